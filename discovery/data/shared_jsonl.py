"""A file of JSON lines that several processes append to, and claims by which they share the work.

Any process may be killed at any time. A line is written completely or not at all, and a dead process's claims end.
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
    """File of lines at `path`, which need not exist yet. Every method raises FileWriteError.

    Set `may_be_link` to False for a path that the user did not name: it must not be a link.
    """

    def __init__(self, path: Path, *, may_be_link: bool = True) -> None:
        self.path = path
        self._flags = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | (0 if may_be_link else os.O_NOFOLLOW)
        self._read = 0  # bytes
        self._count = 0  # lines in them

    def read_new(self) -> list[tuple[int, bytes]]:
        """Return the lines that were added since the last call, with their numbers from 1."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._read)
                complete, end, _ = file.read().rpartition(b"\n")  # what follows is being written, or incomplete
        except FileNotFoundError:
            return []
        except OSError as error:
            raise FileWriteError(f"{self.path}: {error.strerror}") from None
        if not end:
            return []
        lines = list(enumerate(complete.split(b"\n"), start=self._count + 1))
        self._read += len(complete) + 1
        self._count += len(lines)
        return lines

    def append(self, lines: str) -> None:
        """Append a line or several, which include their line ends. They are on disk when this returns."""
        with self._locked(os.O_CREAT) as descriptor:
            size = os.fstat(descriptor).st_size
            try:
                _write(descriptor, lines.encode())
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, size)
                raise

    def repair(self) -> None:
        """Cut off an incomplete last line, left by a process that was killed."""
        if self.path.exists():
            with self._locked():
                pass

    @contextmanager
    def _locked(self, flags: int = 0) -> Iterator[int]:
        """Open and lock the file, repair its last line, and yield the descriptor. Other processes cannot write then."""
        try:
            descriptor = os.open(self.path, self._flags | flags, PRIVATE)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                _repair(descriptor)
                yield descriptor
            finally:
                os.close(descriptor)
        except OSError as error:
            raise FileWriteError(f"{self.path}: {error.strerror}") from None


class WorkClaims:
    """Claims on pieces of work, so that only one process does each: locks on single bytes of the file at `path`.

    The kernel releases a process's locks when it ends, and also when it closes any descriptor of that file. A process
    must therefore not open the file twice. Raises FileWriteError if files cannot be locked there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._held: set[str] = set()
        try:
            self._descriptor = open_lock(path)
        except OSError as error:
            raise FileWriteError(f"{path}: {error.strerror}") from None

    def take(self, name: str) -> bool:
        """Claim `name` and return True, or return False if any process has claimed it, this one included."""
        if name in self._held:
            return False
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _offset(name))
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            raise FileWriteError(f"{self.path}: {error.strerror}") from None
        self._held.add(name)
        return True

    def give_back(self, name: str) -> None:
        """Release `name`, so that another process can claim it."""
        if name in self._held:
            self._held.discard(name)
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, _offset(name))

    def elsewhere(self, names: Iterable[str]) -> int:
        """Return how many of `names` other processes have claimed."""
        count = 0
        for name in names:
            if name not in self._held:
                count += not self.take(name)
                self.give_back(name)
        return count

    def close(self) -> None:
        """Release all claims."""
        os.close(self._descriptor)
        self._held.clear()


def _offset(name: str) -> int:
    """Return the offset of the byte that stands for `name`."""
    return int.from_bytes(sha256(name.encode()).digest()[:8]) >> 2  # file offsets have 63 bits


def _write(descriptor: int, data: bytes) -> None:
    written = 0
    while written < len(data):
        written += os.write(descriptor, data[written:])


def _repair(descriptor: int) -> None:
    """Cut off what follows the last line end. If that is a complete line without its end, add the end instead."""
    size, begin = os.fstat(descriptor).st_size, last_line_end(descriptor)
    if begin == size:
        return
    if _is_complete(os.pread(descriptor, size - begin, begin)):
        _write(descriptor, b"\n")
    else:
        os.ftruncate(descriptor, begin)


def _is_complete(line: bytes) -> bool:
    try:
        return isinstance(parse_json(line), dict)
    except ValueError:
        return False
