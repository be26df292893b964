"""The single writer of a store: a queue of work that one task carries out in shared transactions."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, NamedTuple, TypeVar

from discovery.errors import StoreError, UncertainCommit, UnstorableValue
from discovery.store.databases.connection import DatabaseConnection

T = TypeVar("T")
Work = Callable[[DatabaseConnection], Awaitable[Any]]

MAX_WRITES_PER_TRANSACTION: Final = 256


class _Write(NamedTuple):
    """Work to do inside a transaction, and the future of its result."""

    work: Work
    done: asyncio.Future[Any]


class WriteQueue:
    """Queue of writes to a store. `run` carries them out until `close` is called."""

    def __init__(self, connection: DatabaseConnection) -> None:
        self.connection = connection
        self.transactions = 0  # committed
        self._queue: asyncio.Queue[_Write | None] = asyncio.Queue()  # None ends `run`
        self._is_closed = False

    async def write(self, work: Callable[[DatabaseConnection], Awaitable[T]]) -> T:
        """Do `work` inside a transaction, shared with other queued work, and return when it is on disk.

        If it raises, only its own changes are undone. Cancelling the caller does not undo it. Raises StoreError if the
        store is closed or its writer has failed.
        """
        if self._is_closed:
            raise self._closed()
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait(_Write(work, done))
        return await done

    def close(self) -> None:
        """Let `run` return once everything queued so far is done. Later writes fail."""
        self._is_closed = True
        self._queue.put_nowait(None)

    async def run(self) -> None:
        """Carry out queued writes. If it fails, so do those that are still queued: nobody else would answer them."""
        try:
            await self._carry_out()
        finally:
            self._is_closed = True
            while not self._queue.empty():
                left = self._queue.get_nowait()
                if left is not None and not left.done.done():
                    left.done.set_exception(self._closed())

    async def _carry_out(self) -> None:
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
            await self.connection.begin()
            for write in group:
                await self.connection.execute("SAVEPOINT one")
                try:
                    outcomes.append((write, await write.work(self.connection), None))
                except Exception as error:  # passed on to the write's caller; the other writes go on
                    await self.connection.execute("ROLLBACK TO one")
                    outcomes.append((write, None, error))
                await self.connection.execute("RELEASE one")
            await self.connection.commit()
            self.transactions += 1
        except StoreError as error:
            await self.connection.roll_back()
            is_known = not isinstance(error, UncertainCommit)
            failure = StoreError(f"{error}; nothing was written") if is_known else error
            outcomes = [(write, None, failure) for write in group]
        except BaseException as error:  # `run` ends; the callers must not wait for it
            await self.connection.roll_back()
            failure = StoreError(f"{self.connection.place}: the writer failed: {type(error).__name__}")
            for write in group:
                if not write.done.done():
                    write.done.set_exception(failure)
            raise
        for write, result, problem in outcomes:
            if write.done.done():  # its caller was cancelled
                continue
            if problem is None:
                write.done.set_result(result)
            else:
                write.done.set_exception(self._storable(problem))

    def _closed(self) -> StoreError:
        return StoreError(f"{self.connection.place}: the store is closed; nothing was written")

    def _storable(self, error: Exception) -> Exception:
        """Return the error to raise to the caller of work that failed with `error`."""
        if isinstance(error, (OverflowError, UnicodeEncodeError)):  # raised by the conversion to a row
            return UnstorableValue(f"{self.connection.place}: {error}")
        return error
