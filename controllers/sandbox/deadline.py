"""Time limits of a sandbox process: by the wall clock, or by the processor time that the process has used."""

from __future__ import annotations

from enum import Enum
from typing import Final

from controllers.sandbox.process_usage import ProcessUsage, ProcessUsageReader

SOFT_S: Final = 0.05
"""Seconds after which a decision counts as slow."""
HARD_S: Final = 0.25
"""Seconds after which a process that is still deciding is killed; for n episodes in a message, (n - 1) SOFT_S more."""
STILL_S: Final = 2.0
"""Seconds that a process timed by processor time may sleep without an answer."""
BACKSTOP_S: Final = 120.0
"""Seconds of wall clock after which no answer is awaited any more, however busy the machine is."""


class Clock(Enum):
    """Which clock bounds a decision."""

    WALL = "wall"  # a client is waiting
    CPU = "cpu"  # processor time of the process, which does not depend on how busy the machine is


class Deadline:
    """Seconds that a process may take for an answer, by the wall clock or by its processor time."""

    def __init__(self, meter: ProcessUsageReader, clock: Clock, seconds: float) -> None:
        self.clock = clock
        self.seconds = seconds
        self.start = meter.read()
        self._meter = meter
        self._more: float | None = None  # seconds of extension
        self._stopped: ProcessUsage | None = None  # reading when the clock was stopped

    def left(self) -> float:
        """Return the seconds of wall clock until the next check; 0 or less if the time is up."""
        usage = self._meter.read().since(self.start)
        if self.clock is Clock.WALL:
            return self.seconds + (self._more or 0.0) - usage.wall
        if usage.cpu >= self.seconds or usage.asleep >= STILL_S or usage.wall >= BACKSTOP_S:
            return 0.0
        return max(SOFT_S / 10, self.seconds - usage.cpu)

    def extend(self) -> bool:
        """Extend the deadline once by the time in which the owner did not check for an answer."""
        if self.clock is Clock.CPU or self._more is not None:
            return False
        missed = max(0.0, -self.left())
        self._more = missed + min(self.seconds, missed)
        return True

    def stop(self) -> None:
        """Stop the clock, because the process is about to be killed: the time it takes to end does not count."""
        self._stopped = self._meter.read()

    def usage(self) -> ProcessUsage:
        """Return the usage from the question to `stop`, or to now. It is exact once the process has ended.

        A wait for a processor that `stop` interrupted is known only then: it is what the process has run and waited
        since, beyond the time that has passed.
        """
        now = self._meter.read()
        if self._stopped is None:
            return now.since(self.start)
        ending = now.since(self._stopped)
        waited = max(0.0, ending.cpu + ending.queued - ending.wall)
        return self._stopped._replace(queued=self._stopped.queued + waited).since(self.start)
