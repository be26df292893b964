"""Check the upstream's health every few seconds, for the metrics, for `/ready`, and so that open breakers close."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Final

from proxy.telemetry.logs import log_fault
from proxy.telemetry.metrics import Metrics
from proxy.upstream.health_check import log_change

logger = logging.getLogger(__name__)

CHECK_INTERVAL_S = 5.0
"""Seconds between periodic checks."""
FRESH_S: Final = 1.0
"""Seconds for which the result of a check is reused."""


class HealthMonitor:
    """Runs health checks of the upstream and keeps the latest result. `check` performs one check."""

    def __init__(
        self,
        addresses: Callable[[], Sequence[str]],
        check: Callable[[], Awaitable[bool]],
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._addresses = addresses  # of the upstream, for the log; those of a fleet change
        self._check = check
        self._metrics = metrics
        self._clock = clock
        self._is_healthy: bool | None = None  # None before the first check
        self._checked_at = float("-inf")  # when the latest check ended
        self._under_way: asyncio.Task[None] | None = None
        self._task: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Start the periodic checks."""
        self._task = asyncio.create_task(self._repeat())

    async def close(self) -> None:
        """Stop the checks."""
        for task in (self._task, self._under_way):
            if task is not None:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task

    async def is_ready(self) -> bool:
        """Return whether the upstream is healthy, by a check at most FRESH_S old. Concurrent callers share a check."""
        if self._clock() - self._checked_at >= FRESH_S:
            if self._under_way is None or self._under_way.done():
                self._under_way = asyncio.create_task(self._check_once())
            await asyncio.wait([self._under_way])
        return self._is_healthy is True

    async def _check_once(self) -> None:
        was_healthy = self._is_healthy
        try:
            self._is_healthy = await self._check()
        except Exception as error:  # a fault of the check must not leave an old result in force
            log_fault(logger, error)
            self._is_healthy = False
        self._checked_at = self._clock()
        log_change(self._addresses(), was_healthy, self._is_healthy, "/ready is 503 until a health check passes")
        self._metrics.upstream_up.set(self._is_healthy)

    async def _repeat(self) -> None:
        while True:
            await self.is_ready()
            await asyncio.sleep(CHECK_INTERVAL_S)
