"""Confident waves: adaptive consistency whose votes are weighted by the log-probabilities of their chains.

A vote weighs exp(ℓ / scale). ℓ is the mean log-probability of a chain's tokens, times the mean length of the finished
chains, so that a chain does not count more for being short. As in DeepConf (Fu et al., arXiv 2508.15260), the first
chains set a limit: later ones are given up as soon as a window of their tokens is less confident, and finished ones
below it do not vote. The stopping rule is that of `adaptive_consistency`, on the number of equal votes that tell as
much. Without the signal, nothing is weighted or filtered.
"""

from __future__ import annotations

from math import ceil

from controllers.actions import Action, advance, answer, branch, prune
from controllers.baselines.adaptive_consistency import FIRST_WAVE, LEAST, WORTH, gain
from controllers.core.branch_facts import Branch
from controllers.dial import MOST_CHAINS, check_beta, doubling, linear
from controllers.state import State
from controllers.voting import plurality, softmax, top_two, weighted_votes

KEPT = (0.6, 0.9)  # share of the finished chains, the most confident ones, that vote, at β = 0 and 1
SCALE = 8.0  # nats; measured on the embedded model, and never less than the spread of a question's chains
WARM_UP = 8  # finished chains that set the least confident window allowed


class ConfidentWaves:
    """At most N chains, N from 1 at β = 0 to 64 from β = 0.5 on; a first wave of 1, 2, 4 or 8, then doubling."""

    signals = ("intervals",)

    def __init__(self, beta: float) -> None:
        beta = check_beta(beta)
        self.samples = doubling(MOST_CHAINS, min(1.0, 2 * beta))
        self.first_wave = 2 ** round(FIRST_WAVE * beta)
        self.worth = WORTH[0] * (WORTH[1] / WORTH[0]) ** beta
        self.kept = linear(*KEPT, beta)
        self._counted = 0  # finished chains that `_votes` is about
        self._votes: dict[int, float] = {}
        self._floor = 0  # confidence of a window below which a chain does not vote, in per mille

    def decide(self, state: State) -> list[Action]:
        if self._counted < len(state.finished):
            self._count(state)
        doubtful = [i for i in state.active if self._is_doubtful(state.branches[i])] if self._floor else []
        running = [i for i in state.active if i not in doubtful] if doubtful else state.active
        more = max(0, min(self.samples - state.width, state.room))
        if state.width and self._is_settled(len(running), state.width, more):
            return [answer(plurality(self._votes))]
        actions = [prune(i) for i in doubtful] + [advance(i) for i in running]
        if not running and more:
            actions += [branch()] * min(state.width or self.first_wave, more)
        return actions or [answer(state.leader())]

    def _is_doubtful(self, chain: Branch) -> bool:
        return chain.lowest is not None and chain.lowest < self._floor

    def _is_settled(self, running: int, sampled: int, more: int) -> bool:
        """Return whether to stop now, however the running chains vote, each counted as an average vote."""
        first, second = top_two(self._votes)
        second += running
        if not first or (running and first <= second):
            return False
        total = sum(self._votes.values()) + running
        return not more or (first >= LEAST and gain(first, second, total, total * more / sampled) < self.worth)

    def _count(self, state: State) -> None:
        """Weigh the votes of the finished chains, without the least confident ones."""
        self._counted = len(state.finished)
        finished = [state.branches[i] for i in state.finished]
        known = sorted(chain.lowest for chain in finished if chain.lowest is not None)
        if not self._floor and len(known) >= WARM_UP:
            self._floor = known[len(known) - ceil(self.kept * len(known))]
        finished = [chain for chain in finished if not self._is_doubtful(chain)]
        length = sum(chain.tokens for chain in finished) / len(finished)
        scores = [
            None if chain.log_probability is None else chain.log_probability / max(1, chain.tokens) * length
            for chain in finished
        ]
        self._votes = weighted_votes([chain.label for chain in finished], softmax(scores, max(SCALE, spread(scores))))


def spread(scores: list[float | None]) -> float:
    """Return the standard deviation of the known scores; 0 without any."""
    known = [score for score in scores if score is not None]
    if not known:
        return 0.0
    mean = sum(known) / len(known)
    return float((sum((score - mean) ** 2 for score in known) / len(known)) ** 0.5)
