"""Write records to the store, off the request path.

A request puts its record into a bounded queue and does not wait. One task writes the queued records, many in each
transaction. While the store is unavailable (down, locked, full or slow), records go to a spill file, which is read back
once the store is available. The order is kept: no record overtakes the records in the spill file. If the spill file is
full too, records stay in the queue. Records that arrive at a full queue are lost, counted and logged.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from discovery.data.atomic_files import readable_warning
from discovery.errors import StoreError
from discovery.store import ServedEpisode, Store, StoreItem
from proxy.errors import RecordsAway
from proxy.recording import store_connection
from proxy.recording.record_conversion import QueuedRecord, convert_all, decode_line, encode_line, make_item
from proxy.recording.spill_file import SpillFiles
from proxy.recording.store_connection import DROPPED, STORED, UNWRITABLE, StoreConnection
from proxy.settings import Settings, StoreText
from proxy.spill_paths import default_path
from proxy.telemetry.metrics import Metrics

T = TypeVar("T")
Destination = Callable[[Sequence[StoreItem]], Awaitable[Sequence[str | None] | None]]
"""Function that writes items and returns the outcome of each, or None if nothing could be written.

If not all items fit, the outcomes are None from the first item that does not.
"""

logger = logging.getLogger(__name__)

GROUP: Final = 256
"""Maximum number of records in one transaction."""
ENOUGH: Final = 32
"""Number of records that are written without waiting for more."""
LINGER_S: Final = 0.1
"""Seconds that fewer records wait for more, because a transaction of one costs as much as one of many."""
FIRST_OPEN_S: Final = 10.0
"""Maximum seconds that a reader waits until the store is opened for the first time."""
FLUSH_S: Final = 10.0
"""Seconds to write queued records at shutdown. After half of them they go to the spill file."""
LOSS_LOG_S: Final = 60.0
"""Minimum seconds between log lines about lost records."""
RECENT: Final = 20_000
"""Number of recent requests whose owner is known without the store."""
MOST_SHARED: Final = 256
"""Maximum number of owners that recent requests share."""

SPILLED, RECOVERED = "spilled", "recovered"
"""Outcomes of records that are, or were, in the spill file."""
STORE: Final = "the store is unavailable"
FILE: Final = "the spill file is unavailable"
"""Kinds of problems, as they are logged."""


class RequestOwner(NamedTuple):
    """The tenant of a request, and the controller that served it on a model."""

    tenant: str
    stage: str | None  # rollout stage; None if the request named its controller
    digest: str  # of the controller
    model: str


@lru_cache(MOST_SHARED)
def shared_owner(owner: RequestOwner) -> RequestOwner:
    """Return an equal owner that all requests of it share, because every request makes its own texts."""
    return owner


class StoreWriter:
    """Writes the records of one proxy."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.place = settings.store
        self.spill: SpillFiles | None = None
        if self.place is not None:
            self.spill = SpillFiles(settings.spill or default_path(self.place), settings.spill_bytes)
        self.metrics = metrics
        metrics.recorder_queue_limit.set(settings.recorder_queue if self.is_on else 0)
        self.lost = 0
        self._max_queue = settings.recorder_queue
        self._store_text = settings.store_text
        self._retain = None if settings.retain_days is None else timedelta(days=settings.retain_days)
        self._queue: deque[QueuedRecord] = deque()
        self._owners: OrderedDict[str, RequestOwner] = OrderedDict()
        self._connection: StoreConnection | None = None  # once open
        self._tasks: list[asyncio.Task[None]] = []
        self._file_thread = ThreadPoolExecutor(1, "spill")  # one call at a time, even if its caller was cancelled
        self._look_for_files = True  # other processes may have left spill files
        self._work = asyncio.Event()  # there may be records to write
        self._hurry = asyncio.Event()  # write at once, without waiting for more records
        self._is_closing = False  # no more records are accepted
        self._loss_logged_at = -LOSS_LOG_S
        self._problems: dict[str, str] = {}  # logged problems by kind, until all records are written again

    @property
    def is_on(self) -> bool:
        """Whether requests are recorded."""
        return self.place is not None

    @property
    def store(self) -> Store | None:
        """The open store; None while it is unavailable."""
        return None if self._connection is None else self._connection.store

    @property
    def waiting(self) -> int:
        """Number of records in memory that are not written yet."""
        return len(self._queue)

    @property
    def _is_store_up(self) -> bool:
        return self._connection is not None and self._connection.store is not None

    @property
    def _can_recover(self) -> bool:
        """Whether records wait in the spill file and the store is available."""
        return self._is_store_up and self.spill is not None and self.spill.size > 0

    def as_json(self) -> dict[str, object]:
        """Return the state for `/ready`."""
        return {
            "store": "off" if self.place is None else "up" if self._is_store_up else "away",
            "queue": self.waiting,
            "spill_bytes": 0 if self.spill is None else self.spill.size,
            "lost": self.lost,
        }

    async def open(self) -> None:
        """Start writing, whether or not the store can be opened."""
        place = self.place
        if place is None:
            return
        shown = place.absolute() if isinstance(place, Path) else place
        logger.info("recording to %s (text: %s)", shown, self._store_text)
        has_text = self._store_text is not StoreText.NONE
        if isinstance(place, Path) and has_text and (warning := readable_warning(place, "request texts")):
            logger.warning("%s", warning)

        def report(problem: str) -> None:
            self._report(STORE, problem)

        connection = self._connection = StoreConnection(place, self._retain, report, self._on_store_change)
        self._work.set()
        self._tasks = [asyncio.create_task(connection.run()), asyncio.create_task(self._write(connection))]

    async def close(self) -> None:
        """Write the queued records to the store or the spill file, and stop."""
        self._is_closing = True
        self._work.set()
        self._hurry.set()
        if self._connection is None:
            return
        connecting, writing = self._tasks
        await asyncio.wait({writing}, timeout=FLUSH_S / 2)
        self._connection.close()
        await asyncio.wait({writing}, timeout=FLUSH_S / 2)
        writing.cancel()
        if self._connection.is_stuck:  # the transaction may never end
            connecting.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.spill is not None:
            await self._in_file_thread(self.spill.close)
        self._file_thread.shutdown(wait=False)
        while self._queue:
            self._settle("closed", self._queue.popleft())
        if self.lost:
            self._log_loss(f"RECORDS WERE LOST: {self.lost} in all since this process started")

    # Put and find

    def put(
        self, request: str, make: Callable[[], StoreItem], owner: RequestOwner | None = None, *, hurry: bool = False
    ) -> asyncio.Future[bool]:
        """Queue the record that `make` builds. The returned future is True once it is on disk, False if it was lost.

        `owner` is kept as the owner of `request`, if given, until the record is lost or refused. With `hurry` the
        record does not wait for others.
        """
        kept: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        record = QueuedRecord(request, make, kept)
        if not self.is_on:
            kept.set_result(False)
            return kept
        if self.waiting >= self._max_queue or self._is_closing:
            self._settle("closed" if self._is_closing else "full", record)
            return kept
        if owner is not None:
            self._owners[request] = shared_owner(owner)
            if len(self._owners) > RECENT:
                self._owners.popitem(last=False)
        self._queue.append(record)
        self.metrics.recorder_queue.set(self.waiting)
        self._work.set()
        if hurry or len(self._queue) >= ENOUGH:
            self._hurry.set()
        return kept

    async def find(self, request: str) -> ServedEpisode | None:
        """Return the episode of a request, written or still queued, or None. Raises RecordsAway."""
        for record in list(self._queue):
            if record.request == request:
                item = await asyncio.to_thread(record.make)
                if isinstance(item, ServedEpisode):
                    return item
        connection = self._connection
        if connection is not None and not connection.tried.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(FIRST_OPEN_S):
                    await connection.tried.wait()
        store = None if connection is None else connection.store
        if store is None:
            raise RecordsAway("the store is unavailable; retry later", code="store_away")
        try:
            episode = await store.episode(request)
        except StoreError as error:
            logger.warning("%s", error)
            raise RecordsAway("the store cannot be read; retry later", code="store_away") from None
        if episode is None and self.spill is not None and self.spill.size:
            raise RecordsAway("the store is still catching up; retry later", code="store_away")
        return episode

    async def owner(self, request: str) -> RequestOwner | None:
        """Return the owner of a request, or None if it is unknown. Raises RecordsAway."""
        owner = self._owners.get(request)
        if owner is None and self.is_on and (episode := await self.find(request)) is not None:
            owner = RequestOwner(episode.tenant, episode.about.get("stage"), episode.digest, episode.model)
        return owner

    def _settle(self, outcome: str, record: QueuedRecord | None = None) -> None:
        """Count the outcome of a record, and resolve its future if the record is given."""
        is_kept = outcome in (STORED, SPILLED, RECOVERED)
        if record is not None and not record.kept.done():
            record.kept.set_result(is_kept)
        if record is not None and outcome in (DROPPED, UNWRITABLE):
            self._owners.pop(record.request, None)  # so that its request is looked up in the store
        if is_kept:
            self.metrics.records.labels(outcome).inc()
        elif outcome != DROPPED:
            self.lost += 1
            self.metrics.records_lost.labels(outcome).inc()
            if time.monotonic() - self._loss_logged_at >= LOSS_LOG_S:
                self._loss_logged_at = time.monotonic()
                self._log_loss(f"RECORDS ARE LOST ({outcome}): {self.lost} so far")

    def _log_loss(self, loss: str) -> None:
        problems = "".join(f"; {kind}: {problem}" for kind, problem in self._problems.items())
        logger.error("%s%s", loss, problems)

    # Write

    async def _write(self, connection: StoreConnection) -> None:
        """Write queued records until the connection is closed and the queue is empty or cannot be written."""
        with suppress(TimeoutError):
            async with asyncio.timeout(store_connection.TRANSACTION_TIMEOUT_S):
                await connection.tried.wait()
        while self._queue or not self._is_closing:
            await self._work.wait()
            self._work.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(LINGER_S):
                    await self._hurry.wait()
            self._hurry.clear()
            while self._look_for_files or self._queue or self._can_recover:
                try:
                    is_done = await self._write_pending(connection)
                except Exception as error:  # retry after any error; its message may hold a client's text
                    logger.error("cannot write records, retrying: %s", type(error).__name__)
                    is_done = False
                self._update_gauges()
                if not is_done and connection.closed.done():
                    return
                if not is_done:
                    await asyncio.wait({connection.closed}, timeout=store_connection.RETRY_S)

    async def _write_pending(self, connection: StoreConnection) -> bool:
        """Adopt spill files, recover a group of spilled records and write the queue. Return whether any was done."""
        is_done, self._look_for_files = self._look_for_files, False
        if is_done and self.spill is not None:
            await self._in_file_thread(self.spill.adopt)
        is_done |= await self._recover(connection)
        while self._queue and await self._write_group(connection):
            is_done = True
        return is_done

    async def _write_group(self, connection: StoreConnection) -> bool:
        """Write the first group of the queue to any destination. Return whether that worked."""
        group = list(islice(self._queue, GROUP))
        made = await convert_all(make_item, group)
        items = [item for item in made if item is not None]
        for write in self._destinations(connection):
            outcomes = await write(items)
            if outcomes is not None:
                remaining = iter(outcomes)
                for item in made:
                    outcome = UNWRITABLE if item is None else next(remaining, None)
                    if outcome is None:
                        break
                    self._settle(outcome, self._queue.popleft())
                return True
        return False

    def _destinations(self, connection: StoreConnection) -> Sequence[Destination]:
        """Return the destinations of a group, in order of preference. A long queue goes to the spill file first."""
        if self.spill is not None and self.spill.size:
            return [self._spill]
        destinations: list[Destination] = [connection.write, self._spill]
        return destinations[::-1] if self.waiting > self._max_queue / 2 else destinations

    async def _spill(self, items: Sequence[StoreItem]) -> list[str | None] | None:
        """Append items to the spill file and return the outcome of each. Return None if not even the first fits."""
        spill = self.spill
        if spill is None:
            return None
        lines = await convert_all(encode_line, items)
        count = await self._in_file_thread(lambda: spill.append([line for line in lines if line is not None]))
        spilled = iter([SPILLED] * (count or 0))
        outcomes = [UNWRITABLE if line is None else next(spilled, None) for line in lines]
        return None if outcomes[:1] == [None] else outcomes

    async def _recover(self, connection: StoreConnection) -> bool:
        """Move a group of records from the spill file to the store. Return whether records were moved."""
        spill = self.spill
        if spill is None or not self._can_recover:
            return False
        chunk = await self._in_file_thread(lambda: spill.read(GROUP))
        if chunk is None:  # unreadable: the file is kept and tried again when spill files are next adopted
            await self._in_file_thread(spill.close)
            return False
        items = [item for item in await convert_all(decode_line, chunk.lines) if item is not None]
        outcomes = await connection.write(items, RECOVERED)
        if outcomes is None:
            return False
        for outcome in (*outcomes, *["damaged"] * (chunk.damaged + len(chunk.lines) - len(items))):
            self._settle(outcome)
        await self._in_file_thread(lambda: spill.drop(chunk))
        return True

    async def _in_file_thread(self, work: Callable[[], T]) -> T | None:
        """Run `work` on the spill file in its thread. Return its result, or None if it fails."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._file_thread, work)
        except OSError as error:
            problem = f"{error.filename or 'spill'}: {error.strerror}"
            self._report(FILE, f"{problem}; set AUTOTTS_SPILL to a file elsewhere, or free the disk")
            return None

    # Report

    def _on_store_change(self, is_ready: bool) -> None:
        if is_ready:
            self._look_for_files = True
            self._work.set()
        self._update_gauges()

    def _report(self, kind: str, problem: str) -> None:
        """Log a problem, once until all records are written again."""
        if kind not in self._problems:
            self._problems[kind] = problem
            waiting = f"; records wait in {self.spill.path}" if kind == STORE and self.spill is not None else ""
            logger.error("%s: %s%s", kind, problem, waiting)

    def _update_gauges(self) -> None:
        spilled = 0 if self.spill is None else self.spill.size
        self.metrics.recorder_queue.set(self.waiting)
        self.metrics.spill_bytes.set(spilled)
        self.metrics.store_up.set(self._is_store_up)
        if self._problems and self._is_store_up and not self.waiting and not spilled:
            self._problems.clear()
            logger.info("%s: all waiting records are written", self.place)
