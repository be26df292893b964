"""Token budgets of API keys and of the whole server. No I/O.

    room ──reserve──▶ reserved ──settle──▶ spent ──a minute──▶ room

Tokens are reserved before a request begins and settled by its cost. Spent and reserved tokens together never exceed a
cap, whatever requests ask for and however they fail: the reservation of a request is its hard cap, so it cannot cost
more. Callers pass the time in seconds. It must never go backwards.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable
from random import random
from typing import Final, NamedTuple

MINUTE_S: Final = 60.0
GRAIN_S: Final = 1.0
"""Seconds of settlements that share one entry. The entry expires as if all of them had been at its end."""
LOOKED_AT: Final = 4
"""Windows that a call of `forget_idle` looks at. At most one is added between two calls, so it keeps up with them."""
SHARE: Final = 4
"""Divisor of the minute's tokens that gives the cap of a request without one, so that it cannot take them all."""
_LEAST_SPREAD_S: Final = 2
"""Seconds over which even the shortest waits for a retry are spread."""
_SHARE_SOURCE: Final = "a quarter of"


class Caps(NamedTuple):
    """Limits of one budget holder or of the whole server. None means no limit."""

    branches: int | None = None  # per request
    tokens: int | None = None  # per request
    tokens_per_minute: int | None = None
    episodes: int | None = None  # at a time

    def within(self, other: Caps) -> Caps:
        """Return the stricter of both limits in each field."""
        if self == _NO_CAPS:
            return other
        return Caps(*(smaller(first, second) for first, second in zip(self, other, strict=True)))

    def share(self, count: int) -> Caps:
        """Return the part of one of `count` processes that count tokens and running requests on their own."""
        minute, episodes = self.tokens_per_minute, self.episodes
        return self._replace(
            tokens_per_minute=None if minute is None else max(1, minute // count),
            episodes=None if episodes is None else max(1, episodes // count),
        )

    def cap(self, requested: int | None) -> int | None:
        """Return the maximum tokens of a request whose own limit is `requested`. They fit into a minute's cap."""
        minute, bound = self.tokens_per_minute, smaller(requested, self.tokens)
        if minute is None:
            return bound
        return max(1, minute // SHARE) if bound is None else min(bound, minute)


_NO_CAPS: Final = Caps()


class TokenLimit(NamedTuple):
    """Tokens that a request may spend, and the name of the setting or field that set the limit."""

    tokens: int | None
    source: str = ""


class EpisodeCaps(NamedTuple):
    """Limits of one episode: the strictest of its request, its key and the server."""

    branches: int
    tokens: int | None = None
    source: str = ""  # name of the setting or field that sets `tokens`, for error messages
    prompts: int = 1  # among which the request shares its limit

    @property
    def share_source(self) -> str | None:
        """Part of `source` about a quarter of a minute's tokens; None if `tokens` does not derive from one."""
        _, separator, rest = self.source.partition(_SHARE_SOURCE)
        return separator + rest.rstrip(",") if separator else None


def request_limit(requested: int | None, key: str, own: Caps, common: Caps, processes: int = 1) -> TokenLimit:
    """Return the smallest of a request's own limit, its key's caps and the server's caps, with its source.

    `own` and `common` are the parts of one of `processes`.
    """
    tokens = own.within(common).cap(requested)
    if tokens is None:
        return TokenLimit(None)
    holder, each = f"of key {key}" if key else "of this client", in_each(processes)
    bounds = (
        (requested, "tts.max_total_tokens"),
        (own.tokens, f"the limit `tokens` {holder}"),
        (common.tokens, "the server's limit AUTOTTS_MAX_TOTAL_TOKENS"),
        (own.tokens_per_minute, f"the limit `tokens_per_minute` {holder}{each}"),
        (common.tokens_per_minute, f"the server's limit AUTOTTS_TOKENS_PER_MINUTE{each}"),
    )
    for bound, source in bounds:
        if bound == tokens:
            return TokenLimit(tokens, source)
    minutes = [(bound, source) for bound, source in bounds[3:] if bound is not None]
    minute, source = min(minutes)
    return TokenLimit(tokens, f"{_SHARE_SOURCE} {source} ({minute}), for a request that sets no tts.max_total_tokens,")


def limit_below(caps: Caps, needed: int, processes: int = 1) -> str | None:
    """Return the limit in `caps` that is smaller than `needed`, the tokens of one interval and its answer, or None.

    `caps` are the part of one of `processes`.
    """
    if caps.tokens is not None and caps.tokens < needed:
        return f"tokens = {caps.tokens}"
    minute, each = caps.tokens_per_minute, in_each(processes)
    if minute is not None and minute < needed:
        return f"tokens_per_minute = {minute}{each}"
    if minute is not None and caps.tokens is None and minute // SHARE < needed:
        return f"a quarter of tokens_per_minute = {minute}{each}, the cap of requests that set no tts.max_total_tokens,"
    return None


def in_each(processes: int) -> str:
    """Return which of several processes a limit is a part of; nothing for one process."""
    return f" in each of {processes} workers" if processes > 1 else ""


def smaller(first: int | None, second: int | None) -> int | None:
    """Return the smaller of two limits. None means no limit."""
    return second if first is None else first if second is None else min(first, second)


class WindowState(NamedTuple):
    """Tokens of a window at one time."""

    cap: int
    spent: int
    reserved: int


class BudgetExceeded(Exception):
    """A reservation does not fit into the budget now."""

    def __init__(self, holder: str, after_s: float, state: WindowState) -> None:
        super().__init__(holder)
        self.holder = holder
        self.after_s = after_s  # seconds until it fits at the earliest, if no other request is admitted meanwhile
        self.state = state


class TokenWindow:
    """Sliding window that caps the tokens spent within any `span_s` seconds."""

    def __init__(self, cap: int, span_s: float = MINUTE_S) -> None:
        self.cap = cap  # tokens; may be changed at any time
        self.span_s = span_s
        self.reserved = 0
        self._spent = 0
        self._entries: deque[tuple[float, int]] = deque()  # (end of the grain, tokens), the oldest first

    def spent(self, now: float) -> int:
        """Return the tokens settled in the last `span_s` seconds."""
        while self._entries and self._entries[0][0] <= now - self.span_s:
            self._spent -= self._entries.popleft()[1]
        return self._spent

    def state(self, now: float) -> WindowState:
        """Return the tokens spent in the last `span_s` seconds and those reserved now."""
        return WindowState(self.cap, self.spent(now), self.reserved)

    def room(self, now: float) -> int:
        """Return the tokens that may be reserved now."""
        return max(0, self.cap - self.spent(now) - self.reserved)

    def fits(self, tokens: int, now: float) -> bool:
        """Return whether `tokens` may be reserved or spent now."""
        return self.room(now) >= tokens

    def after_s(self, tokens: int, now: float) -> float:
        """Return the seconds until `tokens` fit.

        If settled tokens alone do not decide that, return GRAIN_S, because reservations may end at any time.
        """
        missing = tokens - self.room(now)
        for end, settled in self._entries:
            if missing <= 0:
                break
            missing -= settled
            if missing <= 0:
                return max(0.0, end + self.span_s - now)
        return 0.0 if missing <= 0 else GRAIN_S

    def reserve(self, tokens: int) -> None:
        """Reserve `tokens`. The caller must have checked that they fit."""
        self.reserved += tokens

    def settle(self, reserved: int, cost: int, now: float) -> None:
        """Replace a reservation of `reserved` tokens by its `cost`."""
        self.reserved -= reserved
        if cost <= 0:
            return
        self._spent += cost
        end = (now // GRAIN_S + 1) * GRAIN_S
        if self._entries and self._entries[-1][0] == end:
            cost += self._entries.pop()[1]
        self._entries.append((end, cost))

    @property
    def is_idle(self) -> bool:
        """Whether nothing is reserved and no settled tokens are in the window."""
        return not self.reserved and not self._entries


class Reservation:
    """Tokens reserved for one request. Only the first call of `settle` counts."""

    def __init__(self, windows: tuple[TokenWindow, ...], tokens: int) -> None:
        self.tokens = tokens
        self._windows = windows

    def settle(self, cost: int, now: float) -> None:
        """Charge `cost` tokens and free the rest."""
        windows, self._windows = self._windows, ()
        for window in windows:
            window.settle(self.tokens, cost, now)


class TokenBudgets:
    """The token window of each budget holder, and one that all holders share."""

    def __init__(self, tokens_per_minute: int | None) -> None:
        self.common = None if tokens_per_minute is None else TokenWindow(tokens_per_minute)
        self.windows: OrderedDict[str, TokenWindow] = OrderedDict()  # by holder

    @property
    def is_unlimited(self) -> bool:
        """Whether there is no common window, and none of a holder."""
        return self.common is None and not self.windows

    def reserve(self, holder: str, per_minute: int | None, tokens: int | None, now: float) -> Reservation:
        """Reserve `tokens` in the holder's window and in the common one, in both or in neither.

        `tokens` is None only if neither window has a cap. Raises BudgetExceeded.
        """
        own = self._window(holder, per_minute)
        windows = {name: window for name, window in ((holder, own), ("", self.common)) if window is not None}
        wanted = tokens or 0
        waits = {name: window.after_s(wanted, now) for name, window in windows.items() if window.room(now) < wanted}
        if waits:
            longest = max(waits, key=lambda name: waits[name])
            raise BudgetExceeded(longest, waits[longest], windows[longest].state(now))
        for window in windows.values():
            window.reserve(wanted)
        return Reservation(tuple(windows.values()), wanted)

    def _window(self, holder: str, per_minute: int | None) -> TokenWindow | None:
        if per_minute is None:
            return None
        window = self.windows.get(holder)
        if window is None:
            window = self.windows[holder] = TokenWindow(per_minute)
        window.cap = per_minute
        return window

    def forget(self, now: float) -> None:
        """Drop some of the windows in which nothing is reserved or spent; see `forget_idle`."""
        forget_idle(self.windows, now)


def forget_idle(windows: OrderedDict[str, TokenWindow], now: float) -> None:
    """Drop those of the next few windows in which nothing is reserved or spent.

    Calls go through all windows in turn, and each takes the same time however many there are. Call it whenever a
    window may be added, so that idle ones do not pile up.
    """
    for _ in range(min(LOOKED_AT, len(windows))):
        holder, window = next(iter(windows.items()))
        window.spent(now)
        if window.is_idle:
            del windows[holder]
        else:
            windows.move_to_end(holder)


class RateLimit:
    """Limit on the number of uses per minute and holder."""

    def __init__(self, per_minute: int) -> None:
        self.per_minute = per_minute
        self._windows: OrderedDict[str, TokenWindow] = OrderedDict()

    @property
    def holders(self) -> int:
        """Number of holders that are remembered."""
        return len(self._windows)

    def take(self, holder: str, now: float) -> None:
        """Count one use. Raises BudgetExceeded if the holder has reached the limit."""
        forget_idle(self._windows, now)
        window = self._windows.setdefault(holder, TokenWindow(self.per_minute))
        if window.room(now) < 1:
            raise BudgetExceeded(holder, window.after_s(1, now), window.state(now))
        window.reserve(1)
        window.settle(1, 1, now)


def retry_after(seconds: float, draw: Callable[[], float] = random) -> str:
    """Return a `retry-after` header: a whole number of seconds, at least `seconds`, from 1 to 60.

    Up to half as much again, or 2 s if that is more, is added at random, so that a burst does not return at once.
    """
    least = min(int(MINUTE_S), max(1, math.ceil(seconds)))
    longest = min(int(MINUTE_S), least + max(_LEAST_SPREAD_S, least // 2))
    return str(least + int(draw() * (longest - least + 1)))
