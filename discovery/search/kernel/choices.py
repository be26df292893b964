"""Choices of a policy in a round: which chains it prunes, which it advances, and how many it opens."""

from __future__ import annotations

import numpy as np

from discovery.search.kernel.jit import compiled
from discovery.search.kernel.records import (
    ALL_AT_ONCE,
    DEVIANT,
    DOUBTFUL,
    GROWING,
    IS_PRUNED,
    LONG,
    NOBODY,
    REFILL,
    UNSTABLE,
    WEAK,
    Record,
    Records,
)
from discovery.search.kernel.votes import log_probability_of, lowest_of


@compiled
def mark_lost(policy: Record, intervals: Records, episode: Record, chains: Records, leader: int) -> None:
    """Mark the active chains that the policy prunes."""
    can_prune = leader != NOBODY and episode.finishes > 0
    for at in range(episode.actives):
        chain = chains[episode.active[at]]
        lost = False
        if policy.prune == LONG:
            lost = chain.probes - chain.left > episode.longest
        elif policy.prune == DEVIANT:
            if can_prune:
                chain.strayed = chain.strayed + 1 if chain.label != leader else 0
                lost = chain.strayed >= policy.patience
        elif policy.prune == UNSTABLE:
            _note_change(chain)
            lost = can_prune and chain.changes >= policy.flips
        elif policy.prune == DOUBTFUL:
            total = log_probability_of(policy, intervals, chain)
            lost = total < episode.level * chain.tokens  # false if it is unknown, NaN
        elif policy.prune == WEAK:
            lowest = lowest_of(policy, intervals, chain)
            lost = lowest >= 0 and lowest < episode.limit
        chain.is_lost = lost


@compiled
def _note_change(chain: Record) -> None:
    """Note whether a running chain has changed its answer."""
    if chain.label == NOBODY:
        return
    if chain.said != NOBODY:
        chain.changes = max(0, chain.changes + (-1 if chain.label == chain.said else 1))
    chain.said = chain.label


@compiled
def choose_running(policy: Record, episode: Record, chains: Records) -> int:
    """List the active chains that continue; return their number."""
    running = 0
    for at in range(episode.actives):
        chain = chains[episode.active[at]]
        is_past_horizon = policy.depth and chain.probes - chain.left >= policy.horizon
        if not is_past_horizon and not chain.is_lost:
            episode.running[running] = episode.active[at]
            running += 1
    return running


@compiled
def chains_to_open(policy: Record, opened: int, running: int, room: int) -> int:
    """Return how many chains the policy opens next."""
    wanted = 0
    if policy.widen == REFILL:
        wanted = policy.running - running if running < opened else 0
    elif policy.widen == GROWING and not running:
        wanted = max(1, int(np.rint(policy.growth * opened)))
    elif policy.widen != ALL_AT_ONCE and not running:
        wanted = policy.wave
    return int(max(0, min(min(wanted, policy.most - opened), room)))


@compiled
def prune_lost(episode: Record, chains: Records) -> None:
    """Prune the marked chains."""
    for at in range(episode.actives):
        chain = chains[episode.active[at]]
        if chain.is_lost:
            chain.fate = IS_PRUNED
            episode.ended += 1
