"""The controller API: the state that a controller sees and the actions it may take. No network, clock or randomness.

A controller file imports from here and from the standard library only:

    from controllers import Action, State, branch, advance, probe, prune, answer, TO_END
"""

from controllers.core import compiled as _compiled  # noqa: F401  # first: it says which of the others are compiled

# isort: split
from controllers.actions import TO_END, Action, Advanced, Fact, Probed, Verb, advance, answer, branch, probe, prune
from controllers.core.branch_facts import Branch
from controllers.environment import Environment
from controllers.episode import Controller, run_episode, run_sync
from controllers.errors import (
    BadFact,
    BetaError,
    Boundary,
    BoundaryViolation,
    ControllerError,
    ControllersError,
    IllegalAction,
    MachineDisturbed,
    SandboxUnavailable,
    UnknownController,
)
from controllers.limits import Limits
from controllers.signals import Signal
from controllers.state import Round, State, Stop

__all__ = [
    "TO_END",
    "Action",
    "Advanced",
    "BadFact",
    "BetaError",
    "Boundary",
    "BoundaryViolation",
    "Branch",
    "Controller",
    "ControllerError",
    "ControllersError",
    "Environment",
    "Fact",
    "IllegalAction",
    "Limits",
    "MachineDisturbed",
    "Probed",
    "Round",
    "SandboxUnavailable",
    "Signal",
    "State",
    "Stop",
    "UnknownController",
    "Verb",
    "advance",
    "answer",
    "branch",
    "probe",
    "prune",
    "run_episode",
    "run_sync",
]
