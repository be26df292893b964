"""Run every chain to its end. It makes recordings and does not vote; the proxy probes the finished chains."""

from __future__ import annotations

from controllers.actions import TO_END, Action, advance, answer, branch
from controllers.dial import chains
from controllers.state import State


class Everything:
    """N chains, from 1 at β = 0 to 64 at β = 1. All are opened at once and run without pauses."""

    def __init__(self, beta: float, samples: int | None = None) -> None:
        self.samples = chains(beta, samples)

    def decide(self, state: State) -> list[Action]:
        moves = [advance(i, TO_END) for i in state.active]  # the token limit cut them in an earlier round
        moves += [branch(TO_END) for _ in range(state.width, min(self.samples, state.limits.max_branches))]
        return moves or [answer(state.leader())]
