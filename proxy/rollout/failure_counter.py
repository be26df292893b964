"""Count the failures of controllers, and say when one has failed too often."""

from __future__ import annotations

import time
from collections import deque
from typing import Final

from controllers import Boundary, BoundaryViolation, ControllerError, IllegalAction

FAILURES: Final = 3
WINDOW_S: Final = 300.0
"""FAILURES failures within WINDOW_S seconds quarantine a controller."""
RAISED, ILLEGAL, UNSEALED, QUARANTINED = "raised", "illegal", "unsealed", "quarantined"
DISTURBED = "disturbed"
"""Reasons for a fallback to the baseline, besides the boundaries of a sandbox."""
BLAMELESS: Final = frozenset({UNSEALED, DISTURBED})
"""Reasons that are the machine's fault, not the controller's."""
SUDDEN: Final = frozenset({Boundary.LATE, Boundary.DEAD})
"""Boundary violations that one event on the machine may cause in several processes at once."""


class FailureCounter:
    """Recent failures by a controller's digest."""

    def __init__(self) -> None:
        self._failures: dict[str, deque[float]] = {}  # times by the monotonic clock

    def record(self, digest: str, error: ControllerError) -> str | None:
        """Count a failure. Return a description of the failures if there are too many, or None.

        Processes that were late or died while their decisions ran at the same time may all have met one event, so they
        count once: such a failure counts only if its decision began after the last counted failure.
        """
        now = time.monotonic()
        failures = self._failures.setdefault(digest, deque(maxlen=FAILURES))
        if failures and _began_at(error, now) <= failures[-1] < now:
            return None
        failures.append(now)
        if len(failures) < FAILURES or now - failures[0] > WINDOW_S:
            return None
        return f"{FAILURES} failures in {now - failures[0]:.0f} s"

    def forget(self, digest: str) -> None:
        """Start anew with a controller whose quarantine was lifted."""
        self._failures.pop(digest, None)


def fallback_reason(error: ControllerError) -> Boundary | str:
    """Return the reason for a fallback after `error`, as metrics and records name it."""
    if isinstance(error, BoundaryViolation):
        return error.boundary
    return ILLEGAL if isinstance(error, IllegalAction) else RAISED


def _began_at(error: ControllerError, now: float) -> float:
    """Return when the decision began during which a process was late or died; `now` for other failures."""
    if isinstance(error, BoundaryViolation) and error.boundary in SUDDEN and error.asked is not None:
        return error.asked
    return now
