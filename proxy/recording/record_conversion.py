"""Build, encode and decode records in threads. A record that fails is logged and skipped.

Logged errors contain only the type of an exception, because its message may contain a client's text.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, TypeVar

from discovery.store import StoreItem
from discovery.store.item_lines import decode_item, encode_item
from proxy.recording.spill_file import MAX_LINE_BYTES

T = TypeVar("T")
V = TypeVar("V")

logger = logging.getLogger(__name__)

SLICE: Final = 32
"""Number of records that are converted per thread call. The event loop is blocked while Python code runs in it."""


class QueuedRecord(NamedTuple):
    """A record that waits to be written."""

    request: str
    make: Callable[[], StoreItem]  # called in a thread, because it is too slow for the event loop
    kept: asyncio.Future[bool]  # True once the record is on disk, False if it was lost


async def convert_all(convert: Callable[[T], V], values: Sequence[T]) -> list[V]:
    """Return `convert(value)` for each value, computed in a thread."""
    converted: list[V] = []
    for start in range(0, len(values), SLICE):
        converted += await asyncio.to_thread(list, map(convert, values[start : start + SLICE]))
    return converted


def make_item(record: QueuedRecord) -> StoreItem | None:
    """Build the item of a record. Return None if that fails."""
    try:
        return record.make()
    except Exception as error:  # any failure must not stop the records after this one
        logger.error("cannot make a record of %s: %s", record.request, type(error).__name__)
        return None


def encode_line(item: StoreItem) -> bytes | None:
    """Encode an item as a line of a spill file. Return None if that fails."""
    try:
        line = encode_item(item)
    except Exception as error:  # for example a text with lone surrogates
        logger.error("cannot encode a record: %s", type(error).__name__)
        return None
    if len(line) > MAX_LINE_BYTES:
        logger.error("cannot spill a record of %s bytes; the limit is %s", len(line), MAX_LINE_BYTES)
        return None
    return line


def decode_line(line: bytes) -> StoreItem | None:
    """Decode a line of a spill file. Return None if that fails."""
    try:
        return decode_item(line)
    except Exception as error:  # any failure must not stop the records after this one
        logger.error("cannot read a record in the spill file: %s", type(error).__name__)
        return None
