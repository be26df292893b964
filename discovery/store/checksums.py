"""Row checksums: the last column of every row is a hash of its other columns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any, Final

Row = tuple[Any, ...]
_ENCODER: Final = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def checksum(values: Sequence[Any]) -> str:
    """Return the checksum of a row's other columns."""
    return blake2b(canonical_json(list(values)).encode(), digest_size=16).hexdigest()


def with_checksum(values: Sequence[Any]) -> Row:
    """Return a row: its columns followed by their checksum."""
    return (*values, checksum(values))


def has_valid_checksum(row: Sequence[Any]) -> bool:
    """Return whether a row's last column is the checksum of the others."""
    try:
        return bool(checksum(row[:-1]) == row[-1])
    except (TypeError, ValueError):  # bytes, or text in no encoding: never written by this program
        return False


def canonical_json(value: Any) -> str:
    """Return compact JSON with sorted keys. Stored digests depend on it, so it must not change."""
    return _ENCODER.encode(value)
