"""The single writer of a store: a queue of work that one task carries out in shared transactions."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import aiosqlite

from discovery.errors import StoreError, UnstorableValue

T = TypeVar("T")
Work = Callable[[aiosqlite.Connection], Awaitable[Any]]

MAX_WRITES_PER_TRANSACTION: Final = 256
_ROW_ERRORS: Final = (
    *(sqlite3.IntegrityError, sqlite3.DataError, sqlite3.InterfaceError),
    *(OverflowError, UnicodeEncodeError),
)
"""Errors that are raised only for a value that no column can hold."""


class _Write(NamedTuple):
    """Work to do inside a transaction, and the future of its result."""

    work: Work
    done: asyncio.Future[Any]


class WriteQueue:
    """Queue of writes to the store at `path`. `run` carries them out until `close` is called."""

    def __init__(self, path: Path, connection: aiosqlite.Connection) -> None:
        self.connection = connection
        self.transactions = 0  # committed
        self._path = path
        self._queue: asyncio.Queue[_Write | None] = asyncio.Queue()  # None ends `run`

    async def write(self, work: Callable[[aiosqlite.Connection], Awaitable[T]]) -> T:
        """Do `work` inside a transaction, shared with other queued work, and return when it is on disk.

        If it raises, only its own changes are undone. Cancelling the caller does not undo it.
        """
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait(_Write(work, done))
        return await done

    def close(self) -> None:
        """Let `run` return once everything queued so far is done."""
        self._queue.put_nowait(None)

    async def run(self) -> None:
        """Carry out queued writes."""
        while (first := await self._queue.get()) is not None:
            group = [first]
            closing = False
            while len(group) < MAX_WRITES_PER_TRANSACTION and not self._queue.empty():
                following = self._queue.get_nowait()
                if following is None:
                    closing = True
                    break
                group.append(following)
            await self._commit(group)
            if closing:
                return

    async def _commit(self, group: Sequence[_Write]) -> None:
        """Do a group of writes in one transaction; a write that fails is rolled back alone."""
        outcomes: list[tuple[_Write, Any, Exception | None]] = []
        try:
            await self.connection.execute("BEGIN IMMEDIATE")
            for write in group:
                await self.connection.execute("SAVEPOINT one")
                try:
                    outcomes.append((write, await write.work(self.connection), None))
                except Exception as error:  # passed on to the write's caller; the other writes go on
                    await self.connection.execute("ROLLBACK TO one")
                    outcomes.append((write, None, error))
                await self.connection.execute("RELEASE one")
            await self.connection.execute("COMMIT")
            self.transactions += 1
        except sqlite3.Error as error:
            if self.connection.in_transaction:
                await self.connection.execute("ROLLBACK")
            failure = StoreError(f"{self._path}: {error}; nothing was written")
            outcomes = [(write, None, failure) for write in group]
        for write, result, problem in outcomes:
            if write.done.done():  # its caller was cancelled
                continue
            if problem is None:
                write.done.set_result(result)
            else:
                write.done.set_exception(to_store_error(self._path, problem))


def to_store_error(path: Path, error: Exception) -> Exception:
    """Return the error to raise to the caller of work that failed with `error`."""
    is_binding = isinstance(error, sqlite3.ProgrammingError) and "binding" in str(error)
    if isinstance(error, _ROW_ERRORS) or is_binding:
        return UnstorableValue(f"{path}: {error}")
    return StoreError(f"{path}: {error}") if isinstance(error, sqlite3.Error) else error
