"""Power cuts and killed servers: no acknowledged row is lost, and what is left is a sound store."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import sqlite3
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from discovery.errors import StoreError
from discovery.store import Feedback, Store, StorePlace
from discovery.store.databases import sqlite_file
from tests.discovery.store.outside import run_sql
from tests.discovery.store.test_replay_store import some
from tests.discovery.store.usage.served import is_consistent
from tests.faults.power_cuts import DiskEvent, RecordingDriver, disk_of, write_image
from tests.faults.test_recorder import episode, until
from tests.postgres_server import PostgresServer

CUTS: Final = int(os.environ.get("SOAK_CUTS", "15"))
"""Power cuts; `make soak` makes 300."""
KILLS: Final = max(2, CUTS // 5)
"""Times that the server of PostgreSQL is killed."""
LIVES: Final = 25
"""Cuts in a row that one store survives, before the next begins with an empty one."""
PRODUCERS: Final = 6
WRITES: Final = 5

pytestmark = pytest.mark.process


class CutResult(NamedTuple):
    """Lost rows and faults of a store after a power cut."""

    acknowledged: int
    lost: int
    faults: list[str]  # of its integrity and its checksums


async def write_rows(place: StorePlace, name: str, driver: RecordingDriver) -> None:
    """Write rows of all kinds from several producers and acknowledge each to `driver`."""

    async def produce(producer: int) -> None:
        for number in range(WRITES):
            key = f"{name}-{producer}-{number}"
            await store.add_all([episode(key), Feedback(key, key, "correct", "1")])
            driver.acknowledge(key)
            if number == 0:
                await store.add([some(key, model=key)])

    async with Store.open(place, create=True) as store:
        await asyncio.gather(*map(produce, range(PRODUCERS)))


async def check_rows(path: Path, acknowledged: set[str]) -> CutResult:
    """Open a store as usual and return what is wrong with it."""
    async with Store.open(path, create=True) as store:
        faults = list((await store.verify()).bad)
        if not await is_consistent(store):
            faults.append("usage differs from the episodes")
        stored = Counter(served.id for served in await store.episodes())
        rated = {rating.id for rating in await store.feedback()}
        faults += [f"{key} is stored {count} times" for key, count in stored.items() if count > 1]
        faults += [f"{key} has a part of its transaction" for key in rated ^ set(stored)]
        await store.add_all([episode("after")])
    with closing(sqlite3.connect(path)) as connection:
        (outcome,), *_ = connection.execute("PRAGMA integrity_check").fetchall()
    if outcome != "ok":
        faults.append(str(outcome))
    return CutResult(len(acknowledged), len(acknowledged - set(stored)), faults)


async def cut_power(
    monkeypatch: pytest.MonkeyPatch, folder: Path, cuts: int, synchronous: str, seed: int
) -> list[CutResult]:
    """Cut the power `cuts` times, and return what each cut left. A store that lost rows or is unsound is given up.

    Half of the stores that sync fully move their log into the file every few transactions.
    """
    checkpoint_pages = (1000, 8) if synchronous == "FULL" else (1000,)
    dice, results = random.Random(seed), list[CutResult]()
    path, acknowledged = folder / "0.db", set[str]()
    for number in range(cuts):
        if number % LIVES == 0 or results[-1].lost or results[-1].faults:
            path, acknowledged = folder / f"{number}.db", set()
        driver, disk = RecordingDriver(synchronous, dice.choice(checkpoint_pages)), disk_of(path)
        with driver.registered(), monkeypatch.context() as patched:
            patched.setattr(sqlite_file, "aiosqlite", driver)
            await write_rows(path, str(number), driver)
        assert_complete(disk_of(path).seen[str(path)].durable, path, driver)
        for event in driver.events[: cut_position(driver.events, dice)]:
            disk.play(event)
            acknowledged |= set(event.rows)
        write_image(disk.surviving(dice), path, dice)
        copy = copied(path, folder / "copy")
        results.append(await check_rows(copy, acknowledged))
        shutil.rmtree(copy.parent)
    return results


def cut_position(events: Sequence[DiskEvent], dice: random.Random) -> int:
    """Return the number of events before a cut. Most cuts come while rows are acknowledged, others at any time."""
    acknowledged = [at for at, event in enumerate(events, start=1) if event.rows]
    return dice.randrange(*(acknowledged[0], acknowledged[-1]) if dice.random() < 0.75 else (0, len(events) + 1))


def copied(path: Path, folder: Path) -> Path:
    """Copy the files of a store into a new folder, because checking a store writes to it."""
    folder.mkdir()
    for file in path.parent.glob(f"{path.name}*"):
        shutil.copy(file, folder)
    return folder / path.name


def assert_complete(content: bytearray, path: Path, driver: RecordingDriver) -> None:
    """Assert that the record has every byte that was written since the store was opened."""
    written = {
        event.offset: event.content for event in driver.events if (event.kind, event.path) == ("write", str(path))
    }
    assert written
    for offset, block in written.items():
        assert content[offset : offset + len(block)] == block


@pytest.mark.timeout(1800)
async def test_no_acknowledged_row_is_lost_by_a_power_cut(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    results = await cut_power(monkeypatch, tmp_path, CUTS, "FULL", seed=CUTS)
    sys.stdout.write(f"{CUTS} cuts, {sum(result.acknowledged for result in results)} acknowledged rows looked up\n")
    assert [result for result in results if result.lost or result.faults] == []
    assert sum(result.acknowledged for result in results) > 20 * CUTS


@pytest.mark.timeout(1800)
async def test_power_cuts_lose_rows_of_a_store_that_syncs_less(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A control: the simulation finds lost rows where SQLite promises none, and a sound file where it does."""
    results = await cut_power(monkeypatch, tmp_path, CUTS, "NORMAL", seed=1)
    losses = sum(result.lost > 0 for result in results)
    sys.stdout.write(f"with synchronous=NORMAL {losses} of {CUTS} cuts lost rows\n")
    assert losses > 0
    assert [result.faults for result in results if result.faults] == []


@pytest.mark.timeout(1800)
async def test_no_acknowledged_row_is_lost_by_killing_the_server(synced_postgres: PostgresServer) -> None:
    place, dice, acknowledged = synced_postgres.create_database(), random.Random(KILLS), set[str]()
    is_over = asyncio.Event()

    async def produce(store: Store, producer: int) -> None:
        for number in range(10**6):
            key, is_stored = f"{producer}-{number}", False
            while not is_stored:
                if is_over.is_set():
                    return
                try:
                    await store.add_all([episode(key), Feedback(key, key, "correct", "1")])
                    is_stored = True
                except StoreError:  # the server is away, or nobody knows whether the row was written
                    await asyncio.sleep(0.02)
            acknowledged.add(key)

    async with Store.open(place, create=True) as store:
        producers = [asyncio.create_task(produce(store, producer)) for producer in range(PRODUCERS)]
        for _ in range(KILLS):
            target = len(acknowledged) + dice.randrange(10, 60)
            await until(lambda: len(acknowledged) >= target)  # noqa: B023
            await asyncio.to_thread(synced_postgres.kill)
            await asyncio.to_thread(synced_postgres.start)
        is_over.set()
        await asyncio.gather(*producers)
        report = await store.verify()
        is_sound = await is_consistent(store)
    stored = Counter(key for (key,) in run_sql(place, "SELECT id FROM episodes"))
    rated = {key for (key,) in run_sql(place, "SELECT id FROM feedback")}
    sys.stdout.write(f"{KILLS} kills, {len(acknowledged)} acknowledged rows, {len(acknowledged - set(stored))} lost\n")
    assert (report.bad, is_sound) == ([], True)
    assert acknowledged - set(stored) == set()
    assert set(stored.values()) == {1}
    assert rated == set(stored)
    assert len(acknowledged) >= 10 * KILLS
