"""Look every few seconds whether the upstream is well, for the metrics and for whoever asks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final

from proxy.telemetry.metrics import Metrics

EVERY_S = 5.0
"""Seconds between looks that nobody asks for."""
FRESH_S: Final = 1.0
"""Seconds for which the result of a look stands."""

Clock = Callable[[], float]


class HealthMonitor:
    """Whether the upstream is well, as a metric and for the route `/ready`. `look` asks the upstream."""

    def __init__(self, look: Callable[[], Awaitable[bool]], metrics: Metrics, clock: Clock = time.monotonic) -> None:
        self._look = look
        self._metrics = metrics
        self._clock = clock
        self._is_well = False
        self._looked = float("-inf")  # when the latest look ended
        self._under_way: asyncio.Task[None] | None = None
        self._task: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Begin to look."""
        self._task = asyncio.create_task(self._repeat())

    async def close(self) -> None:
        """Stop looking."""
        for task in (self._task, self._under_way):
            if task is not None:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task

    async def is_ready(self) -> bool:
        """Return whether the upstream is well, by a look that is at most a second old. Callers share a look."""
        if self._clock() - self._looked >= FRESH_S:
            if self._under_way is None or self._under_way.done():
                self._under_way = asyncio.create_task(self._look_once())
            await asyncio.wait([self._under_way])
        return self._is_well

    async def _look_once(self) -> None:
        self._is_well = await self._look()
        self._looked = self._clock()
        self._metrics.upstream_up.set(self._is_well)

    async def _repeat(self) -> None:
        while True:
            await self.is_ready()
            await asyncio.sleep(EVERY_S)
