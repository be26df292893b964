"""Time another process has spent on a processor, waiting for one, and asleep. Linux only."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import NamedTuple, Self


class ProcessUsage(NamedTuple):
    """Seconds of a process's life; the difference of two readings is what it did between them."""

    wall: float
    cpu: float = 0.0  # it ran
    queued: float = 0.0  # it could have run, but another process had the processor

    @property
    def asleep(self) -> float:
        """Seconds in which it neither ran nor wanted to."""
        return max(0.0, self.wall - self.cpu - self.queued)

    def since(self, start: ProcessUsage) -> ProcessUsage:
        """The time used after the reading `start`."""
        return ProcessUsage(self.wall - start.wall, self.cpu - start.cpu, self.queued - start.queued)


class ProcessUsageReader:
    """Reads the usage of one process, whose id must not be given to another meanwhile. `close` frees a descriptor.

    Where the kernel keeps no scheduler statistics, `queued` stays 0 and waiting for a processor counts as sleep. The
    kernel books a wait when it ends: the wait of a process that waits now is missing until it runs, or has been killed.
    """

    def __init__(self, process: int) -> None:
        self._clock = ~process << 3 | 2  # what clock_getcpuclockid(3) gives: CPUCLOCK_SCHED of a whole process
        self._statistics: int | None = None
        with suppress(OSError):
            self._statistics = os.open(f"/proc/{process}/schedstat", os.O_RDONLY | os.O_CLOEXEC)

    def read(self) -> ProcessUsage:
        """The usage so far. Of a process that is gone only the wall clock is known."""
        try:
            cpu = time.clock_gettime(self._clock)
            queued = 0 if self._statistics is None else int(os.pread(self._statistics, 64, 0).split()[1])
        except (OSError, IndexError):
            return ProcessUsage(time.monotonic())
        return ProcessUsage(time.monotonic(), cpu, queued / 1e9)

    def close(self) -> None:
        """Free the descriptor; `read` must not be called any more."""
        if self._statistics is not None:
            os.close(self._statistics)
            self._statistics = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
