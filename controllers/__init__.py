"""The language of test-time compute: what a controller may see and do. No network, no clock, no randomness.

A controller file imports from here and from the standard library only:

    from controllers import Action, State, branch, advance, probe, prune, answer, TO_END
"""

from controllers.actions import TO_END, Action, Advanced, Fact, Probed, Verb, advance, answer, branch, probe, prune
from controllers.environment import Environment
from controllers.episode import Controller, Round, run_episode, run_sync
from controllers.errors import (
    BadFact,
    BetaError,
    ControllerError,
    ControllersError,
    IllegalAction,
    UnknownController,
)
from controllers.state import Branch, Limits, State, Stop

__all__ = [
    "TO_END",
    "Action",
    "Advanced",
    "BadFact",
    "BetaError",
    "Branch",
    "Controller",
    "ControllerError",
    "ControllersError",
    "Environment",
    "Fact",
    "IllegalAction",
    "Limits",
    "Probed",
    "Round",
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
