"""What happened goes to the store, off the request's path.

A record is put into a bounded queue and its maker goes on. One task writes what waits, many records a transaction.
While the store cannot take them (down, locked, full, slow) they go to a file; that is read back, unaided, when the
store is there again. What fits nowhere stays in the queue; only what comes when that is full is lost, counted and
complained of.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, NamedTuple

from discovery.errors import StoreError
from discovery.store import Episode, Item, Store
from discovery.store.rows import item as unpacked
from discovery.store.rows import line as packed
from proxy.errors import RecordsAway
from proxy.metrics import Metrics
from proxy.settings import Settings
from proxy.spill import Spill

logger = logging.getLogger(__name__)

GROUP: Final = 256
"""Records that share one transaction at most."""
ENOUGH: Final = 32
LINGER_S: Final = 0.1
"""Fewer than so many records wait so long for more: a transaction of one costs as much as one of many."""
WAIT_MS: Final = 1000
"""How long another process's transaction is waited for."""
PATIENCE_S: Final = 2.0
"""How long a transaction of ours may take before what follows goes to the file."""
AGAIN_S: Final = 0.5
"""Seconds between attempts to open a store that could not be."""
OPENING_S: Final = 10.0
"""How long who asks for a record waits for a store that is just being opened for the first time."""
FLUSH_S: Final = 10.0
"""Seconds what waits may take to be written when the proxy ends."""
EXPIRY_S: Final = 3600.0
"""Seconds between looks for what is older than it may be."""
COMPLAINT_S: Final = 60.0
"""Seconds between complaints of losses."""
RECENT: Final = 20_000
"""Requests whose tenant is remembered without the store."""


class Owner(NamedTuple):
    """Whose a request was, and who decided in it."""

    tenant: str
    stage: str | None
    digest: str  # of the controller


class _Record(NamedTuple):
    """A record that waits."""

    request: str
    make: Callable[[], Item]  # called in a thread: making it takes time the event loop does not have
    kept: asyncio.Future[bool]


class Recorder:
    """The records of one proxy."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.path = settings.store
        self.spill: Spill | None = None
        if self.path is not None:
            place = settings.spill or self.path.with_name(f"{self.path.name}.spill")
            self.spill = Spill(place, settings.spill_bytes)
        self.metrics = metrics
        metrics.recorder_queue_limit.set(settings.recorder_queue if self.is_on else 0)
        self.lost = 0
        self._most = settings.recorder_queue
        self._retain = None if settings.retain_days is None else timedelta(days=settings.retain_days)
        self._queue: deque[_Record] = deque()
        self._batch: Sequence[_Record] = ()  # being written
        self._owners: OrderedDict[str, Owner] = OrderedDict()
        self._store: Store | None = None
        self._inode: tuple[int, int] = (0, 0)
        self._writing: asyncio.Task[None] | None = None  # a transaction that takes too long
        self._work = asyncio.Event()  # there is something to do
        self._hurry = asyncio.Event()  # and it does not wait for more
        self._failed = asyncio.Event()  # the store that is open is of no use
        self._tried = asyncio.Event()  # the store has been opened, or could not be
        self._closing = asyncio.Event()  # nothing more is taken
        self._ended = asyncio.Event()  # nothing more is written
        self._tasks: list[asyncio.Task[None]] = []
        self._complained = -COMPLAINT_S
        self._told = ""  # what was last complained of the store

    @property
    def is_on(self) -> bool:
        """Whether anything is recorded."""
        return self.path is not None

    @property
    def waiting(self) -> int:
        """Records in memory that are not written yet."""
        return len(self._queue) + len(self._batch)

    def as_json(self) -> dict[str, object]:
        """How it stands, for people."""
        return {
            "store": "off" if self.path is None else "up" if self._store is not None else "away",
            "queue": self.waiting,
            "spill_bytes": 0 if self.spill is None else self.spill.size,
            "lost": self.lost,
        }

    async def open(self) -> None:
        """Begin to write; whether the store can be opened or not."""
        if self.is_on:
            self._tasks = [asyncio.create_task(self._hold()), asyncio.create_task(self._write())]

    async def close(self) -> None:
        """Write what waits, to the store or the file, and end."""
        self._closing.set()
        self._work.set()
        self._hurry.set()
        if not self._tasks:
            return
        holding, writing = self._tasks
        await asyncio.wait({writing}, timeout=FLUSH_S)
        writing.cancel()
        self._ended.set()
        self._failed.set()
        if self._writing is not None:  # nobody knows when it ends
            holding.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.spill is not None:
            self.spill.close()
        for record in [*self._batch, *self._queue]:
            self._lose(record, "closed")

    # Putting and finding

    def put(
        self, request: str, make: Callable[[], Item], owner: Owner | None = None, *, hurry: bool = False
    ) -> asyncio.Future[bool]:
        """Have what `make` makes written down. The result tells, in its time, whether it is on disk or lost.

        `owner` is remembered, if given: whose `request` is. With `hurry` it does not wait for others to go with it.
        """
        kept: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        record = _Record(request, make, kept)
        if not self.is_on:
            kept.set_result(False)
            return kept
        if owner is not None:
            self._owners[request] = owner
            if len(self._owners) > RECENT:
                self._owners.popitem(last=False)
        if self.waiting >= self._most or self._closing.is_set():
            self._lose(record, "full")
            return kept
        self._queue.append(record)
        self.metrics.recorder_queue.set(self.waiting)
        self._work.set()
        if hurry or len(self._queue) >= ENOUGH:
            self._hurry.set()
        return kept

    async def find(self, request: str) -> Episode | None:
        """The episode of a request, written down or not yet; None if there is none. Raises RecordsAway."""
        for record in [*self._batch, *self._queue]:
            if record.request == request:
                made = await asyncio.to_thread(record.make)
                if isinstance(made, Episode):
                    return made
        if not self._tried.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._tried.wait(), OPENING_S)
        store = self._store
        if store is None:
            raise RecordsAway("the store is away; what happened will be known when it is back", code="store_away")
        try:
            found = await store.episode(request)
        except StoreError as error:
            logger.warning("%s", error)
            raise RecordsAway("the store cannot be read", code="store_away") from None
        if found is None and self.spill is not None and self.spill.size:
            raise RecordsAway("the store is catching up; ask again", code="store_away")
        return found

    async def owner(self, request: str) -> Owner | None:
        """Whose a request was; None if nobody knows. Raises RecordsAway."""
        known = self._owners.get(request)
        if known is None and self.is_on and (episode := await self.find(request)) is not None:
            known = Owner(episode.tenant, episode.about.get("stage"), episode.digest)
        return known

    def _lose(self, record: _Record, reason: str) -> None:
        self.lost += 1
        self.metrics.lost.labels(reason).inc()
        if not record.kept.done():
            record.kept.set_result(False)
        if time.monotonic() - self._complained >= COMPLAINT_S:
            self._complained = time.monotonic()
            logger.error("RECORDS ARE LOST (%s): %s so far; %s", reason, self.lost, self._told or "the queue is full")

    # Writing

    async def _write(self) -> None:
        """Write what waits, for ever; at the end, all of it."""
        if self.spill is not None:
            await self._guarded(self.spill.adopt)
        with suppress(TimeoutError):
            await asyncio.wait_for(self._tried.wait(), PATIENCE_S)
        while self._queue or not self._closing.is_set():
            await self._work.wait()
            self._work.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._hurry.wait(), LINGER_S)
            self._hurry.clear()
            await self._read_back()
            while self._queue:
                await self._read_back()  # first, for a recording is kept only if its episode is
                self._batch = [self._queue.popleft() for _ in range(min(GROUP, len(self._queue)))]
                await self._keep(self._batch)
                self._batch = ()
            self._show()
        await self._read_back()

    async def _keep(self, batch: Sequence[_Record]) -> None:
        """Get `batch` onto a disk, however long it takes."""
        made = await asyncio.to_thread(_made, batch)
        items: list[Item] = []
        records: list[_Record] = []
        for record, one in zip(batch, made, strict=True):
            if isinstance(one, Exception):
                logger.error("a record of %s cannot be made: %r", record.request, one)
                self._lose(record, "unwritable")
            else:
                items.append(one)
                records.append(record)
        while items:
            for outcome in ("stored", "spilled"):
                if await (self._stored(items, records) if outcome == "stored" else self._spilled(items)):
                    self.metrics.recorded.labels(outcome).inc(len(items))
                    for record in records:
                        if not record.kept.done():
                            record.kept.set_result(True)
                    return
            self._show()
            if self._closing.is_set() and self._store is None:
                for record in records:
                    self._lose(record, "closed")
                return
            with suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), AGAIN_S)

    async def _stored(self, items: Sequence[Item], records: Sequence[_Record] = ()) -> bool:
        """Whether `items` are in the store now. One that it will never take is dropped, and counted."""
        store = self._store
        if store is None or self._failed.is_set():
            return False
        task = asyncio.create_task(store.add_all(items))
        await asyncio.wait({task}, timeout=PATIENCE_S)
        if not task.done():
            self._writing = task
            task.add_done_callback(self._late)
            return self._fail(f"{self.path}: a transaction takes more than {PATIENCE_S:g} s")
        try:
            task.result()
        except StoreError as error:
            return self._fail(str(error))
        except Exception as error:  # of one item: a text that is none, a number too large
            return await self._one_by_one(items, records, error)
        if _inode(self.path) != self._inode:
            return self._fail(f"{self.path}: the store has been moved or removed")
        return True

    async def _one_by_one(self, items: Sequence[Item], records: Sequence[_Record], error: Exception) -> bool:
        if len(items) > 1:
            return all([await self._stored([one], records[at : at + 1]) for at, one in enumerate(items)])
        logger.error("a record cannot be written: %s", type(error).__name__)
        for record in records:
            self._lose(record, "unwritable")
        return True

    async def _spilled(self, items: Sequence[Item]) -> bool:
        """Whether `items` are in the file now."""
        if self.spill is None:
            return False
        lines = await asyncio.to_thread(lambda: [packed(one) for one in items])
        spill = self.spill
        return bool(await self._guarded(lambda: spill.append(lines)))

    async def _guarded(self, work: Callable[[], bool | None]) -> bool | None:
        """What `work` on the file gives; False if that fails."""
        try:
            return await asyncio.to_thread(work)
        except OSError as error:
            self._complain(f"{error.filename or 'spill'}: {error.strerror}")
            return False

    async def _read_back(self) -> None:
        """If there is a store, everything from the file into it; then the file is empty."""
        spill = self.spill
        if spill is None or not spill.size or self._store is None:
            return
        count, chunks = 0, spill.chunks(GROUP)
        while chunk := await asyncio.to_thread(next, chunks, None):
            items: list[Item] = []
            for line in chunk:
                try:
                    items.append(unpacked(line))
                except (ValueError, TypeError, KeyError):
                    spill.bad += 1
            if items and not await self._stored(items):
                return  # what is there already is left as it is when this is done again
            count += len(items)
        if spill.bad:
            self.lost += spill.bad
            self.metrics.lost.labels("damaged").inc(spill.bad)
            logger.error("%s: %s records were damaged and are lost", spill.path, spill.bad)
            spill.bad = 0
        self.metrics.recorded.labels("recovered").inc(count)
        logger.info("%s: %s records went from the file to the store", self.path, count)
        await self._guarded(spill.clear)

    # The store

    async def _hold(self) -> None:
        """Keep the store open; if it fails, open it again."""
        if self.path is None:
            return
        while not self._ended.is_set():
            try:
                async with Store.open(self.path, create=True, wait_ms=WAIT_MS) as store:
                    self._failed.clear()
                    self._inode = _inode(self.path)
                    self._store = store
                    self._told = ""
                    self._tried.set()
                    self._work.set()
                    self._show()
                    await self._use(store)
            except StoreError as error:
                self._complain(str(error))
            except Exception:  # whatever it is, the store is tried again
                logger.exception("the store failed")
            finally:
                self._store = None
                self._tried.set()
                self._show()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), AGAIN_S)

    async def _use(self, store: Store) -> None:
        """Return when the store is of no use any more; till then what is too old is removed from it."""
        while not self._failed.is_set() and not self._ended.is_set():
            if self._retain is not None:
                before = (datetime.now(UTC) - self._retain).isoformat(timespec="microseconds")
                await store.expire(before)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._failed.wait(), EXPIRY_S)

    def _fail(self, words: str) -> bool:
        """The store is of no use: it is closed, and opened again."""
        self._store = None
        self._failed.set()
        self._complain(words)
        self._show()
        return False

    def _late(self, task: asyncio.Task[None]) -> None:
        """A transaction that took too long has ended; what it held is in the file anyway."""
        self._writing = None
        if not task.cancelled() and (error := task.exception()) is not None:
            self._complain(str(error))

    def _complain(self, words: str) -> None:
        if words != self._told:
            self._told = words
            logger.error("records go to a file: %s", words)

    def _show(self) -> None:
        self.metrics.recorder_queue.set(self.waiting)
        self.metrics.spill_bytes.set(0 if self.spill is None else self.spill.size)
        self.metrics.store_up.set(self._store is not None)


def _made(batch: Sequence[_Record]) -> list[Item | Exception]:
    made: list[Item | Exception] = []
    for record in batch:
        try:
            made.append(record.make())
        except Exception as error:  # whatever it is, the others go on
            made.append(error)
    return made


def _inode(path: Path | None) -> tuple[int, int]:
    """Which file is at `path` now."""
    try:
        found = os.stat(path or "")
    except OSError:
        return 0, 0
    return found.st_dev, found.st_ino
