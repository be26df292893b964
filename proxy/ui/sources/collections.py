"""Collections in a folder: files of recordings that `autotts collect` writes, and whether it still does."""

from __future__ import annotations

import stat
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Final, NamedTuple

from discovery.commands.discover import RECORD

PATTERN: Final = "*.jsonl"
ACTIVE: Final = timedelta(minutes=2)
"""A file that was written to this recently is under way."""
MOST_COUNTED: Final = 256 * 2**20
"""Size in bytes up to which the lines of a file are counted."""
MOST_LISTED: Final = 100
"""Latest files that are listed."""
_BLOCK: Final = 2**20


class ListedCollection(NamedTuple):
    """A file of recordings."""

    name: str
    size: int  # bytes
    lines: int | None  # None if it is too large to count; a line is a branch or a whole recording
    changed: datetime

    @property
    def is_active(self) -> bool:
        """Whether it was written to recently."""
        return datetime.now(UTC) - self.changed < ACTIVE


def collection_files(folder: Path | None) -> list[ListedCollection]:
    """Return the latest files of recordings in a folder, the latest first."""
    if folder is None:
        return []
    files = []
    for path in folder.glob(PATTERN):
        with suppress(OSError):  # it was removed meanwhile
            status = path.stat()
            if stat.S_ISREG(status.st_mode) and path.name != RECORD:
                files.append((status.st_mtime_ns, status.st_size, path))
    listed = []
    for changed_ns, size, path in sorted(files, reverse=True)[:MOST_LISTED]:
        with suppress(OSError):
            lines = _lines(path, changed_ns, size) if size <= MOST_COUNTED else None
            listed.append(ListedCollection(path.name, size, lines, datetime.fromtimestamp(changed_ns / 1e9, UTC)))
    return listed


@lru_cache(MOST_LISTED)
def _lines(path: Path, _changed_ns: int, _size: int) -> int:
    """Return the lines of a file in one state, which is read once."""
    count = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            count += block.count(b"\n")
    return count
