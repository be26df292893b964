"""Follow a registry in a database in the background, so that no request waits for the database.

A change is announced by the database. The stamp is also read every `poll_s` seconds, in case announcements do not
arrive: after the connection was lost, or through a pooler of connections that does not pass them on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from discovery.errors import PromotionError
from discovery.promotion.storage.announcements import Announcements, open_announcements
from discovery.store import DatabaseUrl
from proxy.rollout.stages import RETRY_S, RolloutStages

LEAST_POLL_S: Final = 0.1
"""Least seconds between two reads that nothing has announced."""
START_S: Final = 5.0
"""Most seconds that the start of the proxy waits for the first read."""


class RegistryWatch:
    """Task that keeps the rollout stages as in the registry, and calls `on_change` after each change."""

    def __init__(self, url: DatabaseUrl, stages: RolloutStages, poll_s: float, on_change: Callable[[], None]) -> None:
        self._url = url
        self._stages = stages
        self._poll_s = max(poll_s, LEAST_POLL_S)
        self._on_change = on_change
        self._has_read = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start, and wait until the registry was read or could not be."""
        self._task = asyncio.create_task(self._run())
        try:
            async with asyncio.timeout(START_S):
                await self._has_read.wait()
        except TimeoutError:
            pass

    async def close(self) -> None:
        """Stop."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        async with open_announcements(self._url) as announcements:
            while True:
                is_read = await self._read(announcements)
                self._has_read.set()
                await announcements.wait(self._poll_s if is_read else min(self._poll_s, RETRY_S))

    async def _read(self, announcements: Announcements) -> bool:
        """Read the registry if its stamp has changed. Returns whether that was possible."""
        try:
            is_changed = await self._stages.follow(await announcements.stamp())
        except PromotionError as error:
            self._stages.log_problem(error)
            return False
        if is_changed:
            self._on_change()
        return True
