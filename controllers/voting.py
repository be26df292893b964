"""Vote counting. `votes` maps a label to its count, in the order the labels were first seen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from math import comb
from typing import Any


def tally(labels: Iterable[int | None]) -> dict[int, int]:
    """Count `labels`; None does not vote."""
    votes: dict[int, int] = {}
    for label in labels:
        if label is not None:
            votes[label] = votes.get(label, 0) + 1
    return votes


def plurality(votes: Mapping[int, int]) -> int | None:
    """Return the label with most votes, the first seen of equals; None without votes."""
    best, most = None, 0
    for label, count in votes.items():
        if count > most:
            best, most = label, count
    return best


def top_two(votes: Mapping[Any, int]) -> tuple[int, int]:
    """Return the two highest counts, highest first; 0 where there is none."""
    first = second = 0
    for count in votes.values():
        if count > first:
            first, second = count, first
        elif count > second:
            second = count
    return first, second


@lru_cache(maxsize=1 << 14)
def confidence(first: int, second: int) -> float:
    """Return the confidence in [0, 1] that the leading label is the more likely of the top two.

    1 - BetaCDF(1/2; first + 1, second + 1), the stopping rule of Adaptive-Consistency (arXiv 2305.11860). With
    whole counts it is a binomial tail, summed exactly. 0 without votes.
    """
    if first == 0:
        return 0.0
    throws = first + second + 1
    return float(sum(comb(throws, k) for k in range(first + 1)) / 2**throws)
