"""Errors of controllers and episodes.

ControllersError
├── BetaError            a β outside [0, 1], or not a number
├── UnknownController    there is no controller of that name
├── ControllerError      the controller is at fault
│   ├── IllegalAction    an action is not allowed; the state is unchanged
│   ├── BadController    its file cannot be read, or its constructor fails
│   └── BoundaryViolation   it violated a boundary of its sandbox and was killed
├── SandboxUnavailable   this machine cannot sandbox a process, so no controller from a file runs
├── MachineDisturbed     the machine killed a sandbox process or gave it no processor time
└── BadFact              the environment is at fault: its facts do not match the actions
"""

from enum import StrEnum


class ControllersError(Exception):
    """Base of every error raised in this package."""


class BetaError(ControllersError, ValueError):
    """A β outside [0, 1], or not a number."""


class UnknownController(ControllersError, LookupError):
    """There is no controller of that name. The message lists the existing ones."""


class ControllerError(ControllersError):
    """The controller is at fault."""


class IllegalAction(ControllerError):
    """An action that the state does not allow. The state is unchanged."""


class BadController(ControllerError):
    """A file without a controller, or a constructor that fails."""


class Boundary(StrEnum):
    """Boundaries of a sandbox."""

    LATE = "late"  # it took too long to decide
    DEAD = "dead"  # it exited, crashed, or used up its processor time
    CALL = "call"  # the kernel killed it for a forbidden system call
    FRAME = "frame"  # it sent an invalid answer
    UNASKED = "unasked"  # it computed although no decision was requested


class BoundaryViolation(ControllerError):
    """A sealed controller violated `boundary`. Its process is dead; the state is unchanged."""

    def __init__(self, boundary: Boundary, message: str, asked: float | None = None) -> None:
        super().__init__(boundary, message, asked)  # all arguments, so that it can be pickled
        self.boundary = boundary
        self.message = message
        self.asked = asked  # monotonic time when the decision was requested; None if none was

    def __str__(self) -> str:
        return f"{self.message} ({self.boundary})"


class SandboxUnavailable(ControllersError):
    """This machine cannot seal controllers. The message names the missing layer and what to do."""


class MachineDisturbed(ControllersError):
    """A sandbox process could not decide because of the machine: it was killed from outside, or was given no time.

    The controller is not at fault. The state is unchanged, and another process may decide instead.
    """


class BadFact(ControllersError):
    """The environment's facts do not match the actions."""
