"""What happened goes to the store, off the request's path.

A record is put into a bounded queue and its maker goes on. One task writes what waits, many records a transaction.
While the store cannot take them (down, locked, full, slow) they go to a file; that is read back, unaided, when the
store is there again. Whatever came first is first in the store, so nothing goes there past what waits in the file.
What fits nowhere stays in the queue; only what comes when that is full is lost, counted and complained of.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any, Final, NamedTuple, TypeVar

from discovery.data.atomic_files import is_readable_by_others
from discovery.data.recordings import RecordedQuestion
from discovery.errors import StoreError, UnstorableValue
from discovery.store import ServedEpisode, Store, StoreItem
from discovery.store.item_lines import decode_item as unpacked
from discovery.store.item_lines import encode_item as packed
from proxy.errors import RecordsAway
from proxy.recording.spill_file import LONGEST, SpillFiles
from proxy.settings import Settings, StoreText
from proxy.telemetry.metrics import Metrics

T = TypeVar("T")
V = TypeVar("V")
Way = Callable[[Sequence[StoreItem]], Awaitable[Sequence[str | None] | None]]
"""Where items may go: what became of each, None from where there was no room; or None if nothing goes there now."""

logger = logging.getLogger(__name__)

GROUP: Final = 256
"""Records that share one transaction at most."""
SLICE: Final = 32
"""Records that are packed at a time: requests stand still while Python runs in another thread."""
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
"""Seconds what waits may take to be written when the proxy ends; after half of them it goes to the file."""
EXPIRY_S: Final = 3600.0
"""Seconds between looks for what is older than it may be, and for files that others left."""
COMPLAINT_S: Final = 60.0
"""Seconds between complaints of losses."""
RECENT: Final = 20_000
"""Requests whose tenant is remembered without the store."""

STORED, SPILLED, RECOVERED = "stored", "spilled", "recovered"
"""What becomes of records that are on disk."""
DROPPED: Final = "dropped"
"""What becomes of a recording whose request the store knows nothing of: it was forgotten, or is lost itself."""
STORE: Final = "the store takes no records"
FILE: Final = "the file takes no records"


class RequestOwner(NamedTuple):
    """Whose a request was, and who decided in it."""

    tenant: str
    stage: str | None
    digest: str  # of the controller


class _Record(NamedTuple):
    """A record that waits."""

    request: str
    make: Callable[[], StoreItem]  # called in a thread: making it takes time the event loop does not have
    kept: asyncio.Future[bool]


class StoreWriter:
    """The records of one proxy."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.path = settings.store
        self.spill: SpillFiles | None = None
        if self.path is not None:
            place = settings.spill or self.path.with_name(f"{self.path.name}.spill")
            self.spill = SpillFiles(place, settings.spill_bytes)
        self.metrics = metrics
        metrics.recorder_queue_limit.set(settings.recorder_queue if self.is_on else 0)
        self.lost = 0
        self._most = settings.recorder_queue
        self._holds_text = settings.store_text is not StoreText.NONE
        self._retain = None if settings.retain_days is None else timedelta(days=settings.retain_days)
        self._queue: deque[_Record] = deque()
        self._owners: OrderedDict[str, RequestOwner] = OrderedDict()
        self._store: Store | None = None
        self._writing: asyncio.Task[list[RecordedQuestion]] | None = None  # a transaction that takes too long
        self._filing = ThreadPoolExecutor(1, "spill")  # one at a time, even if nobody waits for the one before
        self._look = True  # others may have left files
        self._work = asyncio.Event()  # there is something to do
        self._hurry = asyncio.Event()  # and it does not wait for more
        self._failed = asyncio.Event()  # the store that is open is of no use
        self._tried = asyncio.Event()  # the store has been opened, or could not be
        self._is_closing = False  # nothing more is taken
        self._ended: asyncio.Future[None]  # nothing more is written to the store
        self._tasks: list[asyncio.Task[None]] = []
        self._complained = -COMPLAINT_S
        self._told: dict[str, str] = {}  # what was complained of, once until all is well

    @property
    def is_on(self) -> bool:
        """Whether anything is recorded."""
        return self.path is not None

    @property
    def waiting(self) -> int:
        """Records in memory that are not written yet."""
        return len(self._queue)

    @property
    def _is_behind(self) -> bool:
        """Whether records wait in the file, and there is a store for them."""
        return self._store is not None and self.spill is not None and self.spill.size > 0

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
        if self.path is not None:
            if self._holds_text and is_readable_by_others(self.path):
                words = "other users of this machine can read the store, which holds texts of requests; `chmod 600` it"
                logger.warning("%s: %s", self.path, words)
            self._ended = asyncio.get_running_loop().create_future()
            self._work.set()
            self._tasks = [asyncio.create_task(self._hold()), asyncio.create_task(self._write())]

    async def close(self) -> None:
        """Write what waits, to the store or the file, and end."""
        self._is_closing = True
        self._work.set()
        self._hurry.set()
        if not self._tasks:
            return
        holding, writing = self._tasks
        await asyncio.wait({writing}, timeout=FLUSH_S / 2)
        self._ended.set_result(None)
        self._failed.set()
        self._store = None
        await asyncio.wait({writing}, timeout=FLUSH_S / 2)
        writing.cancel()
        if self._writing is not None:  # nobody knows when it ends
            holding.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.spill is not None:
            await self._filed(self.spill.close)
        self._filing.shutdown(wait=False)
        while self._queue:
            self._settle("closed", self._queue.popleft())

    # Putting and finding

    def put(
        self, request: str, make: Callable[[], StoreItem], owner: RequestOwner | None = None, *, hurry: bool = False
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
        if self.waiting >= self._most or self._is_closing:
            self._settle("closed" if self._is_closing else "full", record)
            return kept
        self._queue.append(record)
        self.metrics.recorder_queue.set(self.waiting)
        self._work.set()
        if hurry or len(self._queue) >= ENOUGH:
            self._hurry.set()
        return kept

    async def find(self, request: str) -> ServedEpisode | None:
        """The episode of a request, written down or not yet; None if there is none. Raises RecordsAway."""
        for record in list(self._queue):
            if record.request == request:
                made = await asyncio.to_thread(record.make)
                if isinstance(made, ServedEpisode):
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

    async def owner(self, request: str) -> RequestOwner | None:
        """Whose a request was; None if nobody knows. Raises RecordsAway."""
        known = self._owners.get(request)
        if known is None and self.is_on and (episode := await self.find(request)) is not None:
            known = RequestOwner(episode.tenant, episode.about.get("stage"), episode.digest)
        return known

    def _settle(self, outcome: str, record: _Record | None = None) -> None:
        """Count what became of a record, and tell who waits for it, if it is known."""
        is_kept = outcome in (STORED, SPILLED, RECOVERED)
        if record is not None and not record.kept.done():
            record.kept.set_result(is_kept)
        if is_kept:
            self.metrics.records.labels(outcome).inc()
        elif outcome != DROPPED:
            self.lost += 1
            self.metrics.records_lost.labels(outcome).inc()
            if time.monotonic() - self._complained >= COMPLAINT_S:
                self._complained = time.monotonic()
                why = "".join(f"; {what}: {words}" for what, words in self._told.items())
                logger.error("RECORDS ARE LOST (%s): %s so far%s", outcome, self.lost, why)

    # Writing

    async def _write(self) -> None:
        """Write what waits, for ever; at the end, all of it."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._tried.wait(), PATIENCE_S)
        while self._queue or not self._is_closing:
            await self._work.wait()
            self._work.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._hurry.wait(), LINGER_S)
            self._hurry.clear()
            while self._look or self._queue or self._is_behind:
                try:
                    is_done = await self._go_on()
                except Exception as error:  # whatever it is, it is tried again; its words may be a client's
                    logger.error("records cannot be written for now: %s", type(error).__name__)
                    is_done = False
                self._show()
                if not is_done and self._ended.done():
                    return
                if not is_done:
                    await asyncio.wait({self._ended}, timeout=AGAIN_S)

    async def _go_on(self) -> bool:
        """Take in files that others left, a group from the file and all of the queue; whether any of that was done."""
        is_done, self._look = self._look, False
        if is_done and self.spill is not None:
            await self._filed(self.spill.adopt)
        is_done |= await self._read_back()
        while self._queue and await self._keep():
            is_done = True
        return is_done

    async def _keep(self) -> bool:
        """Get the first group that waits onto a disk; whether that can be done."""
        group = list(islice(self._queue, GROUP))
        made = await _each(_made, group)
        items = [one for one in made if one is not None]
        for way in self._ways():
            outcomes = await way(items)
            if outcomes is not None:
                told = iter(outcomes)
                for one in made:
                    outcome = "unwritable" if one is None else next(told, None)
                    if outcome is None:
                        break
                    self._settle(outcome, self._queue.popleft())
                return True
        return False

    def _ways(self) -> Sequence[Way]:
        """Where a group may go, and where if not there: to the file first while more waits than a slow store takes."""
        if self.spill is not None and self.spill.size:
            return [self._spilled]
        ways: list[Way] = [self._stored, self._spilled]
        return ways[::-1] if self.waiting > self._most / 2 else ways

    async def _stored(self, items: Sequence[StoreItem], outcome: str = STORED) -> list[str] | None:
        """What became of each: it is in the store (`outcome`), never will be, or is dropped. None: that is away."""
        store = self._store
        if store is None or self._failed.is_set():
            return None
        task = asyncio.create_task(store.add_all(items))
        either: set[asyncio.Future[Any]] = {task, self._ended}
        await asyncio.wait(either, timeout=PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            self._writing = task
            task.add_done_callback(self._late)
            self._fail(f"{self.path}: a transaction takes too long")
            return None
        try:
            left_out = set(map(id, task.result()))
        except Exception as error:
            if isinstance(error, StoreError) and not isinstance(error, UnstorableValue):
                self._fail(str(error))
                return None
            return await self._one_by_one(items, outcome, error)  # something is wrong with one of them
        if store.is_moved:
            self._fail(f"{self.path}: the store has been moved or removed")
            return None
        return [DROPPED if id(one) in left_out else outcome for one in items]

    async def _one_by_one(self, items: Sequence[StoreItem], outcome: str, error: Exception) -> list[str] | None:
        if len(items) == 1:
            logger.error("a record cannot be written: %s", type(error).__name__)
            return ["unwritable"]
        outcomes: list[str] = []
        for one in items:
            alone = await self._stored([one], outcome)
            if alone is None:
                return None
            outcomes += alone
        return outcomes

    async def _spilled(self, items: Sequence[StoreItem]) -> list[str | None] | None:
        """What became of each: it is in the file, never will be, or there was no room. None: for the first already."""
        spill = self.spill
        if spill is None:
            return None
        lines = await _each(_packed, items)
        count = await self._filed(lambda: spill.append([line for line in lines if line is not None]))
        kept = iter([SPILLED] * (count or 0))
        outcomes = ["unwritable" if line is None else next(kept, None) for line in lines]
        return None if outcomes[:1] == [None] else outcomes

    async def _filed(self, work: Callable[[], T]) -> T | None:
        """What `work` on the file gives; None if that fails."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._filing, work)
        except OSError as error:
            self._complain(FILE, f"{error.filename or 'spill'}: {error.strerror}")
            return None

    async def _read_back(self) -> bool:
        """A group from the file into the store; whether there is one, and that can be done."""
        spill = self.spill
        if spill is None or not self._is_behind:
            return False
        chunk = await self._filed(lambda: spill.read(GROUP))
        if chunk is None:  # it cannot be read: it stays what it is till files are looked for again
            await self._filed(spill.close)
            return False
        items = [one for one in await _each(_unpacked, chunk.lines) if one is not None]
        outcomes = await self._stored(items, RECOVERED)
        if outcomes is None:
            return False
        for outcome in (*outcomes, *["damaged"] * (chunk.bad + len(chunk.lines) - len(items))):
            self._settle(outcome)
        await self._filed(lambda: spill.drop(chunk))
        return True

    # The store

    async def _hold(self) -> None:
        """Keep the store open; if it fails, open it again."""
        if self.path is None:
            return
        while not self._ended.done():
            try:
                async with Store.open(self.path, create=True, wait_ms=WAIT_MS) as store:
                    self._failed.clear()
                    self._store = store
                    self._tried.set()
                    await self._use(store)
            except StoreError as error:
                self._complain(STORE, str(error))
            except Exception as error:  # whatever it is, the store is tried again
                self._complain(STORE, type(error).__name__)
            finally:
                self._store = None
                self._tried.set()
                self._show()
            await asyncio.wait({self._ended}, timeout=AGAIN_S)

    async def _use(self, store: Store) -> None:
        """Return when the store is of no use any more; till then what is too old is removed from it."""
        while not self._failed.is_set():
            self._look = True
            self._work.set()
            self._show()
            if self._retain is not None:
                before = (datetime.now(UTC) - self._retain).isoformat(timespec="microseconds")
                await store.expire(before)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._failed.wait(), EXPIRY_S)

    def _fail(self, words: str) -> None:
        """The store is of no use: it is closed, and opened again."""
        self._store = None
        self._failed.set()
        self._complain(STORE, words)
        self._show()

    def _late(self, task: asyncio.Task[list[RecordedQuestion]]) -> None:
        """A transaction that took too long has ended; what it held is in the file anyway."""
        self._writing = None
        if not task.cancelled() and (error := task.exception()) is not None:
            self._complain(STORE, str(error))

    def _complain(self, what: str, words: str) -> None:
        if what not in self._told:
            self._told[what] = words
            logger.error("%s: %s", what, words)

    def _show(self) -> None:
        spilled = 0 if self.spill is None else self.spill.size
        self.metrics.recorder_queue.set(self.waiting)
        self.metrics.spill_bytes.set(spilled)
        self.metrics.store_up.set(self._store is not None)
        if self._told and self._store is not None and not self.waiting and not spilled:
            self._told.clear()
            logger.info("%s: no records wait any more", self.path)


async def _each(work: Callable[[T], V], values: Sequence[T]) -> list[V]:
    """What `work` makes of each, in a thread, `SLICE` at a time."""
    done: list[V] = []
    for at in range(0, len(values), SLICE):
        done += await asyncio.to_thread(list, map(work, values[at : at + SLICE]))
    return done


def _made(record: _Record) -> StoreItem | None:
    try:
        return record.make()
    except Exception as error:  # whatever it is, the others go on
        logger.error("a record of %s cannot be made: %s", record.request, type(error).__name__)
        return None


def _packed(item: StoreItem) -> bytes | None:
    try:
        line = packed(item)
    except Exception as error:  # a text that is none
        logger.error("a record cannot be written: %s", type(error).__name__)
        return None
    if len(line) > LONGEST:
        logger.error("a record cannot be written: it has %s bytes, and a file takes %s", len(line), LONGEST)
        return None
    return line


def _unpacked(line: bytes) -> StoreItem | None:
    try:
        return unpacked(line)
    except Exception as error:  # whatever it is, the others go on
        logger.error("a record in the file cannot be read: %s", type(error).__name__)
        return None
