"""Self-consistency (Wang et al., arXiv 2203.11171): sample N chains, answer with the majority."""

from __future__ import annotations

from controllers.actions import TO_END, Action, advance, answer, branch
from controllers.dial import check_beta, doubling
from controllers.state import State

MOST_SAMPLES = 64


class SelfConsistency:
    """N doubles six times from 1 at β = 0 to 64 at β = 1. All chains run at once."""

    def __init__(self, beta: float) -> None:
        self.samples = doubling(MOST_SAMPLES, check_beta(beta))

    def decide(self, state: State) -> list[Action]:
        missing = min(self.samples - state.width, state.room)
        actions = [advance(i, TO_END) for i in state.active] + [branch(TO_END)] * missing
        return actions or [answer(state.leader())]
