"""When a failing upstream is left alone, and how many requests to it may be repeated. Decisions only; no I/O."""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import Enum
from typing import Final

FAILURES: Final = 5
"""Failures in a row after which the upstream is ejected."""
EJECTED_S: Final = 30.0
"""Seconds the first ejection lasts; the n-th in a row lasts n times as long."""
MOST_TIMES: Final = 10
"""The n at which that stops to grow. After as many such times without an ejection, it is counted anew."""
SHARE: Final = 0.2
"""Of the requests may be repeats."""
SAVED: Final = 10.0
"""Repeats that quiet times may save up."""

Clock = Callable[[], float]


class Standing(Enum):
    """How the upstream is thought of."""

    WELL = "well"
    EJECTED = "ejected"
    TRIED = "tried"  # its time is over: one request is let through, and the others wait for what comes of it


class Breaker:
    """Whether requests go to the upstream."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._failures = 0  # in a row
        self._times = 0  # ejected in a row
        self._until = 0.0  # when the latest ejection ends, or ended
        self._standing = Standing.WELL

    @property
    def standing(self) -> Standing:
        """How the upstream is thought of now."""
        return self._standing

    @property
    def wait_s(self) -> float:
        """Seconds until it is worth asking again."""
        return max(0.0, self._until - self._clock())

    def admit(self) -> bool:
        """Whether a request may go out. One that may must be told to `succeed`, `fail` or `leave`."""
        if self._standing is Standing.EJECTED and self._clock() >= self._until:
            self._standing = Standing.TRIED
            return True
        return self._standing is Standing.WELL

    def succeed(self, *, is_telling: bool = True) -> None:
        """A request was answered. If that is not `is_telling` of others, it only ends an ejection."""
        if self._standing is Standing.TRIED:
            self._standing = Standing.WELL
            self._failures = 0
        elif self._standing is Standing.WELL and is_telling:
            self._failures = 0

    def fail(self, *, is_telling: bool = True) -> bool:
        """A request was not answered, or by a failure of the upstream's; whether that is ejected for it."""
        if self._standing is Standing.WELL:
            self._failures += is_telling
        if self._standing is Standing.EJECTED or (self._standing is Standing.WELL and self._failures < FAILURES):
            return False
        now = self._clock()
        is_anew = now > self._until + MOST_TIMES * EJECTED_S
        self._times = 1 if is_anew else min(MOST_TIMES, self._times + 1)
        self._until = now + self._times * EJECTED_S
        self._standing = Standing.EJECTED
        return True

    def leave(self) -> None:
        """A request was given up by whoever made it: that tells nothing, and another is to be let through."""
        if self._standing is Standing.TRIED:
            self._standing = Standing.EJECTED


class Unheeded(Breaker):
    """The same of work that nobody waits for: all of it goes out, and whatever comes of it ejects nothing."""

    def fail(self, *, is_telling: bool = True) -> bool:
        return False


class Budget:
    """How many requests may be repeated: a share of all, so that repeats cannot be what keeps an upstream down."""

    def __init__(self) -> None:
        self._saved = 1.0

    def earn(self) -> None:
        """A request is made."""
        self._saved = min(SAVED, self._saved + SHARE)

    def spend(self) -> bool:
        """Whether one may be repeated; it is counted as repeated then."""
        if self._saved < 1:
            return False
        self._saved -= 1
        return True
