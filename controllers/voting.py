"""Vote counting. `votes` maps a label to its count, in the order the labels were first seen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from math import comb, exp
from typing import Any, overload

STEEPEST = 50.0
"""Largest difference of two logarithms of weights; smaller weights count as if they were that close."""


def tally(labels: Iterable[int | None]) -> dict[int, int]:
    """Count `labels`; None does not vote."""
    votes: dict[int, int] = {}
    for label in labels:
        if label is not None:
            votes[label] = votes.get(label, 0) + 1
    return votes


def mean_confidences(voters: Iterable[tuple[int | None, int | None]]) -> dict[int, int]:
    """Return the mean confidence of each label's voters, given as (label, confidence). Unknown values do not count."""
    known: dict[int, list[int]] = {}
    for label, sure in voters:
        if label is not None and sure is not None:
            known.setdefault(label, []).append(sure)
    return {label: round(sum(values) / len(values)) for label, values in known.items()}


def plurality(votes: Mapping[int, float]) -> int | None:
    """Return the label with most votes, the first seen of equals; None without votes."""
    best: int | None = None
    most: float = 0
    for label, count in votes.items():
        if count > most:
            best, most = label, count
    return best


def softmax(scores: Sequence[float | None], scale: float) -> list[float]:
    """Return weights in proportion to exp(score / scale); the largest is 1.

    An unknown score counts as the mean of the known ones, so that all weights are 1 if none is known.
    """
    known = [score for score in scores if score is not None]
    if not known:
        return [1.0] * len(scores)
    best, mean = max(known), sum(known) / len(known)
    return [exp(max(-STEEPEST, ((mean if score is None else score) - best) / scale)) for score in scores]


def weighted_votes(labels: Sequence[int | None], weights: Sequence[float]) -> dict[int, float]:
    """Add up the weights of each label, scaled to the number of equal votes that tell as much; None does not vote.

    n votes with the weights w tell as much as (Σw)² / Σw² equal ones. The scaled votes sum to that number, so that
    rules for counts apply to them. With equal weights they are the counts.
    """
    votes: dict[int, float] = {}
    total = squares = 0.0
    for label, weight in zip(labels, weights, strict=True):
        if label is not None:
            votes[label] = votes.get(label, 0.0) + weight
            total += weight
            squares += weight * weight
    scale = total / squares if squares else 1.0
    return {label: weight * scale for label, weight in votes.items()}


@overload
def top_two(votes: Mapping[Any, int]) -> tuple[int, int]: ...
@overload
def top_two(votes: Mapping[Any, float]) -> tuple[float, float]: ...
def top_two(votes: Mapping[Any, float]) -> tuple[float, float]:
    """Return the two highest counts, highest first; 0 where there is none."""
    first: float = 0
    second: float = 0
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


def agreement(votes: Mapping[int, int], label: int | None) -> float | None:
    """Return the share of the votes that are for `label`; None without a label or votes."""
    total = sum(votes.values())
    return None if label is None or not total else votes.get(label, 0) / total


def lead_probability(votes: Mapping[int, int], label: int | None) -> float | None:
    """Return the posterior probability that `label` is more likely than the strongest other answer.

    It is `confidence` of their counts, also for a label that is behind; None without a label or votes.
    """
    if label is None or not votes:
        return None
    own, other = own_and_next(votes, label)
    return confidence(own, other) if own else 1 - confidence(other, own)


def own_and_next(votes: Mapping[int, int], label: int | None) -> tuple[int, int]:
    """Return the number of votes for `label`, and the largest number for another one; 0 where there is none."""
    own = 0 if label is None else votes.get(label, 0)
    return own, max((count for rival, count in votes.items() if rival != label), default=0)


class WeightedTally:
    """Votes weighted by exp(score), added one by one.

    Scores are relative to the first one, and no weight is more than exp(STEEPEST) times another. A chain with an
    unknown score weighs as much as the average of those before it, so that votes count equally if none is known.
    """

    __slots__ = ("_anchor", "_squares", "_total", "_voters", "_weights")

    def __init__(self) -> None:
        self._weights: dict[int, float] = {}
        self._anchor: float | None = None
        self._total = self._squares = 0.0
        self._voters = 0

    def add(self, label: int, score: float | None) -> None:
        """Add a vote for `label`. `score` is the logarithm of its weight; None if it is unknown."""
        if score is None:
            weight = self._total / self._voters if self._voters else 1.0
        elif self._anchor is None:
            self._anchor, weight = score, self._total / self._voters if self._voters else 1.0
        else:
            weight = exp(max(-STEEPEST, min(STEEPEST, score - self._anchor)))
        self._weights[label] = self._weights.get(label, 0.0) + weight
        self._total += weight
        self._squares += weight * weight
        self._voters += 1

    def votes(self) -> dict[int, float]:
        """Return the weights by label, scaled like those of `weighted_votes`."""
        scale = self._total / self._squares if self._squares else 1.0
        return {label: weight * scale for label, weight in self._weights.items()}
