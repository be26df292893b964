"""Recorded branches: as they were recorded, with answers as text, and as replay uses them, with answers as numbers.

A replayable recording is dense and immutable. It keeps each distinct answer once and refers to it by number.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from hashlib import sha256
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from controllers.actions import Advanced
from controllers.signals import MAX_CONFIDENCE, Signal
from discovery.answers.redaction import RedactedLabels, is_redacted

NO_ANSWER = -1
UNKNOWN: Final = -1
"""Stands for an unknown signal in a recording's arrays."""
DEFAULT_TEMPERATURE: Final = "default"
"""`branch_temperature` in a recording's sampling where branches were sampled at the model's own default temperature."""
REPLY: Final = "reply"
"""`branch` in a recording's sampling where each branch is a whole reply of the upstream, which was not probed."""
REPLY_FIELDS: Final = ("tools", "tool_choice", "parallel_tool_calls", "response_format", "structured_outputs")
"""Fields of a request that belong to its question, beside the messages: they say what a reply may be."""
MAX_BRANCH_TOKENS: Final = 2**31 - 1
"""Largest token count of a branch: the maximum of a 32-bit integer."""

_NO_FIELDS: Final[Mapping[str, Any]] = MappingProxyType({})


class Split(StrEnum):
    """Purpose of a question, fixed when the question is first added."""

    SEARCH = "search"  # explorers may learn from it
    VALIDATION = "validation"  # candidates are chosen on it
    HELD_OUT = "held-out"  # only the promotion gate reads it


class LabelSource(StrEnum):
    """Source of a reference answer, most reliable first."""

    REFERENCE = "reference"
    FEEDBACK = "feedback"
    CONSENSUS = "consensus"


class Origin(StrEnum):
    """Origin of a recording."""

    IMPORTED = "imported"
    COLLECTED = "collected"
    LIVE = "live"


class Cell(NamedTuple):
    """Recordings that are scored together."""

    model: str
    benchmark: str
    split: Split


class RecordedBranch(NamedTuple):
    """One branch as it was recorded, answers as text.

    Signals are in per mille (`controllers.signals`); an empty sequence means that they are unknown.
    """

    probes: Sequence[str | None]  # the answer after each whole interval; None if it was unreadable
    tokens: int  # the chain's length, as far as known
    final: str | None  # the finished chain's answer
    probe_tokens: Sequence[int] = ()  # cost of each probe; empty means they cost nothing
    complete: bool = True  # it ran to its end; otherwise it is censored and its continuation unknown
    confidences: Sequence[int | None] = ()  # of each interval, also of the one after the last probe
    lowests: Sequence[int | None] = ()  # of the least confident window in each of these intervals
    probe_confidences: Sequence[int | None] = ()  # of each probe's answer

    @property
    def has_signals(self) -> bool:
        """Whether any of its signals were recorded."""
        return bool(self.confidences or self.lowests or self.probe_confidences)


def check_signals(branch: RecordedBranch) -> None:
    """Raise ValueError unless a branch's signals are in range and fit its intervals and probes."""
    probes, least = len(branch.probes), len(branch.probes) + branch.complete
    for name in ("confidences", "lowests", "probe_confidences"):
        for value in getattr(branch, name):
            if value is not None and not (type(value) is int and 0 <= value <= MAX_CONFIDENCE):
                raise ValueError(f"{name} has {value!r}; use null or an integer from 0 to {MAX_CONFIDENCE}")
    if len(branch.probe_confidences) not in (0, probes):
        raise ValueError(f"{len(branch.probe_confidences)} probe_confidences for {probes} probes")
    count = len(branch.confidences)
    if len(branch.lowests) != count:
        raise ValueError(f"{count} confidences but {len(branch.lowests)} lowests; each interval needs both")
    if any((sure is None) != (lowest is None) for sure, lowest in zip(branch.confidences, branch.lowests, strict=True)):
        raise ValueError("an interval has only one of confidence and lowest; both are known, or both are null")
    if count and (count < least or (branch.complete and count > least)):
        raise ValueError(
            f"{count} confidences for {probes} probes; a complete branch has one more than probes, "
            "and a censored branch at least as many"
        )


@dataclass(frozen=True)
class RecordedQuestion:
    """All branches recorded of one question with one model and one sampling, answers as text."""

    question: str  # `question_id` of its text
    model: str
    benchmark: str  # what the question belongs to
    interval: int  # tokens between probes, Δ
    branches: Sequence[RecordedBranch]
    reference: str | None = None  # the reference answer, if known
    label_source: LabelSource = LabelSource.REFERENCE
    split: Split = Split.SEARCH
    text: str | None = None  # the question's text, if it may be kept
    sampling: Mapping[str, Any] = field(default_factory=dict)  # temperature, top_p, …, as sent
    probe_template: str = ""  # name and version of what probes append; empty if unknown
    origin: Origin = Origin.IMPORTED
    chat_template: str = ""  # hash of a conversation rendered by the model's chat template; empty if unknown
    request: str = ""  # id of the request it was made for; empty unless live
    confidence: float = 1.0  # in the reference answer, from 0 to 1
    judged_wrong: bool = False  # clients judged an answer to it wrong; at most votes know the right one

    @property
    def cell(self) -> Cell:
        """The cell it belongs to."""
        return Cell(self.model, self.benchmark, self.split)

    @property
    def complete(self) -> bool:
        """Whether every branch ran to its end; only such recordings are scored."""
        return all(branch.complete for branch in self.branches)

    @property
    def has_probes(self) -> bool:
        """Whether its branches were probed; whole replies of the upstream cannot be."""
        return self.sampling.get("branch") != REPLY

    @property
    def greedy_first(self) -> bool:
        """Whether its first branch was generated at temperature 0, and the others were sampled."""
        return self.sampling.get("temperature") == 0

    @property
    def version(self) -> Version:
        """Its version; only recordings of one version are scored together."""
        sampling = json.dumps(dict(self.sampling), sort_keys=True)
        return Version(self.model, self.chat_template, sampling, self.interval, self.probe_template)


def pooled_branches(group: Sequence[RecordedQuestion]) -> list[RecordedBranch]:
    """Return the branches of recordings of one question and version; of their greedy ones, which are equal, one."""
    return [branch for at, item in enumerate(group) for branch in item.branches[1 if at and item.greedy_first else 0 :]]


class Version(NamedTuple):
    """How branches were made: the model, prompt and sampling. Recordings of two versions are not comparable."""

    model: str
    chat_template: str
    sampling: str  # as JSON
    interval: int
    probe_template: str

    @property
    def upstream(self) -> tuple[str, str, int, str]:
        """The parts that the operator controls; clients choose the sampling."""
        return self.model, self.chat_template, self.interval, self.probe_template

    @property
    def digest(self) -> str:
        """A short hash of the version."""
        return sha256(json.dumps(self).encode()).hexdigest()[:12]


def default_split(question: str) -> Split:
    """Return the split of a question by its `question_id`: six tenths search, two validation, two held-out."""
    tenth = int(question[:8], 16) % 10
    return Split.SEARCH if tenth < 6 else Split.VALIDATION if tenth < 8 else Split.HELD_OUT


def live_split(question: str) -> Split:
    """Return the split of a question first seen in live traffic: its default split, but never held-out."""
    split = default_split(question)
    return Split.VALIDATION if split is Split.HELD_OUT else split


def question_id(text: str) -> str:
    """Return the id of a question: the SHA-256 of its text."""
    return sha256(text.encode()).hexdigest()


def question_text(messages: Sequence[Mapping[str, Any]], fields: Mapping[str, Any] = _NO_FIELDS) -> str:
    """Return the text of a conversation: the content of a single user message, else all messages as JSON.

    With any of REPLY_FIELDS among the request's `fields`, it is an object of the messages and those fields.
    """
    asked = {name: fields[name] for name in REPLY_FIELDS if fields.get(name) not in (None, [], {})}
    if asked:
        return json.dumps({"messages": list(messages), **asked}, sort_keys=True, ensure_ascii=False)
    if len(messages) == 1 and messages[0].get("role") == "user" and isinstance(messages[0].get("content"), str):
        return str(messages[0]["content"])
    return json.dumps(list(messages), sort_keys=True, ensure_ascii=False)


class BranchRow(NamedTuple):
    """One branch of a recording as plain ints, which replay reads faster than arrays.

    Probes are in reverse order, so that the number of intervals left to run is the index of the latest probe. An
    unreadable answer has the number after those of all answers.
    """

    probes: Sequence[int]
    probe_tokens: Sequence[int]
    tokens: int
    final: int
    complete: bool
    confidences: Sequence[int] = ()  # of each interval, in order, UNKNOWN if unknown; empty if all are unknown
    lowests: Sequence[int] = ()  # of each interval, likewise
    probe_confidences: Sequence[int] = ()  # of each probe, in order; empty if all are unknown


def _no_signals() -> NDArray[np.int16]:
    return _frozen((), np.int16)


@dataclass(frozen=True)
class Recording:
    """All recorded branches of one question with one model, answers as numbers.

    Shapes: b branches; `probes` is one flat array of all branches' probe answers, with branch i's from `starts[i]` to
    `starts[i + 1]`. A branch has one interval more than probes, so its intervals start at `starts[i] + i`. All arrays
    are read-only. Arrays of signals are in per mille, with UNKNOWN for unknown values, and empty if all are unknown.
    """

    question: str  # `question_id` of its text
    interval: int  # tokens between probes, Δ
    answers: tuple[str, ...]  # distinct, as first written; the arrays hold their numbers, NO_ANSWER for none
    reference: int  # number of the reference answer; NO_ANSWER if no branch ever gave it
    starts: NDArray[np.int32]  # (b + 1,) first probe of each branch
    probes: NDArray[np.int32]  # (sum of probes,)
    probe_tokens: NDArray[np.int32]  # (sum of probes,) cost of each
    tokens: NDArray[np.int32]  # (b,) length of each chain
    finals: NDArray[np.int32]  # (b,) answer of each finished chain
    complete: NDArray[np.bool_]  # (b,) False where the branch is censored
    greedy_first: bool = False  # the first branch was generated at temperature 0, the others were sampled
    confidences: NDArray[np.int16] = field(default_factory=_no_signals)  # (sum of intervals,)
    lowests: NDArray[np.int16] = field(default_factory=_no_signals)  # (sum of intervals,)
    probe_confidences: NDArray[np.int16] = field(default_factory=_no_signals)  # (sum of probes,)
    has_probes: bool = True  # otherwise branches are whole replies, whose probes stand for intervals only

    def are_right(self, answers: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Return which of some answers are right. None is where no branch ever gave the reference answer."""
        right: NDArray[np.bool_] = (answers == self.reference) & (answers != NO_ANSWER)
        return right

    @cached_property
    def rows(self) -> list[BranchRow]:
        """The branches as plain ints."""
        none = len(self.answers)
        probes, finals = (np.where(numbers == NO_ANSWER, none, numbers) for numbers in (self.probes, self.finals))
        spans = [slice(*cut) for cut in itertools.pairwise(self.starts.tolist())]
        columns = zip(spans, self.tokens.tolist(), finals.tolist(), self.complete.tolist(), strict=True)
        rows = [
            BranchRow(probes[span][::-1].tolist(), self.probe_tokens[span][::-1].tolist(), *column)
            for span, *column in columns
        ]
        if not self.signals:
            return rows
        intervals = [slice(span.start + index, span.stop + index + 1) for index, span in enumerate(spans)]
        return [
            row._replace(
                confidences=self.confidences[interval].tolist(),
                lowests=self.lowests[interval].tolist(),
                probe_confidences=self.probe_confidences[span].tolist(),
            )
            for row, span, interval in zip(rows, spans, intervals, strict=True)
        ]

    @cached_property
    def signals(self) -> frozenset[Signal]:
        """The signals that are known of any of its branches."""
        known = {Signal.INTERVALS: self.confidences, Signal.PROBES: self.probe_confidences}
        return frozenset(signal for signal, values in known.items() if values.size)

    @property
    def has_signals(self) -> bool:
        """Whether any signals were recorded."""
        return bool(self.signals)

    @cached_property
    def signalled_steps(self) -> dict[tuple[int, int], list[Advanced | None]]:
        """Facts of whole intervals with signals, by branch and the id it is opened as. Replay fills it in."""
        return {}

    @cached_property
    def has_probe_costs(self) -> bool:
        """Whether any probe cost tokens."""
        return bool(self.probe_tokens.any())

    @property
    def branches(self) -> int:
        """Number of recorded branches."""
        return len(self.tokens)


def intern_answers(recorded: RecordedQuestion, label: Callable[[str], Hashable | None] = str) -> Recording:
    """Return the recording that replay runs, with answers as numbers.

    Answers with equal `label`s are the same; an answer whose label is None counts as none. If an answer or the
    reference is redacted, all are compared by their hashes: as strings if `label` is `str`, else as `RedactedLabels`
    numbers them, so that an answer with a unit may equal one without.
    """
    branches = recorded.branches if recorded.has_probes else [_in_intervals(b, recorded) for b in recorded.branches]
    texts = (*(text for branch in branches for text in (*branch.probes, branch.final)), recorded.reference)
    known = [answer for answer in texts if answer is not None]
    redacted = RedactedLabels(known) if any(map(is_redacted, known)) else None
    numbers: dict[Hashable, int] = {}
    answers: list[str] = []  # each as it was first written

    def key_of(answer: str | None) -> Hashable | None:
        if answer is None or (key := answer if is_redacted(answer) else label(answer)) is None:
            return None
        if redacted is None:
            return key
        return redacted.hash_of(answer) if label is str else redacted.label_of(answer)

    def number(answer: str | None) -> int:
        key = key_of(answer)
        if answer is None or key is None:
            return NO_ANSWER
        if key not in numbers:
            numbers[key] = len(answers)
            answers.append(answer)
        return numbers[key]

    starts = np.cumsum([0, *(len(branch.probes) for branch in branches)])
    probes = [number(answer) for branch in branches for answer in branch.probes]
    costs = [cost for branch in branches for cost in branch.probe_tokens or [0] * len(branch.probes)]
    finals = [number(branch.final) for branch in branches]
    reference = key_of(recorded.reference)
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
        greedy_first=recorded.greedy_first,
        confidences=_signal_array([(b.confidences, len(b.probes) + 1) for b in branches]),
        lowests=_signal_array([(b.lowests, len(b.probes) + 1) for b in branches]),
        probe_confidences=_signal_array([(b.probe_confidences, len(b.probes)) for b in branches]),
        has_probes=recorded.has_probes,
    )


def _in_intervals(reply: RecordedBranch, recorded: RecordedQuestion) -> RecordedBranch:
    """Return a whole reply with an empty probe after each interval but the last, by which replay counts intervals."""
    return reply._replace(probes=[None] * max(0, -(-reply.tokens // recorded.interval) - reply.complete))


def _signal_array(branches: Sequence[tuple[Sequence[int | None], int]]) -> NDArray[np.int16]:
    """Return the values of all branches, cut or filled up to the given lengths; none if all are unknown."""
    if not any(value is not None for values, length in branches for value in values[:length]):
        return _no_signals()
    numbers: list[int] = []
    for values, length in branches:
        known = [UNKNOWN if value is None else value for value in values[:length]]
        numbers += known + [UNKNOWN] * (length - len(known))
    return _frozen(numbers, np.int16)


def _frozen(values: Any, dtype: Any = np.int32) -> NDArray[Any]:
    array = np.asarray(values, dtype=dtype)
    array.setflags(write=False)
    return array
