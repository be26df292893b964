"""Connection to a store in a SQLite file."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, Final

import aiosqlite

from discovery.errors import StoreError, UnstorableValue
from discovery.store.databases.connection import PAGE, DatabaseConnection
from discovery.store.databases.sqlite_file import Identity, identity_of, is_overwritten, open_file, truncate_log
from discovery.store.schema import MIGRATIONS

logging.getLogger("aiosqlite").setLevel(logging.WARNING)  # at lower levels it logs every value of every row

_ROW_ERRORS: Final = (
    *(sqlite3.IntegrityError, sqlite3.DataError, sqlite3.InterfaceError),
    *(OverflowError, UnicodeEncodeError),
)
"""Errors that are raised only for a value that no column can hold."""


class SqliteConnection(DatabaseConnection):
    """Connection to a SQLite file, whose statements run in a thread of their own."""

    row_number: ClassVar[str] = "rowid"

    def __init__(self, path: Path, opened: aiosqlite.Connection, identity: Identity) -> None:
        super().__init__(path)
        self.opened = opened
        self._path = path
        self._identity = identity

    async def execute(self, statement: str, values: Sequence[Any] = ()) -> int:
        with self._errors():
            return (await self.opened.execute(statement, values)).rowcount

    async def execute_many(self, statement: str, rows: Iterable[Sequence[Any]]) -> None:
        with self._errors():
            await self.opened.executemany(statement, rows)

    async def insert(self, table: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> int:
        places = ", ".join("?" * len(columns))
        statement = f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({places}) ON CONFLICT DO NOTHING"
        with self._errors():
            return (await self.opened.executemany(statement, rows)).rowcount

    async def fetch_all(self, statement: str, values: Iterable[Any] = ()) -> list[Any]:
        with self._errors():
            return list(await self.opened.execute_fetchall(statement, values))

    async def pages(self, statement: str) -> AsyncIterator[list[Any]]:
        with self._errors():
            async with self.opened.execute(statement) as cursor:
                while part := list(await cursor.fetchmany(PAGE)):
                    yield part

    async def begin(self) -> None:
        await self.execute("BEGIN IMMEDIATE")

    async def commit(self) -> None:
        await self.execute("COMMIT")

    async def roll_back(self) -> None:
        with suppress(sqlite3.Error):  # a cancelled COMMIT may have been carried out
            await self.opened.execute("ROLLBACK")

    async def has_store(self) -> bool:
        return bool(await self.fetch_all("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'autotts_store'"))

    def integer_part(self, expression: str) -> str:
        return f"CAST({expression} AS INTEGER)"

    def adapt_schema(self, statement: str) -> str:
        return statement

    async def erase(self) -> bool:
        try:
            await self.opened.execute_fetchall("VACUUM")
            return await truncate_log(self.opened)
        except sqlite3.OperationalError as error:
            raise StoreError(
                f"{self._path}: rows were removed, but their bytes remain in the file: {error}; run the command again"
            ) from None

    async def flush_log(self) -> bool:
        with self._errors():
            return await truncate_log(self.opened)

    @property
    def is_current(self) -> bool:
        return identity_of(self._path) == self._identity

    @property
    def is_overwritten(self) -> bool:
        return is_overwritten(self._path, self._identity)

    def is_same(self, other: DatabaseConnection) -> bool:
        return isinstance(other, SqliteConnection) and self._identity == other._identity

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Raise the errors of SQLite as StoreError, or as UnstorableValue if a value was to blame."""
        try:
            yield
        except (sqlite3.Error, OverflowError, UnicodeEncodeError) as error:
            is_binding = isinstance(error, sqlite3.ProgrammingError) and "binding" in str(error)
            kind = UnstorableValue if isinstance(error, _ROW_ERRORS) or is_binding else StoreError
            raise kind(f"{self._path}: {error}") from None


@asynccontextmanager
async def open_sqlite(
    path: Path, wait_ms: int, *, create: bool = False, is_reader: bool = False, newest: int = len(MIGRATIONS)
) -> AsyncIterator[SqliteConnection]:
    """Connect to the store in the file at `path`. A reader cannot write. Raises StoreError, also above `newest`."""
    async with open_file(path, wait_ms, create=create, newest=newest) as (opened, identity):
        if is_reader:
            await opened.execute_fetchall("PRAGMA query_only = ON")
        yield SqliteConnection(path, opened, identity)
