"""What another controller would have done in an episode that is over; it buys nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from controllers import Limits, Round, State


class DecidedEpisode(NamedTuple):
    """An episode, as the controller that decided it met it."""

    beta: float
    limits: Limits
    rounds: Sequence[Round]


async def compare(controller: Any, played: DecidedEpisode, count: Callable[[bool], None]) -> None:
    """Ask a controller, of those that live elsewhere, for each round, and `count` whether it would have played it so.

    It is told what the rounds brought as if it had. After the first that it would have played otherwise there is
    nothing to tell it: what its own would have brought nobody knows. Raises ControllerError.
    """
    state = State(played.limits)
    for actions, facts in played.rounds:
        decided = await controller.decide_later(state)
        state.check(decided)
        agreed = list(state.affordable(decided)) == list(actions)
        count(agreed)
        if not agreed:
            return
        state.apply(actions, facts)
