"""Pool of sandbox processes that have loaded a controller before an episode needs it."""

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
"""Size of a pool whose controller is needed by running episodes only."""
MAKERS: Final = 2
"""Threads per controller that start processes, so that a slow file delays only its own controller."""
TAKE_TIMEOUT_S: Final = 5.0
"""Seconds that an episode waits for a process."""


class SandboxPool:
    """Sandbox processes that have loaded one controller and wait for its next episodes.

    Each process serves one episode. Threads of `closers`, which pools may share, end the processes.
    """

    def __init__(self, spec: Spec, size: int, hard_s: float, closers: Executor) -> None:
        self._spec = spec
        self._size = size
        self._hard_s = hard_s
        self._ready: deque[SandboxHandle] = deque()
        self._in_use: set[SandboxHandle] = set()
        self._loading: set[SandboxHandle] = set()  # in threads, while they load the controller
        self._stopped = ""  # the reason, if the pool is stopped
        self._waiting: deque[asyncio.Future[SandboxHandle]] = deque()  # episodes, in order of arrival
        self._work: set[asyncio.Future[Any]] = set()  # work in threads
        self._making = 0
        self._makers = ThreadPoolExecutor(MAKERS, thread_name_prefix="sandbox-make")
        self._closers = closers

    async def take(self) -> SandboxHandle:
        """Return a process that is ready, or start one.

        Raises SandboxUnavailable, BadController, BoundaryViolation or MachineDisturbed.
        """
        sandbox = self._next_ready() or await self._wait_for_process()
        self._in_use.add(sandbox)
        return sandbox

    def end(self, sandbox: SandboxHandle) -> None:
        """End a process, off the event loop."""
        self._in_use.discard(sandbox)
        self._start(self._closers, sandbox.close)

    def keep(self, size: int) -> None:
        """Keep `size` processes ready from now on, or none if `size` is RETIRED."""
        self._size, self._stopped = size, ""
        while len(self._ready) > max(0, size):
            self.end(self._ready.pop())
        self._fill()

    def stop(self, reason: str) -> None:
        """Retire the pool and kill the processes of running episodes. These raise MachineDisturbed with `reason`."""
        self.keep(RETIRED)
        self._stopped = reason
        for sandbox in [*self._in_use, *list(self._loading)]:
            sandbox.kill(reason)
        while waiting := self._next_waiting():
            waiting.set_exception(MachineDisturbed(reason))

    async def close(self) -> None:
        """End the processes that are ready, once all work in threads is done."""
        while self._work:
            await asyncio.gather(*self._work, return_exceptions=True)
        for sandbox in self._ready:
            sandbox.close()
        self._ready.clear()
        self._makers.shutdown(wait=False)

    def _next_ready(self) -> SandboxHandle | None:
        """Return a ready process that is alive, or None. Processes that died while idle are skipped."""
        while self._ready:
            sandbox = self._ready.popleft()
            if sandbox.alive:
                self._fill()
                return sandbox
            self.end(sandbox)
        return None

    async def _wait_for_process(self) -> SandboxHandle:
        waiting: asyncio.Future[SandboxHandle] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiting)
        self._fill()
        try:
            async with asyncio.timeout(TAKE_TIMEOUT_S):
                return await waiting
        except BaseException as error:  # also if the request is cancelled
            if waiting in self._waiting:
                self._waiting.remove(waiting)
            if waiting.done() and not waiting.cancelled() and waiting.exception() is None:
                self._put(waiting.result())  # the process was ready too late for this episode
            if isinstance(error, TimeoutError):
                raise MachineDisturbed(
                    f"no process of {self._spec.name} was ready within {TAKE_TIMEOUT_S:g} s"
                ) from None
            raise

    def _fill(self) -> None:
        """Start the processes that the pool lacks and that episodes wait for."""
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
        elif waiting := self._next_waiting():  # otherwise the error is dropped: the next load fails the same way
            waiting.set_exception(error)

    def _put(self, sandbox: SandboxHandle) -> None:
        """Give a process to the episode that has waited longest, or add it to the pool."""
        if waiting := self._next_waiting():
            waiting.set_result(sandbox)
        elif len(self._ready) < max(0, self._size):
            self._ready.append(sandbox)
        else:
            self.end(sandbox)

    def _next_waiting(self) -> asyncio.Future[SandboxHandle] | None:
        while self._waiting:
            waiting = self._waiting.popleft()
            if not waiting.done():
                return waiting
        return None

    def _make(self) -> SandboxHandle:
        try:
            return self._load()
        except MachineDisturbed:  # no episode depends on this process, so try another one
            return self._load()

    def _load(self) -> SandboxHandle:
        if self._stopped:
            raise MachineDisturbed(self._stopped)
        sandbox = spawner().spawn(self._hard_s)
        self._loading.add(sandbox)
        try:
            sandbox.load(self._spec)
        finally:
            self._loading.discard(sandbox)
        return sandbox

    def _start(self, executor: Executor, work: Callable[[], Any]) -> asyncio.Future[Any]:
        future = asyncio.get_running_loop().run_in_executor(executor, work)
        self._work.add(future)
        future.add_done_callback(self._work.discard)
        return future
