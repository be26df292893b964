"""Copy a store into another one, of the same or of another database, and compare every row afterwards.

Rows are copied as they are, checksums included, a part of a table in each transaction. A copy that was interrupted goes
on where it was: rows that are there already are skipped. Usage is derived from the episodes again.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from discovery.errors import StoreError
from discovery.store.checksums import Row
from discovery.store.databases.connection import DatabaseConnection
from discovery.store.replay_store import Store
from discovery.store.row_checks import checked_rows, describe_row, row_key
from discovery.store.schema import COLUMNS, select_statement
from discovery.store.usage.facts import STORED_COLUMNS, stored_facts
from discovery.store.usage.sums import add_usage, summed_until

ROWS: Final = 500
"""Rows that are read and written at a time."""
TABLES: Final = (
    *("questions", "recordings", "branches", "branch_signals", "provenance"),
    *("episodes", "feedback", "labels", "runs", "candidates", "forgotten"),
)
"""All tables that hold records, those that others refer to first."""


async def copy_store(source: Store, target: Store) -> Mapping[str, int]:
    """Copy all records, compare them, and return the number of rows by table.

    Raises CorruptRow for a corrupt row of the source, and StoreError if the target holds anything else, before anything
    is written, or if the two differ in the end.
    """
    if _is_same_place(source, target):
        raise StoreError(f"{source.place}: a store cannot be copied into itself; name another store")
    await _check_target(source, target)
    for table in TABLES:
        async for part in _parts(source, table):
            list(checked_rows(source.place, table, part))  # raises at the first corrupt row
            await target.write(lambda connection, table=table, part=part: _insert(connection, table, part))  # type: ignore[misc]
    if until := await summed_until(source.reading):
        await target.sum_usage(until)
    return await _compare(source, target)


def _is_same_place(source: Store, target: Store) -> bool:
    if isinstance(source.place, Path) and isinstance(target.place, Path):
        return source.place.samefile(target.place)
    return source.place == target.place


async def _check_target(source: Store, target: Store) -> None:
    """Raise StoreError unless every row of the target is one of the source."""
    for table in TABLES:
        async for part in _parts(target, table):
            known = await _same_rows(source, table, part)
            for row in part:
                if known.get(row_key(table, row)) != row:
                    raise StoreError(
                        f"{target.place}: it holds other records than {source.place}, such as "
                        f"{describe_row(table, row_key(table, row))}; name an empty or new store; nothing was copied"
                    )


async def _compare(source: Store, target: Store) -> dict[str, int]:
    """Return the rows by table. Raises StoreError unless all rows of both stores are equal."""
    counts = {}
    for table in TABLES:
        counting = f"SELECT COUNT(*) FROM {table}"
        counts[table] = await source.reading.fetch_number(counting)
        copied = await target.reading.fetch_number(counting)
        async for part in _parts(source, table):
            list(checked_rows(source.place, table, part))
            known = await _same_rows(target, table, part)
            different = [row for row in part if known.get(row_key(table, row)) != row]
            if different:
                shown = describe_row(table, row_key(table, different[0]))
                raise StoreError(f"{target.place}: {shown} is not as in {source.place}; {_CHANGED}")
        if copied != counts[table]:
            raise StoreError(
                f"{target.place}: table {table} has {copied} rows, and {counts[table]} in {source.place}; {_CHANGED}"
            )
    return counts


_CHANGED: Final = "if another process writes to one of the stores, stop it and run the command again"


async def _insert(connection: DatabaseConnection, table: str, part: Sequence[Row]) -> None:
    """Insert rows, and the usage of those that are episodes."""
    added = await connection.insert_rows(table, part)
    if table == "episodes" and added:
        named = [dict(zip(COLUMNS[table], row, strict=False)) for row in part]
        facts = [stored_facts([episode[name] for name in STORED_COLUMNS.split(", ")]) for episode in named]
        await add_usage(connection, [fact for fact in facts if fact is not None], added)


async def _parts(store: Store, table: str) -> AsyncIterator[list[Row]]:
    """Yield the complete rows of a table in the order of its key, some at a time."""
    keys = _key(table)
    places = ", ".join("?" * len(keys))
    columns = ", ".join(keys)
    after: tuple[Any, ...] = ()
    while True:
        where = f"WHERE ({columns}) > ({places})" if after else ""
        part = await store.reading.fetch_all(select_statement(table, f"{where} ORDER BY {columns} LIMIT {ROWS}"), after)
        if not part:
            return
        yield part
        after = row_key(table, part[-1])


async def _same_rows(store: Store, table: str, part: Sequence[Row]) -> dict[tuple[Any, ...], Row]:
    """Return the rows of a store, by key, that have keys of `part`."""
    firsts = sorted({row[0] for row in part})
    where = f"WHERE {_key(table)[0]} IN ({', '.join('?' * len(firsts))})"
    return {row_key(table, row): row for row in await store.reading.fetch_all(select_statement(table, where), firsts)}


def _key(table: str) -> tuple[str, ...]:
    """Return the columns of a table's primary key."""
    return tuple(row_key(table, COLUMNS[table]))
