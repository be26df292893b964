"""A file of lines of JSON that several processes append to at once, and who of them does what.

Any of them may be killed at any time: a line is there whole or not at all, and what a dead process had claimed is free.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from discovery.data.atomic_files import PRIVATE, last_line_end, open_lock
from discovery.data.safe_json import parse_json
from discovery.errors import FileWriteError


class SharedLines:
    """The file at `path`, which may not be there yet. Every method raises FileWriteError.

    A path that the user did not name must not be a link: set `may_be_link` to False for it.
    """

    def __init__(self, path: Path, *, may_be_link: bool = True) -> None:
        self.path = path
        self._flags = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | (0 if may_be_link else os.O_NOFOLLOW)
        self._read = 0  # bytes
        self._count = 0  # lines in them

    def new(self) -> list[tuple[int, bytes]]:
        """The lines that have come since this was last asked, with their numbers from 1."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._read)
                whole, end, _ = file.read().rpartition(b"\n")  # what follows is being written, or torn
        except FileNotFoundError:
            return []
        except OSError as error:
            raise FileWriteError(f"{self.path}: {error.strerror}") from None
        if not end:
            return []
        lines = list(enumerate(whole.split(b"\n"), start=self._count + 1))
        self._read += len(whole) + 1
        self._count += len(lines)
        return lines

    def append(self, line: str) -> None:
        """Put `line`, its end included, behind all others. It is on disk when this returns."""
        with self._held(os.O_CREAT) as descriptor:
            size = os.fstat(descriptor).st_size
            try:
                _write(descriptor, line.encode())
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, size)
                raise

    def mend(self) -> None:
        """Cut off what a process that was killed has left half written."""
        if self.path.exists():
            with self._held():
                pass

    @contextmanager
    def _held(self, flags: int = 0) -> Iterator[int]:
        """The file's descriptor, its last line whole; nobody else writes to it meanwhile."""
        try:
            descriptor = os.open(self.path, self._flags | flags, PRIVATE)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                _mend(descriptor)
                yield descriptor
            finally:
                os.close(descriptor)
        except OSError as error:
            raise FileWriteError(f"{self.path}: {error.strerror}") from None


class WorkClaims:
    """What this process does, so that no other does it too: a byte each of the file at `path`, locked.

    The kernel lets go of a process's locks when it ends, and also when it closes any descriptor of that file: a process
    must not open it twice. Raises FileWriteError where files cannot be locked.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._held: set[str] = set()
        try:
            self._descriptor = open_lock(path)
        except OSError as error:
            raise FileWriteError(f"{path}: {error.strerror}") from None

    def take(self, name: str) -> bool:
        """Whether `name` is this process's now, and was nobody's."""
        if name in self._held:
            return False
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _place(name))
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            raise FileWriteError(f"{self.path}: {error.strerror}") from None
        self._held.add(name)
        return True

    def give_back(self, name: str) -> None:
        """Let another process have `name`."""
        if name in self._held:
            self._held.discard(name)
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, _place(name))

    def elsewhere(self, names: Iterable[str]) -> int:
        """How many of `names` are other processes'."""
        count = 0
        for name in names:
            if name not in self._held:
                count += not self.take(name)
                self.give_back(name)
        return count

    def close(self) -> None:
        """Let go of everything."""
        os.close(self._descriptor)
        self._held.clear()


def _place(name: str) -> int:
    """The byte that stands for `name`; files have 2^63."""
    return int.from_bytes(sha256(name.encode()).digest()[:8]) >> 2


def _write(descriptor: int, data: bytes) -> None:
    written = 0
    while written < len(data):
        written += os.write(descriptor, data[written:])


def _mend(descriptor: int) -> None:
    """Cut off what follows the end of the last line; if that is a line but for its end, end it."""
    size, begin = os.fstat(descriptor).st_size, last_line_end(descriptor)
    if begin == size:
        return
    if _is_whole(os.pread(descriptor, size - begin, begin)):
        _write(descriptor, b"\n")
    else:
        os.ftruncate(descriptor, begin)


def _is_whole(line: bytes) -> bool:
    try:
        return isinstance(parse_json(line), dict)
    except ValueError:
        return False
