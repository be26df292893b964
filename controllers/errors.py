"""What can go wrong in an episode, by the boundary it crossed.

ControllersError
├── BetaError            a β outside [0, 1], or not a number
├── UnknownController    a name no controller answers to
├── ControllerError      the controller is at fault
│   ├── IllegalAction    it asked for what is not allowed; nothing has changed
│   ├── BadController    its file cannot be read, or no object be made of it
│   └── BoundaryViolation          it crossed a boundary of its sandbox and was killed; it says which
├── SandboxUnavailable             this machine cannot seal a controller, so no foreign one runs
├── MachineDisturbed            this machine ended a sealed process, or gave it no time; the controller is not at fault
└── BadFact              the environment is at fault: its facts do not answer the actions; nothing has changed
"""

from enum import StrEnum


class ControllersError(Exception):
    """Base of every error raised in this package."""


class BetaError(ControllersError, ValueError):
    """A β outside [0, 1], or not a number."""


class UnknownController(ControllersError, LookupError):
    """A name no controller answers to; the message lists those there are."""


class ControllerError(ControllersError):
    """The controller did something it must not."""


class IllegalAction(ControllerError):
    """A move the state does not allow. The state is as it was."""


class BadController(ControllerError):
    """A file that holds no controller, or a constructor that fails."""


class Boundary(StrEnum):
    """What a sealed controller may not cross."""

    LATE = "late"  # it decided for longer than allowed
    DEAD = "dead"  # it ended: it left, crashed, or used up its processor time
    CALL = "call"  # the kernel killed it at a system call it may not make
    FRAME = "frame"  # what it sent is no answer to what it was asked
    UNASKED = "unasked"  # it computed while it was not asked anything


class BoundaryViolation(ControllerError):
    """A sealed controller crossed `boundary`. Its process is dead; the state is as it was."""

    def __init__(self, boundary: Boundary, message: str, asked: float | None = None) -> None:
        super().__init__(boundary, message, asked)  # as it was made, so that another process can make it again
        self.boundary = boundary
        self.message = message
        self.asked = asked  # when it was asked, by the monotonic clock; None if it was not

    def __str__(self) -> str:
        return f"{self.message} ({self.boundary})"


class SandboxUnavailable(ControllersError):
    """This machine cannot seal controllers; the message names the layer that is missing and what to do."""


class MachineDisturbed(ControllersError):
    """A sealed process could not decide because of the machine: it was killed from outside, or was given no time.

    Nobody is at fault. The state is as it was, and another process may be asked.
    """


class BadFact(ControllersError):
    """The environment's facts do not answer the actions. The state is as it was."""
