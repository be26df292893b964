"""A file that records wait in while the store cannot take them: appended to, read back, gone when all of it is read.

What `append` has returned from is on disk. A line is the CRC of its content and the content; what a kill left half
written fails that, and is dropped. Every method blocks, and is for one thread at a time.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import accumulate, takewhile
from pathlib import Path
from typing import Final, NamedTuple
from zlib import crc32

from discovery.data.atomic_files import PRIVATE, is_database_file, last_line_end, sync_folder
from proxy.spill_paths import BEGIN_BYTES, is_spill_line, places

LINE_BYTES: Final = BEGIN_BYTES + 1
"""What a line is longer than its content."""
LONGEST: Final = 64 * 2**20
"""Bytes of a line's content that are read at most; a longer one is damaged."""
CHUNK_BYTES: Final = 32 * 2**20
"""Bytes after which a chunk ends, however few lines it has."""


class SpillChunk(NamedTuple):
    """Some lines of a file that follow each other."""

    lines: Sequence[bytes]  # those that are what was written
    bad: int  # how many are not
    file: _File
    end: int  # bytes from the file's beginning


class SpillFiles:
    """The files at `path`, `path.1`, … that no other process holds. Every method raises OSError."""

    def __init__(self, path: Path, limit: int) -> None:
        self.path = path
        self.limit = limit  # bytes, all files together
        self._files: list[_File] = []

    @property
    def size(self) -> int:
        """Bytes that wait."""
        return sum(file.size - file.begin for file in self._files)

    def adopt(self) -> None:
        """Take over what processes that have ended left behind. A file that cannot be does not keep the others back."""
        held = {file.path for file in self._files}
        errors: list[OSError] = []
        for path in places(self.path):
            try:
                if path.exists() and path not in held and (file := _File.hold(path)) is not None:
                    if file.size:
                        self._files.append(file)
                    else:
                        file.remove()
            except OSError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def append(self, lines: Sequence[bytes]) -> int:
        """Keep `lines`, none of which contains a newline; how many of them, the first ones, there was room for."""
        room = self.limit - sum(file.size for file in self._files)
        sizes = accumulate(LINE_BYTES + len(line) for line in lines)
        fit = lines[: sum(1 for _ in takewhile(lambda size: size <= room, sizes))]
        if not fit:
            return 0
        if not self._files:
            held = next((file for path in places(self.path) if (file := _File.hold(path)) is not None), None)
            if held is None:
                return 0
            self._files.append(held)
        self._files[-1].append(b"".join(b"%08x %b\n" % (crc32(line), line) for line in fit))
        return len(fit)

    def read(self, most: int) -> SpillChunk:
        """The first lines that wait, `most` of one file at most; they wait until they are dropped."""
        file = next(file for file in self._files if file.size > file.begin)
        return file.chunk(file.begin, most)

    def drop(self, chunk: SpillChunk) -> None:
        """What was read is not waited for any more; a file that is read to its end is removed."""
        chunk.file.begin = chunk.end
        if chunk.end == chunk.file.size:
            chunk.file.remove()
            self._files.remove(chunk.file)

    def close(self) -> None:
        """Let go of the files; what is in them stays."""
        while self._files:
            self._files.pop().close()


class _File:
    """One file, held by this process alone."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor
        self.size = os.fstat(descriptor).st_size
        self.begin = 0  # of what waits

    @classmethod
    def hold(cls, path: Path) -> _File | None:
        """The file at `path`, made if there is none; None if another process holds it. What is foreign is an error."""
        if is_database_file(path):  # it may be the store itself, whose locks would be lost by closing it
            raise _foreign(path)
        with ExitStack() as undo:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, PRIVATE)
            undo.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return None
            if not path.exists() or not os.path.samestat(path.stat(), os.fstat(descriptor)):
                return None  # removed by the one that held it
            if not is_spill_line(os.pread(descriptor, BEGIN_BYTES, 0)):
                raise _foreign(path)
            os.ftruncate(descriptor, last_line_end(descriptor))
            sync_folder(path.parent)
            undo.pop_all()
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

    def chunk(self, begin: int, most: int) -> SpillChunk:
        """The lines from `begin` on, up to `most`. What is damaged is left out and counted."""
        lines: list[bytes] = []
        bad, end = 0, begin
        with open(os.dup(self._descriptor), "rb") as reader:
            reader.seek(end)
            while len(lines) < most and end < self.size and end - begin < CHUNK_BYTES:
                line = reader.readline(LONGEST + LINE_BYTES)
                end = end + len(line) if line else self.size  # somebody has cut it
                check, _, content = line.rstrip(b"\n").partition(b" ")
                if check == b"%08x" % crc32(content):
                    lines.append(content)
                    continue
                bad += 1
                while line and not line.endswith(b"\n"):  # it is longer than any that was written
                    line = reader.readline(CHUNK_BYTES)
                    end += len(line)
        return SpillChunk(lines, bad, self, end)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        os.close(self._descriptor)


def _foreign(path: Path) -> FileExistsError:
    return FileExistsError(errno.EEXIST, "not a file of records; AUTOTTS_SPILL names another", str(path))
