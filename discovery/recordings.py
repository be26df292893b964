"""Recorded branches of one question, dense and immutable, and the readers that make them.

Answers are interned: a recording keeps each distinct answer once and refers to it by number.
"""

from __future__ import annotations

import itertools
import json
import lzma
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from discovery.errors import BadRecording

NO_ANSWER = -1


class RecordedBranch(NamedTuple):
    """One branch as it was recorded, answers as text."""

    probes: Sequence[str | None]  # what it said after each whole interval; None if nothing readable
    tokens: int  # the whole chain's length
    final: str | None  # what the finished chain says
    probe_tokens: Sequence[int] = ()  # what each probe cost; none means nothing


class RecordedRow(NamedTuple):
    """One branch of a recording in plain ints, which a replay reads faster than arrays."""

    probes: Sequence[int]
    probe_tokens: Sequence[int]
    tokens: int
    final: int


@dataclass(frozen=True)
class Recording:
    """Every recorded branch of one question under one model.

    Shapes: `branches` b branches, `probes` one flat array of all branches' probe answers, branch i's from
    `starts[i]` to `starts[i + 1]`. All arrays are read-only.
    """

    question: str  # hash of the question's text
    interval: int  # tokens between probes, Δ
    answers: tuple[str, ...]  # the distinct answers; the arrays hold their numbers, NO_ANSWER for none
    reference: int  # number of the reference answer; NO_ANSWER if no branch ever gave it
    starts: NDArray[np.int32]  # (b + 1,)
    probes: NDArray[np.int32]  # (sum of probes,)
    probe_tokens: NDArray[np.int32]  # (sum of probes,) what each cost
    tokens: NDArray[np.int32]  # (b,) length of each chain
    finals: NDArray[np.int32]  # (b,) what each finished chain says

    @cached_property
    def rows(self) -> list[RecordedRow]:
        """The branches in plain ints."""
        cuts = self.starts.tolist()
        spans = [slice(*cut) for cut in itertools.pairwise(cuts)]
        probes, costs = self.probes.tolist(), self.probe_tokens.tolist()
        columns = zip(spans, self.tokens.tolist(), self.finals.tolist(), strict=True)
        return [RecordedRow(probes[span], costs[span], tokens, final) for span, tokens, final in columns]

    @cached_property
    def priced(self) -> bool:
        """Whether its probes cost anything."""
        return bool(self.probe_tokens.any())

    @property
    def branches(self) -> int:
        """How many branches were recorded."""
        return len(self.tokens)


def make(question: str, reference: str, interval: int, branches: Sequence[RecordedBranch]) -> Recording:
    """A recording from branches as they were recorded; answers are the same if their texts are."""
    numbers: dict[str, int] = {}

    def number(answer: str | None) -> int:
        return NO_ANSWER if answer is None else numbers.setdefault(answer, len(numbers))

    starts = np.cumsum([0, *(len(branch.probes) for branch in branches)])
    probes = [number(answer) for branch in branches for answer in branch.probes]
    costs = [cost for branch in branches for cost in branch.probe_tokens or [0] * len(branch.probes)]
    finals = [number(branch.final) for branch in branches]
    return Recording(
        question=sha256(question.encode()).hexdigest(),
        interval=interval,
        answers=tuple(numbers),
        reference=numbers.get(reference, NO_ANSWER),
        starts=_frozen(starts),
        probes=_frozen(probes),
        probe_tokens=_frozen(costs),
        tokens=_frozen([branch.tokens for branch in branches]),
        finals=_frozen(finals),
    )


def _frozen(values: Any) -> NDArray[np.int32]:
    array = np.asarray(values, dtype=np.int32)
    array.setflags(write=False)
    return array


def read_release(path: Path) -> list[Recording]:
    """The recordings of one file of the AutoTTS release, `BENCHMARK.json` or `.json.xz`.

    Raises BadRecording, naming the file, the question's number and the reason; then nothing of the file is taken.
    """
    try:
        with lzma.open(path, "rt") if path.suffix == ".xz" else path.open() as file:
            questions = json.load(file)
    except (OSError, EOFError, lzma.LZMAError, ValueError) as error:
        raise BadRecording(f"{path}: {error}") from None
    if not isinstance(questions, list):
        raise BadRecording(f"{path}: not a list of questions")
    return [_question(path, number, question) for number, question in enumerate(questions)]


def _question(path: Path, number: int, question: object) -> Recording:
    try:
        if not isinstance(question, Mapping):
            raise TypeError("not an object")
        branches = list(_branches(question["each_branch"]))
        interval = question["probe_freq"]
        if type(interval) is not int or interval < 1:
            raise ValueError(f"probe_freq is {interval!r}, not a number of tokens")
        return make(str(question["question"]), str(question["gold_answer"]), interval, branches)
    except KeyError as error:
        raise BadRecording(f"{path}: question {number} has no {error}") from None
    except (TypeError, ValueError) as error:
        raise BadRecording(f"{path}: question {number}: {error}") from None


def _branches(branches: Sequence[Any]) -> Iterator[RecordedBranch]:
    if not branches:
        raise ValueError("no branches")
    for index, branch in enumerate(branches):
        probes, tokens, final = branch
        if not isinstance(probes, list) or not all(isinstance(answer, str) for answer in [*probes, final]):
            raise ValueError(f"branch {index}: answers must be strings")
        if type(tokens) is not int or tokens < 0:
            raise ValueError(f"branch {index}: {tokens!r} is no number of tokens")
        yield RecordedBranch(probes, tokens, final)
