"""Actions, which controllers decide on, and facts, which environments reply with.

Equal actions are interned: few distinct ones occur, and creating one costs more than the rest of a step.
"""

from __future__ import annotations

from functools import lru_cache

from controllers.core.action_types import (
    ANSWER,
    BRANCH,
    CONTINUE,
    PROBE,
    PRUNE,
    TO_END,
    Action,
    Advanced,
    Fact,
    Probed,
    Verb,
)

__all__ = [
    "ANSWER",
    "BRANCH",
    "CONTINUE",
    "PROBE",
    "PRUNE",
    "TO_END",
    "Action",
    "Advanced",
    "Fact",
    "Probed",
    "Verb",
    "advance",
    "answer",
    "branch",
    "probe",
    "prune",
]


@lru_cache(maxsize=64, typed=True)
def _branch(intervals: int) -> Action:
    return Action(Verb.BRANCH, -1, intervals)


@lru_cache(maxsize=4096, typed=True)
def _advance(index: int, intervals: int) -> Action:
    return Action(Verb.CONTINUE, index, intervals)


@lru_cache(maxsize=4096, typed=True)
def _probe(index: int) -> Action:
    return Action(Verb.PROBE, index)


@lru_cache(maxsize=4096, typed=True)
def _prune(index: int) -> Action:
    return Action(Verb.PRUNE, index)


def branch(intervals: int = 1) -> Action:
    """Open a branch and run its first `intervals`. Its id is the number of branches opened before it."""
    return _branch(intervals)


def advance(index: int, intervals: int = 1) -> Action:
    """Run branch `index` for `intervals` more, or to its end with TO_END."""
    return _advance(index, intervals)


def probe(index: int) -> Action:
    """Probe branch `index`: ask what it would answer now."""
    return _probe(index)


def prune(index: int) -> Action:
    """Prune branch `index`: it is neither advanced nor probed again."""
    return _prune(index)


def answer(label: int | None) -> Action:
    """End the episode with `label`. It must be the only action of its round."""
    return Action(Verb.ANSWER, label=label)
