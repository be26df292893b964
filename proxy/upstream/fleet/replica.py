"""One replica of a fleet: its client, its health, the models that it lists, and its load."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Final

from proxy.errors import UpstreamError
from proxy.types import ReplicaStatus
from proxy.upstream.client import UpstreamClient
from proxy.upstream.health_check import log_change

logger = logging.getLogger(__name__)

MAX_NAMED: Final = 10
"""Maximum number of models in a warning."""
RECHECK_S: Final = 1.0
"""Minimum seconds between checks that requests start because no replica is available."""


class Replica:
    """One upstream of several. Its circuit breaker and its branch semaphore are those of its client."""

    def __init__(self, client: UpstreamClient, models: frozenset[str] | None = None) -> None:
        self.client = client
        self.name = client.display_url
        self.is_up: bool | None = None  # result of the latest health check; None before the first one
        self.cards: list[dict[str, Any]] = []  # its models, as of the latest check that passed
        self.has_left = False  # whether it belongs to the fleet no more; its calls may still run
        self.checks_passed = 0  # number of health checks
        self.branches = 0  # in flight or waiting for a slot; a forwarded request counts as one
        self._models = models  # models that requests are sent here for; None: all that it lists
        self._listed: list[str] = []  # ids of the models that the replica listed the last time
        self._missing: frozenset[str] = frozenset()  # of `_models`, what it did not list the last time
        self._checked_at = float("-inf")  # when the latest check ended
        self._checking: asyncio.Task[bool] | None = None

    @cached_property
    def background(self) -> UpstreamClient:
        """The client for background work."""
        return self.client.for_background()

    @property
    def is_available(self) -> bool:
        """Whether new requests may go here, by the latest health check and the circuit breaker."""
        return self.is_up is not False and self.client.breaker.is_closed and not self.has_left

    @property
    def check_due_s(self) -> float:
        """Seconds until a new check is worth while; 0 if one is under way."""
        is_running = self._checking is not None and not self._checking.done()
        return 0.0 if is_running else max(0.0, self._checked_at + RECHECK_S - time.monotonic())

    @property
    def load(self) -> float:
        """Branches in flight or waiting, as a share of the limit."""
        return self.branches / self.client.branch_semaphore.limit

    @property
    def state(self) -> ReplicaStatus:
        """State for operators."""
        return ReplicaStatus(self.name, self.is_up is True, self.client.circuit_breaker, self.branches)

    def serves(self, model: str) -> bool:
        """Return whether requests for a model may go here. An empty name stands for any model."""
        if not model:
            return True
        if self._models is not None:
            return model in self._models
        return not self.cards or any(card["id"] == model for card in self.cards)

    @contextmanager
    def occupied(self, branches: int) -> Iterator[None]:
        """Return a context in which so many branches count as load."""
        self.branches += branches
        try:
            yield
        finally:
            self.branches -= branches

    def begin_check(self) -> asyncio.Task[bool]:
        """Start a health check, or join the one under way. Its result is whether the replica serves a model."""
        if self._checking is None or self._checking.done():
            self._checking = asyncio.create_task(self._check())
        return self._checking

    async def read_cards(self) -> list[dict[str, Any]]:
        """Return the models that requests are sent here for, as the replica lists them now. Raises UpstreamError."""
        cards = await self.client.model_cards(is_check=True)
        kept = [card for card in cards if self._models is None or card["id"] in self._models]
        self.client.parse_models(kept)  # raises if one is invalid
        self._listed = [card["id"] for card in cards]
        self.cards = kept
        return kept

    def _report_missing(self) -> None:
        """Warn, once, about models that requests are sent here for, and that the replica does not list."""
        missing = (self._models or frozenset()).difference(self._listed)
        if missing and missing != self._missing:
            models, others = ", ".join(sorted(missing)), ", ".join(self._listed[:MAX_NAMED]) or "none"
            logger.warning(
                "upstream %s does not serve %s, which AUTOTTS_UPSTREAM names; it serves %s", self.name, models, others
            )
        self._missing = missing

    def reset(self) -> None:
        """Forget all failures."""
        self.is_up = None
        self.client.reset()

    async def close(self) -> None:
        """Cancel health checks that are under way."""
        if self._checking is not None:
            self._checking.cancel()
            await asyncio.gather(self._checking, return_exceptions=True)
        await self.client.close()

    async def _check(self) -> bool:
        was_up, is_up = self.is_up, await self.client.is_healthy()
        try:
            self.is_up = is_up and bool(await self.read_cards())
            self._report_missing()
        except UpstreamError:
            self.is_up = False
        log_change([self.name], was_up, self.is_up, "it gets no new requests until a health check passes")
        self.checks_passed += self.is_up
        self._checked_at = time.monotonic()
        return self.is_up
