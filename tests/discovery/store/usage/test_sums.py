"""Sums of usage stay right, whatever is added, removed or found in an older store."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from discovery.errors import StoreError
from discovery.store import ServedEpisode, Store, StorePlace, rows
from discovery.store.schema import JUDGE, MIGRATIONS, USAGE, Migration
from tests.discovery.store.outside import run_sql
from tests.discovery.store.usage.served import is_consistent, served, tables

HALF = "2026-02-20T07:00:00.000000+00:00"
END = "2026-03-10T12:00:00.000000+00:00"


async def test_sums_do_not_depend_on_how_often_they_are_made(place: StorePlace, tmp_path: Path) -> None:
    async with Store.open(place, create=True) as store:
        for number, episode in enumerate(served()):
            await store.add_all([episode])
            if number % 7 == 0:
                await store.sum_usage(episode.created)
        await store.sum_usage(END)
        often = await tables(store)
    async with Store.open(tmp_path / "once.db", create=True) as store:
        await store.add_all(served())
        await store.sum_usage(END)
        assert await tables(store) == often
    assert len(often["episode_facts"]) == 200
    assert often["usage_days"]


async def test_late_and_repeated_episodes_are_counted_once(place: StorePlace) -> None:
    early, late = served()[::2], served()[1::2]
    async with Store.open(place, create=True) as store:
        await store.add_all(early)
        await store.sum_usage(HALF)
        await store.add_all(late)
        await store.add_all(served())
        moved = [replace(episode, created="2026-02-15T01:00:00.000000+00:00") for episode in early[:3]]
        await store.add_all([*moved, *early[:3]])  # their first record stays
        assert await is_consistent(store)
        assert len((await tables(store))["episode_facts"]) == 200


async def test_erased_episodes_leave_the_sums(place: StorePlace) -> None:
    async with Store.open(place, create=True) as store:
        await store.add_all(served())
        await store.sum_usage(HALF)
        request = served()[40]
        tenant = next(episode.tenant for episode in served() if episode.tenant not in ("", request.tenant))
        await store.forget(request=request.request_id)
        assert await is_consistent(store)
        await store.forget(tenant=tenant)
        assert await is_consistent(store)
        await store.expire(served()[60].created)
        assert await is_consistent(store)
        content = await tables(store)
        assert not any(tenant in row or request.id in row for table in content.values() for row in table)
        left = {row[1] for row in content["episode_facts"]}
        assert left == {episode.id for episode in served()[60:] if episode.tenant != tenant}


async def test_everything_can_be_erased(place: StorePlace) -> None:
    async with Store.open(place, create=True) as store:
        await store.add_all(served(50))
        await store.sum_usage(END)
        await store.expire("2030")
        content = await tables(store)
        assert [content.pop("usage_summed")] == [{(END[:13],)}]
        assert not any(content.values())


async def test_pruned_episodes_leave_the_sums(place: StorePlace) -> None:
    async with Store.open(place, create=True) as store:
        await store.add_all(served(50))
        await store.sum_usage(END)
    changed = f"UPDATE episodes SET created = '{HALF}', tenant = 'changed' WHERE id = '{served(50)[3].id}'"
    run_sql(place, changed)
    async with Store.open(place) as store:
        await store.prune(corrupt=True)
        assert await is_consistent(store)
        assert len((await tables(store))["episode_facts"]) == 49


@pytest.mark.parametrize("first_missing", [USAGE, JUDGE])
async def test_an_older_store_gets_its_usage_when_it_is_opened(
    place: StorePlace, tmp_path: Path, first_missing: Migration
) -> None:
    earlier = MIGRATIONS[: MIGRATIONS.index(first_missing)]
    made = [replace(episode, ledger={**episode.ledger, "judge": n}) for n, episode in enumerate(served(60))]
    unreadable = [*map(rows.episode_row, [ServedEpisode("bad", "bad", "m", "c", "d", 0.5, 1, 1, {}, "answered")])]
    async with Store.open(place, create=True, migrations=earlier) as store:
        await store.write(lambda connection: connection.insert_rows("episodes", map(rows.episode_row, made)))
        await store.write(lambda connection: connection.insert_rows("episodes", unreadable))
    unusable = "x'ff'" if isinstance(place, Path) else "'NaN'"  # only SQLite would keep bytes in a text
    run_sql(place, f"UPDATE episodes SET about = '{{', created = {unusable} WHERE id = 'bad'")
    async with Store.open(place) as store:
        await store.sum_usage(HALF)
        migrated = await tables(store)
    async with Store.open(tmp_path / "new.db", create=True) as store:
        await store.add_all(made)
        await store.sum_usage(HALF)
        assert await tables(store) == migrated
        judged = await store._read("SELECT SUM(judge) FROM episode_facts")
        assert judged == [(sum(range(60)),)]


async def test_a_failed_write_adds_no_usage(place: StorePlace) -> None:
    good, bad = served(2)
    async with Store.open(place, create=True) as store:
        before = await tables(store)
        with pytest.raises(StoreError, match="surrogates"):
            await store.add_all([good, replace(bad, answer="\ud800")])
        assert await tables(store) == before
