"""Read and write recordings in file formats: the AutoTTS release and the generic JSON lines.

A malformed file is refused as a whole; the error names the record and the reason.
"""

from __future__ import annotations

import codecs
import json
import lzma
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from controllers.signals import MAX_CONFIDENCE
from discovery.data.recordings import (
    MAX_BRANCH_TOKENS,
    REPLY,
    Cell,
    LabelSource,
    Origin,
    RecordedBranch,
    RecordedQuestion,
    Split,
    check_signals,
    default_split,
    question_id,
)
from discovery.data.safe_json import parse_json
from discovery.errors import BadRecording, RecordingsNotFound, unknown_field

LONGEST_VALUE: Final = 60
"""Characters of a wrong value that are quoted in an error."""

RELEASE_SEARCH = "aime24"
"""The benchmark of the release that is its search split; the other benchmarks are held out."""


def release_files(path: Path) -> list[Path]:
    """Return the release files at `path`: one file, a model's folder or the folder of all models.

    Raises RecordingsNotFound.
    """
    candidates = [path] if path.is_file() else [*path.glob("*.json*"), *path.glob("*/*.json*")]
    files = sorted(file for file in candidates if file.name.removesuffix(".xz").endswith(".json"))
    if not files:
        raise RecordingsNotFound(f"{path}: has no MODEL/BENCHMARK.json or .json.xz files of the AutoTTS release")
    return files


def release_cell(path: Path) -> Cell:
    """Return the cell of a release file by its path. One benchmark is the search split; the others are held out."""
    benchmark = path.name.split(".")[0]
    split = Split.SEARCH if benchmark == RELEASE_SEARCH else Split.HELD_OUT
    return Cell(path.resolve().parent.name, benchmark, split)


def read_release(path: Path) -> list[RecordedQuestion]:
    """Read one file of the AutoTTS release, `MODEL/BENCHMARK.json` or `.json.xz`.

    Raises BadRecording, naming the file, the question's number and the reason; then nothing of the file is used.
    """
    try:
        questions = parse_json(_content(path).decode(), finite=True)
    except ValueError as error:
        raise BadRecording(f"{path}: {error}") from None
    if not isinstance(questions, list):
        raise BadRecording(f"{path}: not a list of questions")
    recordings = [_question(path, number, question) for number, question in enumerate(questions)]
    _check_unique([(f"{path}: question {number}", recorded) for number, recorded in enumerate(recordings)])
    return recordings


def _content(path: Path) -> bytes:
    """Return the content of a file, plain or .xz, without a byte order mark. Raises BadRecording."""
    try:
        content = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        return content.removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise BadRecording(f"{path}: {error.strerror}") from None
    except lzma.LZMAError as error:
        raise BadRecording(f"{path}: {error}") from None


def _check_unique(recordings: Sequence[tuple[str, RecordedQuestion]]) -> None:
    """Raise BadRecording if two recordings with the same key hold the same question."""
    seen: dict[object, str] = {}
    for where, recorded in recordings:
        kind = _merge_key(recorded)
        if kind in seen:
            raise BadRecording(f"{where}: the same question as {seen[kind]}")
        seen[kind] = where


def _merge_key(recorded: RecordedQuestion) -> object:
    """Return a value that two recordings share only if they are of the same branches."""
    return recorded.question, recorded.benchmark, recorded.request, recorded.version


def _question(path: Path, number: int, question: object) -> RecordedQuestion:
    try:
        if not isinstance(question, Mapping):
            raise TypeError("not an object")
        for key in ("question", "gold_answer"):
            if not isinstance(question[key], str):
                raise TypeError(f"{key} is {question[key]!r}, not a string")
        branches = list(_branches(question["each_branch"]))
        interval = question["probe_freq"]
        if type(interval) is not int or interval < 1:
            raise ValueError(f"probe_freq is {interval!r}, not a positive number of tokens")
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
            raise ValueError(f"branch {index}: not a list of three: probe answers, tokens, final answer")
        probes, tokens, final = branch
        if not isinstance(probes, list) or not all(isinstance(answer, str) for answer in [*probes, final]):
            raise ValueError(f"branch {index}: answers must be strings")
        if type(tokens) is not int or not 0 <= tokens <= MAX_BRANCH_TOKENS:
            raise ValueError(f"branch {index}: tokens is {tokens!r}, not an integer from 0 to {MAX_BRANCH_TOKENS}")
        yield RecordedBranch(probes, tokens, final)


Signals = list[Annotated[int, Field(ge=0, le=MAX_CONFIDENCE)] | None]
"""Signals of one branch, in per mille; null where unknown."""


class BranchLine(BaseModel):
    """One branch in a line of the generic format."""

    model_config = ConfigDict(strict=True, extra="forbid")

    probes: list[str | None] = Field(description="answer after each whole interval; null if it was unreadable")
    tokens: int = Field(ge=0, le=MAX_BRANCH_TOKENS, description="length of the chain, as far as known")
    final: str | None = Field(None, description="the finished chain's answer")
    probe_tokens: list[Annotated[int, Field(ge=0, le=MAX_BRANCH_TOKENS)]] = Field(
        default_factory=list, description="cost of each probe; empty means they cost nothing"
    )
    complete: bool = Field(True, description="whether it ran to its end")
    confidences: Signals = Field(
        default_factory=list, description="of each interval, also the one after the last probe, in per mille"
    )
    lowests: Signals = Field(default_factory=list, description="of the least confident window of each interval")
    probe_confidences: Signals = Field(default_factory=list, description="of each probe's answer, in per mille")

    @model_validator(mode="after")
    def _lists_fit(self) -> BranchLine:
        if self.probe_tokens and len(self.probe_tokens) != len(self.probes):
            raise ValueError(f"{len(self.probe_tokens)} probe_tokens for {len(self.probes)} probes")
        check_signals(self.recorded())
        return self

    def recorded(self) -> RecordedBranch:
        """Return the branch that it holds."""
        signals = (self.confidences or (), self.lowests or (), self.probe_confidences or ())
        return RecordedBranch(self.probes, self.tokens, self.final, self.probe_tokens, self.complete, *signals)


class RecordingLine(BaseModel):
    """One line of the generic format: all branches of one question with one model, or one of them."""

    model_config = ConfigDict(strict=True, extra="forbid")

    question: str | None = Field(None, description="the question's text")
    id: str | None = Field(
        None, pattern="^[0-9a-f]{64}$", description="the question's SHA-256, if its text is not kept"
    )
    model: str = Field(min_length=1)
    benchmark: str = Field(min_length=1, description="what the question belongs to")
    interval: int = Field(ge=1, le=MAX_BRANCH_TOKENS, description="tokens between probes")
    branches: list[BranchLine] = Field(min_length=1)
    reference: str | None = Field(None, description="the reference answer")
    label_source: Literal["reference", "feedback", "consensus"] = "reference"
    split: Literal["search", "validation", "held-out"] | None = Field(
        None, description="default: by the question's hash"
    )
    sampling: dict[str, Any] = Field(default_factory=dict, description="temperature, top_p, …, as sent")
    probe_template: str = Field("", description="name and version of what probes append")
    origin: Literal["imported", "collected", "live"] = "imported"
    chat_template: str = Field("", description="hash of a conversation rendered by the model's chat template")
    request: str = Field("", description="id of the request it was made for")
    confidence: float = Field(1.0, ge=0, le=1, description="in the reference answer")
    judged_wrong: bool = Field(
        False, description="whether clients judged an answer wrong and at most votes know the right one"
    )
    part: int | None = Field(None, ge=0, description="number of the only branch that the line holds")

    @field_validator("sampling")
    @classmethod
    def _has_numbers(cls, sampling: dict[str, Any]) -> dict[str, Any]:
        json.dumps(sampling, allow_nan=False)  # raises ValueError
        return sampling

    @model_validator(mode="after")
    def _is_known(self) -> RecordingLine:
        if self.question is None and self.id is None:
            raise ValueError("question or id is needed")
        if self.question is not None and self.id is not None and self.id != question_id(self.question):
            raise ValueError("id is not the SHA-256 of question")
        if self.sampling.get("branch") == REPLY and any(branch.probes for branch in self.branches):
            raise ValueError("branches are whole replies (sampling.branch), which have no probes; leave probes empty")
        if self.judged_wrong and self.reference is not None and self.label_source != "consensus":
            raise ValueError("judged_wrong means that the right answer is unknown; leave it or reference out")
        if self.part is not None and len(self.branches) != 1:
            raise ValueError(f"{len(self.branches)} branches in a line that is part {self.part}")
        return self

    def recorded(self) -> RecordedQuestion:
        """Return the recording that the line holds."""
        identity = self.id if self.id is not None else question_id(self.question or "")
        return RecordedQuestion(
            question=identity,
            model=self.model,
            benchmark=self.benchmark,
            interval=self.interval,
            branches=[branch.recorded() for branch in self.branches],
            reference=self.reference,
            label_source=LabelSource(self.label_source),
            split=Split(self.split) if self.split else default_split(identity),
            text=self.question,
            sampling=self.sampling,
            probe_template=self.probe_template,
            origin=Origin(self.origin),
            chat_template=self.chat_template,
            request=self.request,
            confidence=self.confidence,
            judged_wrong=self.judged_wrong,
        )


def read_jsonl(path: Path) -> list[RecordedQuestion]:
    """Read recordings in the generic format, one `RecordingLine` a line, plain or .xz.

    Lines that are parts of one recording are joined, with branches in order of part, at the position of the first. If a
    part occurs twice, the first counts. Parts that disagree about their question are refused. In a file with parts, an
    incomplete last line is ignored, because its writer was killed.

    Raises BadRecording, naming the file, the line and the reason; then nothing of the file is used.
    """
    lines: list[tuple[str, RecordingLine]] = []
    texts = _content(path).split(b"\n")
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            continue
        try:
            lines.append((f"{path}:{number}", parse_recording_line(text)))
        except BadRecording as error:
            if number == len(texts) and any(line.part is not None for _, line in lines):
                break
            raise BadRecording(f"{path}:{number}: {error}") from None
    if not lines:
        raise BadRecording(f"{path}: the file holds no recordings")
    recordings = _join_parts(lines)
    _check_unique(recordings)
    return [recorded for _, recorded in recordings]


def parse_recording_line(text: bytes) -> RecordingLine:
    """Parse a line of the generic format. Raises BadRecording with the first problem."""
    try:
        return RecordingLine.model_validate_json(text)
    except ValidationError as error:
        raise BadRecording(_first_problem(error)) from None


def holds_recordings(path: Path) -> bool:
    """Return whether the first line of a file is one of the generic format. Raises OSError."""
    with path.open("rb") as file:
        try:
            parse_recording_line(file.readline())
        except BadRecording:
            return False
    return True


def _join_parts(lines: Sequence[tuple[str, RecordingLine]]) -> list[tuple[str, RecordedQuestion]]:
    """Return the recordings of `lines`, each with the place of its first line. Raises BadRecording if they disagree."""
    by_key: dict[object, tuple[str, RecordedQuestion]] = {}
    parts: dict[object, dict[int, RecordedBranch]] = {}
    for where, line in lines:
        recorded = line.recorded()
        kind = where if line.part is None else _merge_key(recorded)
        place, first = by_key.setdefault(kind, (where, recorded))
        for name in ("reference", "label_source", "confidence", "split"):
            known, value = getattr(first, name), getattr(recorded, name)
            if known != value:
                raise BadRecording(f"{where}: its {name} is {value}, but {known} in {place}; correct one of them")
        if line.part is not None:
            parts.setdefault(kind, {}).setdefault(line.part, recorded.branches[0])
    for kind, known in parts.items():
        where, recorded = by_key[kind]
        by_key[kind] = where, replace(recorded, branches=[known[part] for part in sorted(known)])
    return list(by_key.values())


def _first_problem(error: ValidationError) -> str:
    """Return the first problem of a validation error as one line."""
    problem = error.errors(include_url=False, include_context=False)[0]
    place, value = ".".join(map(str, problem["loc"])), problem["input"]
    message = problem["msg"].removeprefix("Value error, ")
    if problem["loc"] and isinstance(value, int | float | str) and len(repr(value)) <= LONGEST_VALUE:
        message += f", not {json.dumps(value)}"
        if problem["type"] == "string_type":
            message += f'; write "{json.dumps(value)}"'
    if problem["type"] == "extra_forbidden":
        owner = BranchLine if problem["loc"][0] == "branches" and len(problem["loc"]) > 1 else RecordingLine
        message = unknown_field(str(problem["loc"][-1]), owner.model_fields)
    return f"{place}: {message}" if place else message


def format_recording_line(recorded: RecordedQuestion, part: int | None = None) -> str:
    """Return a recording as a line of the generic format, with its line end.

    `part` is the number of its only branch, if it has only one of the question's branches.
    """
    line = RecordingLine.model_construct(
        question=recorded.text,
        id=recorded.question,
        model=recorded.model,
        benchmark=recorded.benchmark,
        interval=recorded.interval,
        branches=[_branch_line(branch) for branch in recorded.branches],
        reference=recorded.reference,
        label_source=recorded.label_source.value,
        split=recorded.split.value,
        sampling=dict(recorded.sampling),
        probe_template=recorded.probe_template,
        origin=recorded.origin.value,
        chat_template=recorded.chat_template,
        request=recorded.request,
        confidence=recorded.confidence,
        judged_wrong=recorded.judged_wrong,
        part=part,
    )
    return line.model_dump_json(exclude_defaults=True) + "\n"


def _branch_line(branch: RecordedBranch) -> BranchLine:
    lists: dict[str, Any] = {
        name: list(getattr(branch, name))
        for name in ("probes", "probe_tokens", "confidences", "lowests", "probe_confidences")
    }
    return BranchLine.model_construct(**branch._asdict() | lists)
