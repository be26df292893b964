"""Sealed processes that have loaded a controller before anybody needs one."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from controllers.loading import Spec
from controllers.sandbox.nursery import nursery
from controllers.sandbox.worker import Worker

RETIRED: Final = -1
"""The size of a pool that has none ready, not even one ahead of the next episode."""


class Pool:
    """Sealed processes that have loaded one controller, kept ready for its next episodes."""

    def __init__(self, spec: Spec, size: int, hard_s: float) -> None:
        self._spec = spec
        self._size = size
        self._hard_s = hard_s
        self._ready: deque[Worker] = deque()
        self._work: set[asyncio.Future[Any]] = set()  # in threads: what is being made, and ended
        self._making = 0

    async def take(self) -> Worker:
        """One that is ready, else a new one. Raises Unsealed, BadController or Crossed."""
        self.fill(1)
        while self._ready:
            worker = self._ready.popleft()
            if worker.alive:
                return worker
        return await asyncio.to_thread(self._make)

    def end(self, worker: Worker) -> None:
        """Kill one, off the event loop."""
        self._start(worker.close)

    def keep(self, size: int) -> None:
        """Have so many ready from now on; RETIRED for a controller that only episodes under way still need."""
        self._size = size
        while len(self._ready) > max(0, size):
            self.end(self._ready.pop())
        self.fill()

    def fill(self, more: int = 0) -> None:
        """Have as many ready as there should be, and so many more."""
        for _ in range(self._size + more - len(self._ready) - self._making):
            self._making += 1
            self._start(self._make).add_done_callback(self._made)

    def _made(self, done: asyncio.Future[Worker]) -> None:
        self._making -= 1
        if done.cancelled() or done.exception() is not None:  # an error is told to the request that meets it
            return
        if self._size == RETIRED:
            self.end(done.result())
        else:
            self._ready.append(done.result())

    def _make(self) -> Worker:
        worker = nursery().spawn(self._hard_s)
        worker.load(self._spec)
        return worker

    def _start(self, work: Callable[[], Any]) -> asyncio.Future[Any]:
        future = asyncio.get_running_loop().run_in_executor(None, work)
        self._work.add(future)
        future.add_done_callback(self._work.discard)
        return future

    async def close(self) -> None:
        while self._work:
            await asyncio.gather(*self._work, return_exceptions=True)
        for worker in self._ready:
            worker.close()
        self._ready.clear()
