"""short-m@k (Hassid et al., arXiv 2505.17813): open k chains, stop when m have finished and trust short ones more."""

from __future__ import annotations

from controllers.actions import Action, advance, answer, branch
from controllers.dial import chains
from controllers.state import State


class ShortestFirst:
    """k from 1 at β = 0 to 64 at β = 1, m = k^(2/3): 4 of 8, 8 of 24, 16 of 64.

    Chains run in lockstep, interval by interval. Those that finish in the same round count as equally short, and all of
    them vote. Ties go to the answer seen first: that of the shorter chain, unless both finished in one round.
    """

    def __init__(self, beta: float, samples: int | None = None) -> None:
        self.samples = chains(beta, samples)
        self.enough = max(1, round(self.samples ** (2 / 3)))

    def decide(self, state: State) -> list[Action]:
        if not state.width:
            return [branch()] * min(self.samples, state.room)
        if len(state.finished) >= self.enough or not state.active:
            return [answer(state.leader())]
        return [advance(i) for i in state.active]
