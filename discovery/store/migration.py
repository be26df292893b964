"""Bring a store's tables up to the version that this program uses."""

from __future__ import annotations

from collections.abc import Sequence

from discovery.errors import CorruptRow
from discovery.store.databases.connection import DatabaseConnection, newer_store
from discovery.store.schema import DERIVED, Migration
from discovery.store.usage.sums import rebuild


async def migrate(connection: DatabaseConnection, migrations: Sequence[Migration]) -> None:
    """Bring a store up to date in one transaction. Raises StoreError if it is newer than this program.

    Nothing is written to a store that is up to date, so that readers do not wait for another process's transaction.
    """
    newest = len(migrations)
    if await _version(connection, newest) == newest:
        return
    await connection.begin()
    try:
        version = await _version(connection, newest)
        if version is None:
            await connection.execute("CREATE TABLE autotts_store (version INTEGER NOT NULL)")
            await connection.execute("INSERT INTO autotts_store (version) VALUES (0)")
        missing = migrations[version or 0 :]
        for migration in missing:
            for statement in migration:
                await connection.execute(connection.adapt_schema(statement))
        if version and any(migration in DERIVED for migration in missing):
            await rebuild(connection)  # sums of hours that were not summed follow with `Store.sum_usage`
        await connection.execute("UPDATE autotts_store SET version = ?", (newest,))
        await connection.commit()
    except BaseException:
        await connection.roll_back()
        raise


async def _version(connection: DatabaseConnection, newest: int) -> int | None:
    """Return the version of a store, or None for an empty file.

    Raises CorruptRow if the version is unreadable, and StoreError if it is above `newest`.
    """
    if not await connection.has_store():
        return None
    rows = await connection.fetch_all("SELECT version FROM autotts_store")
    version = rows[0][0] if len(rows) == 1 else None
    if not isinstance(version, int) or version < 0:
        raise CorruptRow(
            f"{connection.place}: table autotts_store does not hold the store's version; restore it from a backup"
        )
    if version > newest:
        raise newer_store(connection.place, version, newest)
    return version
