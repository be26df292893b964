"""One chain that runs to its end, as without test-time scaling."""

from __future__ import annotations

from controllers.actions import TO_END, Action, advance, answer, branch
from controllers.dial import check_beta
from controllers.state import State


class Single:
    """One chain for every β."""

    def __init__(self, beta: float) -> None:
        check_beta(beta)

    def decide(self, state: State) -> list[Action]:
        if not state.width:
            return [branch(TO_END)]
        if state.branches[0].active:  # the token limit ended its previous run early
            return [advance(0, TO_END)]
        return [answer(state.leader())]
