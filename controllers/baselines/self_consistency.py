"""Self-consistency (Wang et al., arXiv 2203.11171): sample N chains, answer with the majority."""

from __future__ import annotations

from controllers.actions import TO_END, Action, advance, answer, branch
from controllers.dial import chains
from controllers.state import State


class SelfConsistency:
    """N chains, from 1 at β = 0 to 64 at β = 1, exponentially. All run at once."""

    def __init__(self, beta: float, samples: int | None = None) -> None:
        self.samples = chains(beta, samples)

    def decide(self, state: State) -> list[Action]:
        missing = min(self.samples - state.width, state.room)
        actions = [advance(i, TO_END) for i in state.active] + [branch(TO_END)] * missing
        return actions or [answer(state.leader())]
