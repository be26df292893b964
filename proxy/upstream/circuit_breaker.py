"""Circuit breaker: stops requests to a failing upstream. No I/O.

                 5 connections fail in a row, or a health check fails
          closed ────────────────────────────────────────────────────▶ open
             ▲                                                          │ 30 s, longer each time,
             └──────────────── the health check passes ──── half-open ◀─┘ or the upstream answers again

A failed request (an error, a broken connection, no response) may itself be the cause, and one client could send only
such requests. Such a failure is therefore only a suspicion. Five suspicions without a served generation in between
start a health check (`health_check.py`), and its result decides.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import Enum
from typing import Final

FAILURES: Final = 5
"""Failed connections in a row that open the breaker, and suspicions that start a health check."""
OPEN_S: Final = 30.0
"""Seconds that the breaker stays open the first time. The n-th time in a row it stays open n times as long."""
MAX_OPENINGS: Final = 10
"""Largest n. After MAX_OPENINGS * OPEN_S seconds without opening, the count restarts at 1."""
CHECK_PAUSE_S: Final = 1.0
"""Minimum seconds after a passed health check before suspicions start another one."""
EARLY_S: Final = 5.0
"""Seconds until a retry makes sense while the upstream may come back: it is asked that often (`health_monitor.py`)."""


class BreakerState(Enum):
    """State of a circuit breaker."""

    CLOSED = "closed"  # requests go out
    OPEN = "open"  # no requests go out
    HALF_OPEN = "half-open"  # no requests go out yet, and a health check is running


class Breaker:
    """Circuit breaker of one upstream."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures = 0  # failed connections in a row
        self._suspicions = 0  # failed requests since a generation was served
        self._last_passed = float("-inf")  # when the latest health check passed
        self._openings = 0  # in a row
        self._open_until = 0.0  # also after it has closed again
        self._may_close_early = True  # whether an answer of the upstream starts a health check before that time
        self._state = BreakerState.CLOSED

    @property
    def state(self) -> BreakerState:
        """Current state."""
        return self._state

    @property
    def is_closed(self) -> bool:
        """Whether requests may go out."""
        return self._state is BreakerState.CLOSED

    @property
    def is_due(self) -> bool:
        """Whether the open time has passed, so that a health check must decide the next state."""
        return self._state is BreakerState.HALF_OPEN or (
            self._state is BreakerState.OPEN and self._clock() >= self._open_until
        )

    @property
    def wait_s(self) -> float:
        """Seconds until the open time has passed."""
        return max(0.0, self._open_until - self._clock())

    @property
    def retry_s(self) -> float:
        """Seconds until a retry makes sense."""
        return min(self.wait_s, EARLY_S) if self._may_close_early else self.wait_s

    def succeed(self, *, is_generation: bool) -> None:
        """Record an answer. Only a generation that was served proves that the upstream generates."""
        self._failures = 0
        if is_generation:
            self._suspicions = 0

    def fail_to_connect(self) -> bool:
        """Record a failed connection, which no client can cause. Return whether the breaker opened."""
        if not self.is_closed:
            return False
        self._failures += 1
        if self._failures < FAILURES:
            return False
        self._open()
        return True

    def suspect(self) -> bool:
        """Record a request that failed by its own or the upstream's fault. Return whether to run a health check."""
        if not self.is_closed:
            return False
        self._suspicions += 1
        return self._suspicions >= FAILURES and self._clock() >= self._last_passed + CHECK_PAUSE_S

    def note_answer(self, *, has_answered: bool) -> bool:
        """Record whether the upstream answers at all. Return whether a health check must decide the next state.

        That is so when it is due, and at the first answer of an outage or after a silence: it may have been restarted.
        """
        is_wanted = self.is_due or (not self.is_closed and has_answered and self._may_close_early)
        self._may_close_early = not has_answered or (self._may_close_early and not is_wanted)
        return is_wanted

    def begin_check(self) -> None:
        """Record that a health check begins."""
        if self._state is BreakerState.OPEN:
            self._state = BreakerState.HALF_OPEN

    def end_check(self, *, is_up: bool) -> bool:
        """Record the result of a health check. Return whether the breaker opened."""
        if is_up:
            self._state = BreakerState.CLOSED
            self._may_close_early = True
            self._failures = self._suspicions = 0
            self._last_passed = self._clock()
            return False
        if self._state is BreakerState.OPEN:  # connections failed meanwhile
            return False
        if self._state is BreakerState.HALF_OPEN and self._clock() < self._open_until:  # it was tried early
            self._state = BreakerState.OPEN
            return False
        self._open()
        return True

    def reset(self) -> None:
        """Forget all failures: the upstream has been restarted."""
        self._failures = self._suspicions = self._openings = 0
        self._open_until = 0.0
        self._may_close_early = True
        self._state = BreakerState.CLOSED

    def _open(self) -> None:
        now = self._clock()
        is_first = now > self._open_until + MAX_OPENINGS * OPEN_S
        self._openings = 1 if is_first else min(MAX_OPENINGS, self._openings + 1)
        self._open_until = now + self._openings * OPEN_S
        self._failures = self._suspicions = 0
        self._state = BreakerState.OPEN


class BackgroundBreaker(Breaker):
    """Breaker for background calls; it never opens."""

    def fail_to_connect(self) -> bool:
        return False

    def suspect(self) -> bool:
        return False
