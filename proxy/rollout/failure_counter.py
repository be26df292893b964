"""Count the failures of controllers, and detect controllers that fail too often."""

from __future__ import annotations

import time
from collections import deque
from typing import Final

from controllers import Boundary, BoundaryViolation, ControllerError, IllegalAction

FAILURES: Final = 3
"""Number of failures within WINDOW_S seconds that quarantine a controller."""
WINDOW_S: Final = 300.0
RAISED, ILLEGAL, UNSEALED, QUARANTINED = "raised", "illegal", "unsealed", "quarantined"
DISTURBED = "disturbed"
"""Reasons for a fallback to the baseline, in addition to the boundary violations of a sandbox."""
BLAMELESS: Final = frozenset({UNSEALED, DISTURBED})
"""Reasons that the machine caused, not the controller."""
SUDDEN: Final = frozenset({Boundary.LATE, Boundary.DEAD})
"""Boundary violations that one event on the machine can cause in several processes at once."""


class FailureCounter:
    """Recent failures of controllers, by digest."""

    def __init__(self) -> None:
        self._failures: dict[str, deque[float]] = {}  # times by the monotonic clock

    def record(self, digest: str, error: ControllerError) -> str | None:
        """Count a failure. Return a description of the failures if there are too many, or None.

        One event on the machine can make several concurrent decisions late or kill their processes. These failures
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

    @property
    def digests(self) -> list[str]:
        """The controllers that have failed."""
        return list(self._failures)

    def forget(self, digest: str) -> None:
        """Forget the failures of a controller whose quarantine was lifted, or that serves no longer."""
        self._failures.pop(digest, None)


def fallback_reason(error: ControllerError) -> Boundary | str:
    """Return the reason for a fallback after `error`, as it appears in metrics and records."""
    if isinstance(error, BoundaryViolation):
        return error.boundary
    return ILLEGAL if isinstance(error, IllegalAction) else RAISED


def _began_at(error: ControllerError, now: float) -> float:
    """Return the start of the decision in which a process was late or died. Return `now` for other failures."""
    if isinstance(error, BoundaryViolation) and error.boundary in SUDDEN and error.asked is not None:
        return error.asked
    return now
