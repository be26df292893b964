"""The five verbs a controller speaks, and the two facts an environment replies with.

Everything here is immutable and holds nothing but ints, so one object may stand for every equal one: the same few
actions and facts come again and again, and making one costs more than all else a step takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Final

from controllers.errors import BadFact, IllegalAction

TO_END: Final = 1 << 30
"""As a number of intervals: run the branch until it finishes."""


class Verb(IntEnum):
    """What an action does. CONTINUE is the paper's name for what `advance` asks."""

    BRANCH = 0
    CONTINUE = 1
    PROBE = 2
    PRUNE = 3
    ANSWER = 4


BRANCH, CONTINUE, PROBE, PRUNE, ANSWER = Verb  # for hot loops: a member looked up in its enum costs several times more


@dataclass(frozen=True, slots=True)
class Action:
    """One move, well-formed by construction. Build it with `branch`, `advance`, `probe`, `prune` or `answer`.

    Raises IllegalAction unless every field is of its type and the intervals are from 1 to TO_END.
    """

    verb: Verb
    branch: int = -1  # the branch it is about; -1 for BRANCH (its id is the next free one) and ANSWER
    intervals: int = 0  # BRANCH, CONTINUE: how many intervals to run, or TO_END
    label: int | None = None  # ANSWER: the label to answer with, None when none ever appeared

    def __post_init__(self) -> None:
        verb = self.verb
        if type(verb) is not Verb:
            raise IllegalAction(f"{verb!r} is no verb")
        if type(self.branch) is not int or (self.branch < 0 and verb in (CONTINUE, PROBE, PRUNE)):
            raise IllegalAction(f"{verb.name}: there is no branch {self.branch!r}; they are numbered from 0")
        if verb <= CONTINUE and (type(self.intervals) is not int or not 1 <= self.intervals <= TO_END):
            raise IllegalAction(f"{verb.name}: intervals must be from 1 to TO_END, not {self.intervals!r}")
        if self.label is not None and type(self.label) is not int:
            raise IllegalAction(f"{verb.name}: there is no label {self.label!r}; they are numbered from 0")


@dataclass(frozen=True, slots=True)
class Advanced:
    """The fact that follows BRANCH and CONTINUE. Raises BadFact on what cannot be."""

    branch: int
    intervals: int  # intervals run, the last of which may be shorter than the rest if the branch finished in it
    tokens: int  # tokens generated in them
    finished: bool  # the branch has come to its end
    label: int | None = None  # what the finished branch answers; None while it runs, or if it answers nothing

    def __post_init__(self) -> None:
        if self.intervals < 0 or self.tokens < 0:
            raise BadFact(f"{self}: nothing runs backwards")
        if self.label is not None and (self.label < 0 or not self.finished):
            raise BadFact(f"{self}: a label is a number from 0, of a branch that has finished")


@dataclass(frozen=True, slots=True)
class Probed:
    """The fact that follows PROBE. Raises BadFact on what cannot be."""

    branch: int
    label: int | None  # what the branch would answer now; None if nothing readable
    tokens: int  # what asking cost: suffix tokens read and answer tokens generated

    def __post_init__(self) -> None:
        if self.tokens < 0 or (self.label is not None and self.label < 0):
            raise BadFact(f"{self}: tokens and labels are numbers from 0")


Fact = Advanced | Probed


@lru_cache(maxsize=4096, typed=True)
def _make(verb: Verb, index: int, intervals: int) -> Action:
    return Action(verb, index, intervals)


def branch(intervals: int = 1) -> Action:
    """Open a branch and run its first `intervals`; its id is the state's width, counting those opened before it."""
    return _make(Verb.BRANCH, -1, intervals)


def advance(index: int, intervals: int = 1) -> Action:
    """Run branch `index` on for `intervals`, or to its end with TO_END."""
    return _make(Verb.CONTINUE, index, intervals)


def probe(index: int) -> Action:
    """Ask branch `index` what it would answer now."""
    return _make(Verb.PROBE, index, 0)


def prune(index: int) -> Action:
    """Give branch `index` up; it is neither run nor asked again."""
    return _make(Verb.PRUNE, index, 0)


def answer(label: int | None) -> Action:
    """End the episode with `label`. It stands alone in its round."""
    return Action(Verb.ANSWER, label=label)
