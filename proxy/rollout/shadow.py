"""Compare a shadow controller's decisions with those of an ended episode. It costs no tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from controllers import Limits, Round, Signal, State
from proxy.rollout.declared_signals import hide_undeclared


class DecidedEpisode(NamedTuple):
    """The rounds of an ended episode, with its β and limits."""

    beta: float
    limits: Limits
    rounds: Sequence[Round]


async def compare_decisions(
    controller: Any, declared: frozenset[Signal], episode: DecidedEpisode, count: Callable[[bool], None]
) -> None:
    """Let a remote controller decide each round, and call `count` with whether its decision is the same.

    The controller gets the facts of each round, with its `declared` signals, as if it had decided the round. The
    comparison stops at the first different decision, because the facts of that decision are unknown. Raises
    ControllerError.
    """
    state = State(episode.limits)
    for actions, facts in episode.rounds:
        decided = await controller.decide_later(state)
        state.check(decided)
        agreed = list(state.affordable(decided)) == list(actions)
        count(agreed)
        if not agreed:
            return
        state.apply(actions, hide_undeclared(facts, declared))
