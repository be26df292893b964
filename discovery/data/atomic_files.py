"""Write files atomically and privately, and never over others' files; helpers for locking, syncing and lines."""

from __future__ import annotations

import os
import secrets
import sqlite3
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, Final, NamedTuple

from discovery.data.safe_json import parse_json
from discovery.errors import FileWriteError

BLOCK: Final = 1 << 16
"""Bytes read at a time when looking for the last line end."""
PRIVATE: Final = 0o600
"""Permissions of files that hold the text of questions or answers."""
DATABASE_FILES: Final = ("", "-wal", "-shm", "-journal")
"""Suffixes of the files that SQLite keeps for one database."""
SMALLEST_DATABASE: Final = 512
"""Bytes of the smallest SQLite database: one page of the smallest size."""
_NO_DATABASE: Final = {sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CANTOPEN}


@contextmanager
def atomic_write(path: Path, *, private: bool = False) -> Iterator[IO[bytes]]:
    """Open a file to write to; it replaces `path` when the context ends without an error. Raises FileWriteError.

    It keeps the mode of the file it replaces. A new file gets the mode that the umask allows, or with `private` one
    that only its owner can read.
    """
    _refuse_device(path, str(path))
    _refuse_database(path, str(path))
    unfinished = path.parent / f".autotts-{secrets.token_hex(8)}"  # beside the link, if it is one, which is replaced
    try:
        with create_exclusively(unfinished, PRIVATE if private else 0o666) as file:
            try:
                yield file
                file.flush()
                if (mode := _mode(path)) is not None:
                    os.fchmod(file.fileno(), mode)
                unfinished.replace(path)
            except BaseException:
                unfinished.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise FileWriteError(f"{path}: {error.strerror}") from None


def create_exclusively(path: Path, mode: int = 0o666) -> IO[bytes]:
    """Create a file and open it for writing; the umask applies to `mode`.

    Raises OSError if the path exists, even as a link.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, mode), "wb")


def open_lock(path: Path) -> int:
    """Open a file that is used only for locking; create it if missing. Raises OSError, also if it is a link."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _mode(path: Path) -> int | None:
    """Return the permissions of the regular file at `path`, or None if there is none."""
    try:
        mode = path.lstat().st_mode
    except OSError:
        return None
    return stat.S_IMODE(mode) if stat.S_ISREG(mode) else None


def readable_warning(path: Path, content: str) -> str | None:
    """Return a warning if other users may read the file at `path`, which holds `content`; None if there is none."""
    try:
        is_readable = path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH)
    except OSError:
        return None
    return f"{path}: other users can read this file, which holds {content}; run `chmod 600`" if is_readable else None


def check_writable_path(path: Path, option: str) -> None:
    """Raise FileWriteError, before costly work, if `path` could not be written."""
    if not path.resolve().parent.is_dir():
        raise FileWriteError(f"{option} {path}: there is no folder {path.resolve().parent}")
    if path.is_dir():
        raise FileWriteError(f"{option} {path}: is a folder; name a file")
    _refuse_device(path, f"{option} {path}")
    _refuse_database(path, f"{option} {path}")


def _refuse_device(path: Path, subject: str) -> None:
    """Raise FileWriteError for what a file would replace, but could not stand for, such as /dev/null or a pipe."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise FileWriteError(f"{subject}: is a device, pipe or socket; name a file")


class OutputKind(NamedTuple):
    """A kind of file that a command writes, and how one is recognised."""

    name: str
    is_kind: Callable[[Path], bool]  # raises OSError or ValueError for some files of other kinds


def json_object(name: str, *keys: str) -> OutputKind:
    """Return the kind of JSON objects with these keys."""
    return OutputKind(name, lambda path: _have(keys, parse_json(path.read_bytes())))


def json_list(name: str, *keys: str) -> OutputKind:
    """Return the kind of JSON lists of objects with these keys."""

    def is_kind(path: Path) -> bool:
        content = parse_json(path.read_bytes())
        return isinstance(content, list) and _have(keys, *content)

    return OutputKind(name, is_kind)


def json_mapping(name: str, *keys: str) -> OutputKind:
    """Return the kind of JSON objects whose values are objects with these keys."""

    def is_kind(path: Path) -> bool:
        content = parse_json(path.read_bytes())
        return isinstance(content, Mapping) and bool(content) and _have(keys, *content.values())

    return OutputKind(name, is_kind)


def _have(keys: tuple[str, ...], *objects: object) -> bool:
    return all(isinstance(item, Mapping) and all(key in item for key in keys) for item in objects)


def check_output(path: Path, option: str, kind: OutputKind) -> None:
    """Raise FileWriteError, before costly work, if `path` could not be written or holds a file of another kind."""
    check_writable_path(path, option)
    if not path.is_file():
        return
    try:
        is_replaceable = path.stat().st_size == 0 or kind.is_kind(path)
    except (OSError, ValueError):
        is_replaceable = False
    if not is_replaceable:
        raise FileWriteError(
            f"{option} {path}: the file is not {kind.name} and would be lost; name another file, or move it away"
        )


def is_database_file(path: Path) -> bool:
    """Return whether `path` is an SQLite database, or the log, index or journal of one.

    The database is opened by SQLite alone and without locking, because closing any descriptor of a file drops the locks
    that this process may hold on it.
    """
    real = Path(os.path.realpath(path))
    endings = (end for end in DATABASE_FILES if real.name.endswith(end) and real.name != end)
    return any(_is_database(real.with_name(real.name.removesuffix(end))) for end in endings)


def _is_database(path: Path) -> bool:
    if not path.is_file() or path.stat().st_size < SMALLEST_DATABASE:  # SQLite takes a shorter file for an empty one
        return False
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro&immutable=1", uri=True)) as connection:
            connection.execute("PRAGMA schema_version").fetchone()
    except sqlite3.DatabaseError as error:
        return error.sqlite_errorcode & 0xFF not in _NO_DATABASE
    return True


def _refuse_database(path: Path, shown: str) -> None:
    """Raise FileWriteError rather than replace a database that another process may be using."""
    if is_database_file(path):
        raise FileWriteError(f"{shown}: is a database, which is never overwritten; name another file")


def sync_folder(folder: Path) -> None:
    """Sync a folder, so that renames and new names in it survive a power cut. Raises OSError."""
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def last_line_end(descriptor: int) -> int:
    """Return the offset after the last line end of an open file. Later bytes are of an incomplete line."""
    end = os.fstat(descriptor).st_size
    while end > 0:
        begin = max(0, end - BLOCK)
        at = os.pread(descriptor, end - begin, begin).rfind(b"\n")
        if at >= 0:
            return begin + at + 1
        end = begin
    return 0
