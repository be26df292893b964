"""Limits that requests reserve from: tokens per minute, and requests of a key that run at a time.

`LocalLimits` hold in this process. `proxy.admission.shared_limits` has limits that hold over several proxies.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Final, NamedTuple, Protocol

from proxy.admission.token_budget import Caps, Reservation, TokenBudgets, WindowState


class Place:
    """Place of one request among the running requests of its key.

    In one process the fair queue counts these, so this place is always held.
    """

    is_held = True

    async def wait(self) -> None:
        """Wait until the place is held. Raises LimitsAway."""

    def release(self) -> None:
        """Give the place back. Further calls do nothing."""


NO_PLACE: Final = Place()
"""Place of a request whose key has no limit, or whose limit the fair queue enforces."""


class LimitUsage(NamedTuple):
    """Usage of one holder now. None means that it is not counted."""

    tokens: WindowState | None
    running: Mapping[str, int] | None = None  # requests over all proxies, by kind


class RequestLimits(Protocol):
    """Limits of tokens and of running requests."""

    async def open(self) -> None:
        """Begin to work."""

    async def close(self) -> None:
        """Return what is still held, as far as possible."""

    async def reserve(self, holder: str, per_minute: int | None, tokens: int | None) -> Reservation:
        """Reserve `tokens` in the holder's window and in the common one, in both or in neither.

        `tokens` is None only if neither window has a cap. Raises BudgetExceeded or LimitsAway.
        """

    async def place(self, kind: str, holder: str, limit: int | None) -> Place:
        """Return a place among the `limit` running requests of one kind. It may not be held yet. Raises LimitsAway."""

    async def usage(self, holders: Mapping[str, Caps]) -> Mapping[str, LimitUsage]:
        """Return the usage of `holders`, and that of all holders together under the empty name."""


class LocalLimits:
    """Limits that hold in this process."""

    def __init__(self, tokens_per_minute: int | None) -> None:
        self.budgets = TokenBudgets(tokens_per_minute)

    async def open(self) -> None:
        """Begin to work. There is nothing to do."""

    async def close(self) -> None:
        """End. There is nothing to do."""

    async def reserve(self, holder: str, per_minute: int | None, tokens: int | None) -> Reservation:
        """Reserve tokens in this process. Raises BudgetExceeded."""
        if per_minute is None and self.budgets.is_unlimited:
            return Reservation((), tokens or 0)
        now = time.monotonic()
        self.budgets.forget(now)
        return self.budgets.reserve(holder, per_minute, tokens, now)

    async def place(self, kind: str, holder: str, limit: int | None) -> Place:
        """Return a place that is held: the fair queue enforces the limit."""
        return NO_PLACE

    async def usage(self, holders: Mapping[str, Caps]) -> Mapping[str, LimitUsage]:
        """Return the usage of this process."""
        now, budgets = time.monotonic(), self.budgets

        def tokens(holder: str, caps: Caps) -> WindowState | None:
            if caps.tokens_per_minute is None:
                return None  # tokens are counted only under a cap
            window = budgets.windows.get(holder)
            return WindowState(caps.tokens_per_minute, 0, 0) if window is None else window.state(now)

        common = None if budgets.common is None else budgets.common.state(now)
        return {"": LimitUsage(common), **{name: LimitUsage(tokens(name, caps)) for name, caps in holders.items()}}
