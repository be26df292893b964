"""Simulated power cuts: what a disk may hold if the machine stops while a store is written.

The store's own code runs over a SQLite whose file system records every write, sync and deletion. A cut is a position
in that record. What was synced before it is on the disk; of everything else any part may be, in any order, down to
torn sectors. The images of such disks are then opened by the store as usual.
"""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import aiosqlite
import apsw

SECTOR: Final = 512
"""Bytes that a disk writes at once, if it is not interrupted."""
ENDINGS: Final = ("", "-wal", "-journal")
"""Endings of the files that SQLite keeps on disk; the index in `-shm` is made anew."""


class DiskEvent(NamedTuple):
    """Something that happened to a file, or rows that were acknowledged."""

    kind: str  # open, write, truncate, sync, delete or acknowledged
    path: str = ""
    offset: int = 0  # of a write; the size of a truncation
    content: bytes = b""
    is_synced: bool = False  # whether the deletion is on disk at once
    rows: tuple[str, ...] = ()


@dataclass
class DiskFile:
    """One file: its bytes on disk, and what was done to it since the last sync."""

    durable: bytearray = field(default_factory=bytearray)
    pending: list[DiskEvent] = field(default_factory=list)

    def sync(self) -> None:
        """Put everything on disk."""
        for event in self.pending:
            _apply(self.durable, event)
        self.pending.clear()

    def surviving(self, dice: random.Random) -> bytes:
        """Return what a power cut may leave: the synced bytes, and any part of the later ones."""
        image = bytearray(self.durable)
        share = dice.choice((0.0, 0.3, 0.7, 1.0))
        parts = [part for event in self.pending for part in _sectors(event) if dice.random() < share]
        if dice.random() < 0.5:
            dice.shuffle(parts)
        for part in parts:
            if part.kind == "write" and dice.random() < 0.05:  # torn: only its beginning was written
                part = part._replace(content=part.content[: dice.randrange(len(part.content))])
            _apply(image, part, dice)
        return bytes(image)


class Disk:
    """Files by name, as the running system sees them and as they are on disk."""

    def __init__(self, files: Iterable[tuple[str, bytes]]) -> None:
        self.seen = {path: DiskFile(bytearray(content)) for path, content in files}
        self.durable = dict(self.seen)  # entries of the folder that are on disk

    def play(self, event: DiskEvent) -> None:
        """Do what an event says.

        SQLite syncs the folder with the first sync of a log or journal that it created, and with some deletions.
        """
        if event.kind == "open":
            self.seen.setdefault(event.path, DiskFile())
        elif event.kind == "delete":
            self.seen.pop(event.path, None)
            if event.is_synced:
                self.durable = dict(self.seen)
        elif event.kind == "sync":
            self.seen[event.path].sync()
            if self.durable.get(event.path) is not self.seen[event.path]:
                self.durable = dict(self.seen)
        elif event.kind in ("write", "truncate"):
            self.seen[event.path].pending.append(event)

    def surviving(self, dice: random.Random) -> dict[str, bytes]:
        """Return the files that a power cut may leave."""
        entries = {}
        for path in sorted({*self.seen, *self.durable}):
            entry = dice.choice((self.seen.get(path), self.durable.get(path)))
            if entry is not None:
                entries[path] = entry.surviving(dice)
        return entries


def _sectors(event: DiskEvent) -> Iterator[DiskEvent]:
    """Yield the parts of an event that reach the disk independently of each other."""
    if event.kind != "write":
        yield event
        return
    at = 0
    while at < len(event.content):
        end = min(len(event.content), at + SECTOR - (event.offset + at) % SECTOR)
        yield event._replace(offset=event.offset + at, content=event.content[at:end])
        at = end


def _apply(image: bytearray, event: DiskEvent, dice: random.Random | None = None) -> None:
    """Write or truncate. What lies between the old end and the write is zero, or old content of the disk."""
    if event.kind == "truncate":
        del image[event.offset :]
        return
    if gap := max(0, event.offset - len(image)):
        image.extend(bytes(gap) if dice is None or dice.random() < 0.5 else dice.randbytes(gap))
    image[event.offset : event.offset + len(event.content)] = event.content


class RecordingFile(apsw.VFSFile):
    """File of SQLite that records what is done to it."""

    def __init__(self, inherit: str, name: Any, flags: list[int], events: list[DiskEvent]) -> None:
        self._path = "" if name is None else str(name.filename() if isinstance(name, apsw.URIFilename) else name)
        self._events = events
        super().__init__(inherit, name, flags)
        self._record("open")

    def xWrite(self, data: bytes, offset: int) -> None:
        super().xWrite(data, offset)
        self._record("write", offset, bytes(data))

    def xTruncate(self, newsize: int) -> None:
        super().xTruncate(newsize)
        self._record("truncate", newsize)

    def xSync(self, flags: int) -> None:
        super().xSync(flags)
        self._record("sync")

    def _record(self, kind: str, offset: int = 0, content: bytes = b"") -> None:
        if self._path.endswith((".db", *ENDINGS[1:])):  # and no temporary file
            self._events.append(DiskEvent(kind, self._path, offset, content))


class RecordingVFS(apsw.VFS):
    """File system of SQLite that records what is done to its files."""

    NAME: Final = "recording"

    def __init__(self, events: list[DiskEvent]) -> None:
        self._events = events
        super().__init__(self.NAME, "unix")

    def xOpen(self, name: Any, flags: list[int]) -> RecordingFile:
        return RecordingFile("unix", name, flags, self._events)

    def xDelete(self, filename: str, syncdir: bool) -> None:
        super().xDelete(filename, syncdir)
        self._events.append(DiskEvent("delete", filename, is_synced=syncdir))


class RecordedCursor(NamedTuple):
    """The part of a cursor that the store reads."""

    rowcount: int


class RecordedConnection:
    """The part of aiosqlite's connection that a writing store uses, over APSW and the recording file system."""

    def __init__(self, address: str, synchronous: str, checkpoint_pages: int) -> None:
        self._opened = apsw.Connection(
            address, flags=apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_URI, vfs=RecordingVFS.NAME
        )
        self._synchronous = synchronous
        self._opened.execute(f"PRAGMA wal_autocheckpoint = {checkpoint_pages}").fetchall()
        self.text_factory: Any = str

    def __await__(self) -> Generator[Any, None, RecordedConnection]:
        """Connect, which has happened already."""
        yield from ()
        return self

    async def execute(self, statement: str, values: Sequence[Any] = ()) -> RecordedCursor:
        await self.execute_fetchall(statement, values)
        return RecordedCursor(self._opened.changes())

    async def executemany(self, statement: str, rows: Iterable[Sequence[Any]]) -> RecordedCursor:
        before = self._opened.total_changes()
        with errors_of_sqlite3():
            self._opened.executemany(statement, [tuple(row) for row in rows])
        return RecordedCursor(self._opened.total_changes() - before)

    async def execute_fetchall(self, statement: str, values: Iterable[Any] = ()) -> list[Any]:
        weakened = statement.replace("synchronous = FULL", f"synchronous = {self._synchronous}")
        with errors_of_sqlite3():
            return self._opened.execute(weakened, tuple(values)).fetchall()

    async def close(self) -> None:
        self._opened.close()


@contextmanager
def errors_of_sqlite3() -> Iterator[None]:
    """Raise the errors that the store knows in place of those of APSW."""
    try:
        yield
    except apsw.Error as error:
        raise sqlite3.OperationalError(str(error)) from error


class RecordingDriver:
    """Takes the place of aiosqlite in the store, and records what its connections write.

    `synchronous` replaces the store's own setting.
    """

    Connection = aiosqlite.Connection

    def __init__(self, synchronous: str = "FULL", checkpoint_pages: int = 1000) -> None:
        self.events: list[DiskEvent] = []
        self._synchronous = synchronous
        self._checkpoint_pages = checkpoint_pages

    def connect(self, address: str, **_: Any) -> RecordedConnection:
        return RecordedConnection(address, self._synchronous, self._checkpoint_pages)

    def acknowledge(self, *rows: str) -> None:
        """Note that these rows were acknowledged."""
        self.events.append(DiskEvent("acknowledged", rows=rows))

    @contextmanager
    def registered(self) -> Iterator[None]:
        """Make the file system known to SQLite meanwhile."""
        vfs = RecordingVFS(self.events)
        try:
            yield
        finally:
            vfs.unregister()


def disk_of(store: Path) -> Disk:
    """Return the disk with the files of a store, all of which are on it.

    A store that is not there yet counts as an empty file on it, because the store syncs the folder when it makes one.
    """
    paths = [Path(f"{store}{ending}") for ending in ENDINGS]
    contents = {str(path): path.read_bytes() for path in paths if path.exists()}
    return Disk(({str(store): b""} | contents).items())


def write_image(files: dict[str, bytes], store: Path, dice: random.Random) -> None:
    """Write the files of a cut disk, and perhaps an old index."""
    for path, content in files.items():
        Path(path).write_bytes(content)
    for ending in ENDINGS:
        path = f"{store}{ending}"
        if path not in files:
            Path(path).unlink(missing_ok=True)
    index = Path(f"{store}-shm")
    index.unlink(missing_ok=True)
    if dice.random() < 0.5 and str(store) in files:
        index.write_bytes(dice.randbytes(32768))
