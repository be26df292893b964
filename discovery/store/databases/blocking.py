"""Connection to a PostgreSQL database for code that is not asynchronous, such as commands and threads."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from threading import Thread
from types import TracebackType
from typing import Any, Self, TypeVar

from discovery.store.databases.postgres import PostgresConnection

T = TypeVar("T")


class BlockingConnection:
    """A connection whose statements run in an event loop in a thread of its own, so that any thread may wait for them.

    Use it as a context. Its methods raise StoreError.
    """

    def __init__(self, connection: PostgresConnection) -> None:
        self._connection = connection
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="autotts-database", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self._wait(self._connection.close())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def execute(self, statement: str, values: Sequence[Any] = ()) -> int:
        """Run a statement; return how many rows it changed."""
        return self._wait(self._connection.execute(statement, values))

    def execute_many(self, statement: str, rows: Sequence[Sequence[Any]]) -> None:
        """Run a statement once for each row of values."""
        self._wait(self._connection.execute_many(statement, rows))

    def fetch_all(self, statement: str, values: Sequence[Any] = ()) -> list[Any]:
        """Return all rows of a query, as tuples."""
        return self._wait(self._connection.fetch_all(statement, values))

    def has_table(self, name: str) -> bool:
        """Return whether there is a table of this name."""
        return self._wait(self._connection.has_table(name))

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Wait until no other connection with the same lock is in a transaction, and commit one at the end."""
        self._wait(self._connection.begin())
        try:
            yield
            self._wait(self._connection.commit())
        except BaseException:
            self._wait(self._connection.roll_back())
            raise

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Return the result of `work`. It is cancelled if this thread is interrupted while it waits."""
        running = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return running.result()
        except BaseException:
            running.cancel()
            raise
