"""CMA-ES without a memory of its own: what earlier generations were and did is told it anew at every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cmaes
import numpy as np
from numpy.typing import NDArray

from discovery.search.explorers import ScoredCandidate

Vector = NDArray[np.float64]


def failure_score(standings: Sequence[ScoredCandidate]) -> float:
    """What a candidate that failed counts as: a point less than the worst that did not."""
    return min((one.score for one in standings if one.score is not None), default=0.0) - 1


def next_generation(
    start: Sequence[float],
    told: Sequence[tuple[Vector, float]],
    seed: int,
    batch: int,
    sigma: float,
    bounds: Any = None,
) -> list[Vector]:
    """The next generation of a line that began at `start`; `told` are all before it, in order, with their scores."""
    with np.errstate(divide="ignore"):  # fewer than four have one parent alone
        strategy = cmaes.CMA(np.array(start), sigma, bounds=bounds, seed=seed, population_size=batch)
    for first in range(0, len(told) - batch + 1, batch):
        strategy.tell([(vector, -score) for vector, score in told[first : first + batch]])
    return [strategy.ask() for _ in range(batch)]
