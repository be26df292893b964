"""Parallel-Probe (arXiv 2602.03845): probe all chains every interval, prune deviants, stop on a stable consensus.

What the paper leaves open is as in the runs behind the AutoTTS paper's table (arXiv 2605.08083): voting begins with the
second interval; warm-up and stability count the votes before the present one; of equals the answer of the chain opened
first leads. A vote before pruning is one after it: those pruned did not vote for the consensus.
"""

from __future__ import annotations

from functools import lru_cache

from controllers.actions import Action, advance, answer, branch, probe, prune
from controllers.dial import check_beta, linear
from controllers.state import State
from controllers.voting import plurality, tally


class ParallelProbe:
    """Width, stability, patience and warm-up grow with β; β = 1 is the published 64 chains, 40, 7 and 15 votes."""

    def __init__(self, beta: float, samples: int | None = None) -> None:
        check_beta(beta)
        self.width = round(linear(4, 64, beta)) if samples is None else samples
        self.stable = round(linear(2, 40, beta))  # votes that must confirm a consensus to stop
        self.patience = round(linear(2, 7, beta))  # deviations in a row for which a chain is pruned
        self.warm_up = round(linear(0, 15, beta))  # votes before deviations count
        self.confirmed = 0
        self.consensus: int | None = None
        self.deviations: dict[int, int] = {}

    def decide(self, state: State) -> list[Action]:
        if not state.width:
            return [action for i in range(min(self.width, state.room)) for action in (branch(2), probe(i))]
        consensus = plurality(tally([chain.label for chain in state.branches if not chain.pruned]))
        self.confirmed = self.confirmed + 1 if consensus == self.consensus else 0
        self.consensus = consensus
        strays = self._strays(state)
        running = [i for i in state.active if i not in strays]
        if not running or (consensus is not None and self.confirmed >= self.stable):
            return [answer(consensus)]
        steps = _steps(state.width)
        return [prune(i) for i in strays] + [action for i in running for action in steps[i]]

    def _strays(self, state: State) -> list[int]:
        """The running chains that have deviated from the consensus for as long as patience allows."""
        if state.rounds <= self.warm_up:
            return []
        for i in state.active:
            deviates = state.branches[i].label != self.consensus
            self.deviations[i] = self.deviations.get(i, 0) + 1 if deviates else 0
        return [i for i in state.active if self.deviations[i] >= self.patience]


@lru_cache(maxsize=8)
def _steps(width: int) -> list[tuple[Action, Action]]:
    """For every chain, the actions that run it on and ask it."""
    return [(advance(i), probe(i)) for i in range(width)]
