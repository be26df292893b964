"""Answer consistency: one chain, stopped when its probe answers have settled (cf. Liu and Wang, arXiv 2506.02536)."""

from __future__ import annotations

from controllers.actions import Action, advance, answer, branch, probe
from controllers.dial import check_beta, linear
from controllers.state import State

MOST_PROBES = 10


class AnswerConsistency:
    """Stops when k consecutive probes give the same answer, k from 2 at β = 0 to 10 at β = 1."""

    needs_probes = True

    def __init__(self, beta: float) -> None:
        self.settled = round(linear(2, MOST_PROBES, check_beta(beta)))
        self.agreed = 0
        self.label: int | None = None

    def decide(self, state: State) -> list[Action]:
        if not state.width:
            return [branch(), probe(0)]
        chain = state.branches[0]
        if chain.finished:
            return [answer(state.leader())]
        if chain.probed == chain.intervals:
            self.agreed = self.agreed + 1 if chain.label == self.label else 1
            self.label = chain.label
        if self.label is not None and self.agreed >= self.settled:
            return [answer(self.label)]
        return [advance(0), probe(0)]
