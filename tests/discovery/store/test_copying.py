"""Copies between stores: equal in every row, refused where they would mix, and continued after an interruption."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from discovery.data.recordings import LabelSource, Origin
from discovery.errors import CorruptRow, StoreError
from discovery.store import Feedback, Label, SearchRun, Store, StorePlace, TriedCandidate, child_environment
from discovery.store.copying import TABLES, copy_store
from discovery.store.schema import COLUMNS
from tests.discovery.store.outside import run_sql
from tests.discovery.store.test_replay_store import CELL, signalled, some
from tests.discovery.store.usage.served import is_consistent, served, tables

END = "2026-03-10T12:00:00.000000+00:00"


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.process)])
def other(request: pytest.FixtureRequest, tmp_path: Path) -> StorePlace:
    """Return the place of a second store that does not exist yet."""
    if request.param == "sqlite":
        return tmp_path / "other.db"
    made: StorePlace = request.getfixturevalue("postgres").create_database()
    return made


async def fill(place: StorePlace, episodes: int = 70) -> None:
    """Make a store with rows in every table."""
    async with Store.open(place, create=True) as store:
        asked = served(episodes)
        await store.add([some(f"q{number}") for number in range(30)] + [signalled(some("rich"), 0), some("\0 \x1a1 é")])
        await store.add_all([*asked, Feedback("f", asked[0].request_id, "answer", '"7"')])
        made = some("live", origin=Origin.LIVE, request=asked[1].request_id, chat_template="t")
        await store.add_all([made])
        await store.set_labels([Label(made.question, LabelSource.FEEDBACK, "7", 0.5, 0.25)])
        tried = [TriedCandidate("d", "one", "llm", None, 53.2, "", 0.01, "class One: ...")]
        await store.add_search(SearchRun("hash", "llm", 7, {"shuffles": 4}, tried))
        await store.forget(request=asked[2].request_id)
        await store.sum_usage(END)


async def copied(place: StorePlace, other: StorePlace) -> dict[str, int]:
    async with Store.open(place) as source, Store.open(other, create=True) as target:
        return dict(await copy_store(source, target))


def test_every_table_is_copied() -> None:
    assert sorted(TABLES) == sorted(COLUMNS)


async def test_a_copy_is_equal_in_every_row(
    place: StorePlace, other: StorePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("discovery.store.copying.ROWS", 7)
    await fill(place)
    counts = await copied(place, other)
    assert min(counts.values()) > 0
    async with Store.open(place) as source, Store.open(other) as target:
        report = await target.verify()
        assert (report.bad, report.rows) == ([], counts)
        assert await target.load(CELL) == await source.load(CELL)
        assert await target.episodes() == await source.episodes()
        assert await tables(target) == await tables(source)
        assert await is_consistent(target)
    assert await copied(place, other) == counts  # again changes nothing
    assert await copied(other, place) == counts  # nor does the way back


@pytest.mark.parametrize("interrupted_after", [1, 6, 11])
async def test_an_interrupted_copy_is_continued(
    place: StorePlace, other: StorePlace, monkeypatch: pytest.MonkeyPatch, interrupted_after: int
) -> None:
    monkeypatch.setattr("discovery.store.copying.ROWS", 20)
    await fill(place)
    write, left = Store.write, [interrupted_after]

    async def interrupted(store: Store, work: Callable[..., object]) -> object:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return await write(store, work)  # type: ignore[arg-type]

    with monkeypatch.context() as changed:
        changed.setattr(Store, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            await copied(place, other)
    counts = await copied(place, other)
    async with Store.open(other) as target:
        assert (await target.verify()).rows == counts
        assert await is_consistent(target)


async def test_a_store_with_other_records_is_refused_and_left_unchanged(place: StorePlace, other: StorePlace) -> None:
    await fill(place)
    async with Store.open(other, create=True) as store:
        await store.add([some("mine")])
        before = (await store.verify()).rows
    with pytest.raises(StoreError, match=r"it holds other records than .* of questions; name an empty or new store"):
        await copied(place, other)
    async with Store.open(other) as store:
        assert (await store.verify()).rows == before


async def test_a_corrupt_row_is_not_copied(place: StorePlace, other: StorePlace) -> None:
    await fill(place)
    run_sql(place, "UPDATE feedback SET value = '8'")
    with pytest.raises(CorruptRow, match="row f of feedback has a wrong checksum"):
        await copied(place, other)


async def test_records_that_are_added_meanwhile_are_noticed(
    place: StorePlace, other: StorePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fill(place)
    sum_usage = Store.sum_usage

    async def and_add(store: Store, now: str | None = None) -> None:
        await sum_usage(store, now)
        run_sql(place, "DELETE FROM labels")

    monkeypatch.setattr(Store, "sum_usage", and_add)
    with pytest.raises(StoreError, match=r"table labels has 1 rows, and 0 in .* stop it and run the command again"):
        await copied(place, other)


async def test_a_store_is_not_copied_into_itself(place: StorePlace) -> None:
    await fill(place, 3)
    with pytest.raises(StoreError, match="cannot be copied into itself"):
        await copied(place, place)


@pytest.mark.process
def test_the_copy_command_reports_counts_and_needs_a_source(
    place: StorePlace, other: StorePlace, tmp_path: Path
) -> None:
    def copy() -> tuple[int, str]:
        command = [sys.executable, "-m", "proxy.cli", "store", "copy", str(place), str(other)]
        environment = child_environment(place, other)
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
        return done.returncode, " ".join((done.stdout + done.stderr).split())

    code, output = copy()
    assert (code, "there is no store" in output) == (2, True)
    if isinstance(other, Path):
        assert not other.exists()
    asyncio.run(fill(place))
    code, output = copy()
    assert code == 0, output
    assert output.startswith(f"{other}: 33 questions, 33 recordings, 66 branches, ")
    assert output.endswith(f"all are as in {place}")
