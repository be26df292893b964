"""The five verbs a controller speaks, and the two facts an environment replies with.

Everything here is a tuple of ints, so that a round crosses a process boundary as it is.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final, NamedTuple

TO_END: Final = 1 << 30
"""As a number of intervals: run the branch until it finishes."""


class Verb(IntEnum):
    """What an action does. CONTINUE is the paper's name for what `advance` asks."""

    BRANCH = 0
    CONTINUE = 1
    PROBE = 2
    PRUNE = 3
    ANSWER = 4


class Action(NamedTuple):
    """One move. Build it with `branch`, `advance`, `probe`, `prune` or `answer`."""

    verb: Verb
    branch: int = -1  # the branch it is about; -1 for BRANCH (its id is the next free one) and ANSWER
    intervals: int = 0  # BRANCH, CONTINUE: how many intervals to run, or TO_END
    label: int | None = None  # ANSWER: the label to answer with, None when none ever appeared


class Advanced(NamedTuple):
    """The fact that follows BRANCH and CONTINUE."""

    branch: int
    intervals: int  # intervals run, the last of which may be shorter than the rest if the branch finished in it
    tokens: int  # tokens generated in them
    finished: bool  # the branch has come to its end
    label: int | None = None  # what the finished branch answers; None while it runs, or if it answers nothing


class Probed(NamedTuple):
    """The fact that follows PROBE."""

    branch: int
    label: int | None  # what the branch would answer now; None if nothing readable
    tokens: int  # what asking cost: suffix tokens read and answer tokens generated


Fact = Advanced | Probed


def branch(intervals: int = 1) -> Action:
    """Open a branch and run its first `intervals`; its id is the state's width, counting those opened before it."""
    return Action(Verb.BRANCH, -1, intervals)


def advance(index: int, intervals: int = 1) -> Action:
    """Run branch `index` on for `intervals`, or to its end with TO_END."""
    return Action(Verb.CONTINUE, index, intervals)


def probe(index: int) -> Action:
    """Ask branch `index` what it would answer now."""
    return Action(Verb.PROBE, index)


def prune(index: int) -> Action:
    """Give branch `index` up; it is neither run nor asked again."""
    return Action(Verb.PRUNE, index)


def answer(label: int | None) -> Action:
    """End the episode with `label`. It stands alone in its round."""
    return Action(Verb.ANSWER, label=label)
