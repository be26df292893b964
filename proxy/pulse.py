"""Whether the upstream is well, looked at every few seconds, for whoever watches the metrics."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from proxy.engine import Engine
from proxy.metrics import Metrics

EVERY_S = 5.0
"""Seconds between looks."""


class Pulse:
    """The upstream's, as a metric."""

    def __init__(self, engine: Engine, metrics: Metrics) -> None:
        self._engine = engine
        self._metrics = metrics
        self._looking: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Begin to look."""
        self._looking = asyncio.create_task(self._look())

    async def close(self) -> None:
        """Look no more."""
        if self._looking is not None:
            self._looking.cancel()
            with suppress(asyncio.CancelledError):
                await self._looking

    async def _look(self) -> None:
        while True:
            self._metrics.upstream_up.set(await self._engine.healthy())
            await asyncio.sleep(EVERY_S)
