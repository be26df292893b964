"""Who decides for a request: a built-in controller here, one from a file in a sealed process, or the baseline instead.

A controller that fails costs its client nothing: the baseline goes on from the state it left. One that fails three
times in five minutes is not asked again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

from controllers import (
    Action,
    Boundary,
    Controller,
    ControllerError,
    Crossed,
    Environment,
    IllegalAction,
    State,
    UnknownController,
    Unsealed,
    run_episode,
)
from controllers.episode import Remote
from controllers.loading import Spec, make, parse_spec
from controllers.registry import BUILT_IN, create, find
from controllers.sandbox.controller import SandboxedController
from controllers.sandbox.nursery import nursery
from controllers.sandbox.proof import Level, Proof
from controllers.sandbox.worker import Worker
from proxy.metrics import Metrics
from proxy.settings import Settings

logger = logging.getLogger(__name__)

BASELINE: Final = "short_m_at_k"
"""Takes over from any state: it runs on what is open, and votes once enough have finished."""
FAILURES: Final = 3
WINDOW_S: Final = 300.0
"""So many failures in so many seconds quarantine a controller."""
RAISED, ILLEGAL, UNSEALED, QUARANTINED = "raised", "illegal", "unsealed", "quarantined"
"""Why the baseline decides, besides the boundaries of a sandbox."""


class Casting:
    """The controllers of one proxy."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.default = parse_spec(settings.controller)
        self.quarantined: set[str] = set()  # digests
        self.metrics = metrics
        self._settings = settings
        self._pools: dict[str, _Pool] = {}  # of controllers from files, by name
        self._failures: dict[str, deque[float]] = {}  # by digest: when, by the monotonic clock
        self._proof = Proof()
        if self.default.is_foreign:
            self._pools[self.default.name] = _Pool(self.default, settings.sandbox_pool, settings.decision_s)

    @property
    def level(self) -> Level:
        """How controllers from files are held."""
        if self._settings.allow_unsandboxed:
            return Level.OPEN
        return Level.SEALED if self._proof.sealed else Level.REFUSED

    @property
    def lacking(self) -> str | None:
        """What keeps controllers from being sealed; None if nothing does."""
        return self._proof.lacking

    def level_of(self, spec: Spec) -> Level:
        """How one controller is held."""
        return self.level if spec.is_foreign else Level.TRUSTED

    def find(self, name: str | None) -> Spec:
        """The controller a request names; the default if it names none. Raises UnknownController."""
        if name is None or name == self.default.name:
            return self.default
        try:
            find(name)
        except UnknownController:
            if not self.default.is_foreign:
                raise
            names = ", ".join([*BUILT_IN, self.default.name])
            raise UnknownController(f"there is no controller {name!r}; there are {names}") from None
        return Spec(name)

    async def open(self) -> None:
        """Find out whether controllers can be sealed, say so, and get some ready."""
        if nursery().proof is None:
            await asyncio.to_thread(nursery().check)
        self.learn_level()
        if self.level is Level.SEALED:
            for pool in self._pools.values():
                pool.fill()

    async def close(self) -> None:
        """End every sealed process."""
        for pool in self._pools.values():
            await pool.close()

    def cast(self, spec: Spec) -> Cast:
        """Who decides in an episode for which `spec` was chosen."""
        return Cast(self, spec)

    @asynccontextmanager
    async def controller(self, spec: Spec, beta: float) -> AsyncIterator[Controller | Remote]:
        """A fresh controller for one episode. Raises ControllerError or Unsealed."""
        if self.level_of(spec) is not Level.SEALED or not spec.is_foreign:
            if self.level_of(spec) is Level.REFUSED:
                raise Unsealed(f"{spec.name}: controllers cannot be sealed here: {self.lacking}")
            yield make(spec, beta)
            return
        pool = self._pools[spec.name]
        worker = await pool.take()
        try:
            yield SandboxedController(worker, beta)
        finally:
            if worker.slow:
                self.metrics.slow.labels(spec.name).inc(worker.slow)
            pool.end(worker)

    def strike(self, spec: Spec) -> None:
        """Take notice of a failure."""
        now = time.monotonic()
        failures = self._failures.setdefault(spec.digest, deque(maxlen=FAILURES))
        failures.append(now)
        if len(failures) == FAILURES and now - failures[0] <= WINDOW_S:
            self.quarantined.add(spec.digest)
            self.metrics.quarantined.labels(spec.name).set(1)
            logger.error(
                "controller %s (%s) is quarantined: %d failures in %.0f s; %s serves until a restart",
                *(spec.name, spec.digest[:12], FAILURES, now - failures[0], BASELINE),
            )

    def learn_level(self) -> None:
        """Take notice of the latest proof, and say how controllers from files are held now."""
        self._proof = nursery().proof or self._proof
        self.metrics.sandbox_level.set(self.level.rank)
        if self.level is Level.OPEN:
            logger.error(
                "NOT SANDBOXED: controllers from files run with all of this process's rights, its keys included"
            )
        elif self.level is Level.REFUSED:
            logger.error("controllers from files are refused, baselines serve: %s", self.lacking)

    def timed(self, spec: Spec, controller: Controller | Remote) -> Controller | Remote:
        """The same controller, its decisions measured."""
        seconds = self.metrics.decision_seconds.labels(spec.name)
        later = getattr(controller, "decide_later", None)
        return _Timed(controller, seconds) if later is None else _TimedRemote(later, seconds)  # type: ignore[arg-type]


class Cast:
    """Who decides in one episode: the controller that was chosen and, where that fails or may not run, the baseline."""

    def __init__(self, casting: Casting, spec: Spec) -> None:
        self.fallback: str | None = None  # why the baseline decides, if it does
        self.level = casting.level_of(spec)
        self._casting = casting
        self._spec = spec

    async def run(self, beta: float, environment: Environment, state: State) -> None:
        """Run an episode to its end.

        Raises ControllerError if the baseline fails too, and whatever `environment` raises.
        """
        spec, casting = self._spec, self._casting
        if spec.digest in casting.quarantined:
            self.fallback = QUARANTINED
        else:
            try:
                async with casting.controller(spec, beta) as controller:
                    await run_episode(casting.timed(spec, controller), environment, state)
                return
            except Unsealed:
                casting.learn_level()
                self.fallback = UNSEALED
            except ControllerError as error:
                if spec.name == BASELINE:
                    raise
                self.fallback = _reason(error)
                logger.warning("controller %s failed (%s): %s", spec.name, self.fallback, error)
                casting.strike(spec)
        casting.metrics.fallbacks.labels(spec.name, self.fallback).inc()
        await run_episode(casting.timed(Spec(BASELINE), create(BASELINE, beta)), environment, state)


class _Pool:
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

    def fill(self, more: int = 0) -> None:
        """Have as many ready as there should be, and so many more."""
        for _ in range(self._size + more - len(self._ready) - self._making):
            self._making += 1
            self._start(self._make).add_done_callback(self._made)

    def _made(self, done: asyncio.Future[Worker]) -> None:
        self._making -= 1
        if not done.cancelled() and done.exception() is None:  # an error is told to the request that meets it
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
        await asyncio.gather(*self._work, return_exceptions=True)
        for worker in self._ready:
            worker.close()
        self._ready.clear()


class _Timed:
    """A controller whose decisions are timed."""

    def __init__(self, controller: Controller, seconds: Any) -> None:
        self._controller = controller
        self._seconds = seconds

    def decide(self, state: State) -> Sequence[Action]:
        with self._seconds.time():
            return self._controller.decide(state)


class _TimedRemote:
    """The same of one that lives elsewhere."""

    def __init__(self, later: Callable[[State], Awaitable[Sequence[Action]]], seconds: Any) -> None:
        self._later = later
        self._seconds = seconds

    async def decide_later(self, state: State) -> Sequence[Action]:
        with self._seconds.time():
            return await self._later(state)


def _reason(error: ControllerError) -> Boundary | str:
    if isinstance(error, Crossed):
        return error.boundary
    return ILLEGAL if isinstance(error, IllegalAction) else RAISED
