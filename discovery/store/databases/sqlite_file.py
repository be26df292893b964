"""Connections to a store's file, which is opened and closed by SQLite alone.

SQLite protects a file with POSIX locks, and a process loses all its POSIX locks on a file when it closes any descriptor
of that file. Reading a single byte of an open store by other means would let other processes delete its log and write
over it. A store's file is therefore created and examined without being opened, or else through SQLite.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import sqlite3
import stat
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Final, NamedTuple

import aiosqlite

from discovery.data.atomic_files import PRIVATE
from discovery.errors import StoreDamaged, StoreError
from discovery.store.databases.connection import newer_store

RETRY_S: Final = 0.01
"""Seconds between retries of operations for which SQLite does not wait."""
LOG, INDEX = "-wal", "-shm"
"""Suffixes of the files that SQLite keeps in the folder of a store."""

FileNumber = tuple[int, int]
"""Device and inode of a file; zeros if there is none."""


class Identity(NamedTuple):
    """Which files are a store."""

    store: FileNumber
    log: FileNumber


def identity_of(path: Path) -> Identity:
    """Return which files are the store at `path` now."""
    return Identity(_number(path), _number(_log_of(path)))


def is_overwritten(path: Path, identity: Identity) -> bool:
    """Return whether the store's file is the same, but not its log: a backup was copied over it and the log removed."""
    now = identity_of(path)
    return now.store == identity.store and now.log != identity.log


def _log_of(path: Path) -> Path:
    return Path(f"{os.path.realpath(path)}{LOG}")


def _number(path: Path) -> FileNumber:
    try:
        status = os.stat(path)
    except OSError:
        return 0, 0
    return status.st_dev, status.st_ino


@asynccontextmanager
async def open_file(
    path: Path, wait_ms: int, *, create: bool = False, newest: int
) -> AsyncIterator[tuple[aiosqlite.Connection, Identity]]:
    """Connect to the store at `path` and yield the connection and the files' identity; `create` makes a missing file.

    Another process's transaction is waited for `wait_ms`. A file that is not a store, or one of a version above
    `newest`, is left unchanged. Raises StoreError.
    """
    await asyncio.to_thread(_prepare, path, create)
    before, identity = _number(path), None
    try:
        opened = await _connected(aiosqlite.connect(_uri(path), uri=True, isolation_level=None))
    except sqlite3.Error as error:
        raise StoreError(f"{path}: {error}") from None
    opened.text_factory = _text
    try:
        if _number(path) != before:
            raise StoreError(f"{path}: the store was replaced while it was being opened; try again")
        await _set(opened, f"busy_timeout = {wait_ms}")
        await _recognise(path, opened, create)
        await _refuse_newer(path, opened, newest)
        for setting in ("secure_delete = ON", "synchronous = FULL", "foreign_keys = ON", "case_sensitive_like = ON"):
            await _set(opened, setting)
        await _write_ahead(opened, wait_ms)
        await opened.execute_fetchall("SELECT name FROM sqlite_master")  # opens the log
        identity = identity_of(path)
        yield opened, identity
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_CORRUPT:
            advice = "the file is damaged: restore a backup (docs/recording.md#backups)"
            raise StoreDamaged(f"{path}: {error}; {advice}") from None
        raise StoreError(f"{path}: {error}") from None
    finally:
        with _overwritten_store_kept(path, identity):
            await opened.close()


@contextmanager
def _overwritten_store_kept(path: Path, identity: Identity | None) -> Iterator[None]:
    """Keep SQLite from writing a removed log into a store that a copy has overwritten in place meanwhile.

    The last connection that closes writes the log into the store's file, unless another one reads the file.
    """
    if identity is None or not is_overwritten(path, identity):
        yield
        return
    with closing(sqlite3.connect(_uri(path), uri=True)) as reading:
        with suppress(sqlite3.Error):
            reading.execute("BEGIN")
            reading.execute("SELECT name FROM sqlite_master").fetchall()
        yield


async def _connected(connection: aiosqlite.Connection) -> aiosqlite.Connection:
    """Connect. If that fails or is cancelled, wait until the connection's thread has ended.

    The thread reports to the event loop even then, and fails if the loop has been closed meanwhile.
    """
    try:
        return await connection
    except BaseException:
        thread: Thread | None = getattr(connection, "_thread", None)
        if thread is not None:
            await asyncio.shield(asyncio.to_thread(thread.join))
        raise


def _uri(path: Path) -> str:
    """Return the URI by which SQLite opens only an existing file; by its name alone it would also be created."""
    return f"{path.absolute().as_uri()}?mode=rw"


def _text(stored: bytes) -> str:
    """Return stored text. Invalid UTF-8 is escaped, so that the row's checksum does not match."""
    return stored.decode(errors="backslashreplace")


def _prepare(path: Path, create: bool) -> None:
    """Create the store's file if it is missing and `create` is set. Raises StoreError if no store can be there."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        if not create:
            raise StoreError(
                f"{path}: there is no store; name it with --store or AUTOTTS_STORE; a proxy makes it when it records, "
                "and so does `autotts import`"
            ) from None
        _create(path)
        return
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from None
    if stat.S_ISDIR(status.st_mode):
        raise StoreError(f"{path}: is a folder; name a file")
    if not stat.S_ISREG(status.st_mode):
        raise StoreError(f"{path}: not a regular file; name one")
    if status.st_nlink > 1:
        raise StoreError(
            f"{path}: the file has {status.st_nlink} names (hard links), and SQLite keeps a separate log for each, "
            "which corrupts a store used by two of them; remove the others, and copy a store by SQLite's `.backup`"
        )
    if not os.access(path, os.R_OK | os.W_OK):
        raise StoreError(f"{path}: Permission denied; this user must be able to read and write it")


def _create(path: Path) -> None:
    """Create an empty file that only its owner can read. Raises StoreError."""
    real = Path(os.path.realpath(path))
    if not real.parent.is_dir():
        raise StoreError(f"{path}: there is no folder {real.parent}")
    try:
        with _locked(real.parent) as folder:
            if not real.exists():
                _clear_leftovers(real)
                _make_file(real)
                with suppress(OSError):  # some network file systems cannot sync folders
                    os.fsync(folder)  # a power cut must not leave a log without its store
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from None


def _clear_leftovers(real: Path) -> None:
    """Remove the log and index of a store that was moved away. Raises StoreError if the log still holds data.

    SQLite would delete such a log unread, or apply it to the new store.
    """
    log = Path(f"{real}{LOG}")
    if log.exists() and log.stat().st_size:
        raise StoreError(
            f"{real}: the store is gone, but its log {log.name} remains and holds records; move the store back, move "
            "the log to the store's new name, or delete the log if the records are not needed"
        )
    for leftover in (log, Path(f"{real}{INDEX}")):
        leftover.unlink(missing_ok=True)


def _make_file(real: Path) -> None:
    with suppress(FileExistsError):
        try:
            os.mknod(real, stat.S_IFREG | PRIVATE)  # without opening it; SQLite gives the log and index the same mode
        except PermissionError:  # some systems reserve mknod for root
            os.close(os.open(real, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, PRIVATE))


@contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """Keep other processes of this program from creating a store in `folder` meanwhile. Yields its descriptor."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # some network file systems cannot lock folders
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


async def _set(opened: aiosqlite.Connection, setting: str) -> None:
    await opened.execute_fetchall(f"PRAGMA {setting}")  # a statement that is not read to its end holds a lock


async def _recognise(path: Path, opened: aiosqlite.Connection, create: bool) -> None:
    """Raise StoreError unless the file is a store or, with `create`, empty. Changes nothing."""
    not_a_store = StoreError(f"{path}: not a store; name a store made by `autotts import`, or a new file")
    try:
        tables = await opened.execute_fetchall("SELECT name FROM sqlite_master WHERE type = 'table'")
        ((pages,),) = await opened.execute_fetchall("PRAGMA page_count")
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_NOTADB:
            raise not_a_store from None
        raise
    if not pages and not create:
        raise not_a_store
    if tables and "autotts_store" not in {name for (name,) in tables}:
        raise StoreError(f"{path}: a database, but not a store of this program; name another file")


async def _refuse_newer(path: Path, opened: aiosqlite.Connection, newest: int) -> None:
    """Raise StoreError if a newer program wrote the store. Changes nothing, not even the kind of its log."""
    with suppress(sqlite3.OperationalError):  # an empty file; other faults of the table are found by `migrate`
        for (version,) in await opened.execute_fetchall("SELECT version FROM autotts_store"):
            if isinstance(version, int) and version > newest:
                raise newer_store(path, version, newest)


async def _write_ahead(opened: aiosqlite.Connection, wait_ms: int) -> None:
    """Switch to a write-ahead log. SQLite does not wait here for other transactions, whatever its busy timeout."""
    until = time.monotonic() + wait_ms / 1000
    while True:
        try:
            await opened.execute_fetchall("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() >= until:
                raise
        await asyncio.sleep(RETRY_S)


async def truncate_log(opened: aiosqlite.Connection) -> bool:
    """Move the log into the store's file and empty it; return whether another connection prevented that."""
    ((is_busy, _, _),) = await opened.execute_fetchall("PRAGMA wal_checkpoint(TRUNCATE)")
    return bool(is_busy)
