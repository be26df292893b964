"""Best-of-∞ (Komiyama et al., arXiv 2509.21091): sample until a Bayes factor says that the majority will hold."""

from __future__ import annotations

from collections.abc import Mapping

from controllers.baselines.waves import Waves
from controllers.stopping import bayes_factor

FACTOR = (3.0, 100.0)
"""Bayes factor to stop at, at β = 0 and 1; the published code uses 10 by default."""


class BestOfInfinity(Waves):
    """At most N chains, N from 1 at β = 0 to 64 from β = 0.5 on, in waves; the paper samples one chain at a time."""

    def __init__(self, beta: float) -> None:
        super().__init__(beta)
        self.factor: float = FACTOR[0] * (FACTOR[1] / FACTOR[0]) ** beta

    def is_safe(self, votes: Mapping[int, int]) -> bool:
        return bayes_factor(votes.values()) >= self.factor
