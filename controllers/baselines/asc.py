"""Adaptive-Consistency (Aggarwal et al., arXiv 2305.11860): sample chains until the majority is likely to hold."""

from __future__ import annotations

from controllers.actions import TO_END, Action, advance, answer, branch
from controllers.dial import chains
from controllers.state import State
from controllers.voting import confidence, top_two

THRESHOLD = 0.95  # the published setting


class AdaptiveConsistency:
    """At most N chains, N from 1 at β = 0 to 64 at β = 1, one after the other. It saves tokens, not time."""

    def __init__(self, beta: float, samples: int | None = None) -> None:
        self.samples = chains(beta, samples)

    def decide(self, state: State) -> list[Action]:
        active = state.active
        if active:  # the token limit ended its previous run early
            return [advance(i, TO_END) for i in active]
        sure = confidence(*top_two(state.votes)) >= THRESHOLD
        if sure or state.width >= self.samples or not state.room:
            return [answer(state.leader())]
        return [branch(TO_END)]
