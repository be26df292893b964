"""Weighted semaphore that limits the branches the upstream generates at once, over all requests.

A call takes one slot for each of its branches, all at once or none, in order of arrival. Background calls wait until no
live call waits.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class _Waiter:
    """A call that waits for its slots."""

    def __init__(self, branches: int) -> None:
        self.branches = branches
        self.granted = asyncio.Event()


class BranchSemaphore:
    """Branch slots of one upstream. The default is no limit."""

    def __init__(self, limit: float = math.inf) -> None:
        self.limit = limit  # branches
        self.taken = 0  # slots, one per branch in flight
        self._live: deque[_Waiter] = deque()
        self._background: deque[_Waiter] = deque()

    @property
    def waiting(self) -> int:
        """Number of calls that wait."""
        return len(self._live) + len(self._background)

    @asynccontextmanager
    async def hold(self, branches: int, *, is_background: bool = False) -> AsyncIterator[None]:
        """Wait for a slot for each branch, then hold them. A call larger than the limit runs alone."""
        queue = self._background if is_background else self._live
        call = _Waiter(branches)
        queue.append(call)
        self._serve()
        try:
            await call.granted.wait()
            yield
        finally:
            if call.granted.is_set():
                self.taken -= branches
            else:
                queue.remove(call)
            self._serve()  # a cancelled waiter may have blocked those behind it

    def _serve(self) -> None:
        """Give free slots to the calls at the front of the queue.

        If the first call does not fit, all others wait too. Otherwise small calls could delay a large one for ever.
        """
        while queue := self._live or self._background:
            call = queue[0]
            if self.taken and self.taken + call.branches > self.limit:
                return
            queue.popleft()
            self.taken += call.branches
            call.granted.set()
