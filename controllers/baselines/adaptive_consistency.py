"""Adaptive consistency in waves: sample until more chains are not worth their tokens.

A version of Adaptive-Consistency (Aggarwal et al., arXiv 2305.11860) with low latency. Chains run in waves instead of
one after the other; each wave is as large as all earlier ones together. It stops by the value of information
(Raiffa and Schlaifer, Applied Statistical Decision Theory, 1961) instead of a confidence: votes that are scattered over
many answers are not worth more chains, even if nothing is certain.
"""

from __future__ import annotations

from math import erfc, exp, pi, sqrt

from controllers.actions import Action, advance, answer, branch
from controllers.dial import MOST_CHAINS, check_beta, doubling
from controllers.state import State
from controllers.voting import top_two

FIRST_WAVE = 3  # log2 of the first wave at β = 1: with powers of two, waves of all β end at the same sizes
WORTH = (0.05, 0.014)  # least gain in the winner's vote share that is worth the remaining chains, at β = 0 and 1
LEAST = 2  # chains that must agree before it stops early


class AdaptiveWaves:
    """At most N chains, N from 1 at β = 0 to 64 from β = 0.5 on; a first wave of 1, 2, 4 or 8, then doubling.

    Short chains do not count more: a wave runs to its end, unless the answer and the decision to stop are the same
    whatever its unfinished chains will answer. It uses no probes, and can continue from any state.
    """

    def __init__(self, beta: float) -> None:
        beta = check_beta(beta)
        self.samples = doubling(MOST_CHAINS, min(1.0, 2 * beta))
        self.first_wave = 2 ** round(FIRST_WAVE * beta)
        self.worth = WORTH[0] * (WORTH[1] / WORTH[0]) ** beta

    def decide(self, state: State) -> list[Action]:
        running = state.active
        sampled = len(state.finished) + len(running)
        most = min(self.samples, sampled + state.room)
        if sampled and self._settled(state, len(running), sampled, most):
            return [answer(state.leader())]
        if running:
            return [advance(i) for i in running]
        wave = min(sampled or self.first_wave, most - sampled)
        return [branch()] * wave if wave > 0 else [answer(state.leader())]

    def _settled(self, state: State, unfinished: int, sampled: int, most: int) -> bool:
        """Return whether to stop now, however the `unfinished` chains of the wave vote."""
        first, second = top_two(state.votes)
        second += unfinished  # worst case: all of them vote for the runner-up
        if unfinished and first <= second:
            return False
        if sampled >= most:
            return True
        return first >= LEAST and gain(first, second, sampled, most - sampled) < self.worth


def gain(first: int, second: int, sampled: int, left: int) -> float:
    """Return the expected gain in the winner's share of votes from `left` more chains, in [0, 1].

    `first` and `second` are the two highest vote counts among `sampled` chains, p and q their shares, smoothed by one
    vote each. The difference of the shares has mean d = p - q and variance v = (p + q - d²) / n, n = sampled + 2. After
    `left` more chains its estimate D is normal with mean d and variance s² = v · left / (sampled + left). If the
    runner-up overtakes, choosing it gains -D. The expected gain is E[max(0, -D)] = s·φ(d/s) - d·Φ(-d/s).
    """
    total = sampled + 2
    p, q = (first + 1) / total, (second + 1) / total
    lead = p - q
    deviation = sqrt(max((p + q - lead * lead) / total * left / (sampled + left), 1e-12))
    z = lead / deviation
    return deviation * exp(-z * z / 2) / sqrt(2 * pi) - lead * erfc(z / sqrt(2)) / 2
