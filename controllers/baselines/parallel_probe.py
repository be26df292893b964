"""Parallel-Probe (arXiv 2602.03845): probe all chains every interval, prune deviants, stop on a stable consensus."""

from __future__ import annotations

from controllers.actions import Action, advance, answer, branch, probe, prune
from controllers.dial import check_beta, linear
from controllers.state import State
from controllers.voting import plurality, tally


class ParallelProbe:
    """Width, stability, patience and warm-up grow with β; β = 1 is the published 64 chains, 40, 7 and 15 intervals."""

    def __init__(self, beta: float, samples: int | None = None) -> None:
        check_beta(beta)
        self.width = round(linear(4, 64, beta)) if samples is None else samples
        self.stable = round(linear(4, 40, beta))  # intervals the consensus must hold to stop
        self.patience = round(linear(1, 7, beta))  # consecutive deviations a chain is forgiven
        self.warm_up = round(linear(2, 15, beta))  # intervals before deviations count
        self.interval = 0
        self.held = 0
        self.consensus: int | None = None
        self.deviations: dict[int, int] = {}

    def decide(self, state: State) -> list[Action]:
        if not state.width:
            return [action for i in range(min(self.width, state.room)) for action in (branch(), probe(i))]
        self.interval += 1
        consensus = plurality(tally(branch.label for branch in state.branches if not branch.pruned))
        self.held = self.held + 1 if consensus == self.consensus else 1
        self.consensus = consensus
        if consensus is not None and self.held >= self.stable:
            return [answer(consensus)]
        actions = [prune(i) for i in self._deviants(state)]
        gone = {action.branch for action in actions}
        for i in state.active:
            if i not in gone:
                actions += (advance(i), probe(i))
        if len(actions) == len(gone):  # nobody left to run
            return [answer(consensus)]
        return actions

    def _deviants(self, state: State) -> list[int]:
        """The running chains that have strayed from the consensus for longer than patience allows."""
        if self.interval < self.warm_up:
            return []
        deviants = []
        for i in state.active:
            strayed = self.deviations.get(i, 0) + 1 if state.branches[i].label != self.consensus else 0
            self.deviations[i] = strayed
            if strayed > self.patience:
                deviants.append(i)
        return deviants
