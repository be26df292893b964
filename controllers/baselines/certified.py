"""Certified self-consistency (CITE, Ota et al., arXiv 2605.05873): sample until the leader is the mode for certain.

The rule is a sequential test with e-processes, so it may be watched after every chain without losing its error rate
(`controllers.stopping.is_certified`). What is certified is that the model gives this answer most often, not that it is
right. Waves and the mapping of β are ours.
"""

from __future__ import annotations

from collections.abc import Mapping

from controllers.baselines.waves import Waves
from controllers.stopping import is_certified

ERROR = (0.5, 0.05)
"""Probability to certify another answer than the mode, at β = 0 and 1."""


class CertifiedConsistency(Waves):
    """At most N chains, N from 1 at β = 0 to 64 from β = 0.5 on. At β = 1, nine chains that agree are enough."""

    def __init__(self, beta: float) -> None:
        super().__init__(beta)
        self.error: float = ERROR[0] * (ERROR[1] / ERROR[0]) ** beta

    def is_safe(self, votes: Mapping[int, int]) -> bool:
        return is_certified(votes.values(), self.error)
