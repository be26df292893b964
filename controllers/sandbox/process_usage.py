"""Time that another process has spent running, waiting for a processor, and asleep. Linux only."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import NamedTuple, Self


class ProcessUsage(NamedTuple):
    """Seconds of a process's life. The difference of two readings is the time between them."""

    wall: float
    cpu: float = 0.0  # running
    queued: float = 0.0  # ready to run while other processes had the processor

    @property
    def asleep(self) -> float:
        """Seconds in which it neither ran nor was ready to run."""
        return max(0.0, self.wall - self.cpu - self.queued)

    def since(self, start: ProcessUsage) -> ProcessUsage:
        """Return the time since the reading `start`."""
        return ProcessUsage(self.wall - start.wall, self.cpu - start.cpu, self.queued - start.queued)


class ProcessUsageReader:
    """Reads the usage of one process. Its id must not be reused meanwhile. `close` frees a descriptor.

    Without scheduler statistics in the kernel, `queued` stays 0 and waiting for a processor counts as sleep. The kernel
    adds a wait when it ends: a wait in progress is missing until the process runs or has been killed.
    """

    def __init__(self, process: int) -> None:
        self._clock = ~process << 3 | 2  # what clock_getcpuclockid(3) gives: CPUCLOCK_SCHED of a whole process
        self._statistics: int | None = None
        with suppress(OSError):
            self._statistics = os.open(f"/proc/{process}/schedstat", os.O_RDONLY | os.O_CLOEXEC)

    def read(self) -> ProcessUsage:
        """Return the usage so far. For a process that has ended only the wall clock is known."""
        try:
            cpu = time.clock_gettime(self._clock)
            queued = 0 if self._statistics is None else int(os.pread(self._statistics, 64, 0).split()[1])
        except (OSError, IndexError):
            return ProcessUsage(time.monotonic())
        return ProcessUsage(time.monotonic(), cpu, queued / 1e9)

    def read_cpu(self) -> float:
        """Return the processor time so far, which is read faster than the rest; 0 of a process that has ended."""
        try:
            return time.clock_gettime(self._clock)
        except OSError:
            return 0.0

    def close(self) -> None:
        """Free the descriptor. `read` must not be called afterwards."""
        if self._statistics is not None:
            os.close(self._statistics)
            self._statistics = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
