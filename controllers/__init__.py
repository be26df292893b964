"""The language of test-time compute: what a controller may see and do. No network, no clock, no randomness.

A controller file imports from here and from the standard library only:

    from controllers import Action, State, branch, advance, probe, prune, answer, TO_END
"""

from controllers.actions import TO_END, Action, Advanced, Fact, Probed, Verb, advance, answer, branch, probe, prune
from controllers.environment import Environment
from controllers.episode import Controller, run_episode, run_sync
from controllers.errors import (
    BadFact,
    BetaError,
    Boundary,
    ControllerError,
    ControllersError,
    Crossed,
    Disturbed,
    IllegalAction,
    UnknownController,
    Unsealed,
)
from controllers.state import Branch, Limits, Round, State, Stop

__all__ = [
    "TO_END",
    "Action",
    "Advanced",
    "BadFact",
    "BetaError",
    "Boundary",
    "Branch",
    "Controller",
    "ControllerError",
    "ControllersError",
    "Crossed",
    "Disturbed",
    "Environment",
    "Fact",
    "IllegalAction",
    "Limits",
    "Probed",
    "Round",
    "State",
    "Stop",
    "UnknownController",
    "Unsealed",
    "Verb",
    "advance",
    "answer",
    "branch",
    "probe",
    "prune",
    "run_episode",
    "run_sync",
]
