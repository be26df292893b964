"""How many branches the upstream generates at once, over all requests, and which call is next.

A call to the upstream takes a berth for each of its branches, all at once or none, in the order they came. Work that
nobody waits for comes after all that somebody does.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class _Call:
    """A call that waits."""

    def __init__(self, branches: int) -> None:
        self.branches = branches
        self.given = asyncio.Event()


class BranchSemaphore:
    """Those of one upstream; without a bound unless one is given."""

    def __init__(self, most: float = math.inf) -> None:
        self.most = most  # branches
        self.taken = 0  # by branches that are in flight
        self._live: deque[_Call] = deque()
        self._background: deque[_Call] = deque()

    @property
    def waiting(self) -> int:
        """Calls that wait."""
        return len(self._live) + len(self._background)

    @asynccontextmanager
    async def hold(self, branches: int, *, is_background: bool = False) -> AsyncIterator[None]:
        """Wait for a slot for each branch, then hold them. A call larger than the limit runs alone."""
        queue = self._background if is_background else self._live
        call = _Call(branches)
        queue.append(call)
        self._serve()
        try:
            await call.given.wait()
            yield
        finally:
            if call.given.is_set():
                self.taken -= branches
            else:
                queue.remove(call)
            self._serve()  # one that was only waited for may have kept those behind it

    def _serve(self) -> None:
        """Give free slots to the next call. It waits until there are enough, and everybody with it: else many
        small calls could keep a large one waiting for ever."""
        while queue := self._live or self._background:
            call = queue[0]
            if self.taken and self.taken + call.branches > self.most:
                return
            queue.popleft()
            self.taken += call.branches
            call.given.set()
