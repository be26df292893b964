"""Types of actions, which controllers decide on, and of facts, which environments reply with.

They are immutable and hold only ints. This module can be compiled (`controllers/core/compiled.py`). Compiled code
raises TypeError for arguments of other types than declared, so what a check here refuses is declared as `object`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Final

from controllers.errors import BadFact, IllegalAction
from controllers.signals import MAX_CONFIDENCE

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
_CALLS = ("branch()", "advance()", "probe()", "prune()", "answer()")
_put = object.__setattr__  # as constructors of frozen dataclasses set fields


@dataclass(frozen=True, slots=True, init=False)
class Action:
    """One action, well-formed by construction. Create it with `branch`, `advance`, `probe`, `prune` or `answer`.

    Raises IllegalAction unless every field is of its type and the intervals are from 1 to TO_END.
    """

    verb: Verb
    branch: int = -1  # its branch; -1 for BRANCH (which gets the next free id) and ANSWER
    intervals: int = 0  # BRANCH, CONTINUE: how many intervals to run, or TO_END
    label: int | None = None  # ANSWER: the label to answer with; None if there is none

    def __init__(self, verb: object, branch: object = -1, intervals: object = 0, label: object = None) -> None:
        if type(verb) is not Verb:
            raise IllegalAction(f"{verb!r} is not a verb")
        if type(branch) is not int or (branch < 0 and verb in (CONTINUE, PROBE, PRUNE)):
            raise IllegalAction(f"{call_name(verb)}: there is no branch {branch!r}; they are numbered from 0")
        if verb <= CONTINUE and (type(intervals) is not int or not 1 <= intervals <= TO_END):
            raise IllegalAction(f"{call_name(verb)}: intervals must be from 1 to TO_END, not {intervals!r}")
        if label is not None and type(label) is not int:
            raise IllegalAction(f"{call_name(verb)}: there is no label {label!r}; they are numbered from 0")
        _put(self, "verb", verb)
        _put(self, "branch", branch)
        _put(self, "intervals", intervals)
        _put(self, "label", label)

    def __reduce__(self) -> tuple[type[Action], tuple[object, ...]]:
        return Action, (self.verb, self.branch, self.intervals, self.label)


def call_name(verb: Verb) -> str:
    """Return the call that makes an action of this kind, as controllers write it. Messages name actions by it."""
    return _CALLS[verb]


@dataclass(frozen=True, slots=True, init=False)
class Advanced:
    """Result of BRANCH and CONTINUE. Raises BadFact for impossible values. Signals are None unless declared."""

    branch: int
    intervals: int  # intervals run; the last may be shorter if the branch finished in it
    tokens: int  # tokens generated in them
    finished: bool  # the branch has ended
    label: int | None = None  # answer of the finished branch; None while it runs, or without a readable answer
    confidence: int | None = None  # of the generated tokens, in per mille; None if unknown (`controllers.signals`)
    lowest: int | None = None  # of the least confident window in them, in per mille; None if unknown
    number: Any = field(default=None, compare=False, repr=False)  # an int if replay has many of it, else None
    code: bytes = field(default=b"", init=False, compare=False, repr=False)  # the number as bytes, or empty

    def __init__(
        self,
        branch: int,
        intervals: int,
        tokens: int,
        finished: bool,
        label: int | None = None,
        confidence: object = None,
        lowest: object = None,
        number: Any = None,
    ) -> None:
        if confidence is not None or lowest is not None:
            _check_confidences(branch, (confidence, lowest))
        _put(self, "branch", branch)
        _put(self, "intervals", intervals)
        _put(self, "tokens", tokens)
        _put(self, "finished", finished)
        _put(self, "label", label)
        _put(self, "confidence", confidence)
        _put(self, "lowest", lowest)
        _put(self, "number", number)
        _put(self, "code", b"" if number is None else number_code(number))
        if intervals < 0 or tokens < 0:
            raise BadFact(f"{self}: intervals and tokens must not be negative")
        if label is not None and (label < 0 or not finished):
            raise BadFact(f"{self}: a label must be 0 or more, and the branch must have finished")

    def __reduce__(self) -> tuple[type[Advanced], tuple[object, ...]]:
        fields = self.branch, self.intervals, self.tokens, self.finished, self.label, self.confidence, self.lowest
        return Advanced, fields


@dataclass(frozen=True, slots=True, init=False)
class Probed:
    """Result of PROBE. Raises BadFact for impossible values. `confidence` is None unless declared."""

    branch: int
    label: int | None  # answer that the branch would give now; None if it is unreadable
    tokens: int  # cost of the probe: suffix tokens read and answer tokens generated
    confidence: int | None = None  # of the answer's tokens, in per mille; None if unknown (`controllers.signals`)
    number: Any = field(default=None, compare=False, repr=False)  # as in `Advanced`
    code: bytes = field(default=b"", init=False, compare=False, repr=False)

    def __init__(
        self, branch: int, label: int | None, tokens: int, confidence: object = None, number: Any = None
    ) -> None:
        if confidence is not None:
            _check_confidences(branch, (confidence,))
        _put(self, "branch", branch)
        _put(self, "label", label)
        _put(self, "tokens", tokens)
        _put(self, "confidence", confidence)
        _put(self, "number", number)
        _put(self, "code", b"" if number is None else number_code(number))
        if tokens < 0 or (label is not None and label < 0):
            raise BadFact(f"{self}: tokens and labels must not be negative")

    def __reduce__(self) -> tuple[type[Probed], tuple[object, ...]]:
        return Probed, (self.branch, self.label, self.tokens, self.confidence)


Fact = Advanced | Probed


def number_code(number: int) -> bytes:
    """Return the number of a fact as four bytes. Traces join them, which is faster than a conversion of numbers."""
    return number.to_bytes(4, sys.byteorder)


def _check_confidences(branch: int, values: tuple[object, ...]) -> None:
    """Raise BadFact unless each value is None or a number from 0 to MAX_CONFIDENCE."""
    for value in values:
        if value is not None and (type(value) is not int or not 0 <= value <= MAX_CONFIDENCE):
            rule = f"confidence and lowest must be whole numbers from 0 to {MAX_CONFIDENCE}, or None"
            raise BadFact(f"a fact of branch {branch} has {value!r}: {rule}")
