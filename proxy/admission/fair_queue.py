"""Fair queue: a fixed number of requests run at a time, and holders (API keys) with waiting requests take turns.

A request runs, waits or is refused at once. Its permit is released exactly once, however the request ends.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict, deque
from typing import Final

INITIAL_MEAN_S: Final = 1.0
"""Assumed seconds of a request until the first one has ended."""
MEAN_WEIGHT: Final = 0.2
"""Weight of the latest request in the moving average of request times."""


class QueueFull(Exception):
    """A request can neither run nor wait: the queue is full."""

    def __init__(self, after_s: float, *, own: bool) -> None:
        super().__init__(after_s)
        self.after_s = after_s  # estimated seconds until there is room
        self.own = own  # whether the holder has used up its own share of the queue


class Permit:
    """The right of one request to run. `async with` waits for it."""

    def __init__(self, queue: FairQueue, holder: str, limit: int | None, is_ready: bool) -> None:
        self.holder = holder
        self.limit = limit  # permits that the holder may have at a time
        self.is_ready = is_ready  # whether it may be granted; else it only waits
        self.granted = asyncio.Event()
        self.since = 0.0  # when it was granted, by the loop's clock
        self._queue = queue
        self._is_open = True

    async def __aenter__(self) -> None:
        try:
            await self.granted.wait()
        except asyncio.CancelledError:
            self.release()
            raise

    async def __aexit__(self, *_: object) -> None:
        self.release()

    def make_ready(self) -> None:
        """Let the permit be granted."""
        self.is_ready = True
        self._queue.grant_free(self.holder)

    def release(self) -> None:
        """Give the permit back. Further calls do nothing."""
        if self._is_open:
            self._is_open = False
            self._queue.take_back(self)


class FairQueue:
    """Permits for one kind of request. Needs a running event loop for its clock."""

    def __init__(self, places: int, queue: int) -> None:
        self.places = places
        self.queue = queue  # requests that may wait, over all holders
        self.taken: Counter[str] = Counter()  # granted permits, by holder
        self.in_flight = 0  # granted permits
        self.waiting = 0  # requests that wait, over all holders
        self.mean_s = INITIAL_MEAN_S  # moving average of how long permits are held
        self._waiting: OrderedDict[str, deque[Permit]] = OrderedDict()  # by holder, in the order of their turns

    def waiting_of(self, holder: str) -> int:
        """Return the number of requests of one holder that wait."""
        return len(self._waiting.get(holder, ()))

    def most(self, limit: int | None, *, share: int = 1) -> int:
        """Return how many requests of one holder can run and wait together while there are no others.

        `limit` and `share` are those of `enter`.
        """
        return min(self.places, self.places if limit is None else limit) + self._share(share)

    def _share(self, share: int) -> int:
        """Return how many requests of one holder may wait."""
        return -(-self.queue // share)

    def enter(self, holder: str, limit: int | None = None, *, share: int = 1, is_ready: bool = True) -> Permit:
        """Return a permit for a request of `holder`, which may not be granted yet. Raises QueueFull.

        The holder may have `limit` granted permits at a time, and may fill 1/`share` of the queue, rounded up. Unless
        `is_ready`, the permit is granted only after `make_ready`.
        """
        permit = Permit(self, holder, limit, is_ready)
        if is_ready and not self._waiting and self.in_flight < self.places and self._may_run(holder, limit):
            self._grant(permit)
            return permit
        self._waiting.setdefault(holder, deque()).append(permit)
        self.waiting += 1
        self.grant_free(holder)
        if not permit.granted.is_set():
            is_share_full = self.waiting_of(holder) > self._share(share)
            if is_share_full or self.waiting > self.queue:
                self._remove(permit)
                raise QueueFull(self._after_s(holder, limit), own=is_share_full and self.waiting < self.queue)
        return permit

    def take_back(self, permit: Permit) -> None:
        """Free a granted permit, or remove one that still waits."""
        holder = permit.holder
        was_full = self.in_flight >= self.places
        if permit.granted.is_set():
            self.mean_s += MEAN_WEIGHT * (asyncio.get_running_loop().time() - permit.since - self.mean_s)
            self.in_flight -= 1
            left = self.taken.pop(holder) - 1  # a Counter's own methods for missing and deleted keys are slow
            if left:
                self.taken[holder] = left
        else:
            self._remove(permit)
        self.grant_free(None if was_full else holder)  # a removed permit may have blocked later ones of its holder

    def _remove(self, permit: Permit) -> None:
        queue = self._waiting[permit.holder]
        queue.remove(permit)
        self.waiting -= 1
        if not queue:
            del self._waiting[permit.holder]

    def grant_free(self, holder: str | None = None) -> None:
        """Grant free places to the next holders that may run. A holder that gets one moves to the end.

        If a change can let only one `holder` run, it is named, so that others that wait for their own limits are not
        looked at.
        """
        while self._waiting and self.in_flight < self.places:
            queues = self._waiting.values() if holder is None else [self._waiting.get(holder, ())]
            first = (next((permit for permit in queue if permit.is_ready), None) for queue in queues)
            permit = next(
                (permit for permit in first if permit is not None and self._may_run(permit.holder, permit.limit)), None
            )
            if permit is None:
                return
            self._waiting.move_to_end(permit.holder)
            self._remove(permit)
            self._grant(permit)

    def _may_run(self, holder: str, limit: int | None) -> bool:
        return limit is None or self.taken[holder] < limit

    def _grant(self, permit: Permit) -> None:
        self.in_flight += 1
        self.taken[permit.holder] = self.taken.get(permit.holder, 0) + 1
        permit.since = asyncio.get_running_loop().time()
        permit.granted.set()

    def _after_s(self, holder: str, limit: int | None) -> float:
        """Return the estimated seconds until the requests ahead of this one have run."""
        ahead, places = self.waiting + 1, self.places
        if limit is not None and limit < places and not self._may_run(holder, limit):
            ahead, places = self.waiting_of(holder) + 1, limit
        return self.mean_s * ahead / places
