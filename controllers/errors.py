"""What can go wrong in an episode, by the boundary it crossed.

ControllersError
├── BetaError            a β outside [0, 1], or not a number
├── UnknownController    a name no controller answers to
├── ControllerError      the controller is at fault
│   ├── IllegalAction    it asked for what is not allowed; nothing has changed
│   └── BadController    its file cannot be read, or no object be made of it
└── BadFact              the environment is at fault: its facts do not answer the actions; nothing has changed
"""


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


class BadFact(ControllersError):
    """The environment's facts do not answer the actions. The state is as it was."""
