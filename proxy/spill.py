"""A file that records wait in while the store cannot take them: appended to, read back once, then empty again.

What `append` has returned from is on disk. A line is the CRC of its content and the content; what a kill left half
written fails that, and is dropped. Every method blocks, and is for one thread at a time.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Final
from zlib import crc32

from discovery.files import end_of_lines

MOST_FILES: Final = 64
"""Proxies that may spill to one place, each to a file of its own."""


class Spill:
    """The files at `path`, `path.1`, … that no other process holds. Every method raises OSError."""

    def __init__(self, path: Path, limit: int) -> None:
        self.path = path
        self.limit = limit  # bytes, all files together
        self.bad = 0  # lines that were not what was written
        self._files: list[_File] = []

    @property
    def size(self) -> int:
        """Bytes that wait."""
        return sum(file.size for file in self._files)

    def adopt(self) -> None:
        """Take over what processes that have ended left behind."""
        held = {file.path for file in self._files}
        for path in self._names():
            if path.exists() and path not in held and (file := _File.hold(path)) is not None:
                self._files.append(file)

    def append(self, lines: Sequence[bytes]) -> bool:
        """Keep `lines`, none of which contains a newline; False, and nothing kept, if they do not fit."""
        data = b"".join(b"%08x %b\n" % (crc32(line), line) for line in lines)
        if self.size + len(data) > self.limit:
            return False
        if not self._files:
            held = next((file for path in self._names() if (file := _File.hold(path)) is not None), None)
            if held is None:
                return False
            self._files.append(held)
        self._files[-1].append(data)
        return True

    def chunks(self, most: int) -> Iterator[list[bytes]]:
        """All that waits, up to `most` lines at a time. What is damaged is left out and counted."""
        chunk: list[bytes] = []
        for file in self._files:
            for line in file.lines():
                check, _, content = line.rstrip(b"\n").partition(b" ")
                if check != b"%08x" % crc32(content):
                    self.bad += 1
                    continue
                chunk.append(content)
                if len(chunk) == most:
                    yield chunk
                    chunk = []
        if chunk:
            yield chunk

    def clear(self) -> None:
        """Nothing of it is waited for any more."""
        while self._files:
            self._files.pop().remove()

    def close(self) -> None:
        """Let go of the files; what is in them stays."""
        while self._files:
            self._files.pop().close()

    def _names(self) -> Iterator[Path]:
        for number in count():
            if number == MOST_FILES:
                return
            yield self.path if not number else self.path.with_name(f"{self.path.name}.{number}")


class _File:
    """One file, held by this process alone."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor
        self.size = os.fstat(descriptor).st_size

    @classmethod
    def hold(cls, path: Path) -> _File | None:
        """The file at `path`, made if there is none; None if another process holds it."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_there = path.exists() and os.path.samestat(path.stat(), os.fstat(descriptor))
        except BlockingIOError:
            is_there = False
        if not is_there:  # held, or removed by the one that held it
            os.close(descriptor)
            return None
        os.ftruncate(descriptor, end_of_lines(descriptor))
        return cls(path, descriptor)

    def append(self, data: bytes) -> None:
        """All of `data` is on disk, or nothing of it stays."""
        written = 0
        try:
            while written < len(data):
                written += os.pwrite(self._descriptor, data[written:], self.size + written)
            os.fdatasync(self._descriptor)
        except OSError:
            os.ftruncate(self._descriptor, self.size)
            raise
        self.size += len(data)

    def lines(self) -> Iterator[bytes]:
        with open(os.dup(self._descriptor), "rb") as reader:
            reader.seek(0)
            left = self.size
            while left > 0:
                line = reader.readline()
                left -= len(line)
                if not line:
                    return
                yield line

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        os.close(self._descriptor)
