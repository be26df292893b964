"""Places of a ledger: the lines of a file, or the rows of a table in PostgreSQL. `ledger.py` says what is in a line."""

from __future__ import annotations

import fcntl
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from discovery.data.atomic_files import open_lock
from discovery.data.hash_chained_log import LogFile
from discovery.errors import DamagedLog, FileWriteError
from discovery.promotion.storage.tables import LEDGER, LEDGER_TABLE, changing_ledger, reading
from discovery.store.databases.blocking import BlockingConnection
from discovery.store.databases.places import DatabaseUrl


class LedgerStorage(ABC):
    """The place of a ledger. Only one object may use it at a time, in one thread."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Where the lines are, in messages."""

    @abstractmethod
    def lines(self) -> list[bytes]:
        """Return the lines, not verified. Raises DamagedLog, or StoreError."""

    @abstractmethod
    def add(self, known: Sequence[bytes], added: Sequence[bytes]) -> None:
        """Add lines to those that are known to be there. Raises FileWriteError or StoreError; nothing is added then."""

    @abstractmethod
    def locked(self) -> AbstractContextManager[None]:
        """Wait until no other process has locked the ledger, and lock it. Raises FileWriteError or StoreError."""


class LedgerFile(LedgerStorage):
    """A ledger in a file, with its lock in another file beside it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._log = LogFile(path)

    @property
    def name(self) -> str:
        return str(self._path)

    def lines(self) -> list[bytes]:
        content = self._log.load()
        if content.torn:
            raise DamagedLog(f"{self._path}: the last line is incomplete")
        return content.lines

    def add(self, known: Sequence[bytes], added: Sequence[bytes]) -> None:
        self._log.rewrite([*known, *added])

    @contextmanager
    def locked(self) -> Iterator[None]:
        lock = self._path.with_name(f"{self._path.name}.lock")
        try:
            descriptor = open_lock(lock)
        except OSError as error:
            raise FileWriteError(f"{lock}: {error.strerror}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


class LedgerDatabase(LedgerStorage):
    """A ledger in a database. The lock is held by a transaction, which is committed when it is released."""

    def __init__(self, url: DatabaseUrl) -> None:
        self._url = url
        self._locking: BlockingConnection | None = None

    @property
    def name(self) -> str:
        return f"{self._url}, table {LEDGER}"

    def lines(self) -> list[bytes]:
        if self._locking is not None:
            return _lines(self._locking)
        with reading(self._url) as connection:
            return _lines(connection)

    def add(self, known: Sequence[bytes], added: Sequence[bytes]) -> None:
        if self._locking is None:
            with self.locked():
                self.add(known, added)
            return
        self._locking.execute(LEDGER_TABLE)
        rows = list(enumerate(added, len(known) + 1))  # a number that another process has used is refused
        self._locking.execute_many(f"INSERT INTO {LEDGER} (number, line) VALUES (?, ?)", rows)

    @contextmanager
    def locked(self) -> Iterator[None]:
        with changing_ledger(self._url) as connection, connection.transaction():
            self._locking = connection
            try:
                yield
            finally:
                self._locking = None


def _lines(connection: BlockingConnection) -> list[bytes]:
    if not connection.has_table(LEDGER):
        return []
    rows = connection.fetch_all(f"SELECT line FROM {LEDGER} ORDER BY number")
    return [bytes(line) for (line,) in rows]
