"""Rules for stopping, computed as controller files and `controllers.stopping` compute them, to the bit."""

from __future__ import annotations

from math import erfc, exp, inf, pi, sqrt

import numpy as np
from numpy.typing import NDArray

from discovery.search.kernel.jit import compiled
from discovery.search.kernel.records import (
    ALL_AT_ONCE,
    BAYES,
    CERTIFIED,
    CONFIDENCE,
    GROWING,
    LEAD,
    MARGIN,
    NOBODY,
    SHARE,
    Record,
)
from discovery.search.kernel.votes import sort, total_of


@compiled
def is_settled(
    policy: Record,
    tables: NDArray[np.float64],
    episode: Record,
    votes: NDArray[np.float64],
    known: int,
    leader: int,
    running: int,
    room: int,
) -> bool:
    """Return whether the leader among the first `known` votes is settled, while so many chains are running."""
    if episode.opened - running >= policy.enough:
        return True
    if leader == NOBODY or episode.finishes < policy.least:
        return False
    more = 0 if policy.widen == ALL_AT_ONCE else min(policy.most - episode.opened, room)
    if policy.widen != GROWING or not running:
        return _is_enough(policy, tables, episode, votes, known, running, more)
    second = _rival(votes, known, leader)  # worst case: all unfinished chains vote for the second answer
    if second == known:
        known += 1
        votes[second] = 0.0
        episode.is_int[second] = 1
    kept = votes[second]
    votes[second] += running
    if votes[second] >= votes[leader]:
        settled = False
    elif more <= 0:
        settled = True
    else:
        settled = _is_enough(policy, tables, episode, votes, known, running, more)
    votes[second] = kept
    return settled


@compiled
def _rival(votes: NDArray[np.float64], known: int, leader: int) -> int:
    """Return the place with most votes except the leader's, the first of equals; `known` if there is no other."""
    best, most = known, -1.0
    for place in range(known):
        if place != leader and votes[place] > most:
            best, most = place, votes[place]
    return best


@compiled
def _is_enough(
    policy: Record,
    tables: NDArray[np.float64],
    episode: Record,
    votes: NDArray[np.float64],
    known: int,
    running: int,
    more: int,
) -> bool:
    """Return what the component `stop` says of the votes; `more` chains may still be opened."""
    if policy.stop == BAYES:
        return bool(bayes_factor(tables, episode.values, votes, known) >= policy.factor)
    if policy.stop == CERTIFIED:
        return is_certified(tables, votes, known, policy.error)
    first, second = top_two(votes, known)
    if policy.stop == CONFIDENCE:
        return bool(tables[0, int(np.rint(first)), int(np.rint(second))] >= policy.sure)
    if policy.stop == LEAD:
        return bool(first - second >= policy.lead * (first + second) ** policy.half)
    total = total_of(votes, episode.is_int, known)
    if policy.stop == SHARE:
        return bool(first >= policy.share * total)
    if policy.stop == MARGIN:
        return bool(first - second >= policy.margin * total)
    if policy.widen == GROWING:
        left = total * max(0, more) / episode.opened
    else:
        left = total * (running + max(0, more)) / (episode.opened - running)
    return bool(gain(first, second, total, left) < policy.worth)


@compiled
def top_two(votes: NDArray[np.float64], known: int) -> tuple[float, float]:
    """Return the two highest votes, 0 where there is none."""
    first, second = 0.0, 0.0
    for place in range(known):
        if votes[place] > first:
            first, second = votes[place], first
        elif votes[place] > second:
            second = votes[place]
    return first, second


@compiled
def bayes_factor(
    tables: NDArray[np.float64], counts: NDArray[np.float64], votes: NDArray[np.float64], known: int
) -> float:
    """Return the Bayes factor for the leader, as `controllers.stopping.bayes_factor` does. `counts` is overwritten."""
    for place in range(known):
        counts[place] = np.rint(votes[place])
    sort(counts, known)
    first = int(counts[known - 1])
    if first <= 0:
        return 0.0
    doubts = np.empty(known)
    for at in range(known - 1):  # the others, most votes first
        doubts[at] = 1 - tables[0, first, int(counts[known - 2 - at])]
    doubts[known - 1] = 1 - tables[0, first, 0]  # an answer not yet seen
    doubt = total_of(doubts, np.zeros(known, np.int64), known)
    if doubt >= 1:
        return 0.0
    return (known + 1) * (1 - doubt) / doubt if doubt > 0 else inf


@compiled
def is_certified(tables: NDArray[np.float64], votes: NDArray[np.float64], known: int, error: float) -> bool:
    """Return whether the leader is certified, as `controllers.stopping.is_certified` does."""
    first, second, rank = -1, -1, 0
    for place in range(known):
        count = int(np.rint(votes[place]))
        if count > first:
            first, second, rank = count, first, place + 1
        elif count > second:
            second = count
    evidence = tables[1, first - 1, max(0, second)] if first > 1 else 0.0
    return bool(evidence >= rank * (rank + 1) / error)


@compiled
def gain(first: float, second: float, sampled: float, left: float) -> float:
    """Return the expected gain from `left` more chains, as `controllers.baselines.adaptive_consistency.gain` does."""
    total = sampled + 2
    p, q = (first + 1) / total, (second + 1) / total
    lead = p - q
    deviation = sqrt(max((p + q - lead * lead) / total * left / (sampled + left), 1e-12))
    z = lead / deviation
    return deviation * exp(-z * z / 2) / sqrt(2 * pi) - lead * erfc(z / sqrt(2)) / 2
