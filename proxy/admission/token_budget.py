"""What a key, and all of them together, may use: reserved before a request begins, settled with what it cost. No I/O.

    room ──reserve──▶ reserved ──settle──▶ spent ──a minute──▶ room

Spent and reserved together never pass a cap, whatever is asked for, whoever fails and whenever: a request's reserve is
its own hard cap, so it cannot cost more. Clocks are passed in, in seconds; a clock may stand still, not run backwards.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Final, NamedTuple

MINUTE_S: Final = 60.0
GRAIN_S: Final = 1.0
"""Settlements of one such span are kept as one, which leaves the minute as if all had come at the span's end."""
SHARE: Final = 4
"""A request without a cap may use one part in so many of the minute's tokens: one alone must not take them all."""


class Caps(NamedTuple):
    """What one holder may use; None sets no bound."""

    branches: int | None = None  # a request may open
    tokens: int | None = None  # a request may spend
    tokens_per_minute: int | None = None
    episodes: int | None = None  # at once

    def within(self, other: Caps) -> Caps:
        """What both allow."""
        return Caps(*(least(one, two) for one, two in zip(self, other, strict=True)))

    def cap(self, asked: int | None) -> int | None:
        """Tokens a request may spend that asks for `asked`; so many fit into a minute."""
        minute, bound = self.tokens_per_minute, least(asked, self.tokens)
        if minute is None:
            return bound
        return max(1, minute // SHARE) if bound is None else min(bound, minute)


class TokenLimit(NamedTuple):
    """Tokens a request may spend, and who set the bound, as messages name it."""

    tokens: int | None
    source: str = ""


def request_limit(asked: int | None, key: str, own: Caps, common: Caps) -> TokenLimit:
    """Return the tokens a request may spend: the least of `asked`, the caps of its `key` and those of all requests."""
    tokens = own.within(common).cap(asked)
    if tokens is None:
        return TokenLimit(None)
    mine = f"of key {key}" if key else "of this client"
    bounds = (
        (asked, "tts.max_total_tokens"),
        (own.tokens, f"the limit `tokens` {mine}"),
        (common.tokens, "the server's limit AUTOTTS_MAX_TOTAL_TOKENS"),
        (own.tokens_per_minute, f"the limit `tokens_per_minute` {mine}"),
        (common.tokens_per_minute, "the server's limit AUTOTTS_TOKENS_PER_MINUTE"),
    )
    for bound, source in bounds:
        if bound == tokens:
            return TokenLimit(tokens, source)
    minutes = [(bound, source) for bound, source in bounds[3:] if bound is not None]
    minute, source = min(minutes)
    return TokenLimit(tokens, f"a quarter of {source} ({minute}), for a request that sets no tts.max_total_tokens,")


def limit_below(caps: Caps, need: int) -> str | None:
    """Which of `caps` leaves less than the `need` tokens of one interval and its answer, or None."""
    if caps.tokens is not None and caps.tokens < need:
        return f"tokens = {caps.tokens}"
    minute = caps.tokens_per_minute
    if minute is not None and minute < need:
        return f"tokens_per_minute = {minute}"
    if minute is not None and caps.tokens is None and minute // SHARE < need:
        return f"a quarter of tokens_per_minute = {minute}, the cap of requests that set no tts.max_total_tokens,"
    return None


def least(one: int | None, two: int | None) -> int | None:
    """The smaller of two bounds, None being none."""
    return two if one is None else one if two is None else min(one, two)


class BudgetExceeded(Exception):
    """A reserve does not fit now."""

    def __init__(self, holder: str, after_s: float) -> None:
        super().__init__(holder)
        self.holder = holder
        self.after_s = after_s  # when it may at the soonest, if nobody else asks


class TokenWindow:
    """The tokens of one holder in the last minute."""

    def __init__(self, cap: int) -> None:
        self.cap = cap  # tokens a minute; may be set anew
        self.reserved = 0
        self._spent = 0
        self._past: deque[tuple[float, int]] = deque()  # the end of a span, and how many; the oldest first

    def spent(self, now: float) -> int:
        """Tokens settled in the minute before `now`."""
        while self._past and self._past[0][0] <= now - MINUTE_S:
            self._spent -= self._past.popleft()[1]
        return self._spent

    def room(self, now: float) -> int:
        """Tokens that may be reserved now."""
        return max(0, self.cap - self.spent(now) - self.reserved)

    def after_s(self, tokens: int, now: float) -> float:
        """Seconds until `tokens` fit, as far as the past decides; what is reserved may be back at any time."""
        missing = tokens - self.room(now)
        for at, some in self._past:
            if missing <= 0:
                break
            missing -= some
            if missing <= 0:
                return max(0.0, at + MINUTE_S - now)
        return 0.0 if missing <= 0 else GRAIN_S

    def reserve(self, tokens: int) -> None:
        """Set `tokens` aside; that they fit is for the caller to see to."""
        self.reserved += tokens

    def settle(self, reserved: int, cost: int, now: float) -> None:
        """Turn a reserve into what it cost."""
        self.reserved -= reserved
        if cost <= 0:
            return
        self._spent += cost
        end = (now // GRAIN_S + 1) * GRAIN_S
        if self._past and self._past[-1][0] == end:
            cost += self._past.pop()[1]
        self._past.append((end, cost))

    @property
    def is_idle(self) -> bool:
        """Nothing is reserved, and nothing known to have been spent."""
        return not self.reserved and not self._past


class Reservation:
    """Tokens set aside for one request; settled once, whatever is called how often."""

    def __init__(self, windows: tuple[TokenWindow, ...], tokens: int) -> None:
        self.tokens = tokens
        self._windows = windows

    def settle(self, cost: int, now: float) -> None:
        """The request is over and has cost `cost`."""
        windows, self._windows = self._windows, ()
        for window in windows:
            window.settle(self.tokens, cost, now)


class TokenBudgets:
    """The minute's tokens of every holder, and of all of them together."""

    def __init__(self, tokens_per_minute: int | None) -> None:
        self.common = None if tokens_per_minute is None else TokenWindow(tokens_per_minute)
        self.windows: dict[str, TokenWindow] = {}

    def reserve(self, holder: str, per_minute: int | None, tokens: int | None, now: float) -> Reservation:
        """Set `tokens` aside under the holder's cap and the common one: under both, or nothing. Raises BudgetExceeded.

        `tokens` is None only where neither caps.
        """
        own = self._window(holder, per_minute, now)
        windows = {holder: own, "": self.common}
        found = {name: window for name, window in windows.items() if window is not None}
        asked = tokens or 0
        tight = {name: window.after_s(asked, now) for name, window in found.items() if window.room(now) < asked}
        if tight:
            who = max(tight, key=lambda name: tight[name])
            raise BudgetExceeded(who, tight[who])
        for window in found.values():
            window.reserve(asked)
        return Reservation(tuple(found.values()), asked)

    def _window(self, holder: str, per_minute: int | None, now: float) -> TokenWindow | None:
        if per_minute is None:
            return None
        window = self.windows.get(holder)
        if window is None:
            window = self.windows[holder] = TokenWindow(per_minute)
        window.cap = per_minute
        return window

    def forget(self, now: float) -> None:
        """Let go of windows in which nothing is left."""
        for holder, window in list(self.windows.items()):
            window.spent(now)
            if window.is_idle:
                del self.windows[holder]


class RateLimit:
    """How often each holder may do something in a minute."""

    def __init__(self, per_minute: int) -> None:
        self.per_minute = per_minute
        self._windows: dict[str, TokenWindow] = {}

    def take(self, holder: str, now: float) -> None:
        """Count one time. Raises BudgetExceeded if the holder has used up its minute."""
        window = self._windows.setdefault(holder, TokenWindow(self.per_minute))
        if window.room(now) < 1:
            raise BudgetExceeded(holder, window.after_s(1, now))
        window.reserve(1)
        window.settle(1, 1, now)


def retry_after(seconds: float) -> str:
    """Seconds for a `retry-after` header: whole ones, at least one, at most a minute."""
    return str(min(int(MINUTE_S), max(1, math.ceil(seconds))))
