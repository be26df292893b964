"""The recorder while its store is down, locked, full, slow or gone: nothing acknowledged is lost, and nobody waits."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest

from discovery.store import Episode, Feedback, Item, Store
from discovery.store.rows import line
from proxy.metrics import Metrics
from proxy.recorder import GROUP, Owner, Recorder
from proxy.settings import load
from proxy.spill import Spill
from tests.proxy.conftest import SMALL, Proxy, backend

__all__ = ["backend"]  # a fixture

CYCLES = int(os.environ.get("SOAK_CYCLES", "20"))
"""How often a writer is killed; `make soak` does it 300 times."""
LOCKED_S = 30
"""How long the store is locked in the longest test."""


def episode(name: str, **about: Any) -> Episode:
    return Episode(name, name, "m", "cmc", "d", 0.5, 3, 4, {"winner": 5}, "answered", answer="7", **about)


def putting(recorder: Recorder, *names: str) -> list[asyncio.Future[bool]]:
    return [recorder.put(name, lambda name=name: episode(name), Owner("t", None, "d")) for name in names]  # type: ignore[misc]


@asynccontextmanager
async def recording(path: Path, **settings: Any) -> AsyncIterator[Recorder]:
    recorder = Recorder(load(upstream="http://127.0.0.1:1", store=path, **settings), Metrics())
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
            await asyncio.sleep(0.01)  # no event tells of what another process or thread has done


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
    """The store held by another writer."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield connection
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        connection.close()


def counted(recorder: Recorder, name: str, **labels: str) -> float:
    return recorder.metrics.registry.get_sample_value(f"autotts_recorder_{name}", labels) or 0


async def test_what_is_put_is_stored_and_found_before_and_after(tmp_path: Path) -> None:
    async with recording(tmp_path / "s.db") as recorder:
        kept = putting(recorder, "a", "b")
        before = await recorder.find("a")
        assert await asyncio.gather(*kept) == [True, True]
        assert before is not None
        await until(lambda: recorder.as_json()["store"] == "up")
        await until(lambda: recorder.spill is not None and not recorder.spill.size)
        found = await recorder.find("a")
        assert found is not None
        assert (found.id, found.answer) == (before.id, before.answer)
        assert await recorder.find("nobody") is None
        assert await recorder.owner("a") == Owner("t", None, "d")
    assert stored(tmp_path / "s.db") == {"a", "b"}


async def test_a_locked_store_holds_nobody_up_and_is_caught_up_with(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    async with recording(path) as recorder:
        await asyncio.gather(*putting(recorder, "before"))
        await until(lambda: recorder.as_json()["store"] == "up")
        with locked(path):
            during = [str(i) for i in range(1000)]
            assert all(await asyncio.gather(*putting(recorder, *during)))  # to the file, for the store is locked
            assert stored(path) <= {"before"}
            assert recorder.spill is not None
            assert recorder.spill.size > 0
        await until(lambda: stored(path) == {"before", *during})
        await until(lambda: recorder.spill is not None and not recorder.spill.size)
        assert counted(recorder, "records_total", outcome="spilled") >= 1000 - GROUP
        assert recorder.lost == 0
    assert os.listdir(tmp_path) == ["s.db"]  # the file is gone, and WAL's too


@pytest.mark.timeout(180)
async def test_no_request_notices_that_the_store_is_locked_for_long(tmp_path: Path, backend: Any) -> None:
    import aiohttp
    from openai import AsyncOpenAI

    from proxy.server import running

    path = tmp_path / "s.db"
    ids = []
    async with (
        running(load(upstream=backend.url, store=path, record_fraction=0, **SMALL)) as url,
        aiohttp.ClientSession() as http,
        AsyncOpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as openai,
    ):
        proxy = Proxy(backend, url, http, openai)
        await proxy.ask("0")
        await until(lambda: path.exists() and len(stored(path)) == 1)
        loop = asyncio.get_running_loop()
        with locked(path):
            end = loop.time() + LOCKED_S
            while loop.time() < end:
                status, _, body = await proxy.ask("0", tts={"answer": "boxed"})
                assert status == 200
                ids.append(body["id"])
        await until(lambda: set(ids) <= stored(path))
        assert len(ids) > LOCKED_S
        assert await proxy.metric("autotts_recorder_lost_total") == 0
        assert await proxy.metric("autotts_requests_total", outcome="answered") == len(ids) + 1


async def test_a_store_that_is_not_there_at_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "away" / "s.db"
    async with recording(path, spill=tmp_path / "spill") as recorder:
        assert all(await asyncio.gather(*putting(recorder, *map(str, range(300)))))
        assert recorder.as_json()["store"] == "away"
        path.parent.mkdir()
        await until(lambda: path.exists() and recorder.as_json()["store"] == "up")
        await until(lambda: len(stored(path)) == 300)
        assert counted(recorder, "records_total", outcome="recovered") == 300
    assert "there is no folder" in caplog.text


async def test_a_store_that_is_taken_away_and_brought_back(tmp_path: Path) -> None:
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
        await until(lambda: stored(path) == {"during"})  # a new one was begun
    assert "before" in stored(aside)


async def test_a_store_that_is_none_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    path.write_text("my diary")
    async with recording(path) as recorder:
        assert all(await asyncio.gather(*putting(recorder, "a")))
        assert recorder.as_json()["store"] == "away"
    assert path.read_text() == "my diary"
    async with recording(tmp_path / "other.db", spill=tmp_path / "s.db.spill"):
        await until(lambda: (tmp_path / "other.db").exists() and stored(tmp_path / "other.db") == {"a"})


async def test_a_store_that_is_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, go_on, plain = tmp_path / "s.db", asyncio.Event(), Store.add_all
    async with recording(path) as recorder:
        await until(lambda: recorder.as_json()["store"] == "up")

        async def slow(store: Store, items: list[Item]) -> None:
            await go_on.wait()
            await plain(store, items)

        monkeypatch.setattr("proxy.recorder.PATIENCE_S", 0.05)
        monkeypatch.setattr(Store, "add_all", slow)
        assert all(await asyncio.gather(*putting(recorder, *map(str, range(20)))))
        assert recorder.spill is not None
        assert recorder.spill.size > 0
        go_on.set()
        await until(lambda: len(stored(path)) == 20)


async def test_a_store_that_is_just_being_opened_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    """A disk of a megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True)
    if done.returncode:
        pytest.skip(f"no disk can be made here: {done.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


async def test_a_full_disk(small_disk: Path, tmp_path: Path) -> None:
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


async def test_two_full_disks_keep_what_fits_in_memory_and_count_the_rest(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, filler = small_disk / "s.db", small_disk / "filler"
    async with recording(path, recorder_queue=50) as recorder:  # the file is beside the store
        await asyncio.gather(*putting(recorder, "before"))
        await until(lambda: recorder.as_json()["store"] == "up")
        fill(filler)
        kept = putting(recorder, *map(str, range(200)))
        lost = [one for one in kept if one.done() and not one.result()]
        assert len(lost) == 150
        assert recorder.lost == counted(recorder, "lost_total", reason="full") == 150
        assert not [one for one in kept if one.done() and one.result()]
        assert "RECORDS ARE LOST" in caplog.text
        filler.unlink()
        outcomes = await asyncio.gather(*kept)
        assert outcomes.count(True) == 50
        await until(lambda: len(stored(path)) == 51)


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        while os.statvfs(path).f_bavail:
            file.write(bytes(4096))


async def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
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
        kept_names = {str(n) for n, one in enumerate(await asyncio.gather(*outcomes)) if one}
        await until(lambda: stored(path) == kept_names)
        assert len(kept_names) + recorder.lost == 100


async def test_what_cannot_be_written_stops_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> Episode:
        raise RuntimeError("no such thing")

    path = tmp_path / "s.db"
    async with recording(path) as recorder:
        await until(lambda: recorder.as_json()["store"] == "up")
        bad = episode("bad", tenant="\ud800")  # no text any encoding knows
        kept = [recorder.put("bad", lambda: bad), recorder.put("worse", broken), *putting(recorder, "good")]
        assert await asyncio.gather(*kept) == [False, False, True]
        assert counted(recorder, "lost_total", reason="unwritable") == 2
    assert stored(path) == {"good"}


async def test_closing_writes_what_waits(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    async with recording(path) as recorder:
        kept = putting(recorder, *map(str, range(2000)))
    assert all(one.result() for one in kept)
    assert len(stored(path)) == 2000
    assert not recorder.put("late", lambda: episode("late")).result()


async def test_off(tmp_path: Path) -> None:
    recorder = Recorder(load(upstream="http://127.0.0.1:1"), Metrics())
    await recorder.open()
    assert putting(recorder, "a")[0].result() is False
    assert (recorder.lost, recorder.as_json()["store"]) == (0, "off")
    await recorder.close()


# The file


def test_half_a_line_and_a_damaged_one_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "spill"
    spill = Spill(path, 1 << 20)
    assert spill.append([b"one", b"two", b"three"])
    spill.close()
    data = path.read_bytes()
    path.write_bytes(data.replace(b"two", b"tvo") + b"00000000 fo")
    again = Spill(path, 1 << 20)
    again.adopt()
    assert list(again.chunks(2)) == [[b"one", b"three"]]
    assert again.bad == 1
    assert again.append([b"four"])
    assert list(again.chunks(2)) == [[b"one", b"three"], [b"four"]]
    again.clear()
    assert list(tmp_path.iterdir()) == []


def test_each_process_has_a_file_of_its_own_and_the_next_takes_over(tmp_path: Path) -> None:
    one, two = Spill(tmp_path / "spill", 1000), Spill(tmp_path / "spill", 1000)
    assert one.append([b"1"])
    assert two.append([b"2"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["spill", "spill.1"]
    two.close()
    one.adopt()
    assert [line for chunk in one.chunks(9) for line in chunk] == [b"1", b"2"]
    one.clear()
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_is_not_begun(tmp_path: Path) -> None:
    spill = Spill(tmp_path / "spill", 31)
    assert spill.append([b"x" * 10])
    assert not spill.append([b"y" * 10])
    assert spill.append([b"z"])
    assert list(spill.chunks(9)) == [[b"x" * 10, b"z"]]
    spill.close()


@pytest.mark.parametrize("one", [episode("e"), Feedback("f", "r", "correct", "true", tenant="t")])
def test_an_item_is_one_line_and_found_again(one: Item) -> None:
    from discovery.store.rows import item

    assert b"\n" not in line(one)
    assert item(line(one)) == one


# Killed

WRITER = """
import asyncio, sys
from pathlib import Path
from discovery.store import Episode
from proxy.metrics import Metrics
from proxy.recorder import Recorder
from proxy.settings import load

async def main():
    recorder = Recorder(load(upstream="http://127.0.0.1:1", store=Path(sys.argv[1])), Metrics())
    await recorder.open()
    async def one(name):
        for i in range(10**6):
            identity = f"{name}-{i}"
            made = Episode(identity, identity, "m", "cmc", "d", 0.5, 3, 4, {"winner": 5}, "answered")
            if await recorder.put(identity, lambda: made):
                print(identity, flush=True)
    await asyncio.gather(*(one(f"{sys.argv[2]}.{k}") for k in range(16)))

asyncio.run(main())
"""


def writer(path: Path, name: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(path), name]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


@pytest.mark.timeout(60 + 10 * CYCLES)
async def test_a_proxy_killed_while_it_writes_loses_nothing_it_acknowledged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Every other time the store is locked, so that the file is written; now and then while it is being read back."""
    caplog.set_level(logging.CRITICAL)
    path, acknowledged = tmp_path / "s.db", set()
    async with Store.open(path, create=True):
        pass
    for cycle in range(CYCLES):
        process = writer(path, str(cycle))
        assert process.stdout is not None
        try:
            with locked(path) if cycle % 2 else nullcontext():
                acknowledged |= {process.stdout.readline().strip() for _ in range(40 + 7 * cycle % 60)}
                if cycle % 4 == 1:
                    os.kill(process.pid, signal.SIGKILL)
            acknowledged |= {process.stdout.readline().strip() for _ in range(20)} - {""}
        finally:
            os.kill(process.pid, signal.SIGKILL)
            rest, _ = process.communicate()
        acknowledged |= {one.strip() for one in rest.splitlines(keepends=True) if one.endswith("\n")}
    async with recording(path) as recorder:
        await until(lambda: acknowledged <= stored(path))
        assert recorder.lost == 0
    async with Store.open(path) as store:
        assert (await store.verify()).bad == []
    assert len(acknowledged) >= 50 * CYCLES
