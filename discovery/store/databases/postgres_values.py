"""Values on their way to PostgreSQL and back. Its texts cannot hold a zero character, so that one is escaped."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final

ESCAPE: Final = "\x1a"
"""Character SUBSTITUTE, which begins an escaped character."""
_ESCAPED: Final = {"\0": f"{ESCAPE}0", ESCAPE: f"{ESCAPE}1"}
_ORIGINAL: Final = {escaped: original for original, escaped in _ESCAPED.items()}
_TO_ESCAPE: Final = re.compile(f"[\0{ESCAPE}]")
_TO_RESTORE: Final = re.compile(f"{ESCAPE}[01]")


def escaped(value: Any) -> Any:
    """Return a value as it is stored."""
    if isinstance(value, str) and _TO_ESCAPE.search(value):
        return _TO_ESCAPE.sub(lambda special: _ESCAPED[special[0]], value)
    return value


def to_python(records: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Return the rows of a query as they were before they were stored."""
    return [tuple(map(_restored, record)) for record in records]


def _restored(value: Any) -> Any:
    if isinstance(value, str) and ESCAPE in value:
        return _TO_RESTORE.sub(lambda special: _ORIGINAL[special[0]], value)
    return value
