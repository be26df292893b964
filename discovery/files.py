"""Files that appear whole or not at all, and files of lines of which the last may be torn."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

from discovery.errors import NotWritten

BLOCK: Final = 1 << 16
"""Bytes that are looked through at a time for the end of the last line."""


@contextmanager
def whole(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to that takes the name `path` when the context ends well. Raises NotWritten."""
    try:
        with tempfile.NamedTemporaryFile("wb", dir=path.resolve().parent, prefix=".autotts-", delete=False) as file:
            try:
                yield file
                file.flush()
                Path(file.name).chmod(0o644)
                Path(file.name).replace(path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        raise NotWritten(f"{path}: {error.strerror}") from None


def check_place(path: Path, option: str) -> None:
    """Raise NotWritten, before anything costly, if there is no folder for `path`."""
    if not path.resolve().parent.is_dir():
        raise NotWritten(f"{option} {path}: there is no folder {path.resolve().parent}")
    if path.is_dir():
        raise NotWritten(f"{option} {path}: that is a folder")


def sync_folder(folder: Path) -> None:
    """Have the folder on the disk say which file has which name. Raises OSError."""
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def end_of_lines(descriptor: int) -> int:
    """Where the last whole line of an open file ends: what follows was being written when somebody died."""
    end = os.fstat(descriptor).st_size
    while end > 0:
        begin = max(0, end - BLOCK)
        at = os.pread(descriptor, end - begin, begin).rfind(b"\n")
        if at >= 0:
            return begin + at + 1
        end = begin
    return 0
