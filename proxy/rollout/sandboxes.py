"""Run controllers from files in sandbox processes, with one pool per controller."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Final

from controllers import Controller, SandboxUnavailable
from controllers.episode import RemoteController
from controllers.loading import Spec, make, unload
from controllers.sandbox.controller import SandboxedController
from controllers.sandbox.proof import Proof, SandboxLevel
from controllers.sandbox.spawner import spawner
from proxy.rollout.sandbox_pool import RETIRED, SandboxPool
from proxy.telemetry.metrics import Metrics, controller_label

logger = logging.getLogger(__name__)

CLOSERS: Final = 2
"""Number of threads that end sandbox processes, for all pools."""


class Sandboxes:
    """The sandbox processes of one proxy."""

    def __init__(self, metrics: Metrics, *, decision_s: float, allow_unsandboxed: bool) -> None:
        self._metrics = metrics
        self._decision_s = decision_s
        self._allow_unsandboxed = allow_unsandboxed
        self._pools: dict[str, SandboxPool] = {}  # by a controller's digest
        self._loaded: set[str] = set()  # digests of controllers from files that this process has run
        self._closing: set[asyncio.Task[None]] = set()  # of pools whose controllers serve no longer
        self._closers = ThreadPoolExecutor(CLOSERS, thread_name_prefix="sandbox-end")
        self._proof = Proof()

    @property
    def level(self) -> SandboxLevel:
        """How controllers from files run."""
        if self._allow_unsandboxed:
            return SandboxLevel.OPEN
        return SandboxLevel.SEALED if self._proof.sealed else SandboxLevel.REFUSED

    @property
    def lacking(self) -> str | None:
        """Feature that this machine lacks for sandboxing, or None."""
        return self._proof.lacking

    def level_for(self, spec: Spec) -> SandboxLevel:
        """Return how one controller runs."""
        return self.level if spec.is_foreign else SandboxLevel.TRUSTED

    async def check(self) -> None:
        """Find out whether controllers can be sandboxed, and log the result."""
        if spawner().proof is None:
            await asyncio.to_thread(spawner().check)
        self.update_level()

    def update_level(self) -> None:
        """Use the latest result of the sandbox check, and log how controllers from files run."""
        self._proof = spawner().proof or self._proof
        self._metrics.sandbox_level.set(self.level.rank)
        if self.level is SandboxLevel.OPEN:
            logger.error(
                "NOT SANDBOXED: controllers from files run with all permissions of this process, including its keys"
            )
        elif self.level is SandboxLevel.REFUSED:
            logger.error("controllers from files are refused and the baseline replaces them: %s", self.lacking)

    @asynccontextmanager
    async def controller(self, spec: Spec, beta: float) -> AsyncIterator[Controller | RemoteController]:
        """Yield a new controller for one episode. Raises ControllerError, SandboxUnavailable or MachineDisturbed."""
        level = self.level_for(spec)
        if level is SandboxLevel.REFUSED:
            raise SandboxUnavailable(f"{spec.name}: controllers cannot be sandboxed here: {self.lacking}")
        if level is not SandboxLevel.SEALED:
            if spec.is_foreign:
                self._loaded.add(spec.digest)
            yield make(spec, beta)  # in this process
            return
        pool = self.pool(spec)
        sandbox = await pool.take()
        try:
            yield SandboxedController(sandbox, beta)
        finally:
            if sandbox.slow:
                self._metrics.slow_decisions.labels(controller_label(spec.name)).inc(sandbox.slow)
            pool.end(sandbox)

    def pool(self, spec: Spec) -> SandboxPool:
        """Return the pool of a controller, created on first use."""
        if spec.digest not in self._pools:
            self._pools[spec.digest] = SandboxPool(spec, RETIRED, self._decision_s, self._closers)
        return self._pools[spec.digest]

    @property
    def digests(self) -> set[str]:
        """The controllers that have a pool, or whose file this process has run."""
        return {*self._pools, *self._loaded}

    def forget(self, digest: str) -> None:
        """End the pool of a controller that serves no longer, with its threads. No episode may be using it."""
        if digest in self._loaded:
            self._loaded.discard(digest)
            unload(digest)
        if (pool := self._pools.pop(digest, None)) is not None:
            pool.keep(RETIRED)
            closing = asyncio.create_task(pool.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    def stop(self, digest: str, reason: str) -> None:
        """Kill the processes of a controller, also those of running episodes."""
        if digest in self._pools:
            self._pools[digest].stop(reason)

    def resize(self, sizes: Mapping[str, int], stopped: Mapping[str, str]) -> None:
        """Set the size of every pool by digest. Pools without a size are retired; `stopped` gives reasons to stop."""
        for digest, pool in self._pools.items():
            if digest in stopped:
                pool.stop(stopped[digest])
            else:
                pool.keep(sizes.get(digest, RETIRED) if self.level is SandboxLevel.SEALED else RETIRED)

    async def close(self) -> None:
        """End every process."""
        for pool in self._pools.values():
            pool.stop("the server is shutting down")
            await pool.close()
        await asyncio.gather(*self._closing)
        self._closers.shutdown(wait=False)
