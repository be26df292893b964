"""Readers of recordings in others' formats. A malformed file is refused whole, naming the record and the reason."""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from discovery.errors import BadRecording, NotRecorded
from discovery.recordings import (
    Cell,
    LabelSource,
    Origin,
    RecordedBranch,
    RecordedQuestion,
    Split,
    question_id,
    split_of,
)

RELEASE_SEARCH = "aime24"
"""The release's search split; its other benchmarks are held out."""


def release_files(path: Path) -> list[Path]:
    """The files of the release at `path`: one of them, a model's folder, or the folder of all. Raises NotRecorded."""
    found = [path] if path.is_file() else [*path.glob("*.json*"), *path.glob("*/*.json*")]
    files = sorted(file for file in found if file.name.removesuffix(".xz").endswith(".json"))
    if not files:
        raise NotRecorded(f"{path}: no MODEL/BENCHMARK.json or .json.xz of the AutoTTS release there")
    return files


def release_cell(path: Path) -> Cell:
    """What a file of the release says by where it lies. Its search split is one benchmark, the others are held out."""
    benchmark = path.name.split(".")[0]
    split = Split.SEARCH if benchmark == RELEASE_SEARCH else Split.HELD_OUT
    return Cell(path.resolve().parent.name, benchmark, split)


def read_release(path: Path) -> list[RecordedQuestion]:
    """The recordings of one file of the AutoTTS release, `MODEL/BENCHMARK.json` or `.json.xz`.

    Raises BadRecording, naming the file, the question's number and the reason; then nothing of the file is taken.
    """
    try:
        questions = json.loads(_text(path), parse_constant=_refuse)
    except ValueError as error:
        raise BadRecording(f"{path}: {error}") from None
    if not isinstance(questions, list):
        raise BadRecording(f"{path}: not a list of questions")
    found = [_question(path, number, question) for number, question in enumerate(questions)]
    _check_unique([(f"{path}: question {number}", one) for number, one in enumerate(found)])
    return found


def _text(path: Path) -> str:
    """The text of a file, plain or .xz. Raises BadRecording."""
    try:
        return (lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()).decode()
    except (OSError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise BadRecording(f"{path}: {error}") from None


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no number")


def _check_unique(found: Sequence[tuple[str, RecordedQuestion]]) -> None:
    """Raise BadRecording if a question stands twice among recordings of one kind."""
    seen: dict[object, str] = {}
    for where, one in found:
        sampling = json.dumps(dict(one.sampling), sort_keys=True)
        kind = (one.question, one.model, one.benchmark, one.interval, one.probe_template, sampling)
        if kind in seen:
            raise BadRecording(f"{where}: the same question as {seen[kind]}")
        seen[kind] = where


def _question(path: Path, number: int, question: object) -> RecordedQuestion:
    try:
        if not isinstance(question, Mapping):
            raise TypeError("not an object")
        for key in ("question", "gold_answer"):
            if not isinstance(question[key], str):
                raise TypeError(f"{key} is {question[key]!r}, not a text")
        branches = list(_branches(question["each_branch"]))
        interval = question["probe_freq"]
        if type(interval) is not int or interval < 1:
            raise ValueError(f"probe_freq is {interval!r}, not a number of tokens")
        text, cell = question["question"], release_cell(path)
        return RecordedQuestion(
            question=question_id(text),
            model=cell.model,
            benchmark=cell.benchmark,
            interval=interval,
            branches=branches,
            reference=question["gold_answer"],
            split=cell.split,
            text=text,
        )
    except KeyError as error:
        raise BadRecording(f"{path}: question {number} has no {error}") from None
    except (TypeError, ValueError) as error:
        raise BadRecording(f"{path}: question {number}: {error}") from None


def _branches(branches: Sequence[Any]) -> Iterator[RecordedBranch]:
    if not isinstance(branches, list) or not branches:
        raise ValueError("no branches")
    for index, branch in enumerate(branches):
        if not isinstance(branch, list) or len(branch) != 3:
            raise ValueError(f"branch {index}: not three things: probe answers, tokens, final answer")
        probes, tokens, final = branch
        if not isinstance(probes, list) or not all(isinstance(answer, str) for answer in [*probes, final]):
            raise ValueError(f"branch {index}: answers must be strings")
        if type(tokens) is not int or not 0 <= tokens <= MOST_TOKENS:
            raise ValueError(f"branch {index}: {tokens!r} is no number of tokens")
        yield RecordedBranch(probes, tokens, final)


MOST_TOKENS = 2**31 - 1
"""Of a branch: what an array of 32-bit numbers holds."""


class BranchLine(BaseModel):
    """One branch in a line of the generic format."""

    model_config = ConfigDict(strict=True, extra="forbid")

    probes: list[str | None] = Field(description="answers after each whole interval, null where none was readable")
    tokens: int = Field(ge=0, le=MOST_TOKENS, description="length of the chain, as far as it is known")
    final: str | None = Field(None, description="what the finished chain answers")
    probe_tokens: list[Annotated[int, Field(ge=0, le=MOST_TOKENS)]] = Field(
        default_factory=list, description="cost of each probe; none means nothing"
    )
    complete: bool = Field(True, description="it ran to its end")

    @model_validator(mode="after")
    def _costs_fit(self) -> BranchLine:
        if self.probe_tokens and len(self.probe_tokens) != len(self.probes):
            raise ValueError(f"{len(self.probe_tokens)} probe_tokens for {len(self.probes)} probes")
        return self


class Line(BaseModel):
    """One line of the generic format: all branches of one question under one model."""

    model_config = ConfigDict(strict=True, extra="forbid")

    question: str | None = Field(None, description="the question's text")
    id: str | None = Field(None, pattern="^[0-9a-f]{64}$", description="its SHA-256, where the text is not to be kept")
    model: str = Field(min_length=1)
    benchmark: str = Field(min_length=1, description="what the question belongs to")
    interval: int = Field(ge=1, le=MOST_TOKENS, description="tokens between probes")
    branches: list[BranchLine] = Field(min_length=1)
    reference: str | None = Field(None, description="the reference answer")
    label_source: Literal["reference", "feedback", "consensus"] = "reference"
    split: Literal["search", "validation", "held-out"] | None = Field(
        None, description="by the question's hash if none"
    )
    sampling: dict[str, Any] = Field(default_factory=dict, description="temperature, top_p, …, as sent")
    probe_template: str = Field("", description="name and version of what probes append")
    origin: Literal["imported", "collected", "live"] = "imported"

    @model_validator(mode="after")
    def _is_known(self) -> Line:
        if self.question is None and self.id is None:
            raise ValueError("question or id is needed")
        if self.question is not None and self.id is not None and self.id != question_id(self.question):
            raise ValueError("id is not the SHA-256 of question")
        return self

    def recorded(self) -> RecordedQuestion:
        """What the line says."""
        identity = self.id if self.id is not None else question_id(self.question or "")
        return RecordedQuestion(
            question=identity,
            model=self.model,
            benchmark=self.benchmark,
            interval=self.interval,
            branches=[RecordedBranch(**branch.model_dump()) for branch in self.branches],
            reference=self.reference,
            label_source=LabelSource(self.label_source),
            split=Split(self.split) if self.split else split_of(identity),
            text=self.question,
            sampling=self.sampling,
            probe_template=self.probe_template,
            origin=Origin(self.origin),
        )


def read_jsonl(path: Path) -> list[RecordedQuestion]:
    """The recordings of a file in the generic format, a `Line` a line, plain or .xz.

    Raises BadRecording, naming the file, the line and the reason; then nothing of the file is taken.
    """
    found: list[tuple[str, RecordedQuestion]] = []
    for number, text in enumerate(_text(path).split("\n"), start=1):
        if not text.strip():
            continue
        try:
            found.append((f"{path}:{number}", Line.model_validate_json(text).recorded()))
        except ValidationError as error:
            raise BadRecording(f"{path}:{number}: {_first(error)}") from None
    if not found:
        raise BadRecording(f"{path}: no recordings in it")
    _check_unique(found)
    return [recorded for _, recorded in found]


def _first(error: ValidationError) -> str:
    """The first thing wrong, in a line."""
    problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = ".".join(map(str, problem["loc"]))
    return f"{place}: {problem['msg']}" if place else problem["msg"]


def as_line(recorded: RecordedQuestion) -> str:
    """A recording as a line of the generic format, its end included."""
    line = Line.model_construct(
        question=recorded.text,
        id=recorded.question,
        model=recorded.model,
        benchmark=recorded.benchmark,
        interval=recorded.interval,
        branches=[BranchLine.model_construct(**branch._asdict()) for branch in recorded.branches],
        reference=recorded.reference,
        label_source=recorded.label_source.value,
        split=recorded.split.value,
        sampling=dict(recorded.sampling),
        probe_template=recorded.probe_template,
        origin=recorded.origin.value,
    )
    return line.model_dump_json(exclude_defaults=True) + "\n"
