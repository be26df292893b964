"""Paths of spill files, and how to tell a spill file from any other. Settings check them before anything is opened."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from discovery.data.atomic_files import is_database_file

MOST_FILES: Final = 64
"""Proxies that may spill to one place, each to a file of its own."""
BEGIN: Final = re.compile(rb"[0-9a-f]{8} ")
"""How every line begins."""
BEGIN_BYTES: Final = 9


def places(path: Path) -> Iterator[Path]:
    """Where files may be that are said to be at `path`."""
    yield path
    for number in range(1, MOST_FILES):
        yield path.with_name(f"{path.name}.{number}")


def is_foreign(path: Path) -> bool:
    """Whether something other than a file of lines is at `path`. Raises OSError."""
    if not path.is_file() or path.is_symlink():
        return os.path.lexists(path)
    if is_database_file(path):
        return True
    with path.open("rb") as file:
        return not is_spill_line(file.read(BEGIN_BYTES))


def is_spill_line(begin: bytes) -> bool:
    """Whether a file that begins so is one of lines, or empty."""
    return not begin or BEGIN.match(begin) is not None
