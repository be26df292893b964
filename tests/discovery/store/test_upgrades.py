"""Files of earlier releases: they are opened, upgraded and read back whole. Stores of newer ones are left as they are.

`earlier/` has what releases wrote, and README.md there the script that made them write it.
"""

from __future__ import annotations

import json
import sqlite3
import tarfile
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import pytest

from controllers.rollout_state import RolloutStage
from discovery.audit.explain import explain
from discovery.data.recordings import Cell, LabelSource, Split
from discovery.errors import StoreError
from discovery.promotion.ledger import Ledger
from discovery.promotion.registry import ChangeCause, Registry
from discovery.search.history import History
from discovery.store import Store
from discovery.store.item_lines import decode_item
from discovery.store.schema import COLUMNS, MIGRATIONS
from discovery.store.usage.reader import UsageReader
from discovery.store.usage.requests import RequestFilter
from proxy.recording.spill_file import SpillFiles
from tests.discovery.store.test_replay_store import some
from tests.discovery.store.usage.served import is_consistent

EARLIER: Final = Path(__file__).parent / "earlier"
RELEASES: Final = sorted(path.name.removesuffix(".tar.xz") for path in EARLIER.glob("*.tar.xz"))
NEWER: Final = [*MIGRATIONS, ["CREATE TABLE later (x INTEGER)"]]


@pytest.fixture(params=RELEASES)
def written(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return a folder with the files of an earlier release."""
    with tarfile.open(EARLIER / f"{request.param}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def rows_of(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of all tables that have checksums, by the names of their columns."""
    with closing(sqlite3.connect(path)) as connection:
        connection.row_factory = sqlite3.Row
        named = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        return {
            table: [dict(row) for row in connection.execute(f"SELECT * FROM {table} ORDER BY rowid")]
            for table in COLUMNS
            if table in named
        }


def contents_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_there_are_files_of_the_first_release_and_of_a_later_one() -> None:
    assert {"0.1.0", "2026-11-30"} <= set(RELEASES)


async def test_an_earlier_store_is_upgraded_without_changing_a_value(written: Path) -> None:
    path = written / "store.db"
    before = rows_of(path)
    assert all(before[table] for table in set(before) - {"branch_signals"})
    async with Store.open(path) as store:
        report = await store.verify()
        assert await is_consistent(store)
    assert report.bad == []
    after = rows_of(path)
    for table, rows in before.items():
        assert [{name: row[name] for name in rows[0]} for row in after[table]] == rows, table


async def test_records_of_an_earlier_store_are_read(written: Path) -> None:
    async with Store.open(written / "store.db") as store:
        for split in (Split.SEARCH, Split.HELD_OUT):
            recordings = await store.load(Cell("m", "b", split))
            assert [len(recorded.branches) for recorded in recordings] in ([6, 7, 6], [7, 6, 7])
            assert all("β “”" in str(recorded.text) for recorded in recordings)
        episodes = {served.controller: served for served in await store.episodes()}
        assert set(episodes) == {"single", "cmc", "parallel_probe"}
        assert all(explain(served)["rounds"] for served in episodes.values())
        feedback = await store.feedback()
        assert {rating.kind for rating in feedback} == {"correct", "answer", "score"}
        assert {rating.request_id for rating in feedback} == {episodes["cmc"].request_id}
        assert {label.source for label in await store.labels()} == {LabelSource.FEEDBACK, LabelSource.CONSENSUS}
        assert await store.versions("fake-model")
        await store.add([some("new")])
        assert (await store.verify()).bad == []
    async with UsageReader(written / "store.db") as reader:
        assert await reader.count(RequestFilter()) == 3


async def test_what_was_forgotten_stays_forgotten_after_an_upgrade(written: Path) -> None:
    async with Store.open(written / "store.db") as store:
        (episode, *_) = await store.episodes()
        await store.forget(request=episode.request_id)
        await store.add_all([episode])
        assert episode.request_id not in {served.request_id for served in await store.episodes()}
        assert (await store.verify()).rows["forgotten"] == 2


async def test_an_earlier_spill_file_is_read(written: Path) -> None:
    spilled = SpillFiles(written / "spilled", 0)
    spilled.adopt()
    items = [decode_item(line) for line in spilled.read(100).lines]
    spilled.close()
    async with Store.open(written / "store.db") as store:
        before = len(await store.episodes())
        await store.add_all(items)
        assert len(await store.episodes()) == before + 2
        assert (await store.verify()).bad == []


def test_an_earlier_registry_is_read_and_changed(written: Path) -> None:
    registry = Registry(written / "registry")
    champion = registry.read().default.champion
    assert champion is not None
    assert registry.spec(champion).name == "mine1"  # mine2 was rolled back
    actions = [line["action"] for line in registry.audit()]
    assert len(actions) == 4
    (other,) = (digest for digest in registry.digests() if digest != champion)
    cause = ChangeCause("zoë", "β", datetime(2026, 12, 1, tzinfo=UTC), forced=True)
    registry.promote(other, RolloutStage.CHAMPION, 0, cause, "m")
    assert registry.read().own("m").champion == other
    assert len(registry.audit()) == 5


def test_an_earlier_ledger_is_read_and_continued(written: Path) -> None:
    ledger = Ledger(written / "ledger.jsonl")
    (judgement,) = ledger.judgements()
    assert len(judgement.questions) == 3
    earlier = (written / "ledger.jsonl").read_bytes()
    fields = json.loads(earlier.splitlines()[0])
    del fields["after"]
    ledger.append(**fields | {"k": 2})
    assert [line.k for line in ledger.judgements()] == [1, 2]
    assert (written / "ledger.jsonl").read_bytes().startswith(earlier)


def test_an_earlier_history_is_read(written: Path) -> None:
    history = History.read(written / "history.jsonl")
    kinds = [event.kind for event in history.events]
    assert kinds[0] == "begun"
    assert {"proposed", "judged"} <= set(kinds)


@pytest.mark.parametrize("log", ["wal", "delete"])
async def test_a_newer_store_is_refused_without_a_byte_changed(tmp_path: Path, log: str) -> None:
    path = tmp_path / "store.db"
    async with Store.open(path, create=True, migrations=NEWER) as store:
        await store.add([some()])
    with closing(sqlite3.connect(path)) as connection:  # a copy made by VACUUM INTO has no write-ahead log
        connection.execute(f"PRAGMA journal_mode = {log}")
    before = contents_of(tmp_path)
    for _ in range(2):
        with pytest.raises(StoreError, match="upgrade autotts"):
            async with Store.open(path):
                pass
        with pytest.raises(StoreError, match="upgrade autotts"):
            async with UsageReader(path) as reader:
                await reader.count(RequestFilter())
    assert contents_of(tmp_path) == before
