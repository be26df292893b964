"""Votes of an episode, counted as controller files count them: the same operations on floats in the same order."""

from __future__ import annotations

from math import exp, inf, log, nan

import numpy as np
from numpy.typing import NDArray

from discovery.search.kernel.jit import compiled
from discovery.search.kernel.records import (
    DOUBTFUL,
    LENGTH,
    LENGTH_AND_CONFIDENCE,
    LIKELIHOOD,
    LONG,
    NOBODY,
    PLAIN,
    PROBE_CONFIDENCE,
    WEAK,
    Record,
    Records,
)

COMPENSATED = sum([0.1] * 10) == 1.0
"""Whether `sum` corrects rounding errors of floats, as it does since Python 3.12."""


@compiled
def total_of(values: NDArray[np.float64], is_int: NDArray[np.int64], count: int) -> float:
    """Return the sum of the first values as Python's `sum` adds them."""
    total, correction, has_float = 0.0, 0.0, False
    for at in range(count):
        value = values[at]
        added = total + value
        if COMPENSATED and has_float and not is_int[at]:
            if abs(total) >= abs(value):
                correction += (total - added) + value
            else:
                correction += (value - added) + total
        has_float = has_float or not is_int[at]
        total = added
    return float(total + correction if correction != 0 and np.isfinite(correction) else total)


@compiled
def first_most(votes: NDArray[np.float64], count: int) -> int:
    """Return the place of the most votes, the first of equals; NOBODY without votes above 0."""
    best, most = NOBODY, 0.0
    for place in range(count):
        if votes[place] > most:
            best, most = place, votes[place]
    return best


@compiled
def begin_votes(episode: Record, places: Records, known: int) -> None:
    """Begin a count that keeps the first `known` labels at their places."""
    episode.stamp += 1
    for place in range(known):
        label = episode.labels[place]
        places[label].stamp = episode.stamp
        places[label].place = place


@compiled
def place_of(episode: Record, places: Records, label: int, known: int) -> int:
    """Return the place of a label in the current count; a new one gets the place `known`."""
    if places[label].stamp != episode.stamp:
        places[label].stamp = episode.stamp
        places[label].place = known
        episode.labels[known] = label
    return int(places[label].place)


@compiled
def log_probability_of(policy: Record, intervals: Records, chain: Record) -> float:
    """Return the log-probability of a chain's tokens; NaN if it is unknown."""
    if policy.pace:
        return float(chain.log_probability)
    return float(intervals[chain.start + chain.probes - chain.left - 1].log_probability)


@compiled
def lowest_of(policy: Record, intervals: Records, chain: Record) -> int:
    """Return the confidence of a chain's least confident window; UNSEEN_WINDOW if it is unknown."""
    if policy.pace:
        return int(chain.lowest)
    return int(intervals[chain.start + chain.probes - chain.left - 1].lowest_so_far)


@compiled
def _score(policy: Record, intervals: Records, chain: Record) -> float:
    """Return the logarithm of a finished chain's weight; NaN if it is unknown."""
    if policy.weight == PLAIN:
        return 0.0
    if policy.weight == LENGTH:
        return float(policy.power * log(float(max(1, chain.tokens))))
    if policy.weight == PROBE_CONFIDENCE:
        return float(policy.belief * chain.probe_confidence)
    total = log_probability_of(policy, intervals, chain)
    if policy.weight == LIKELIHOOD:
        return float(total / policy.scale)
    if np.isnan(total):
        return nan
    by_confidence = policy.strength * total / chain.tokens
    if policy.weight == LENGTH_AND_CONFIDENCE:
        return float(policy.power * log(float(chain.tokens)) + by_confidence)
    return float(by_confidence)


@compiled
def _add_vote(episode: Record, places: Records, label: int, score: float, steepest: float) -> None:
    """Add a weighted vote as `WeightedTally.add` does; weights differ by exp(`steepest`) at most."""
    weight = episode.total / episode.voters if episode.voters > 0 else 1.0
    if not np.isnan(score):
        if np.isnan(episode.anchor):
            episode.anchor = score
        else:
            weight = exp(max(-steepest, min(steepest, score - episode.anchor)))
    _add_weight(episode, places, label, weight)
    episode.total += weight
    episode.squares += weight * weight
    episode.voters += 1


@compiled
def _add_weight(episode: Record, places: Records, label: int, weight: float) -> None:
    place = place_of(episode, places, label, episode.known)
    if place == episode.known:
        episode.known += 1
        episode.weights[place] = 0.0
    episode.weights[place] += weight


@compiled
def _least_rate(policy: Record, intervals: Records, episode: Record, chains: Records) -> float:
    """Return the mean log-probability that a chain needs to vote; -inf if none is known."""
    known = 0
    for at in range(episode.finishes):
        chain = chains[episode.finished[at]]
        total = log_probability_of(policy, intervals, chain)
        if not np.isnan(total):
            episode.values[known] = total / chain.tokens
            known += 1
    if not known:
        return -inf
    sort(episode.values, known)
    return float(episode.values[known - max(1, int(np.rint(policy.kept * known)))])


@compiled
def sort(values: NDArray[np.float64], count: int) -> None:
    """Sort the first values by insertion; they are few."""
    for at in range(1, count):
        value, place = values[at], at
        while place > 0 and values[place - 1] > value:
            values[place] = values[place - 1]
            place -= 1
        values[place] = value


@compiled
def count_votes(policy: Record, intervals: Records, episode: Record, chains: Records, places: Records) -> None:
    """Count the votes of finished chains; chains counted before are not counted again unless they are filtered."""
    first, least = episode.counted, -inf
    if policy.filter:
        first, episode.known = 0, 0
        episode.total, episode.squares, episode.voters, episode.anchor = 0.0, 0.0, 0.0, nan
        least = _least_rate(policy, intervals, episode, chains)
    begin_votes(episode, places, episode.known)
    for at in range(first, episode.finishes):
        chain = chains[episode.finished[at]]
        if policy.filter:
            total = log_probability_of(policy, intervals, chain)
            if not np.isnan(total) and total / chain.tokens < least:
                continue
        if chain.label == NOBODY:
            continue
        if policy.is_counted:
            score = _score(policy, intervals, chain)
            _add_vote(episode, places, chain.label, score, policy.steepest)
        else:
            _add_weight(episode, places, chain.label, 1.0)
    scale = episode.total / episode.squares if policy.is_counted and episode.squares > 0 else 1.0
    for place in range(episode.known):
        episode.votes[place] = episode.weights[place] * scale
        episode.is_int[place] = not policy.is_counted
    episode.counted = episode.finishes
    episode.leader = first_most(episode.votes, episode.known)


@compiled
def poll(policy: Record, episode: Record, chains: Records, places: Records) -> int:
    """Add the votes of running chains' probes to those of finished chains; return the number of labels."""
    known = episode.known
    begin_votes(episode, places, known)
    for place in range(known):
        episode.polled[place] = episode.votes[place]
        episode.is_int[place] = not policy.is_counted
    for at in range(episode.actives):
        label = chains[episode.active[at]].label
        if label == NOBODY:
            continue
        place = place_of(episode, places, label, known)
        if place == known:
            known += 1
            episode.polled[place] = 0.0
        episode.polled[place] += policy.voice
        episode.is_int[place] = 0
    return int(known)


@compiled
def set_limits(policy: Record, intervals: Records, episode: Record, chains: Records) -> None:
    """Compute the limits for pruning from the finished chains, which have been counted."""
    if episode.counted < policy.least:
        return
    known, values = 0, episode.values
    if policy.prune == LONG:
        for at in range(episode.finishes):
            chain = chains[episode.finished[at]]
            values[at] = chain.probes - chain.left
        sort(values, episode.finishes)
        episode.longest = policy.stretch * values[episode.finishes // 2]
    elif policy.prune == DOUBTFUL:
        label = episode.labels[episode.leader] if episode.leader != NOBODY else NOBODY
        for at in range(episode.finishes):
            chain = chains[episode.finished[at]]
            total = log_probability_of(policy, intervals, chain)
            if chain.label == label and not np.isnan(total):
                values[known] = total / chain.tokens
                known += 1
        episode.level = -inf
        if known:
            episode.level = total_of(values, np.zeros(known, np.int64), known) / known + policy.log_trust
    elif policy.prune == WEAK and episode.limit < 0:
        for at in range(episode.finishes):
            lowest = lowest_of(policy, intervals, chains[episode.finished[at]])
            if lowest >= 0:
                values[known] = lowest
                known += 1
        sort(values, known)
        episode.limit = values[int(policy.floor * known)] if known else -1.0
