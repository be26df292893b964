"""Spill files, which hold records while the store is unavailable. A file is removed once it is read back completely.

When `append` returns, the lines are on disk. A line is the CRC of its content and the content, so a line that is
incomplete after a crash is detected and dropped. All methods block, and only one thread may call them at a time.
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
from proxy.spill_paths import BEGIN_BYTES, candidate_paths, is_spill_line

LINE_BYTES: Final = BEGIN_BYTES + 1
"""Bytes of a line in addition to its content."""
MAX_LINE_BYTES: Final = 64 * 2**20
"""Maximum bytes of a line's content. A longer line counts as damaged."""
CHUNK_BYTES: Final = 32 * 2**20
"""Bytes after which a chunk ends, even if it has few lines."""


class SpillChunk(NamedTuple):
    """Consecutive lines of a file."""

    lines: Sequence[bytes]  # content of the intact lines, without their CRC
    damaged: int  # number of damaged lines
    file: _File
    end: int  # offset in the file, in bytes


class SpillFiles:
    """The files at `path`, `path.1`, … that this process has locked. All methods raise OSError."""

    def __init__(self, path: Path, limit: int) -> None:
        self.path = path
        self.limit = limit  # total bytes of all files
        self._files: list[_File] = []

    @property
    def size(self) -> int:
        """Bytes that are not read back yet."""
        return sum(file.size - file.begin for file in self._files)

    def adopt(self) -> None:
        """Take over the files of processes that have ended. A file that fails does not affect the others."""
        held = {file.path for file in self._files}
        errors: list[OSError] = []
        for path in candidate_paths(self.path):
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
        """Append as many of `lines` as the limit allows, and return how many. They must not contain newlines."""
        room = self.limit - sum(file.size for file in self._files)
        sizes = accumulate(LINE_BYTES + len(line) for line in lines)
        fit = lines[: sum(1 for _ in takewhile(lambda size: size <= room, sizes))]
        if not fit:
            return 0
        if not self._files:
            held = next((file for path in candidate_paths(self.path) if (file := _File.hold(path)) is not None), None)
            if held is None:
                return 0
            self._files.append(held)
        self._files[-1].append(b"".join(b"%08x %b\n" % (crc32(line), line) for line in fit))
        return len(fit)

    def read(self, max_lines: int) -> SpillChunk:
        """Return the first lines of one file, at most `max_lines`. They stay in the file until `drop` is called."""
        file = next(file for file in self._files if file.size > file.begin)
        return file.chunk(max_lines)

    def drop(self, chunk: SpillChunk) -> None:
        """Mark a chunk as read back. A file that is read to its end is removed."""
        chunk.file.begin = chunk.end
        if chunk.end == chunk.file.size:
            chunk.file.remove()
            self._files.remove(chunk.file)

    def close(self) -> None:
        """Close the files. Their content stays."""
        while self._files:
            self._files.pop().close()


class _File:
    """One file, locked by this process."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor
        self.size = os.fstat(descriptor).st_size
        self.begin = 0  # offset of the first line that is not read back

    @classmethod
    def hold(cls, path: Path) -> _File | None:
        """Open or create the file at `path` and lock it. Return None if another process has locked it.

        Raises FileExistsError if it is not a spill file.
        """
        if is_database_file(path):  # closing a file of the store would release SQLite's locks
            raise _foreign(path)
        with ExitStack() as undo:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, PRIVATE)
            undo.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return None
            if not path.exists() or not os.path.samestat(path.stat(), os.fstat(descriptor)):
                return None  # the process that had locked it has removed it
            if not is_spill_line(os.pread(descriptor, BEGIN_BYTES, 0)):
                raise _foreign(path)
            os.ftruncate(descriptor, last_line_end(descriptor))
            sync_folder(path.parent)
            undo.pop_all()
            return cls(path, descriptor)

    def append(self, data: bytes) -> None:
        """Write all of `data` to disk, or none of it."""
        written = 0
        try:
            while written < len(data):
                written += os.pwrite(self._descriptor, data[written:], self.size + written)
            os.fdatasync(self._descriptor)
        except OSError:
            os.ftruncate(self._descriptor, self.size)
            raise
        self.size += len(data)

    def chunk(self, max_lines: int) -> SpillChunk:
        """Return at most `max_lines` of the lines that are not read back. Damaged lines are counted and skipped."""
        lines: list[bytes] = []
        damaged, end = 0, self.begin
        with open(os.dup(self._descriptor), "rb") as reader:
            reader.seek(end)
            while len(lines) < max_lines and end < self.size and end - self.begin < CHUNK_BYTES:
                line = reader.readline(MAX_LINE_BYTES + LINE_BYTES)
                end = end + len(line) if line else self.size  # no line: the file was truncated from outside
                check, _, content = line.rstrip(b"\n").partition(b" ")
                if check == b"%08x" % crc32(content):
                    lines.append(content)
                    continue
                damaged += 1
                while line and not line.endswith(b"\n"):  # longer than any line that is written
                    line = reader.readline(CHUNK_BYTES)
                    end += len(line)
        return SpillChunk(lines, damaged, self, end)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        os.close(self._descriptor)


def _foreign(path: Path) -> FileExistsError:
    return FileExistsError(errno.EEXIST, "not a spill file; set AUTOTTS_SPILL to another path", str(path))
