"""How many requests are under way, and who of those that wait is next: everybody in turn, whoever asks most.

It is decided at once: a place now, a place in the queue, or a refusal. A place is let go of once, however its request
ended; one that was only waited for is dropped.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict, deque
from typing import Final

AT_FIRST_S: Final = 1.0
"""Seconds a request is thought to take while none has ended."""
WEIGHT: Final = 0.2
"""Of the latest request in the mean of how long they take."""


class QueueFull(Exception):
    """There is no place, not even to wait."""

    def __init__(self, after_s: float, *, own: bool) -> None:
        super().__init__(after_s)
        self.after_s = after_s  # when there may be one
        self.own = own  # its holder has had its share


class Permit:
    """A request's place; `async with` waits for it."""

    def __init__(self, admission: FairQueue, holder: str, most: int | None) -> None:
        self.holder = holder
        self.limit = most  # its holder may have at once
        self.granted = asyncio.Event()
        self.since = 0.0  # when it was given, by the loop's clock
        self._admission = admission
        self._is_open = True

    async def __aenter__(self) -> None:
        try:
            await self.granted.wait()
        except asyncio.CancelledError:
            self.release()
            raise

    async def __aexit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Let go of it. More than once is no matter."""
        if self._is_open:
            self._is_open = False
            self._admission.release_permit(self)


class FairQueue:
    """Places of one kind. Needs a running loop, for its clock."""

    def __init__(self, places: int, queue: int) -> None:
        self.places = places
        self.queue = queue  # requests that may wait, over all holders
        self.taken: Counter[str] = Counter()  # by holder
        self.in_flight = 0  # places that are taken
        self.mean_s = AT_FIRST_S  # a request has its place
        self._waiting: OrderedDict[str, deque[Permit]] = OrderedDict()  # by holder; the first is asked first

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return sum(map(len, self._waiting.values()))

    def waiting_of(self, holder: str) -> int:
        """Requests of one holder that wait."""
        return len(self._waiting.get(holder, ()))

    def enter(self, holder: str, most: int | None = None, *, share: int = 1) -> Permit:
        """A place for a request of `holder`, who may have `most` at once; it may have to be waited for.

        Raises QueueFull.

        A holder may fill one part in `share` of the queue, rounded up.
        """
        place = Permit(self, holder, most)
        if not self._waiting and self.in_flight < self.places and self._may(holder, most):
            self._give(place)
            return place
        self._waiting.setdefault(holder, deque()).append(place)
        self._serve()
        if not place.granted.is_set():
            has_its_share = self.waiting_of(holder) > -(-self.queue // share)
            if has_its_share or self.waiting > self.queue:
                self._drop(place)
                raise QueueFull(self._after_s(holder, most), own=has_its_share and self.waiting < self.queue)
        return place

    def release_permit(self, place: Permit) -> None:
        """A place is free, or is not waited for any more."""
        holder = place.holder
        if place.granted.is_set():
            self.mean_s += WEIGHT * (asyncio.get_running_loop().time() - place.since - self.mean_s)
            self.in_flight -= 1
            self.taken[holder] -= 1
            if not self.taken[holder]:
                del self.taken[holder]
        else:
            self._drop(place)
        self._serve()  # one that was only waited for may have kept those of its holder behind it

    def _drop(self, place: Permit) -> None:
        queue = self._waiting[place.holder]
        queue.remove(place)
        if not queue:
            del self._waiting[place.holder]

    def _serve(self) -> None:
        """Give free places to whoever is next and may have one; a holder that was given one is last then."""
        while self.in_flight < self.places:
            place = next(
                (queue[0] for holder, queue in self._waiting.items() if self._may(holder, queue[0].limit)), None
            )
            if place is None:
                return
            queue = self._waiting[place.holder]
            queue.popleft()
            self._waiting.move_to_end(place.holder)
            if not queue:
                del self._waiting[place.holder]
            self._give(place)

    def _may(self, holder: str, most: int | None) -> bool:
        return most is None or self.taken[holder] < most

    def _give(self, place: Permit) -> None:
        self.in_flight += 1
        self.taken[place.holder] += 1
        place.since = asyncio.get_running_loop().time()
        place.granted.set()

    def _after_s(self, holder: str, most: int | None) -> float:
        """Seconds until those before it may have had their turn."""
        ahead, places = self.waiting + 1, self.places
        if most is not None and most < places and not self._may(holder, most):
            ahead, places = self.waiting_of(holder) + 1, most
        return self.mean_s * ahead / places
