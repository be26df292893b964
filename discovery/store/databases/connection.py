"""Interface of a connection to a store's database.

Statements are written once, in the SQL that SQLite and PostgreSQL share, with `?` for values. What differs is here:
transactions, the number of a row, integers from fractions, and what is done to erase bytes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Final

from discovery.errors import StoreError
from discovery.store.databases.places import StorePlace
from discovery.store.schema import COLUMNS

PAGE: Final = 1_000
"""Rows that `pages` yields at a time, so that a table need not fit into memory."""
CHUNK: Final = 500
"""Values that one statement names at most."""


class DatabaseConnection(ABC):
    """One connection to a store. Its methods raise StoreError, or UnstorableValue for a value no column can hold."""

    row_number: ClassVar[str]
    """Column by which the database itself numbers rows, whatever they contain."""

    def __init__(self, place: StorePlace) -> None:
        self.place = place

    @abstractmethod
    async def execute(self, statement: str, values: Sequence[Any] = ()) -> int:
        """Run a statement; return how many rows it changed."""

    @abstractmethod
    async def execute_many(self, statement: str, rows: Iterable[Sequence[Any]]) -> None:
        """Run a statement once for each row of values."""

    @abstractmethod
    async def insert(self, table: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> int:
        """Insert rows, skipping those whose key exists; return how many were new."""

    @abstractmethod
    async def fetch_all(self, statement: str, values: Iterable[Any] = ()) -> list[Any]:
        """Return all rows of a query, as tuples."""

    @abstractmethod
    def pages(self, statement: str) -> AsyncIterator[list[Any]]:
        """Yield the rows of a query, at most PAGE at a time. No other statement may run meanwhile."""

    @abstractmethod
    async def begin(self) -> None:
        """Begin a transaction and wait until no other connection is in one that writes."""

    @abstractmethod
    async def commit(self) -> None:
        """Commit the transaction: its rows are on disk when this returns."""

    @abstractmethod
    async def roll_back(self) -> None:
        """Undo the transaction, if one is open. Raises nothing: a lost connection undoes it as well."""

    @abstractmethod
    async def has_store(self) -> bool:
        """Return whether the tables of a store are there."""

    @abstractmethod
    def integer_part(self, expression: str) -> str:
        """Return the expression that truncates a positive number to an integer."""

    @abstractmethod
    def adapt_schema(self, statement: str) -> str:
        """Return a statement of a migration as this database needs it."""

    @abstractmethod
    async def erase(self) -> bool:
        """Free what removed rows occupied. Return whether bytes remain because another process reads them."""

    @abstractmethod
    async def flush_log(self) -> bool:
        """Empty a log of the store's own, if it has one. Return whether another process prevented that."""

    @property
    @abstractmethod
    def is_current(self) -> bool:
        """Whether the place still holds the database that was opened."""

    @property
    def is_overwritten(self) -> bool:
        """Whether a backup was copied over the open database, whose log is gone."""
        return False

    @abstractmethod
    def is_same(self, other: DatabaseConnection) -> bool:
        """Return whether another connection to the same place has opened the same database."""

    async def insert_rows(self, table: str, rows: Iterable[Sequence[Any]]) -> int:
        """Insert complete rows, checksum last, skipping those whose key exists; return how many were new."""
        return await self.insert(table, (*COLUMNS[table], "checksum"), rows)

    async def select_in(self, begin: str, values: Sequence[Any]) -> list[Any]:
        """Return the one column of a query whose last condition is that a column is one of `values`."""
        return [value for (value,) in await self.rows_in(begin, values)]

    async def rows_in(self, begin: str, values: Sequence[Any]) -> list[Any]:
        """Return the rows of a query whose last condition is that a column is one of `values`."""
        selected: list[Any] = []
        for chunk, places in _chunks(values):
            selected += await self.fetch_all(f"{begin} IN ({places})", chunk)
        return selected

    async def delete_in(self, begin: str, values: Sequence[Any]) -> int:
        """Delete the rows of which a column is one of `values`; return how many."""
        return sum([await self.delete_rows(f"{begin} IN ({places})", *chunk) for chunk, places in _chunks(values)])

    async def delete_rows(self, where: str, *values: Any) -> int:
        """Run `DELETE FROM {where}`; return how many rows it removed."""
        return await self.execute(f"DELETE FROM {where}", values)

    async def fetch_number(self, statement: str) -> int:
        """Return the one integer that a query yields."""
        ((number,),) = await self.fetch_all(statement)
        return int(number)


def _chunks(values: Sequence[Any]) -> Iterator[tuple[Sequence[Any], str]]:
    """Yield parts of values that fit into one statement, with their places in it."""
    for start in range(0, len(values), CHUNK):
        chunk = values[start : start + CHUNK]
        yield chunk, ", ".join("?" * len(chunk))


def newer_store(place: StorePlace, version: int, newest: int) -> StoreError:
    """Return the error for a store that a newer program wrote."""
    return StoreError(
        f"{place}: the store has version {version}, but this program supports up to {newest}; upgrade autotts"
    )
