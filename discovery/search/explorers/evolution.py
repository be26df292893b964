"""Stateless CMA-ES: every step rebuilds the strategy from all earlier generations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cmaes
import numpy as np
from numpy.typing import NDArray

from discovery.search.explorers import ScoredCandidate

Vector = NDArray[np.float64]


def failure_score(standings: Sequence[ScoredCandidate]) -> float:
    """Return the score a failed candidate counts with: one point less than the worst score."""
    return min((one.score for one in standings if one.score is not None), default=0.0) - 1


def ratings(standings: Sequence[ScoredCandidate]) -> dict[str, float]:
    """Return a number by digest that ranks all candidates, also those without a score.

    Estimates of dropped candidates are moved to the scale of the scores, and further until all are below all scores.
    One that failed otherwise is rated one point below all others.
    """
    below = failure_score(standings)
    scores = [one.score for one in standings if one.score is not None]
    estimates = [one.estimate for one in standings if one.estimate is not None and one.score is not None]
    dropped = [one.estimate for one in standings if one.estimate is not None and one.score is None]
    shift = max(scores) - max(estimates) if estimates else 0.0
    shift = min(shift, below - max(dropped)) if dropped and scores else shift
    rated: dict[str, float] = {}
    for standing in standings:
        if standing.score is not None:
            rated[standing.candidate.digest] = standing.score
        elif standing.estimate is not None:
            rated[standing.candidate.digest] = standing.estimate + shift
    failed = min(rated.values(), default=0.0) - 1
    return {one.candidate.digest: rated.get(one.candidate.digest, failed) for one in standings}


def next_generation(
    start: Sequence[float],
    earlier: Sequence[tuple[Vector, float]],
    seed: int,
    batch: int,
    sigma: float,
    bounds: Any = None,
) -> list[Vector]:
    """Return the next generation of a lineage that began at `start`.

    `earlier` are all individuals of the lineage before it, in order, with their scores.
    """
    with np.errstate(divide="ignore"):  # with fewer than four there is only one parent
        strategy = cmaes.CMA(np.array(start), sigma, bounds=bounds, seed=seed, population_size=batch)
    for first in range(0, len(earlier) - batch + 1, batch):
        strategy.tell([(vector, -score) for vector, score in earlier[first : first + batch]])
    return [strategy.ask() for _ in range(batch)]
