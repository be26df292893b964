"""Lower β while the upstream is busy, so that all requests get fewer branches instead of waiting in a queue.

    factor  1 ┤─────────╮
              │          ╲
    least     ┤           ╰────────
              └─────────┬─┬────────  waiting requests, or share of the KV cache in use; the lower factor applies
                    low ┘ └ high

Requests with `tts.required`, and recordings, keep their β. They still count against the budgets of their key.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Final, NamedTuple

from proxy.settings import Settings
from proxy.telemetry.metrics import Metrics
from proxy.upstream.fleet.interface import Upstream

POLL_S: Final = 1.0
"""Seconds between polls while there is traffic."""
IDLE_S: Final = 5.0
"""Seconds without a request after which polling stops."""
FRESH_S: Final = 3.0
"""Seconds for which the result of a poll is used."""
WAIT_S: Final = 0.25
"""Maximum seconds that a request waits for a poll if the last result is too old."""


class Watermarks(NamedTuple):
    """The readings at which β starts to shrink (low) and stops shrinking (high)."""

    low: float
    high: float

    def share(self, reading: float | None) -> float:
        """Return the position of `reading` between low (0) and high (1). An unknown reading counts as low."""
        if reading is None or reading <= self.low:
            return 0.0
        return min(1.0, (reading - self.low) / (self.high - self.low)) if self.high > self.low else 1.0


def parse_watermarks(text: str | None) -> Watermarks | None:
    """Parse a setting such as `4:32`."""
    if text is None:
        return None
    low, _, high = text.partition(":")
    return Watermarks(float(low), float(high))


class LoadShedding:
    """Polls the load of one upstream while there is traffic. Without watermarks it is off and never polls."""

    def __init__(self, engine: Upstream, settings: Settings, metrics: Metrics) -> None:
        self._engine = engine
        self._metrics = metrics
        self._waiting = parse_watermarks(settings.load_waiting)
        self._cache = parse_watermarks(settings.load_cache)
        self._least = settings.load_factor
        self._factor = 1.0
        self._polled_at = self._asked_at = float("-inf")  # by the loop's clock
        self._fresh = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        metrics.load_factor.set(1)

    @property
    def is_on(self) -> bool:
        """Whether any watermarks are set."""
        return self._waiting is not None or self._cache is not None

    async def beta_factor(self) -> float:
        """Return the current factor for β, from `load_factor` to 1. It is 1 if the load is unknown."""
        if not self.is_on:
            return 1.0
        now = self._asked_at = asyncio.get_running_loop().time()
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._poll())
        if now - self._polled_at > FRESH_S:
            self._fresh.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(WAIT_S):
                    await self._fresh.wait()
        return self._factor if now - self._polled_at <= FRESH_S else 1.0

    async def close(self) -> None:
        """Stop polling."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _poll(self) -> None:
        clock = asyncio.get_running_loop().time
        while clock() - self._asked_at < IDLE_S:
            waiting, cache = await self._engine.read_load()
            readings = ((self._waiting, waiting), (self._cache, cache))
            shares = [marks.share(reading) for marks, reading in readings if marks]
            self._factor = 1 - (1 - self._least) * max(shares)
            self._metrics.load_factor.set(self._factor)
            self._polled_at = clock()
            self._fresh.set()
            await asyncio.sleep(POLL_S)
        self._factor = 1.0
        self._metrics.load_factor.set(1)
