"""Keep one connection to the store open: reopen it after a failure, and remove expired records.

The store may be down, locked, full or slow at any time. A transaction that takes too long keeps running in the
background, and its records are written elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from discovery.errors import StoreError, UnstorableValue
from discovery.store import Store, StoreItem, StorePlace
from discovery.store.records import stored_time

logger = logging.getLogger(__name__)

BUSY_TIMEOUT_MS: Final = 1000
"""Maximum milliseconds to wait for another process's transaction."""
TRANSACTION_TIMEOUT_S: Final = 2.0
"""Maximum seconds of a transaction before the store counts as failed."""
RETRY_S: Final = 0.5
"""Seconds between attempts to open the store."""
EXPIRY_S: Final = 3600.0
"""Seconds between removals of expired records."""

STORED: Final = "stored"
DROPPED: Final = "dropped"
"""Outcome of a recording or feedback whose request is not in the store, because it was forgotten or lost."""
UNWRITABLE: Final = "unwritable"


class StoreConnection:
    """The connection of one proxy to its store. It needs a running event loop.

    `report` is called with the text of each failure. `on_change` is called with False when the connection is lost, and
    with True when the store is opened and every hour after that.
    """

    def __init__(
        self,
        place: StorePlace,
        retain: timedelta | None,
        report: Callable[[str], None],
        on_change: Callable[[bool], None],
    ) -> None:
        self.store: Store | None = None  # None while the store cannot be used
        self.tried = asyncio.Event()  # set when the first attempt to open the store has ended
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._place = place
        self._retain = retain
        self._report = report
        self._on_change = on_change
        self._failed = asyncio.Event()
        self._slow: asyncio.Task[list[StoreItem]] | None = None  # a transaction that takes too long

    @property
    def is_stuck(self) -> bool:
        """Whether a transaction that took too long is still running."""
        return self._slow is not None

    async def run(self) -> None:
        """Keep the store open until `close` is called."""
        while not self.closed.done():
            try:
                async with Store.open(self._place, create=True, wait_ms=BUSY_TIMEOUT_MS) as store:
                    if self.closed.done():  # closed while it was being opened
                        return
                    self._failed.clear()
                    self.store = store
                    self.tried.set()
                    await self._maintain(store)
            except StoreError as error:
                self._report(str(error))
            except Exception as error:  # any failure: the store is opened again
                self._report(type(error).__name__)
            finally:
                self.store = None
                self.tried.set()
                self._on_change(False)
            await asyncio.wait({self.closed}, timeout=RETRY_S)

    def close(self) -> None:
        """Stop writing to the store and let `run` end."""
        self.closed.set_result(None)
        self._failed.set()
        self.store = None

    async def write(self, items: Sequence[StoreItem], outcome: str = STORED) -> list[str] | None:
        """Write items in one transaction. Return the outcome of each: `outcome`, DROPPED or UNWRITABLE.

        Returns None if the store cannot be used.
        """
        store = self.store
        if store is None or self._failed.is_set():
            return None
        if self._fail_if_moved(store):
            return None
        task = asyncio.create_task(store.add_all(items))
        either: set[asyncio.Future[Any]] = {task, self.closed}
        await asyncio.wait(either, timeout=TRANSACTION_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            self._slow = task
            task.add_done_callback(self._end_slow)
            self._fail(f"{self._place}: a transaction takes longer than {TRANSACTION_TIMEOUT_S:g} s")
            return None
        try:
            dropped = set(map(id, task.result()))
        except Exception as error:
            if isinstance(error, StoreError) and not isinstance(error, UnstorableValue):
                self._fail(str(error))
                return None
            return await self._write_each(items, outcome, error)  # at least one item cannot be stored
        if self._fail_if_moved(store):
            return None
        return [DROPPED if id(item) in dropped else outcome for item in items]

    def _fail_if_moved(self, store: Store) -> bool:
        """Mark the store as failed if its file is no longer the one that was opened, and return whether it is not."""
        is_moved = store.is_moved
        if is_moved:
            self._fail(f"{self._place}: the store has been moved, removed or overwritten")
        return is_moved

    async def _write_each(self, items: Sequence[StoreItem], outcome: str, error: Exception) -> list[str] | None:
        if len(items) == 1:
            logger.error("cannot store a record: %s", type(error).__name__)
            return [UNWRITABLE]
        outcomes: list[str] = []
        for item in items:
            item_outcome = await self.write([item], outcome)
            if item_outcome is None:
                return None
            outcomes += item_outcome
        return outcomes

    async def _maintain(self, store: Store) -> None:
        """Remove expired records and sum the usage every EXPIRY_S seconds. Return when the store fails."""
        while not self._failed.is_set():
            self._on_change(True)
            if self._retain is not None:
                await store.expire(stored_time(datetime.now(UTC) - self._retain))
            await store.sum_usage()
            with suppress(TimeoutError):
                async with asyncio.timeout(EXPIRY_S):
                    await self._failed.wait()

    def _fail(self, reason: str) -> None:
        """Mark the store as failed, so that `run` closes and reopens it."""
        self.store = None
        self._failed.set()
        self._report(reason)
        self._on_change(False)

    def _end_slow(self, task: asyncio.Task[list[StoreItem]]) -> None:
        """Clear a slow transaction that has ended. Its records have been written to the spill file meanwhile."""
        self._slow = None
        if not task.cancelled() and (error := task.exception()) is not None:
            self._report(str(error))
