"""Decide when a failing upstream is left alone, and how many requests to it may be retried. No I/O.

                 5 connections fail in a row, or a health check fails
          closed ────────────────────────────────────────────────────▶ open
             ▲                                                          │ 30 s, longer each time
             └──────────────── the health check passes ──── half-open ◀─┘

A request that the upstream answers with an error, cuts off or leaves without an answer may itself be to blame: one
client could send nothing else. Such a failure is only a suspicion. After five in a row the upstream is asked something
of the proxy's own (`health_check.py`), and that alone decides.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import Enum
from typing import Final

FAILURES: Final = 5
"""Failed connections in a row after which the breaker opens, and suspicions in a row that call for a health check."""
OPEN_S: Final = 30.0
"""Seconds the breaker stays open the first time; the n-th time in a row it stays open n times as long."""
MOST_TIMES: Final = 10
"""The n at which that stops growing. After as many such times without opening, the count starts again."""
CHECK_PAUSE_S: Final = 1.0
"""Seconds between health checks that suspicions call for."""
SHARE: Final = 0.2
"""Share of the requests that may be retries."""
SAVED: Final = 10.0
"""Retries that quiet times may save up."""

Clock = Callable[[], float]


class BreakerState(Enum):
    """Whether requests go to the upstream."""

    CLOSED = "closed"  # they do
    OPEN = "open"  # they do not
    HALF_OPEN = "half-open"  # they do not yet: a health check is under way


class Breaker:
    """Circuit breaker of one upstream."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._failures = 0  # connections, in a row
        self._suspicions = 0  # in a row
        self._checked = float("-inf")  # when a suspicion last proved unfounded
        self._times = 0  # opened in a row
        self._until = 0.0  # when the latest opening ends, or ended
        self._state = BreakerState.CLOSED

    @property
    def state(self) -> BreakerState:
        """The present state."""
        return self._state

    @property
    def is_closed(self) -> bool:
        """Whether requests may go out."""
        return self._state is BreakerState.CLOSED

    @property
    def is_due(self) -> bool:
        """Whether the breaker has been open for long enough: a health check decides what follows."""
        return self._state is BreakerState.HALF_OPEN or (
            self._state is BreakerState.OPEN and self._clock() >= self._until
        )

    @property
    def wait_s(self) -> float:
        """Seconds until it is worth asking again."""
        return max(0.0, self._until - self._clock())

    def succeed(self) -> None:
        """Take in a request that was served."""
        self._failures = self._suspicions = 0

    def fail_to_connect(self) -> bool:
        """Take in a connection that failed, which no client can bring about. Return whether the breaker opened."""
        if not self.is_closed:
            return False
        self._failures += 1
        if self._failures < FAILURES:
            return False
        self._open()
        return True

    def suspect(self) -> bool:
        """Take in a request that failed by its own fault or the upstream's. Return whether to check which."""
        if not self.is_closed:
            return False
        self._suspicions += 1
        return self._suspicions >= FAILURES and self._clock() >= self._checked + CHECK_PAUSE_S

    def begin_check(self) -> None:
        """Take in that a health check begins."""
        if self._state is BreakerState.OPEN:
            self._state = BreakerState.HALF_OPEN

    def end_check(self, *, is_up: bool) -> bool:
        """Take in the result of a health check. Return whether the breaker opened."""
        if is_up:
            self._state = BreakerState.CLOSED
            self._failures = self._suspicions = 0
            self._checked = self._clock()
            return False
        if self._state is BreakerState.OPEN:  # connections failed meanwhile
            return False
        self._open()
        return True

    def reset(self) -> None:
        """Forget everything: the upstream has been started anew."""
        self._failures = self._suspicions = self._times = 0
        self._until = 0.0
        self._state = BreakerState.CLOSED

    def _open(self) -> None:
        now = self._clock()
        is_first = now > self._until + MOST_TIMES * OPEN_S
        self._times = 1 if is_first else min(MOST_TIMES, self._times + 1)
        self._until = now + self._times * OPEN_S
        self._failures = self._suspicions = 0
        self._state = BreakerState.OPEN


class BackgroundBreaker(Breaker):
    """Breaker for requests that nobody waits for; it never opens."""

    def fail_to_connect(self) -> bool:
        return False

    def suspect(self) -> bool:
        return False


class RetryBudget:
    """Bounds retries to a share of all requests, so that they cannot be what keeps an upstream down."""

    def __init__(self) -> None:
        self._saved = 1.0

    def earn(self) -> None:
        """Take in a request."""
        self._saved = min(SAVED, self._saved + SHARE)

    def spend(self) -> bool:
        """Return whether a request may be retried; if so, the retry is counted."""
        if self._saved < 1:
            return False
        self._saved -= 1
        return True
