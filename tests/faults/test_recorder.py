"""The store writer while its store is down, locked, full, slow or gone: no acknowledged record is lost."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from openai import AsyncOpenAI

from discovery.data.recordings import Origin, RecordedBranch, RecordedQuestion
from discovery.errors import StoreError
from discovery.store import Feedback, ServedEpisode, Store, StoreItem, StorePlace
from discovery.store.item_lines import encode_item
from proxy.recording.spill_file import SpillFiles
from proxy.recording.store_connection import StoreConnection
from proxy.recording.store_writer import FILE, GROUP, STORE, RequestOwner, StoreWriter
from proxy.server import running
from proxy.settings import load
from proxy.spill_paths import MAX_FILES, candidate_paths
from proxy.telemetry.metrics import Metrics
from tests.proxy.conftest import SMALL, Proxy, backend

__all__ = ["backend"]  # a fixture

CYCLES = int(os.environ.get("SOAK_CYCLES", "6"))
"""Number of times a writer is killed; `make soak` uses 300."""
LOCKED_S = int(os.environ.get("SOAK_LOCKED_S", "3"))
"""Seconds the store is locked in the longest test; `make soak` uses 30."""


def episode(name: str, **about: Any) -> ServedEpisode:
    return ServedEpisode(name, name, "m", "cmc", "d", 0.5, 3, 4, {"winner": 5}, "answered", answer="7", **about)


def putting(recorder: StoreWriter, *names: str) -> list[asyncio.Future[bool]]:
    return [recorder.put(name, lambda name=name: episode(name), RequestOwner("t", None, "d", "m")) for name in names]  # type: ignore[misc]


@asynccontextmanager
async def serving(backend: Any, path: Path, **settings: Any) -> AsyncIterator[Proxy]:
    async with (
        running(load(upstream=backend.url, store=path, record_fraction=0, **SMALL, **settings)) as url,
        aiohttp.ClientSession() as http,
        AsyncOpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as openai,
    ):
        yield Proxy(backend, url, http, openai)


async def answered(proxy: Proxy, count: int = 1) -> set[str]:
    """Send requests, assert that all are answered and return their ids."""
    ids = set()
    for _ in range(count):
        status, _, body = await proxy.ask("0", tts={"answer": "boxed"})
        assert status == 200
        ids.add(body["id"])
    return ids


def leave_spill(path: Path, *names: str) -> bytes:
    """Write a spill file with episodes, as left by a proxy, and return its content."""
    spill = SpillFiles(path, 1 << 30)
    assert spill.append([encode_item(episode(name)) for name in names])
    spill.close()
    return path.read_bytes()


def waiting_in(path: Path) -> list[str]:
    """Return the ids of the records in spill files."""
    spill = SpillFiles(path, 0)
    spill.adopt()
    lines = [line for file in spill._files for line in file.chunk(file.size).lines]
    spill.close()
    return [json.loads(line)[1]["id"] for line in lines]


def drained(spill: SpillFiles, most: int) -> Iterator[Sequence[bytes]]:
    """Yield all waiting lines, up to `most` at a time, and drop them."""
    while spill.size:
        chunk = spill.read(most)
        yield chunk.lines
        spill.drop(chunk)


class Turnstile:
    """Makes the store wait before each transaction for a pass."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, passes: int = 0) -> None:
        self.seen: list[str] = []  # ids, in the order in which the store was given them
        self.passes = asyncio.Semaphore(passes)
        self.entered = asyncio.Semaphore(0)
        plain = Store.add_all

        async def add_all(store: Store, items: list[StoreItem]) -> list[StoreItem]:
            self.entered.release()
            await self.passes.acquire()
            self.seen += [item.id for item in items if not isinstance(item, RecordedQuestion)]
            return await plain(store, items)

        monkeypatch.setattr(Store, "add_all", add_all)
        monkeypatch.setattr("proxy.recording.store_connection.TRANSACTION_TIMEOUT_S", 1e9)

    def open(self) -> None:
        for _ in range(10_000):
            self.passes.release()


@asynccontextmanager
async def recording(path: Path, **settings: Any) -> AsyncIterator[StoreWriter]:
    recorder = StoreWriter(load(upstream="http://127.0.0.1:1", store=path, **settings), Metrics())
    await recorder.open()
    try:
        yield recorder
    finally:
        await recorder.close()


async def until(holds: Callable[[], bool], seconds: float = 60) -> None:
    async with asyncio.timeout(seconds):
        for _ in repeat(None):
            if holds():
                return
            await asyncio.sleep(0.01)  # no event announces what another process or thread has done


def stored(path: Path) -> set[str]:
    connection = sqlite3.connect(path)
    try:
        return {row[0] for row in connection.execute("SELECT id FROM episodes")}
    except sqlite3.OperationalError:  # its tables have not been made yet
        return set()
    finally:
        connection.close()


@contextmanager
def locked(path: Path) -> Iterator[sqlite3.Connection]:
    """Lock the store as another writer does."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield connection
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        connection.close()


def counted(recorder: StoreWriter, name: str, **labels: str) -> float:
    return recorder.metrics.registry.get_sample_value(f"autotts_recorder_{name}", labels) or 0


async def test_a_record_is_found_before_and_after_it_is_stored(tmp_path: Path) -> None:
    async with recording(tmp_path / "s.db") as recorder:
        kept = putting(recorder, "a", "b")
        before = await recorder.find("a")
        assert await asyncio.gather(*kept) == [True, True]
        assert before is not None
        await until(lambda: recorder.as_json()["store"] == "up")
        await until(lambda: recorder.spill is not None and not recorder.spill.size)
        stored_record = await recorder.find("a")
        assert stored_record is not None
        assert (stored_record.id, stored_record.answer) == (before.id, before.answer)
        assert await recorder.find("nobody") is None
        assert await recorder.owner("a") == RequestOwner("t", None, "d", "m")
    assert stored(tmp_path / "s.db") == {"a", "b"}


async def test_records_go_to_the_spill_file_while_the_store_is_locked_and_are_stored_later(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    async with recording(path) as recorder:
        await asyncio.gather(*putting(recorder, "before"))
        await until(lambda: recorder.as_json()["store"] == "up")
        with locked(path):
            during = [str(i) for i in range(1000)]
            assert all(
                await asyncio.gather(*putting(recorder, *during))
            )  # to the spill file, because the store is locked
            assert stored(path) <= {"before"}
            assert recorder.spill is not None
            assert recorder.spill.size > 0
        await until(lambda: stored(path) == {"before", *during})
        await until(lambda: recorder.spill is not None and not recorder.spill.size)
        assert counted(recorder, "records_total", outcome="spilled") >= 1000 - GROUP
        assert recorder.lost == 0
    assert os.listdir(tmp_path) == ["s.db"]  # the spill file and the WAL are gone


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_requests_are_answered_while_the_store_is_locked_for_long(tmp_path: Path, backend: Any) -> None:
    path = tmp_path / "s.db"
    ids = set()
    async with serving(backend, path) as proxy:
        await answered(proxy)
        await until(lambda: path.exists() and len(stored(path)) == 1)
        loop = asyncio.get_running_loop()
        with locked(path):
            end = loop.time() + LOCKED_S
            while loop.time() < end:
                ids |= await answered(proxy)
        await until(lambda: ids <= stored(path))
        assert len(ids) > LOCKED_S
        assert await proxy.metric("autotts_recorder_lost_total") == 0
        assert await proxy.metric("autotts_requests_total", outcome="answered") == len(ids) + 1


@pytest.mark.slow
async def test_requests_are_answered_while_the_store_is_missing_at_first(tmp_path: Path, backend: Any) -> None:
    path = tmp_path / "away" / "s.db"
    async with serving(backend, path, spill=tmp_path / "spill") as proxy:
        ids = await answered(proxy, 20)
        assert await proxy.metric("autotts_recorder_store_up") == 0
        path.parent.mkdir()
        ids |= await answered(proxy, 20)
        await until(lambda: path.exists() and ids <= stored(path))
        assert await proxy.metric("autotts_recorder_lost_total") == 0


async def test_feedback_gets_202_without_waiting_for_a_stalled_store(
    tmp_path: Path, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every wait for a record times out at once, as if its time had passed."""
    waits: list[float] = []
    plain = asyncio.wait

    async def wait(awaited: Any, **named: Any) -> Any:
        if all(type(future) is asyncio.Future for future in awaited):  # and not a task
            waits.append(named["timeout"])
            named["timeout"] = 0
        return await plain(awaited, **named)

    turnstile = Turnstile(monkeypatch)
    async with serving(backend, tmp_path / "s.db") as proxy:
        (request,) = await answered(proxy)
        await turnstile.entered.acquire()
        monkeypatch.setattr("proxy.recording.episode_log.asyncio.wait", wait)
        feedback = {"request_id": request, "correct": True}
        async with proxy.http.post(f"{proxy.url}/v1/tts/feedback", json=feedback) as response:
            assert response.status == 202  # accepted but not yet on disk
        monkeypatch.undo()
        assert turnstile.seen == []
        assert [wait_s for wait_s in waits if wait_s <= 0.01] == waits != []
        turnstile.open()


async def test_records_are_stored_once_a_missing_store_appears(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "away" / "s.db"
    async with recording(path, spill=tmp_path / "spill") as recorder:
        assert all(await asyncio.gather(*putting(recorder, *map(str, range(300)))))
        assert recorder.as_json()["store"] == "away"
        path.parent.mkdir()
        await until(lambda: path.exists() and recorder.as_json()["store"] == "up")
        await until(lambda: len(stored(path)) == 300)
        await until(lambda: recorder.spill is not None and not recorder.spill.size)  # the records are counted by then
        assert counted(recorder, "records_total", outcome="recovered") == 300
    assert "there is no folder" in caplog.text


async def test_records_go_to_a_new_store_when_the_file_is_moved_away(tmp_path: Path) -> None:
    path, aside = tmp_path / "s.db", tmp_path / "aside.db"
    async with recording(path, spill=tmp_path / "spill") as recorder:
        await asyncio.gather(*putting(recorder, "before"))
        await until(lambda: recorder.as_json()["store"] == "up")
        with sqlite3.connect(path) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.close()
        path.rename(aside)
        assert all(await asyncio.gather(*putting(recorder, "during")))
        await until(lambda: recorder.as_json()["store"] == "up")
        await until(lambda: stored(path) == {"during"})  # a new store was created
    assert "before" in stored(aside)


async def test_records_go_into_a_backup_that_was_copied_over_the_store(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, backup = tmp_path / "s.db", tmp_path / "backup.db"
    async with recording(backup) as recorder:
        await asyncio.gather(*putting(recorder, "kept"))
    async with recording(path, spill=tmp_path / "spill") as recorder:
        await asyncio.gather(*putting(recorder, "before"))
        path.write_bytes(backup.read_bytes())
        for end in ("-wal", "-shm"):
            (tmp_path / f"s.db{end}").unlink()
        assert all(await asyncio.gather(*putting(recorder, "after")))
        await until(lambda: recorder.as_json()["store"] == "up" and stored(path) == {"kept", "after"})
    assert stored(path) == {"kept", "after"}
    assert "the store was overwritten while it was in use" in caplog.text


async def test_a_file_that_is_not_a_store_is_left_unchanged_and_records_are_spilled(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    recorder = StoreWriter(load(upstream="http://127.0.0.1:1", store=path), Metrics())
    path.write_text("my diary")  # after the settings were checked
    await recorder.open()
    assert all(await asyncio.gather(*putting(recorder, "a")))
    assert recorder.as_json()["store"] == "away"
    await recorder.close()
    assert path.read_text() == "my diary"
    async with recording(tmp_path / "other.db", spill=tmp_path / "s.db.spill"):
        await until(lambda: (tmp_path / "other.db").exists() and stored(tmp_path / "other.db") == {"a"})


async def test_records_are_acknowledged_from_the_spill_file_while_the_store_is_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, go_on, plain = tmp_path / "s.db", asyncio.Event(), Store.add_all
    async with recording(path) as recorder:
        await until(lambda: recorder.as_json()["store"] == "up")

        async def slow(store: Store, items: list[StoreItem]) -> list[StoreItem]:
            await go_on.wait()
            return await plain(store, items)

        monkeypatch.setattr("proxy.recording.store_connection.TRANSACTION_TIMEOUT_S", 0.05)
        monkeypatch.setattr(Store, "add_all", slow)
        assert all(await asyncio.gather(*putting(recorder, *map(str, range(20)))))
        assert recorder.spill is not None
        assert recorder.spill.size > 0
        go_on.set()
        await until(lambda: len(stored(path)) == 20)


async def test_a_lookup_waits_for_a_store_that_is_being_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, plain = asyncio.Event(), Store.open

    @asynccontextmanager
    async def slow(*args: Any, **named: Any) -> AsyncIterator[Store]:
        await go_on.wait()
        async with plain(*args, **named) as store:
            yield store

    monkeypatch.setattr(Store, "open", slow)
    async with recording(tmp_path / "s.db") as recorder:
        asked = asyncio.create_task(recorder.find("nobody"))
        done, _ = await asyncio.wait({asked}, timeout=0.05)
        assert not done
        go_on.set()
        assert await asked is None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of one megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True)
    if done.returncode:
        give_up = pytest.fail if os.environ.get("CI") else pytest.skip
        give_up(f"cannot mount a disk here: {done.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.process
async def test_records_are_spilled_while_the_disk_of_the_store_is_full(small_disk: Path, tmp_path: Path) -> None:
    path, filler = small_disk / "s.db", small_disk / "filler"
    async with recording(path, spill=tmp_path / "spill") as recorder:
        await asyncio.gather(*putting(recorder, "before"))
        await until(lambda: recorder.as_json()["store"] == "up")
        fill(filler)
        assert all(await asyncio.gather(*putting(recorder, *map(str, range(500)))))
        assert recorder.spill is not None
        assert recorder.spill.size > 0
        filler.unlink()
        await until(lambda: len(stored(path)) == 501)
        assert recorder.lost == 0


@pytest.mark.process
async def test_requests_are_answered_while_the_disk_is_full_and_none_is_lost(
    small_disk: Path, tmp_path: Path, backend: Any
) -> None:
    path, filler = small_disk / "s.db", small_disk / "filler"
    async with serving(backend, path, spill=tmp_path / "spill") as proxy:
        ids = await answered(proxy)
        await until(lambda: path.exists() and ids == stored(path))
        fill(filler)
        ids |= await answered(proxy, 40)
        filler.unlink()
        await until(lambda: ids == stored(path))
        assert await proxy.metric("autotts_recorder_records_total", outcome="spilled") > 0
        assert await proxy.metric("autotts_recorder_lost_total") == 0


@pytest.mark.process
async def test_with_store_and_spill_disks_full_the_queue_is_kept_and_further_records_are_counted_lost(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, filler = small_disk / "s.db", small_disk / "filler"
    async with recording(path, recorder_queue=50) as recorder:  # the spill file is on the same disk as the store
        await asyncio.gather(*putting(recorder, "before"))
        await until(lambda: recorder.as_json()["store"] == "up")
        fill(filler)
        kept = putting(recorder, *map(str, range(200)))
        lost = [future for future in kept if future.done() and not future.result()]
        assert len(lost) == 150
        assert recorder.lost == counted(recorder, "lost_total", reason="full") == 150
        assert not [future for future in kept if future.done() and future.result()]
        assert "RECORDS ARE LOST" in caplog.text
        filler.unlink()
        outcomes = await asyncio.gather(*kept)
        assert outcomes.count(True) == 50
        await until(lambda: len(stored(path)) == 51)


async def test_a_closed_recorder_logs_once_how_many_records_were_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.recording.store_writer.FLUSH_S", 0.2)
    path = tmp_path / "away" / "s.db"
    async with recording(path, spill=tmp_path / "spill", spill_bytes=1, recorder_queue=4) as recorder:
        kept = putting(recorder, *map(str, range(7)))
    assert [future.result() for future in kept] == [False] * 7
    totals = [line for line in caplog.messages if line.startswith("RECORDS WERE LOST: 7 in all since this process")]
    assert len(totals) == 1
    assert "the store is unavailable: " in totals[0]


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        while os.statvfs(path).f_bavail:
            file.write(bytes(4096))


async def test_records_over_the_spill_limit_stay_in_the_queue_or_are_counted_lost(tmp_path: Path) -> None:
    path = tmp_path / "away" / "s.db"
    async with recording(path, spill=tmp_path / "spill", spill_bytes=3000, recorder_queue=20) as recorder:
        outcomes = []
        for number in range(100):
            (kept,) = putting(recorder, str(number))
            await asyncio.wait({kept}, timeout=0.05)
            outcomes.append(kept)
        assert recorder.spill is not None
        assert 0 < recorder.spill.size <= 3000
        assert recorder.waiting == 20
        path.parent.mkdir()
        kept_names = {str(n) for n, is_kept in enumerate(await asyncio.gather(*outcomes)) if is_kept}
        await until(lambda: stored(path) == kept_names)
        assert len(kept_names) + recorder.lost == 100


async def test_an_unwritable_record_is_counted_lost_and_others_are_stored(tmp_path: Path) -> None:
    def broken() -> ServedEpisode:
        raise RuntimeError("no such thing")

    path = tmp_path / "s.db"
    async with recording(path) as recorder:
        await until(lambda: recorder.as_json()["store"] == "up")
        bad = episode("bad", tenant="\ud800")  # a lone surrogate, which cannot be encoded
        kept = [recorder.put("bad", lambda: bad), recorder.put("worse", broken), *putting(recorder, "good")]
        assert await asyncio.gather(*kept) == [False, False, True]
        assert recorder.lost == counted(recorder, "lost_total", reason="unwritable") == 2
        assert counted(recorder, "records_total", outcome="stored") == 1
    assert stored(path) == {"good"}


async def test_closing_stores_all_waiting_records(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    async with recording(path) as recorder:
        kept = putting(recorder, *map(str, range(2000)))
    assert all(future.result() for future in kept)
    assert len(stored(path)) == 2000
    assert not recorder.put("late", lambda: episode("late")).result()
    assert counted(recorder, "lost_total", reason="closed") == 1


@pytest.mark.parametrize("fit", [GROUP, 300])
async def test_closing_spills_the_records_that_a_slow_store_does_not_take_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fit: int
) -> None:
    path = tmp_path / "s.db"
    limit = len(leave_spill(tmp_path / "like", *map(str, range(fit))))
    monkeypatch.setattr("proxy.recording.store_writer.FLUSH_S", 2)
    turnstile = Turnstile(monkeypatch)
    async with recording(path, spill_bytes=limit) as recorder:
        await until(lambda: recorder.as_json()["store"] == "up")
        kept = putting(recorder, *map(str, range(3)))
        await turnstile.entered.acquire()
        kept += putting(recorder, *map(str, range(3, 300)))
    turnstile.open()
    assert [future.result() for future in kept] == [True] * fit + [False] * (300 - fit)
    assert recorder.lost == counted(recorder, "lost_total", reason="closed") == 300 - fit
    assert waiting_in(tmp_path / "s.db.spill") == [str(i) for i in range(fit)]


async def test_closing_waits_for_a_running_write_of_the_spill_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_writing, go_on, plain = threading.Event(), threading.Event(), SpillFiles.append

    def append(spill: SpillFiles, lines: list[bytes]) -> int:
        is_writing.set()
        go_on.wait()
        return plain(spill, lines)

    monkeypatch.setattr(SpillFiles, "append", append)
    monkeypatch.setattr("proxy.recording.store_writer.FLUSH_S", 0.1)
    recorder = StoreWriter(
        load(upstream="http://x", store=tmp_path / "away" / "s.db", spill=tmp_path / "spill"), Metrics()
    )
    await recorder.open()
    putting(recorder, "a")
    await until(is_writing.is_set)
    closing = asyncio.create_task(recorder.close())
    try:
        await until(lambda: all(task.done() for task in recorder._tasks))
        done, _ = await asyncio.wait({closing}, timeout=0.05)
        assert not done
    finally:
        go_on.set()
        await closing
    assert waiting_in(tmp_path / "spill") == ["a"]


async def test_a_record_that_cannot_be_spilled_is_counted_lost_and_others_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "away" / "s.db"
    async with recording(path, spill=tmp_path / "spill") as recorder:
        bad = episode("bad", tenant="\ud800")
        assert await asyncio.gather(recorder.put("bad", lambda: bad), *putting(recorder, "a", "b")) == [
            False,
            True,
            True,
        ]
        assert recorder.lost == counted(recorder, "lost_total", reason="unwritable") == 1
        assert counted(recorder, "records_total", outcome="spilled") == 2
        path.parent.mkdir()
        await until(lambda: path.exists() and stored(path) == {"a", "b"})


async def test_an_unreadable_spill_file_is_kept_and_new_records_are_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "s.db"
    data = leave_spill(tmp_path / "s.db.spill", "old")

    def read(spill: SpillFiles, most: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(SpillFiles, "read", read)
        async with recording(path) as recorder:
            await until(lambda: FILE in caplog.text)
            assert await asyncio.gather(*putting(recorder, "new")) == [True]
            assert stored(path) == {"new"}
    assert (tmp_path / "s.db.spill").read_bytes() == data
    async with recording(path):
        await until(lambda: stored(path) == {"old", "new"})


async def test_an_unexpected_error_of_the_writer_is_retried_and_its_text_not_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain, failures = StoreWriter._write_group, [RuntimeError("a client's text"), MemoryError()]

    async def keep(recorder: StoreWriter, connection: StoreConnection) -> bool:
        if failures:
            raise failures.pop(0)
        return await plain(recorder, connection)

    monkeypatch.setattr(StoreWriter, "_write_group", keep)
    monkeypatch.setattr("proxy.recording.store_connection.RETRY_S", 0.01)
    async with recording(tmp_path / "s.db") as recorder:
        assert await asyncio.gather(*putting(recorder, "a")) == [True]
    assert "RuntimeError" in caplog.text
    assert "a client's text" not in caplog.text


async def test_a_queue_half_full_behind_a_slow_store_is_spilled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s.db"
    turnstile = Turnstile(monkeypatch)
    async with recording(path, recorder_queue=100) as recorder:
        await until(lambda: recorder.as_json()["store"] == "up")
        kept = putting(recorder, "first")
        await turnstile.entered.acquire()
        kept += putting(recorder, *map(str, range(60)))
        turnstile.passes.release()
        assert all(await asyncio.gather(*kept))
        assert stored(path) == {"first"}
        assert counted(recorder, "records_total", outcome="spilled") == 60
        turnstile.open()
        await until(lambda: len(stored(path)) == 61)
        assert recorder.lost == 0


async def test_records_put_while_a_spill_file_is_read_are_spilled_and_stored_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, old = tmp_path / "s.db", [str(i) for i in range(4 * GROUP)]
    leave_spill(tmp_path / "s.db.spill", *old)
    turnstile = Turnstile(monkeypatch)
    async with recording(path) as recorder:
        await turnstile.entered.acquire()
        feedback = Feedback("feedback", "0", "correct", "true", tenant="t")
        kept = [*putting(recorder, "new"), recorder.put("0", lambda: feedback, hurry=True)]
        turnstile.passes.release()
        assert await asyncio.gather(*kept) == [True, True]
        assert stored(path) == set(old[:GROUP])
        turnstile.open()
        await until(lambda: recorder.spill is not None and not recorder.spill.size)
        assert turnstile.seen == [*old, "new", "feedback"]
        assert counted(recorder, "records_total", outcome="recovered") == len(old) + 2


async def test_a_spill_file_is_removed_only_after_its_records_are_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s.db.spill"
    data = leave_spill(path, "a", "b")
    turnstile = Turnstile(monkeypatch)
    async with recording(tmp_path / "s.db") as recorder:
        await turnstile.entered.acquire()
        assert path.read_bytes() == data
        turnstile.open()
        await until(lambda: recorder.spill is not None and not recorder.spill.size)
    assert not path.exists()


async def test_each_damaged_or_unwritable_spilled_record_is_counted_lost_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, failures, plain = tmp_path / "s.db", 4, Store.add_all
    huge = replace(episode("huge"), branches=2**70)  # fits into a line, but not into a row
    spill = SpillFiles(tmp_path / "s.db.spill", 1 << 20)
    assert spill.append(
        [encode_item(episode("a")), b"{}", encode_item(huge), encode_item(episode("b")), encode_item(episode("c"))]
    )
    spill.close()
    spill.path.write_bytes(spill.path.read_bytes().replace(b'"c"', b'"d"'))

    async def add_all(store: Store, items: list[StoreItem]) -> list[StoreItem]:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise StoreError("database or disk is full")
        return await plain(store, items)

    monkeypatch.setattr(Store, "add_all", add_all)
    monkeypatch.setattr("proxy.recording.store_connection.RETRY_S", 0.01)
    async with recording(path) as recorder:
        await until(lambda: failures < 0 and recorder.spill is not None and not recorder.spill.size)
        assert stored(path) == {"a", "b"}
        assert counted(recorder, "lost_total", reason="damaged") == 2
        assert counted(recorder, "lost_total", reason="unwritable") == 1
        assert counted(recorder, "records_total", outcome="recovered") == 2
        assert recorder.lost == 3


async def test_a_recording_without_its_episode_is_not_acknowledged(tmp_path: Path) -> None:
    def made(request: str) -> RecordedQuestion:
        branch = RecordedBranch(["7"], 40, "7", [6])
        return RecordedQuestion(request, "m", "live", 40, [branch], origin=Origin.LIVE, request=request)

    async with recording(tmp_path / "s.db") as recorder:
        await until(lambda: recorder.as_json()["store"] == "up")
        kept = [*putting(recorder, "a"), *(recorder.put(name, lambda name=name: made(name)) for name in ("a", "b"))]  # type: ignore[misc]
        assert await asyncio.gather(*kept) == [True, True, False]
        assert counted(recorder, "records_total", outcome="stored") == 2
        assert recorder.lost == 0


async def test_gauges_show_store_state_spill_size_and_queue(tmp_path: Path) -> None:
    path = tmp_path / "away" / "s.db"
    async with recording(path, spill=tmp_path / "spill") as recorder:
        assert all(await asyncio.gather(*putting(recorder, "a", "b")))
        await until(lambda: counted(recorder, "spill_bytes") == (tmp_path / "spill").stat().st_size > 0)
        assert (counted(recorder, "store_up"), counted(recorder, "queue")) == (0, 0)
        path.parent.mkdir()
        await until(lambda: counted(recorder, "store_up") == 1 and counted(recorder, "spill_bytes") == 0)


async def test_each_store_and_spill_problem_is_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path, attempts, plain = tmp_path / "away" / "s.db", [0, 0], Store.open

    def opened(*args: Any, **named: Any) -> Any:
        attempts[0] += 1
        return plain(*args, **named)

    def append(spill: SpillFiles, lines: list[bytes]) -> int:
        attempts[1] += 1
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Store, "open", opened)
    monkeypatch.setattr("proxy.recording.store_connection.RETRY_S", 0.01)
    with monkeypatch.context() as patched:
        patched.setattr(SpillFiles, "append", append)
        async with recording(path, spill=tmp_path / "spill") as recorder:
            (kept,) = putting(recorder, "a")
            await until(lambda: min(attempts) > 5)
            messages = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
            assert sorted(message.partition(":")[0] for message in messages) == [FILE, STORE]
            path.parent.mkdir()
            assert await kept
            await until(lambda: "all waiting records are written" in caplog.text)


async def test_a_foreign_file_at_the_spill_path_is_left_unchanged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "s.db.spill").write_text("line one\nmy thesis")
    async with recording(tmp_path / "s.db") as recorder:
        assert await asyncio.gather(*putting(recorder, "a")) == [True]
        await until(lambda: "s.db.spill: not a spill file" in caplog.text)
    assert (tmp_path / "s.db.spill").read_text() == "line one\nmy thesis"


async def test_a_spill_file_left_by_a_peer_is_stored_when_the_store_is_back(tmp_path: Path) -> None:
    path, spill = tmp_path / "away" / "s.db", tmp_path / "spill"
    async with recording(path, spill=spill) as recorder:
        assert all(await asyncio.gather(*putting(recorder, "a")))
        async with recording(path, spill=spill) as peer:
            assert all(await asyncio.gather(*putting(peer, "b")))
        path.parent.mkdir()
        await until(lambda: path.exists() and stored(path) == {"a", "b"})
        await until(lambda: not list(tmp_path.glob("spill*")))


async def test_records_are_stored_with_the_longest_retention(tmp_path: Path) -> None:
    async with recording(tmp_path / "s.db", retain_days=36500) as recorder:
        await until(lambda: recorder.as_json()["store"] == "up")
        assert await asyncio.gather(*putting(recorder, "a")) == [True]
    assert stored(tmp_path / "s.db") == {"a"}


async def test_without_a_store_nothing_is_recorded_or_counted_lost() -> None:
    recorder = StoreWriter(load(upstream="http://127.0.0.1:1"), Metrics())
    await recorder.open()
    assert putting(recorder, "a")[0].result() is False
    assert (recorder.lost, recorder.as_json()["store"]) == (0, "off")
    await recorder.close()


# The spill file


def test_incomplete_and_damaged_lines_of_a_spill_file_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "spill"
    spill = SpillFiles(path, 1 << 20)
    assert spill.append([b"one", b"two", b"three"])
    spill.close()
    data = path.read_bytes()
    path.write_bytes(data.replace(b"two", b"tvo") + b"00000000 fo")
    again = SpillFiles(path, 1 << 20)
    again.adopt()
    assert again.read(2).lines == [b"one", b"three"]
    assert again.read(9).damaged == 1
    assert again.append([b"four"])
    assert list(drained(again, 2)) == [[b"one", b"three"], [b"four"]]
    assert list(tmp_path.iterdir()) == []


def test_each_process_has_its_own_spill_file_and_another_adopts_it(tmp_path: Path) -> None:
    first, second = SpillFiles(tmp_path / "spill", 1000), SpillFiles(tmp_path / "spill", 1000)
    assert first.append([b"1"])
    assert second.append([b"2"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["spill", "spill.1"]
    second.close()
    first.adopt()
    assert [line for chunk in drained(first, 9) for line in chunk] == [b"1", b"2"]
    assert list(tmp_path.iterdir()) == []


def test_lines_that_do_not_fit_into_the_spill_limit_are_not_written(tmp_path: Path) -> None:
    spill = SpillFiles(tmp_path / "spill", 31)
    assert spill.append([b"x" * 10])
    assert spill.append([b"y" * 10]) == 0
    assert spill.append([b"z", b"z"]) == 1
    assert list(drained(spill, 9)) == [[b"x" * 10, b"z"]]
    spill.close()


def test_appended_lines_and_a_new_spill_file_are_synced_to_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    for name in ("fdatasync", "fsync"):
        plain = getattr(os, name)

        def spy(descriptor: int, plain: Callable[[int], None] = plain) -> None:
            plain(descriptor)
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            synced.append(f"{path.name} {path.stat().st_size}" if path.is_file() else path.name)

        monkeypatch.setattr(os, name, spy)
    spill = SpillFiles(tmp_path / "spill", 1000)
    assert spill.append([b"a"])
    assert spill.append([b"b"])
    assert synced == [tmp_path.name, "spill 11", "spill 22"]
    spill.close()


async def test_the_store_is_synced_with_each_transaction(tmp_path: Path) -> None:
    async with Store.open(tmp_path / "s.db", create=True) as store:
        assert await store._writes.connection.fetch_all("PRAGMA synchronous") == [(2,)]  # FULL


@pytest.mark.parametrize("item", [episode("e"), Feedback("f", "r", "correct", "true", tenant="t")])
def test_an_encoded_item_is_one_line_and_decodes_to_itself(item: StoreItem) -> None:
    from discovery.store.item_lines import decode_item

    assert b"\n" not in encode_item(item)
    assert decode_item(encode_item(item)) == item


# Killed writers

STARTER = """
import asyncio, json, os, signal, sys
from discovery.store import ServedEpisode
from proxy.recording import store_connection
from proxy.telemetry.metrics import Metrics
from proxy.recording.store_writer import StoreWriter
from proxy.settings import load

store_connection.BUSY_TIMEOUT_MS = 50

async def main(path, name):
    recorder = StoreWriter(load(upstream="http://127.0.0.1:1", store=path), Metrics())
    await recorder.open()
    async def write(name):
        for i in range(10**6):
            identity = f"{name}-{i}"
            made = ServedEpisode(identity, identity, "m", "cmc", "d", 0.5, 3, 4, {"winner": 5}, "answered")
            if await recorder.put(identity, lambda: made):
                print(identity, flush=True)
    await asyncio.gather(*(write(f"{name}.{k}") for k in range(16)))

signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    path, name, out = json.loads(line)
    if not (pid := os.fork()):
        os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        asyncio.run(main(path, name))
    print(pid, flush=True)
"""
"""Forks writers that log acknowledged ids to a file. Forking avoids repeated imports."""


class Writer:
    """Process that writes records until it is killed."""

    def __init__(self, starter: subprocess.Popen[str], place: StorePlace, name: str, folder: Path) -> None:
        self._out = folder / f"{name}.out"
        self._out.touch()
        assert starter.stdin is not None
        assert starter.stdout is not None
        starter.stdin.write(json.dumps([str(place), name, str(self._out)]) + "\n")
        starter.stdin.flush()
        self._pid = int(starter.stdout.readline())

    @property
    def acknowledged(self) -> set[str]:
        output = self._out.read_text()
        return set(output[: output.rfind("\n") + 1].split())

    async def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        await until(lambda: not Path(f"/proc/{self._pid}").exists())


@pytest.fixture
def starter() -> Iterator[subprocess.Popen[str]]:
    with started_by(STARTER) as process:
        yield process


@contextmanager
def started_by(program: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Yield a process that runs a program and reads from a pipe."""
    command, pipe = [sys.executable, "-c", program], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, **options) as process:
        yield process
        process.communicate()


async def all_in(path: Path, acknowledged: set[str]) -> None:
    async with recording(path) as recorder:
        await until(lambda: not any(place.exists() for place in candidate_paths(path.with_name("s.db.spill"))))
        assert acknowledged <= stored(path)
        assert recorder.lost == 0
    async with Store.open(path) as store:
        assert (await store.verify()).bad == []


@pytest.mark.process
@pytest.mark.timeout(60 + 10 * CYCLES)
async def test_a_writer_killed_while_writing_loses_no_acknowledged_record(
    tmp_path: Path, starter: subprocess.Popen[str], caplog: pytest.LogCaptureFixture
) -> None:
    """In every second cycle the store is locked, so that the spill file is used; in every fourth until the kill."""
    caplog.set_level(logging.CRITICAL)
    path, acknowledged = tmp_path / "s.db", set()
    async with Store.open(path, create=True):
        pass
    for cycle in range(CYCLES):
        writer = Writer(starter, path, str(cycle), path.parent)
        enough = 40 + 7 * cycle % 60
        try:
            with locked(path) if cycle % 2 else nullcontext():
                await until(lambda: len(writer.acknowledged) >= enough)  # noqa: B023
                if cycle % 4 == 1:
                    await writer.kill()
            if cycle % 4 != 1:
                await until(lambda: len(writer.acknowledged) >= enough + 20)  # noqa: B023
        finally:
            await writer.kill()
        acknowledged |= writer.acknowledged
    await all_in(path, acknowledged)
    assert len(acknowledged) >= 50 * CYCLES


@pytest.mark.process
@pytest.mark.timeout(60 + 10 * CYCLES)
async def test_a_writer_killed_while_reading_spill_files_loses_no_record(
    tmp_path: Path, starter: subprocess.Popen[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The kill comes at a random time after the start, with many spill files, each removed once it is read."""
    caplog.set_level(logging.CRITICAL)
    path, acknowledged, draw = tmp_path / "s.db", set(), random.Random(6)
    spill = path.with_name("s.db.spill")
    for cycle in range(CYCLES):
        for number, place in enumerate(candidate_paths(spill)):
            if not place.exists():
                names = [f"old-{cycle}-{number}-{i}" for i in range(20)]
                leave_spill(place, *names)
                acknowledged |= set(names)
        writer = Writer(starter, path, str(cycle), path.parent)
        try:
            await until(lambda: sum(place.exists() for place in candidate_paths(spill)) < MAX_FILES)
            await asyncio.sleep(draw.uniform(0, 0.3))
        finally:
            await writer.kill()
        acknowledged |= writer.acknowledged
    await all_in(path, acknowledged)
