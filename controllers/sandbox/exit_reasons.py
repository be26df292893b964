"""Why a sandbox process ended: by its controller's fault (BoundaryViolation) or by the machine's (MachineDisturbed)."""

from __future__ import annotations

import os
import signal
from typing import Final

from controllers.errors import Boundary, BoundaryViolation, MachineDisturbed
from controllers.sandbox.deadline import STILL_S, Clock, Deadline
from controllers.sandbox.process_usage import ProcessUsage
from controllers.sandbox.seal import CPU_S

FAIR_S: Final = 0.02
"""A process that is late by the wall clock and got less processor time than this was starved, not slow."""


def explain_late(deadline: Deadline, usage: ProcessUsage) -> BoundaryViolation | MachineDisturbed:
    """Explain a missed deadline. The controller is at fault if its process ran or slept, instead of waiting to run."""
    if deadline.clock is Clock.WALL:
        own = usage.cpu >= min(FAIR_S, deadline.seconds / 2) or usage.asleep >= deadline.seconds / 2
        message = f"it took longer than {deadline.seconds * 1000:.0f} ms"
    else:
        own = usage.cpu >= deadline.seconds or usage.asleep >= STILL_S
        message = f"it took longer than {deadline.seconds * 1000:.0f} ms of processor time"
        if usage.cpu < deadline.seconds:
            message = f"it slept for {usage.asleep:.1f} s and did not answer"
    if own:
        return BoundaryViolation(Boundary.LATE, message, deadline.start.wall)
    return MachineDisturbed(
        f"the machine is too busy: of {usage.wall:.2f} s a sealed process waited {usage.queued:.2f} s for a processor"
    )


def explain_exit(
    status: int | None, gone: bool, idle: bool, cpu_s: float, requested_at: float
) -> BoundaryViolation | MachineDisturbed:
    """Explain the end of a process that closed its channel."""
    if status is None:
        return MachineDisturbed("the zygote process has ended, and all sandbox processes with it")
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number == signal.SIGSYS:
            return BoundaryViolation(
                Boundary.CALL, "the kernel killed it at a system call it may not make", requested_at
            )
        if number == signal.SIGKILL and not gone:
            return BoundaryViolation(Boundary.DEAD, "it closed its channel", requested_at)
        if number == signal.SIGKILL and cpu_s > CPU_S - 1:
            return BoundaryViolation(Boundary.DEAD, f"it has used up its {CPU_S} s of processor time", requested_at)
        if number == signal.SIGKILL and idle:
            return MachineDisturbed("a sealed process was killed from outside while it was idle")
        return BoundaryViolation(Boundary.DEAD, f"it was killed by {signal.Signals(number).name}", requested_at)
    return BoundaryViolation(Boundary.DEAD, f"it exited with status {os.waitstatus_to_exitcode(status)}", requested_at)
