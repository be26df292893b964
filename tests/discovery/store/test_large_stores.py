"""Writes to a store read only what they are about, however much is in the store."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import pytest

from discovery.data.recordings import LabelSource
from discovery.store import Label, ServedEpisode, Store, StorePlace
from discovery.store.checksums import with_checksum
from discovery.store.databases.connection import CHUNK
from discovery.store.databases.postgres import PostgresConnection
from discovery.store.databases.sqlite import SqliteConnection
from discovery.store.records import utc_now
from discovery.store.rows import tombstone

STORED: Final = 2 * CHUNK
"""Episodes that are in the store, and requests that were erased from it."""


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of rows that each query has returned."""
    counts: list[int] = []
    for kind in (SqliteConnection, PostgresConnection):
        fetch_all = kind.fetch_all

        async def counting(self: Any, statement: str, values: Iterable[Any] = (), fetch: Any = fetch_all) -> list[Any]:
            result: list[Any] = await fetch(self, statement, values)
            counts.append(len(result))
            return result

        monkeypatch.setattr(kind, "fetch_all", counting)
    return counts


def served(name: str, tenant: str = "") -> ServedEpisode:
    return ServedEpisode(name, name, "m", "cmc", "d", 0.5, 3, 4, {}, "answered", question=name, tenant=tenant)


async def fill(store: Store) -> None:
    names = [tombstone("request", f"erased {number}") for number in range(STORED)]
    rows = [with_checksum((name, utc_now())) for name in names]
    await store.write(lambda connection: connection.insert_rows("forgotten", rows))
    await store.add_all([served(str(number)) for number in range(STORED)])


async def test_adding_an_episode_reads_no_rows_of_others(place: StorePlace, fetched: list[int]) -> None:
    async with Store.open(place, create=True) as store:
        await fill(store)
        fetched.clear()
        await store.add_all([served("one"), served("erased 7")])
        assert max(fetched) == 1
        assert {each.id for each in await store.episodes()} == {"one", *map(str, range(STORED))}


async def test_labelling_a_question_reads_no_rows_of_others(place: StorePlace, fetched: list[int]) -> None:
    async with Store.open(place, create=True) as store:
        await fill(store)
        fetched.clear()
        await store.set_labels([Label(name, LabelSource.FEEDBACK, "7", 0.5) for name in ("7", "unknown")])
        assert max(fetched) == 1
        assert [label.question for label in await store.labels()] == ["7"]


async def test_forgotten_requests_are_looked_up_in_chunks(place: StorePlace) -> None:
    async with Store.open(place, create=True) as store:
        await fill(store)
        late = [served(f"erased {number}") for number in range(STORED)]
        await store.add_all([*late, served("one")])
        assert len(await store.episodes()) == STORED + 1
