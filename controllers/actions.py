"""Actions, which controllers decide on, and facts, which environments reply with.

They are immutable and hold only ints, so equal ones are interned: few distinct ones occur, and creating one costs more
than the rest of a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Final

from controllers.errors import BadFact, IllegalAction

TO_END: Final = 1 << 30
"""Number of intervals that runs a branch until it finishes."""


class Verb(IntEnum):
    """Kind of action. CONTINUE is the AutoTTS paper's name for `advance`."""

    BRANCH = 0
    CONTINUE = 1
    PROBE = 2
    PRUNE = 3
    ANSWER = 4


BRANCH, CONTINUE, PROBE, PRUNE, ANSWER = Verb  # for hot loops: a lookup in the enum is several times slower


@dataclass(frozen=True, slots=True)
class Action:
    """One action, well-formed by construction. Create it with `branch`, `advance`, `probe`, `prune` or `answer`.

    Raises IllegalAction unless every field is of its type and the intervals are from 1 to TO_END.
    """

    verb: Verb
    branch: int = -1  # its branch; -1 for BRANCH (which gets the next free id) and ANSWER
    intervals: int = 0  # BRANCH, CONTINUE: how many intervals to run, or TO_END
    label: int | None = None  # ANSWER: the label to answer with; None if there is none

    def __post_init__(self) -> None:
        verb = self.verb
        if type(verb) is not Verb:
            raise IllegalAction(f"{verb!r} is not a verb")
        if type(self.branch) is not int or (self.branch < 0 and verb in (CONTINUE, PROBE, PRUNE)):
            raise IllegalAction(f"{verb.name}: there is no branch {self.branch!r}; they are numbered from 0")
        if verb <= CONTINUE and (type(self.intervals) is not int or not 1 <= self.intervals <= TO_END):
            raise IllegalAction(f"{verb.name}: intervals must be from 1 to TO_END, not {self.intervals!r}")
        if self.label is not None and type(self.label) is not int:
            raise IllegalAction(f"{verb.name}: there is no label {self.label!r}; they are numbered from 0")


@dataclass(frozen=True, slots=True)
class Advanced:
    """Result of BRANCH and CONTINUE. Raises BadFact for impossible values."""

    branch: int
    intervals: int  # intervals run; the last may be shorter if the branch finished in it
    tokens: int  # tokens generated in them
    finished: bool  # the branch has ended
    label: int | None = None  # answer of the finished branch; None while it runs, or without a readable answer

    def __post_init__(self) -> None:
        if self.intervals < 0 or self.tokens < 0:
            raise BadFact(f"{self}: intervals and tokens must not be negative")
        if self.label is not None and (self.label < 0 or not self.finished):
            raise BadFact(f"{self}: a label must be 0 or more, and the branch must have finished")


@dataclass(frozen=True, slots=True)
class Probed:
    """Result of PROBE. Raises BadFact for impossible values."""

    branch: int
    label: int | None  # answer that the branch would give now; None if it is unreadable
    tokens: int  # cost of the probe: suffix tokens read and answer tokens generated

    def __post_init__(self) -> None:
        if self.tokens < 0 or (self.label is not None and self.label < 0):
            raise BadFact(f"{self}: tokens and labels must not be negative")


Fact = Advanced | Probed


@lru_cache(maxsize=4096, typed=True)
def _make(verb: Verb, index: int, intervals: int) -> Action:
    return Action(verb, index, intervals)


def branch(intervals: int = 1) -> Action:
    """Open a branch and run its first `intervals`. Its id is the number of branches opened before it."""
    return _make(Verb.BRANCH, -1, intervals)


def advance(index: int, intervals: int = 1) -> Action:
    """Run branch `index` for `intervals` more, or to its end with TO_END."""
    return _make(Verb.CONTINUE, index, intervals)


def probe(index: int) -> Action:
    """Probe branch `index`: ask what it would answer now."""
    return _make(Verb.PROBE, index, 0)


def prune(index: int) -> Action:
    """Prune branch `index`: it is neither advanced nor probed again."""
    return _make(Verb.PRUNE, index, 0)


def answer(label: int | None) -> Action:
    """End the episode with `label`. It must be the only action of its round."""
    return Action(Verb.ANSWER, label=label)
