"""Check rows as they are read: the checksum, the column types, and whether the row can be used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, TypeVar

from discovery.errors import CorruptRow
from discovery.store.checksums import has_valid_checksum
from discovery.store.rows import ROW_READERS
from discovery.store.schema import COLUMNS, NUMBERS

T = TypeVar("T")
REPAIR_HINT: Final = "restore the store from a backup, or remove corrupt rows with `autotts store prune --corrupt`"
"""Way out of a corrupt row, with which every message about one ends."""


def row_fault(table: str, row: Sequence[Any]) -> str:
    """Return what is wrong with a row, or an empty string if nothing is."""
    if not has_valid_checksum(row):
        return "checksum mismatch"
    try:
        _check_types(table, row)
        ROW_READERS[table](row[:-1])
    except Exception:  # whatever the exception, no command can use the row
        return "cannot be read"
    return ""


def read_rows(store: object, table: str, rows: Iterable[Sequence[Any]], read: Callable[[Sequence[Any]], T]) -> list[T]:
    """Return the result of `read` for each row, given without its checksum.

    Raises CorruptRow at the first row that was changed or cannot be read.
    """
    records = []
    for row in checked_rows(store, table, rows):
        try:
            records.append(read(row))
        except Exception:  # whatever the exception, the row caused it
            raise CorruptRow(
                f"{store}: {describe_row(table, row_key(table, row))} cannot be read; {REPAIR_HINT}"
            ) from None
    return records


def checked_rows(store: object, table: str, rows: Iterable[Sequence[Any]]) -> Iterator[Sequence[Any]]:
    """Yield rows without their checksums. Raises CorruptRow if a checksum or a column's type is wrong."""
    for row in rows:
        if not has_valid_checksum(row):
            raise CorruptRow(f"{store}: {describe_row(table, row_key(table, row))} has a wrong checksum; {REPAIR_HINT}")
        try:
            _check_types(table, row)
        except ValueError as error:
            raise CorruptRow(f"{store}: {describe_row(table, row_key(table, row))}: {error}; {REPAIR_HINT}") from None
        yield row[:-1]


def _check_types(table: str, row: Sequence[Any]) -> None:
    """Raise ValueError unless every column holds text or a number, as its table requires, or NULL."""
    for column, value in zip(COLUMNS[table], row, strict=False):
        if value is not None and isinstance(value, str) == (column in NUMBERS):
            raise ValueError(f"its {column} is not a {'number' if column in NUMBERS else 'text'}")
    if None in row_key(table, row):
        raise ValueError("its key is NULL")


def row_key(table: str, row: Sequence[Any]) -> tuple[Any, ...]:
    """Return the values of a row's primary key."""
    return tuple(row[: 2 if table in ("branches", "branch_signals") else 1])


def describe_row(table: str, key: Sequence[Any]) -> str:
    """Return a row's table and shortened key, for messages."""
    return f"row {'/'.join(str(part)[:16] for part in key)} of {table}"
