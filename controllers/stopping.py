"""Statistics that say whether the leading answer of a vote is safe. They are exact, without randomness."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from math import comb, inf
from typing import Final

from controllers.voting import confidence

MAPPING: Final = "counts must be vote counts such as state.votes.values(), not a mapping"
"""Error for votes by label where counts are needed."""


def bayes_factor(counts: Iterable[int]) -> float:
    """Return the Bayes factor for the leading answer being the model's most frequent one, from vote counts.

    Best-of-∞ (arXiv 2509.21091) gives the answers' probabilities a Dirichlet prior with one answer more than has been
    seen, and stops at a large s · P / (1 - P). s is the number of answers, and P the posterior probability that the
    leader is the most frequent one. The paper estimates P by random draws; here 1 - P is the sum over the others of the
    probability to be more frequent than the leader, which is never too small. 0 without votes. Raises TypeError for a
    mapping, of which only the labels would be seen.
    """
    if isinstance(counts, Mapping):
        raise TypeError(MAPPING)
    first, *others = sorted(counts, reverse=True) or [0]
    if first <= 0:
        return 0.0
    doubt = sum(1 - confidence(first, other) for other in (*others, 0))  # 0: an answer not yet seen
    if doubt >= 1:
        return 0.0
    return (len(others) + 2) * (1 - doubt) / doubt if doubt > 0 else inf


@lru_cache(maxsize=1 << 14)
def e_value(wins: int, losses: int) -> float:
    """Return the evidence that one answer is more frequent than another, from their votes.

    It is a bet on a coin: its likelihood averaged over all chances of winning above one half, relative to a fair coin.
    If the answer is not more frequent, its mean is at most 1 however the votes are watched, so that it ever reaches
    1 / δ with a probability of at most δ (Ville's inequality).
    """
    if wins <= 0:
        return 0.0
    votes = wins + losses
    return (1 << (votes + 1)) / ((votes + 1) * comb(votes, wins)) * confidence(wins, losses)


def is_certified(votes: Iterable[int], error: float) -> bool:
    """Return whether the leader is the model's most frequent answer, with a probability of at most `error` to be wrong.

    `votes` are counted in the order in which the answers were first seen, as in `state.votes.values()`. The guarantee
    holds although votes are watched all the time (CITE, arXiv 2605.05873). The paper certifies an answer named in
    advance. Here the k-th answer that appears is named by its first vote, which does not count, and is tested with
    `error` / (k · (k + 1)). An answer not yet seen has fewer votes than the second, so that it needs no test. Raises
    TypeError for a mapping, of which only the labels would be seen.
    """
    if isinstance(votes, Mapping):
        raise TypeError(MAPPING)
    counts = list(votes)
    if not counts:
        return False
    first = max(counts)
    rank = counts.index(first) + 1
    second = max((count for at, count in enumerate(counts, 1) if at != rank), default=0)
    return e_value(first - 1, second) >= rank * (rank + 1) / error
