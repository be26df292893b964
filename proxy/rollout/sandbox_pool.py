"""Sealed processes that have loaded a controller before anybody needs one."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, Final

from controllers.errors import MachineDisturbed
from controllers.loading import Spec
from controllers.sandbox.handle import SandboxHandle
from controllers.sandbox.spawner import spawner

RETIRED: Final = -1
"""The size of a pool that has none ready, not even one ahead of the next episode."""
MAKERS: Final = 2
"""Threads in which the processes of one controller are made. A file that loads slowly holds up its own controller."""
PATIENCE_S: Final = 5.0
"""Seconds an episode waits for a process."""


class SandboxPool:
    """Sealed processes that have loaded one controller, kept ready for its next episodes.

    Each process serves one episode. They are ended in threads of `enders`, which pools may share.
    """

    def __init__(self, spec: Spec, size: int, hard_s: float, enders: Executor) -> None:
        self._spec = spec
        self._size = size
        self._hard_s = hard_s
        self._ready: deque[SandboxHandle] = deque()
        self._in_use: set[SandboxHandle] = set()
        self._loading: set[SandboxHandle] = set()  # in threads
        self._stopped = ""  # why, if it is
        self._waiting: deque[asyncio.Future[SandboxHandle]] = deque()  # episodes, the first to come first
        self._work: set[asyncio.Future[Any]] = set()  # in threads: what is being made, and ended
        self._making = 0
        self._makers = ThreadPoolExecutor(MAKERS, thread_name_prefix="sandbox-make")
        self._enders = enders

    async def take(self) -> SandboxHandle:
        """Return one that is ready, else a new one.

        Raises SandboxUnavailable, BadController, BoundaryViolation or MachineDisturbed.
        """
        worker = self._next() or await self._made_soon()
        self._in_use.add(worker)
        return worker

    def end(self, worker: SandboxHandle) -> None:
        """Kill one, off the event loop."""
        self._in_use.discard(worker)
        self._start(self._enders, worker.close)

    def keep(self, size: int) -> None:
        """Have so many ready from now on; RETIRED for a controller that only episodes under way still need."""
        self._size, self._stopped = size, ""
        while len(self._ready) > max(0, size):
            self.end(self._ready.pop())
        self._fill()

    def stop(self, why: str) -> None:
        """Retire, and kill the processes of episodes under way too, which then raise MachineDisturbed with `why`."""
        self.keep(RETIRED)
        self._stopped = why
        for worker in [*self._in_use, *list(self._loading)]:
            worker.kill(why)
        while waiting := self._first():
            waiting.set_exception(MachineDisturbed(why))

    async def close(self) -> None:
        """End every process that is ready, once all work in threads is done."""
        while self._work:
            await asyncio.gather(*self._work, return_exceptions=True)
        for worker in self._ready:
            worker.close()
        self._ready.clear()
        self._makers.shutdown(wait=False)

    def _next(self) -> SandboxHandle | None:
        """One of those that are ready and alive; those that died idle are nobody's fault and are passed over."""
        while self._ready:
            worker = self._ready.popleft()
            if worker.alive:
                self._fill()
                return worker
            self.end(worker)
        return None

    async def _made_soon(self) -> SandboxHandle:
        waiting: asyncio.Future[SandboxHandle] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiting)
        self._fill()
        try:
            async with asyncio.timeout(PATIENCE_S):
                return await waiting
        except BaseException as error:  # a cancelled request's too
            if waiting in self._waiting:
                self._waiting.remove(waiting)
            if waiting.done() and not waiting.cancelled() and waiting.exception() is None:
                self._put(waiting.result())  # it came too late
            if isinstance(error, TimeoutError):
                raise MachineDisturbed(f"no process of {self._spec.name} was ready within {PATIENCE_S:g} s") from None
            raise

    def _fill(self) -> None:
        """Have as many made as there should be and episodes wait for."""
        wanted = max(0, self._size) + len(self._waiting)
        for _ in range(wanted - len(self._ready) - self._making):
            self._making += 1
            self._start(self._makers, self._make).add_done_callback(self._made)

    def _made(self, done: asyncio.Future[SandboxHandle]) -> None:
        self._making -= 1
        if done.cancelled():
            return
        error = done.exception()
        if error is None:
            self._put(done.result())
        elif waiting := self._first():  # without one the error is dropped: the next load fails alike
            waiting.set_exception(error)

    def _put(self, worker: SandboxHandle) -> None:
        """Give a process to the episode that has waited longest, or keep it."""
        if waiting := self._first():
            waiting.set_result(worker)
        elif len(self._ready) < max(0, self._size):
            self._ready.append(worker)
        else:
            self.end(worker)

    def _first(self) -> asyncio.Future[SandboxHandle] | None:
        while self._waiting:
            waiting = self._waiting.popleft()
            if not waiting.done():
                return waiting
        return None

    def _make(self) -> SandboxHandle:
        try:
            return self._loaded()
        except MachineDisturbed:  # nobody waits for this process in particular: another one will do
            return self._loaded()

    def _loaded(self) -> SandboxHandle:
        if self._stopped:
            raise MachineDisturbed(self._stopped)
        worker = spawner().spawn(self._hard_s)
        self._loading.add(worker)
        try:
            worker.load(self._spec)
        finally:
            self._loading.discard(worker)
        return worker

    def _start(self, executor: Executor, work: Callable[[], Any]) -> asyncio.Future[Any]:
        future = asyncio.get_running_loop().run_in_executor(executor, work)
        self._work.add(future)
        future.add_done_callback(self._work.discard)
        return future
