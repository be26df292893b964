"""Find out what is no longer in use, so that its metrics and other entries are removed after a while.

Without this, every controller and model that ever served would take memory for as long as the process lives.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from typing import Final

logger = logging.getLogger(__name__)

LOOKS: Final = 4
"""Looks for retired keys in the time for which they are kept."""
LEAST_WAIT_S: Final = 1.0
MOST_WAIT_S: Final = 60.0
"""Least and most seconds between two looks."""


class Retirement:
    """Keys that are not in use, and since when. A key is retired once it has not been in use for `keep_s` seconds."""

    def __init__(self, keep_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._keep_s = keep_s
        self._clock = clock
        self._unused_since: dict[str, float] = {}
        self._held: Counter[str] = Counter()  # requests in flight that use a key

    @contextmanager
    def hold(self, key: str) -> Iterator[None]:
        """Keep a key in use. Afterwards its time begins anew."""
        self._held[key] += 1
        try:
            yield
        finally:
            self._held[key] -= 1
            if not self._held[key]:
                del self._held[key]
            self._unused_since.pop(key, None)

    def retired(self, keys: Iterable[str], in_use: Container[str]) -> list[str]:
        """Return those of `keys` that are retired. All others that are not in use are remembered for the next call."""
        now, before = self._clock(), self._unused_since
        since = {key: before.get(key, now) for key in keys if key not in in_use and key not in self._held}
        retired = [key for key, began in since.items() if now - began >= self._keep_s]
        for key in retired:
            del since[key]
        self._unused_since = since
        return retired


class RetirementTask:
    """Task that calls functions again and again, also after one has failed.

    Each removes what is retired; `keep_s` is how long that is kept.
    """

    def __init__(self, keep_s: float, *removals: Callable[[], None]) -> None:
        self._wait_s = max(LEAST_WAIT_S, min(MOST_WAIT_S, keep_s / LOOKS))
        self._removals = removals
        self._task: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Start."""
        self._task = asyncio.create_task(self._repeat())

    async def close(self) -> None:
        """Stop."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _repeat(self) -> None:
        while True:
            await asyncio.sleep(self._wait_s)
            for remove in self._removals:
                try:
                    remove()
                except Exception:  # memory grows slowly without it, and the others still help
                    logger.exception("cannot remove what serves no longer")
