"""How busy the upstream is, and what is left of β then: fewer branches for everybody rather than a queue for all.

    factor  1 ┤─────────╮
              │          ╲
    least     ┤           ╰────────
              └─────────┬─┬────────  waiting requests, or share of the KV cache in use; the worse of them counts
                    low ┘ └ high

Requests that say `tts.required`, and recordings, keep their β: who needs all of it can say so, and is still held by
the budgets of its key.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Final, NamedTuple

from proxy.settings import Settings
from proxy.telemetry.metrics import Metrics
from proxy.upstream.client import UpstreamClient

EVERY_S: Final = 1.0
"""Seconds between looks while there is traffic."""
IDLE_S: Final = 5.0
"""Seconds without a request after which nobody looks any more."""
FRESH_S: Final = 3.0
"""Age of a look that is still believed."""
WAIT_S: Final = 0.25
"""Seconds a request waits for a look where there is none that is fresh."""


class Watermarks(NamedTuple):
    """From where a reading counts, and from where no further."""

    low: float
    high: float

    def share(self, reading: float | None) -> float:
        """How far `reading` is from one to the other, from 0 to 1; an unknown one is at 0."""
        if reading is None or reading <= self.low:
            return 0.0
        return min(1.0, (reading - self.low) / (self.high - self.low)) if self.high > self.low else 1.0


def parse_watermarks(text: str | None) -> Watermarks | None:
    """The marks of a setting, `4:32`."""
    if text is None:
        return None
    low, _, high = text.partition(":")
    return Watermarks(float(low), float(high))


class LoadShedding:
    """One upstream's load, looked at while there is traffic. Off, and never looking, where no marks are set."""

    def __init__(self, engine: UpstreamClient, settings: Settings, metrics: Metrics) -> None:
        self._engine = engine
        self._metrics = metrics
        self._waiting = parse_watermarks(settings.load_waiting)
        self._cache = parse_watermarks(settings.load_cache)
        self._least = settings.load_factor
        self._factor = 1.0
        self._looked = self._asked = float("-inf")  # when, by the loop's clock
        self._fresh = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        metrics.load_factor.set(1)

    @property
    def is_on(self) -> bool:
        """Whether load changes anything."""
        return self._waiting is not None or self._cache is not None

    async def beta_factor(self) -> float:
        """What is left of β now, from `load_factor` to 1. Where nobody can tell it is all of it."""
        if not self.is_on:
            return 1.0
        now = self._asked = asyncio.get_running_loop().time()
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._look())
        if now - self._looked > FRESH_S:
            self._fresh.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(WAIT_S):
                    await self._fresh.wait()
        return self._factor if now - self._looked <= FRESH_S else 1.0

    async def close(self) -> None:
        """Look no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _look(self) -> None:
        clock = asyncio.get_running_loop().time
        while clock() - self._asked < IDLE_S:
            waiting, cache = await self._engine.read_load()
            shares = [marks.share(at) for marks, at in ((self._waiting, waiting), (self._cache, cache)) if marks]
            self._factor = 1 - (1 - self._least) * max(shares)
            self._metrics.load_factor.set(self._factor)
            self._looked = clock()
            self._fresh.set()
            await asyncio.sleep(EVERY_S)
        self._factor = 1.0
        self._metrics.load_factor.set(1)
