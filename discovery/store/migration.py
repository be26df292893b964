"""Bring a store's tables up to the version that this program uses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import aiosqlite

from discovery.errors import CorruptRow, StoreError
from discovery.store.schema import Migration
from discovery.store.transactions import fetch_all


async def migrate(path: Path, connection: aiosqlite.Connection, migrations: Sequence[Migration]) -> None:
    """Bring a store up to date in one transaction. Raises StoreError if it is newer than this program.

    Nothing is written to a store that is up to date, so that readers do not wait for another process's transaction.
    """
    newest = len(migrations)
    if await _version(path, connection, newest) == newest:
        return
    await connection.execute("BEGIN IMMEDIATE")
    try:
        version = await _version(path, connection, newest)
        if version is None:
            await connection.execute("CREATE TABLE autotts_store (version INTEGER NOT NULL)")
            await connection.execute("INSERT INTO autotts_store (version) VALUES (0)")
        for migration in migrations[version or 0 :]:
            for statement in migration:
                await connection.execute(statement)
        await connection.execute("UPDATE autotts_store SET version = ?", (newest,))
        await connection.execute("COMMIT")
    except BaseException:
        await connection.execute("ROLLBACK")
        raise


async def _version(path: Path, connection: aiosqlite.Connection, newest: int) -> int | None:
    """Return the version of a store, or None for an empty file.

    Raises CorruptRow if the version is unreadable, and StoreError if it is above `newest`.
    """
    if not await fetch_all(connection, "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'autotts_store'"):
        return None
    rows = await fetch_all(connection, "SELECT version FROM autotts_store")
    version = rows[0][0] if len(rows) == 1 else None
    if not isinstance(version, int) or version < 0:
        raise CorruptRow(f"{path}: table autotts_store does not hold the store's version; restore it from a backup")
    if version > newest:
        raise StoreError(
            f"{path}: the store has version {version}, but this program supports up to {newest}; upgrade autotts"
        )
    return version
