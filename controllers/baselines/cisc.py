"""Confidence-informed self-consistency (CISC, Taubenfeld et al., arXiv 2502.06233): votes weighted by confidence.

The confidence of a chain is the length-normalized probability of its tokens, one of the paper's three measures. A vote
weighs exp(confidence / T), normalized over the chains of the question. The paper tunes the temperature T per model;
here it is fixed. Without the signal, all votes count equally, as in self-consistency.
"""

from __future__ import annotations

from controllers.actions import TO_END, Action, advance, answer, branch
from controllers.dial import chains
from controllers.signals import MAX_CONFIDENCE
from controllers.state import State
from controllers.voting import plurality, softmax, weighted_votes

TEMPERATURE = 0.05
"""Difference in confidence, as a probability, by which a vote weighs e times as much."""


class ConfidenceInformed:
    """N chains, N from 1 at β = 0 to 64 at β = 1."""

    signals = ("intervals",)

    def __init__(self, beta: float, samples: int | None = None) -> None:
        self.samples = chains(beta, samples)

    def decide(self, state: State) -> list[Action]:
        missing = min(self.samples - state.width, state.room)
        if actions := [advance(i, TO_END) for i in state.active] + [branch(TO_END)] * missing:
            return actions
        finished = [state.branches[i] for i in state.finished]
        weights = softmax([chain.confidence for chain in finished], TEMPERATURE * MAX_CONFIDENCE)
        leader = plurality(weighted_votes([chain.label for chain in finished], weights))
        return [answer(state.leader() if leader is None else leader)]
