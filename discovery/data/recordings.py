"""Recorded branches: as they were written down, and as replay wants them: dense, interned and immutable.

Answers are interned: a recording keeps each distinct answer once and refers to it by number.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from hashlib import sha256
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from discovery.answers.redaction import is_redacted, redacted

NO_ANSWER = -1
DEFAULT_TEMPERATURE: Final = "default"
"""`branch_temperature` in a recording's sampling where branches were sampled at the model's own default temperature."""
MAX_BRANCH_TOKENS: Final = 2**31 - 1
"""Most tokens of a branch: the largest number that an array of 32-bit integers holds."""


class Split(StrEnum):
    """What a question may be used for. It is fixed when the question is first taken in."""

    SEARCH = "search"  # explorers may learn from it
    VALIDATION = "validation"  # candidates are chosen on it
    HELD_OUT = "held-out"  # the promotion gate alone looks at it


class LabelSource(StrEnum):
    """How the reference answer is known, surest first."""

    REFERENCE = "reference"
    FEEDBACK = "feedback"
    CONSENSUS = "consensus"


class Origin(StrEnum):
    """Where a recording comes from."""

    IMPORTED = "imported"
    COLLECTED = "collected"
    LIVE = "live"


class Cell(NamedTuple):
    """Recordings that are scored together."""

    model: str
    benchmark: str
    split: Split


class RecordedBranch(NamedTuple):
    """One branch as it was recorded, answers as text."""

    probes: Sequence[str | None]  # what it said after each whole interval; None if nothing readable
    tokens: int  # the chain's length, as far as it is known
    final: str | None  # what the finished chain says
    probe_tokens: Sequence[int] = ()  # what each probe cost; none means nothing
    complete: bool = True  # it ran to its end; if not it is censored: nobody knows what follows


@dataclass(frozen=True)
class RecordedQuestion:
    """All branches recorded of one question under one model and one way of sampling, answers as text."""

    question: str  # `question_id` of its text
    model: str
    benchmark: str  # what the question belongs to
    interval: int  # tokens between probes, Δ
    branches: Sequence[RecordedBranch]
    reference: str | None = None  # the reference answer, if known
    label_source: LabelSource = LabelSource.REFERENCE
    split: Split = Split.SEARCH
    text: str | None = None  # of the question, where it may be kept
    sampling: Mapping[str, Any] = field(default_factory=dict)  # temperature, top_p, …, as sent
    probe_template: str = ""  # name and version of what probes append; empty if unknown
    origin: Origin = Origin.IMPORTED
    chat_template: str = ""  # hash of what the model's chat template makes of a conversation; empty if unknown
    request: str = ""  # id of the request it was made for, where it is live
    confidence: float = 1.0  # in the reference answer, from 0 to 1

    @property
    def cell(self) -> Cell:
        """What it is scored together with."""
        return Cell(self.model, self.benchmark, self.split)

    @property
    def complete(self) -> bool:
        """Whether every branch ran to its end; only such recordings are scored."""
        return all(branch.complete for branch in self.branches)

    @property
    def version(self) -> Version:
        """What must be the same for recordings to be scored together."""
        sampling = json.dumps(dict(self.sampling), sort_keys=True)
        return Version(self.model, self.chat_template, sampling, self.interval, self.probe_template)


class Version(NamedTuple):
    """How branches were made: one model, asked and sampled one way. Recordings of two versions are not comparable."""

    model: str
    chat_template: str
    sampling: str  # as JSON
    interval: int
    probe_template: str

    @property
    def upstream(self) -> tuple[str, str, int, str]:
        """What of it is the operator's: clients choose the sampling."""
        return self.model, self.chat_template, self.interval, self.probe_template

    @property
    def digest(self) -> str:
        """It as a short hash."""
        return sha256(json.dumps(self).encode()).hexdigest()[:12]


def default_split(question: str) -> Split:
    """The split a question falls into by its `question_id`: six tenths search, two validation, two held-out."""
    tenth = int(question[:8], 16) % 10
    return Split.SEARCH if tenth < 6 else Split.VALIDATION if tenth < 8 else Split.HELD_OUT


def live_split(question: str) -> Split:
    """The split of a question first seen in live traffic: as `default_split` has it, but nothing live is held out."""
    split = default_split(question)
    return Split.VALIDATION if split is Split.HELD_OUT else split


def question_id(text: str) -> str:
    """What a question is known by: the SHA-256 of its text."""
    return sha256(text.encode()).hexdigest()


def question_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """The text of a conversation: what its one message says if a user alone has spoken, else all of it as JSON."""
    if len(messages) == 1 and messages[0].get("role") == "user" and isinstance(messages[0].get("content"), str):
        return str(messages[0]["content"])
    return json.dumps(list(messages), sort_keys=True, ensure_ascii=False)


class BranchRow(NamedTuple):
    """One branch of a recording in plain ints, which a replay reads faster than arrays.

    Probes stand last first: what is left to run of a branch is then where its latest probe stands. An answer that was
    not readable has the number after those of all answers.
    """

    probes: Sequence[int]
    probe_tokens: Sequence[int]
    tokens: int
    final: int
    complete: bool


@dataclass(frozen=True)
class Recording:
    """Every recorded branch of one question under one model, answers as numbers.

    Shapes: `branches` b branches, `probes` one flat array of all branches' probe answers, branch i's from
    `starts[i]` to `starts[i + 1]`. All arrays are read-only.
    """

    question: str  # `question_id` of its text
    interval: int  # tokens between probes, Δ
    answers: tuple[
        str, ...
    ]  # the distinct answers, as first written; the arrays hold their numbers, NO_ANSWER for none
    reference: int  # number of the reference answer; NO_ANSWER if no branch ever gave it
    starts: NDArray[np.int32]  # (b + 1,)
    probes: NDArray[np.int32]  # (sum of probes,)
    probe_tokens: NDArray[np.int32]  # (sum of probes,) what each cost
    tokens: NDArray[np.int32]  # (b,) length of each chain
    finals: NDArray[np.int32]  # (b,) what each finished chain says
    complete: NDArray[np.bool_]  # (b,) False where the branch is censored
    greedy_first: bool = False  # the first branch was generated at temperature 0, the others were sampled

    @cached_property
    def rows(self) -> list[BranchRow]:
        """The branches in plain ints."""
        none = len(self.answers)
        probes, finals = (np.where(numbers == NO_ANSWER, none, numbers) for numbers in (self.probes, self.finals))
        spans = [slice(*cut) for cut in itertools.pairwise(self.starts.tolist())]
        columns = zip(spans, self.tokens.tolist(), finals.tolist(), self.complete.tolist(), strict=True)
        return [
            BranchRow(probes[span][::-1].tolist(), self.probe_tokens[span][::-1].tolist(), *column)
            for span, *column in columns
        ]

    @cached_property
    def priced(self) -> bool:
        """Whether its probes cost anything."""
        return bool(self.probe_tokens.any())

    @property
    def branches(self) -> int:
        """How many branches were recorded."""
        return len(self.tokens)


def intern_answers(recorded: RecordedQuestion, tell: Callable[[str], Hashable | None] = str) -> Recording:
    """The recording that replay runs. Answers are the same if `tell` says the same of them, none if it says None.

    Where an answer of it, or its reference, is veiled, they are the same if their veils are.
    """
    branches = recorded.branches
    written = (*(one for branch in branches for one in (*branch.probes, branch.final)), recorded.reference)
    hidden = any(answer is not None and is_redacted(answer) for answer in written)
    numbers: dict[Hashable, int] = {}
    answers: list[str] = []  # each as it was first written

    def meaning(answer: str | None) -> Hashable | None:
        if answer is None or (told := answer if is_redacted(answer) else tell(answer)) is None:
            return None
        return redacted(answer) if hidden else told

    def number(answer: str | None) -> int:
        told = meaning(answer)
        if answer is None or told is None:
            return NO_ANSWER
        if told not in numbers:
            numbers[told] = len(answers)
            answers.append(answer)
        return numbers[told]

    starts = np.cumsum([0, *(len(branch.probes) for branch in branches)])
    probes = [number(answer) for branch in branches for answer in branch.probes]
    costs = [cost for branch in branches for cost in branch.probe_tokens or [0] * len(branch.probes)]
    finals = [number(branch.final) for branch in branches]
    reference = meaning(recorded.reference)
    return Recording(
        question=recorded.question,
        interval=recorded.interval,
        answers=tuple(answers),
        reference=NO_ANSWER if reference is None else numbers.get(reference, NO_ANSWER),
        starts=_frozen(starts),
        probes=_frozen(probes),
        probe_tokens=_frozen(costs),
        tokens=_frozen([branch.tokens for branch in branches]),
        finals=_frozen(finals),
        complete=_frozen([branch.complete for branch in branches], np.bool_),
        greedy_first=recorded.sampling.get("temperature") == 0,
    )


def _frozen(values: Any, dtype: Any = np.int32) -> NDArray[Any]:
    array = np.asarray(values, dtype=dtype)
    array.setflags(write=False)
    return array
