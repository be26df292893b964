"""Data page: totals of the store, collections, drift, and imports that are whole or refused."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from discovery.data.importers import format_recording_line
from discovery.store import Store
from discovery.store.usage.reader import UsageReader
from discovery.store.usage.recordings import recorded_data
from proxy.errors import BadRequest
from proxy.server import running
from proxy.settings import load
from proxy.ui.sources.collections import MOST_LISTED, _lines, collection_files
from proxy.ui.sources.uploads import RecordingImport
from tests import large_store
from tests.fakes import FakeVLLM
from tests.proxy.conftest import SMALL
from tests.proxy.ui.conftest import ALICE, BOSS, Browser, PageReply
from tests.proxy.ui.test_rendering import Tags

HOSTILE = "<script>alert(1)"
LIMIT = 20_000


def lines(count: int, **changes: Any) -> list[str]:
    """Return lines of recordings in the generic format."""
    made = [json.loads(format_recording_line(recording)) for recording in large_store.recordings(count)]
    return [json.dumps({**line, **changes}) for line in made]


@pytest.fixture
def store_path(tmp_path: Path) -> Path:
    """Return the path of a store with requests, recordings and labels."""
    asyncio.run(large_store.fill(tmp_path / "s.db", 20, 30))
    return tmp_path / "s.db"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "runs"
    made.mkdir()
    (made / f"{HOSTILE}.jsonl").write_text("{}\n{}\n")
    (made / "old.jsonl").write_text("{}\n")
    os.utime(made / "old.jsonl", (0, 0))
    return made


@pytest_asyncio.fixture
async def admin(backend: FakeVLLM, key_file: Path, folder: Path, store_path: Path) -> AsyncIterator[Browser]:
    settings = load(
        upstream=backend.url, keys=key_file, admin_key=BOSS, ui_runs=folder, store=store_path, retain_days=7,
        record_fraction=0.0, ui_import_bytes=LIMIT, **SMALL,
    )  # fmt: skip
    async with running(settings) as url:
        browser = Browser(url)
        await browser.sign_in(BOSS)
        yield browser
        await browser.close()


async def upload(browser: Browser, body: bytes, csrf: str | None = None) -> PageReply:
    headers = {"content-type": "application/x-ndjson", "x-csrf-token": browser.csrf if csrf is None else csrf}
    return await browser._send("POST", "/ui/data/import", data=body, headers=headers)


async def counts(path: Path) -> int:
    async with Store.open(path) as store:
        return sum(summary.recordings for summary in await store.summaries())


async def test_the_page_shows_recordings_labels_retention_and_collections(admin: Browser) -> None:
    page = await admin.get("/ui/recordings")
    assert page.status == 200
    for text in ("aime24", "arithmetic", "held-out", "240 branches", "reference", "consensus", "7 days", "under way"):
        assert text in page.text, text
    assert "Searches see the search split only" in page.text


async def test_hostile_file_names_models_and_benchmarks_are_inert(admin: Browser) -> None:
    assert (await upload(admin, lines(1, model=HOSTILE, benchmark=HOSTILE)[0].encode())).status == 200
    page = await admin.get("/ui/recordings")
    assert page.text.count("alert(1)") >= 3
    assert HOSTILE not in page.text
    assert all((script.get("src") or "").startswith("/ui/static/") for script in Tags(page.text).executed)


async def test_a_file_is_imported_once(admin: Browser, store_path: Path) -> None:
    body = "\n".join(lines(4, model="new")).encode()
    first, second = await upload(admin, body), await upload(admin, body)
    assert json.loads(first.text) == {"questions": 0, "recordings": 4, "branches": 32, "known": 0}
    assert json.loads(second.text) == {"questions": 0, "recordings": 0, "branches": 0, "known": 4}
    assert await counts(store_path) == 34


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ("{", "line 3: "),
        ('{"question": "q"}', "line 3: model: Field required"),
        (json.dumps({"question": HOSTILE, "colour": 1}), "line 3: "),
        (lines(1, interval=0)[0], "line 3: interval"),
    ],
)
async def test_a_file_with_a_wrong_line_is_refused_whole_with_the_line_and_the_reason(
    admin: Browser, store_path: Path, wrong: str, problem: str
) -> None:
    reply = await upload(admin, "\n".join([*lines(2, model="new"), wrong]).encode())
    assert reply.status == 400
    error = json.loads(reply.text)["error"]["message"]
    assert error.startswith(f"nothing was imported: {problem}")
    assert "/tmp" not in error
    assert await counts(store_path) == 30


@pytest.mark.parametrize("body", [b"", b"\n", b"\xff\xfe", b"\x00" * 100])
async def test_a_file_without_recordings_is_refused(admin: Browser, store_path: Path, body: bytes) -> None:
    reply = await upload(admin, body)
    assert reply.status == 400
    assert "nothing was imported" in reply.text
    assert await counts(store_path) == 30


async def test_a_file_beyond_the_limit_is_refused(admin: Browser, store_path: Path) -> None:
    reply = await upload(admin, b"\n" * (LIMIT + 1))
    assert reply.status == 413
    assert "20,000 bytes, the limit AUTOTTS_UI_IMPORT_BYTES" in reply.text
    assert await counts(store_path) == 30


async def test_an_import_needs_the_token_and_an_admin(admin: Browser, store_path: Path) -> None:
    body = lines(1, model="new")[0].encode()
    assert (await upload(admin, body, csrf="wrong")).status == 403
    client = Browser(admin.url)
    await client.sign_in(ALICE)
    assert (await upload(client, body)).status == 403
    assert (await client.get("/ui/recordings")).status == 403
    await client.close()
    assert await counts(store_path) == 30


async def test_one_file_is_imported_at_a_time(store_path: Path) -> None:
    waiting, importer = asyncio.Event(), RecordingImport(store_path, LIMIT)

    async def slow() -> AsyncIterator[bytes]:
        await waiting.wait()
        yield lines(1, model="slow")[0].encode()

    async def fast() -> AsyncIterator[bytes]:
        yield lines(1, model="fast")[0].encode()

    first = asyncio.create_task(importer.run(slow()))
    await asyncio.sleep(0)
    with pytest.raises(BadRequest, match="another file is being imported"):
        await importer.run(fast())
    waiting.set()
    assert (await first).added.recordings == 1
    assert (await importer.run(fast())).added.recordings == 1


async def test_without_a_store_the_page_says_how_to_get_one(backend: FakeVLLM) -> None:
    async with running(load(upstream=backend.url, record=False, **SMALL)) as url:
        browser = Browser(url)
        page = await browser.get("/ui/recordings")
        assert "AUTOTTS_STORE" in page.text
        assert (await upload(browser, b"x")).status == 400
        await browser.close()


async def test_labels_count_references_and_their_confidence(store_path: Path) -> None:
    async with UsageReader(store_path) as reader:
        data = await recorded_data(reader)
    labels = {label.source: label for label in data.labels}
    assert (labels["reference"].questions, labels["reference"].confidence) == (15, 1.0)
    assert labels["consensus"].questions == 15
    assert labels["consensus"].confidence == pytest.approx(0.8)
    assert (data.requests, sum(cell.questions for cell in data.cells)) == (20, 30)


def test_collections_tell_files_at_rest_from_those_under_way(folder: Path) -> None:
    active, resting = collection_files(folder)
    assert (active.name, active.lines, active.is_active) == (f"{HOSTILE}.jsonl", 2, True)
    assert (resting.name, resting.is_active) == ("old.jsonl", False)
    assert collection_files(None) == []


def test_collections_are_counted_once_and_listed_up_to_a_number(folder: Path) -> None:
    for number in range(MOST_LISTED + 5):
        (folder / f"{number}.jsonl").write_text("{}\n" * number)
        os.utime(folder / f"{number}.jsonl", (1000 + number, 1000 + number))
    (folder / "gone.jsonl").symlink_to(folder / "nowhere")
    first = collection_files(folder)
    assert len(first) == MOST_LISTED
    assert (first[1].name, first[1].lines) == (f"{MOST_LISTED + 4}.jsonl", MOST_LISTED + 4)
    read = _lines.cache_info().misses
    assert (collection_files(folder), _lines.cache_info().misses) == (first, read)
    with (folder / f"{MOST_LISTED + 4}.jsonl").open("ab") as file:
        file.write(b"{}\n")
    assert collection_files(folder)[0].lines == MOST_LISTED + 5
