"""Run every chain to its end and probe it after each interval. It makes recordings and does not vote."""

from __future__ import annotations

from controllers.actions import Action, advance, answer, branch, probe
from controllers.dial import chains
from controllers.state import State


class Everything:
    """N chains, from 1 at β = 0 to 64 at β = 1. They run in lockstep, one interval per round."""

    def __init__(self, beta: float, samples: int | None = None) -> None:
        self.samples = chains(beta, samples)

    def decide(self, state: State) -> list[Action]:
        behind = (i for i in state.active if state.branches[i].probed < state.branches[i].intervals)
        moves = [probe(i) for i in behind]  # the token limit ended the last round before these probes
        for i in state.active:
            moves += (advance(i), probe(i))
        for i in range(state.width, min(self.samples, state.limits.max_branches)):
            moves += (branch(), probe(i))
        return moves or [answer(state.leader())]
