"""Everything of every chain: run to its end and asked after each interval. It decides nothing; it makes recordings."""

from __future__ import annotations

from controllers.actions import Action, advance, answer, branch, probe
from controllers.dial import chains
from controllers.state import State


class Everything:
    """N doubles six times from 1 at β = 0 to 64 at β = 1. All chains run in lockstep, an interval a round."""

    def __init__(self, beta: float, samples: int | None = None) -> None:
        self.samples = chains(beta, samples)

    def decide(self, state: State) -> list[Action]:
        behind = (i for i in state.active if state.branches[i].probed < state.branches[i].intervals)
        moves = [probe(i) for i in behind]  # a cap had come between its step and its probe
        for i in state.active:
            moves += (advance(i), probe(i))
        for i in range(state.width, min(self.samples, state.limits.max_branches)):
            moves += (branch(), probe(i))
        return moves or [answer(state.leader())]
