"""Paths of spill files, and the detection of files of other kinds. Used by the recorder and to check settings."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from discovery.data.atomic_files import is_database_file
from discovery.store.databases.places import DatabaseUrl, StorePlace

MAX_FILES: Final = 64
"""Maximum number of proxies that share a spill path. Each has its own file."""
LINE_BEGIN: Final = re.compile(rb"[0-9a-f]{8} ")
"""Beginning of every line: the CRC of its content."""
BEGIN_BYTES: Final = 9


def default_path(store: StorePlace) -> Path:
    """Return the path of the spill files of a store for which no other path is set."""
    if isinstance(store, DatabaseUrl):
        return Path(f"{store.database}.spill")
    return store.with_name(f"{store.name}.spill")


def candidate_paths(path: Path) -> Iterator[Path]:
    """Yield the possible paths of the spill files for `path`."""
    yield path
    for number in range(1, MAX_FILES):
        yield path.with_name(f"{path.name}.{number}")


def is_foreign(path: Path) -> bool:
    """Return whether something other than a spill file is at `path`. Raises OSError."""
    if not path.is_file() or path.is_symlink():
        return os.path.lexists(path)
    if is_database_file(path):
        return True
    with path.open("rb") as file:
        return not is_spill_line(file.read(BEGIN_BYTES))


def is_spill_line(begin: bytes) -> bool:
    """Return whether `begin` is the beginning of a spill file, or empty."""
    return not begin or LINE_BEGIN.match(begin) is not None
