"""Append-only logs of JSON lines in which each line holds a hash of the line before it.

A line that was changed, moved or removed breaks the chain and is found by `verify`. A crash may leave the last line
incomplete ("torn"); such a line was never acknowledged, and its owner decides whether to refuse or to remove it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from discovery.data.atomic_files import atomic_write, sync_folder
from discovery.errors import DamagedLog

Record = TypeVar("Record")


def hash_line(line: bytes) -> str:
    """Return the SHA-256 of a line, without its newline."""
    return sha256(line).hexdigest()


def append_line(path: Path, line: bytes) -> None:
    """Append a line to a file; it is on the disk when this returns. Raises OSError."""
    with path.open("ab") as file:
        file.write(line + b"\n")
        file.flush()
        os.fsync(file.fileno())


def begins_as(torn: bytes, start: bytes) -> bool:
    """Return whether an incomplete line may be one of a log whose lines begin with `start`."""
    return torn[: len(start)] == start[: len(torn)]


@dataclass(frozen=True)
class ChainFormat(Generic[Record]):
    """How the lines of one kind of log are parsed and linked."""

    origin: str  # stands in the first line for the hash of a line before it
    parse: Callable[[bytes], Record]  # raises ValueError
    previous_hash: Callable[[Record], str]  # the hash a record holds of the line before it
    own_hash: Callable[[bytes, Record], str] = lambda line, _: hash_line(line)  # the hash the next record must hold
    starts_at_origin: bool = True  # False if the first line may follow lines that were moved away

    def verify(self, lines: Iterable[bytes], name: object) -> list[Record]:
        """Parse lines and check that each follows the one before. Raises DamagedLog, which names the first bad line.

        `name` says in the message where the lines are.
        """
        records: list[Record] = []
        expected = self.origin if self.starts_at_origin else None
        for number, line in enumerate(lines, 1):
            try:
                record = self.parse(line)
            except ValueError as error:
                raise DamagedLog(f"{name}: line {number} is not a valid record: {error}") from None
            if expected is not None and self.previous_hash(record) != expected:
                place = f"does not follow line {number - 1}" if records else "is not the first line of the log"
                raise DamagedLog(f"{name}: line {number} {place}; a line was changed, moved or removed")
            expected = self.own_hash(line, record)
            records.append(record)
        return records


class LogContent(NamedTuple):
    """The bytes of a log, not verified."""

    lines: list[bytes]  # complete lines, without their newlines
    torn: bytes  # an incomplete last line; empty if there is none

    @property
    def size(self) -> int:
        """Bytes of the complete lines, newlines included."""
        return sum(len(line) + 1 for line in self.lines)


class LogFile:
    """The lines of a log in a file; a file that does not exist has none.

    The caller makes sure that only one process writes at a time.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self) -> LogContent:
        """Read the lines without verifying them. Raises DamagedLog if the file cannot be read."""
        try:
            *lines, torn = self.path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return LogContent([], b"")
        except OSError as error:
            raise DamagedLog(f"{self.path}: {error.strerror}") from None
        return LogContent(lines, torn)

    def append(self, line: bytes) -> None:
        """Append a line; it is on the disk when this returns, but a crash may leave it torn. Raises OSError."""
        append_line(self.path, line)

    def rewrite(self, lines: Iterable[bytes]) -> None:
        """Replace the file by `lines` at once, so that no crash leaves a torn line. Raises FileWriteError, OSError."""
        with atomic_write(self.path) as file:
            file.write(b"".join(line + b"\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
        sync_folder(self.path.resolve().parent)

    def remove_torn_line(self) -> None:
        """Truncate the file to its complete lines. Raises OSError, and DamagedLog if the file cannot be read."""
        content = self.load()
        if content.torn:
            os.truncate(self.path, content.size)


class HashChainedLog(LogFile, Generic[Record]):
    """A log in a file whose lines form a chain."""

    def __init__(self, path: Path, chain: ChainFormat[Record]) -> None:
        super().__init__(path)
        self._chain = chain

    def verify(self, lines: Iterable[bytes]) -> list[Record]:
        """Return the records of lines of this file. Raises DamagedLog, which names the first bad line."""
        return self._chain.verify(lines, self.path)
