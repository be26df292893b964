"""Readers of recordings in others' formats. A malformed file is refused whole, naming the record and the reason."""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from discovery.data.recordings import (
    MAX_BRANCH_TOKENS,
    Cell,
    LabelSource,
    Origin,
    RecordedBranch,
    RecordedQuestion,
    Split,
    default_split,
    question_id,
)
from discovery.data.safe_json import parse_json
from discovery.errors import BadRecording, RecordingsNotFound, unknown_field

RELEASE_SEARCH = "aime24"
"""The release's search split; its other benchmarks are held out."""


def release_files(path: Path) -> list[Path]:
    """Return the release files at `path`: one file, a model's folder or the folder of all models.

    Raises RecordingsNotFound.
    """
    found = [path] if path.is_file() else [*path.glob("*.json*"), *path.glob("*/*.json*")]
    files = sorted(file for file in found if file.name.removesuffix(".xz").endswith(".json"))
    if not files:
        raise RecordingsNotFound(f"{path}: no MODEL/BENCHMARK.json or .json.xz of the AutoTTS release there")
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
        questions = parse_json(_content(path).decode(), finite=True)
    except ValueError as error:
        raise BadRecording(f"{path}: {error}") from None
    if not isinstance(questions, list):
        raise BadRecording(f"{path}: not a list of questions")
    found = [_question(path, number, question) for number, question in enumerate(questions)]
    _check_unique([(f"{path}: question {number}", one) for number, one in enumerate(found)])
    return found


def _content(path: Path) -> bytes:
    """What is in a file, plain or .xz. Raises BadRecording."""
    try:
        return lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    except (OSError, lzma.LZMAError) as error:
        raise BadRecording(f"{path}: {error}") from None


def _check_unique(found: Sequence[tuple[str, RecordedQuestion]]) -> None:
    """Raise BadRecording if a question stands twice among recordings of one kind."""
    seen: dict[object, str] = {}
    for where, one in found:
        kind = _kind(one)
        if kind in seen:
            raise BadRecording(f"{where}: the same question as {seen[kind]}")
        seen[kind] = where


def _kind(recorded: RecordedQuestion) -> object:
    """What is the same of two recordings only if they are of the same branches."""
    return recorded.question, recorded.benchmark, recorded.request, recorded.version


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
        if type(tokens) is not int or not 0 <= tokens <= MAX_BRANCH_TOKENS:
            raise ValueError(f"branch {index}: {tokens!r} is no number of tokens")
        yield RecordedBranch(probes, tokens, final)


class BranchLine(BaseModel):
    """One branch in a line of the generic format."""

    model_config = ConfigDict(strict=True, extra="forbid")

    probes: list[str | None] = Field(description="answers after each whole interval, null where none was readable")
    tokens: int = Field(ge=0, le=MAX_BRANCH_TOKENS, description="length of the chain, as far as it is known")
    final: str | None = Field(None, description="what the finished chain answers")
    probe_tokens: list[Annotated[int, Field(ge=0, le=MAX_BRANCH_TOKENS)]] = Field(
        default_factory=list, description="cost of each probe; none means nothing"
    )
    complete: bool = Field(True, description="it ran to its end")

    @model_validator(mode="after")
    def _costs_fit(self) -> BranchLine:
        if self.probe_tokens and len(self.probe_tokens) != len(self.probes):
            raise ValueError(f"{len(self.probe_tokens)} probe_tokens for {len(self.probes)} probes")
        return self


class RecordingLine(BaseModel):
    """One line of the generic format: the branches of one question under one model, all or one of them."""

    model_config = ConfigDict(strict=True, extra="forbid")

    question: str | None = Field(None, description="the question's text")
    id: str | None = Field(None, pattern="^[0-9a-f]{64}$", description="its SHA-256, where the text is not to be kept")
    model: str = Field(min_length=1)
    benchmark: str = Field(min_length=1, description="what the question belongs to")
    interval: int = Field(ge=1, le=MAX_BRANCH_TOKENS, description="tokens between probes")
    branches: list[BranchLine] = Field(min_length=1)
    reference: str | None = Field(None, description="the reference answer")
    label_source: Literal["reference", "feedback", "consensus"] = "reference"
    split: Literal["search", "validation", "held-out"] | None = Field(
        None, description="by the question's hash if none"
    )
    sampling: dict[str, Any] = Field(default_factory=dict, description="temperature, top_p, …, as sent")
    probe_template: str = Field("", description="name and version of what probes append")
    origin: Literal["imported", "collected", "live"] = "imported"
    chat_template: str = Field("", description="hash of what the model's chat template makes of a conversation")
    request: str = Field("", description="id of the request it was made for")
    confidence: float = Field(1.0, ge=0, le=1, description="in the reference answer")
    part: int | None = Field(None, ge=0, description="the line holds this one of the question's branches, and no other")

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
        if self.part is not None and len(self.branches) != 1:
            raise ValueError(f"{len(self.branches)} branches in a line that is part {self.part}")
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
            split=Split(self.split) if self.split else default_split(identity),
            text=self.question,
            sampling=self.sampling,
            probe_template=self.probe_template,
            origin=Origin(self.origin),
            chat_template=self.chat_template,
            request=self.request,
            confidence=self.confidence,
        )


def read_jsonl(path: Path) -> list[RecordedQuestion]:
    """The recordings of a file in the generic format, a `Line` a line, plain or .xz.

    Lines that are parts of one recording make one, where the first of them stands, its branches in order of part; of
    a part that is there twice the first counts. Parts that say different things of their question are refused. Where
    there are parts, a last line that is torn is left out: whoever wrote it was killed. Raises BadRecording, naming the
    file, the line and the reason; then nothing of it is taken.
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
        raise BadRecording(f"{path}: no recordings in it")
    found = _gathered(lines)
    _check_unique(found)
    return [recorded for _, recorded in found]


def parse_recording_line(text: bytes) -> RecordingLine:
    """What a line of the generic format says. Raises BadRecording with the first thing that is wrong."""
    try:
        return RecordingLine.model_validate_json(text)
    except ValidationError as error:
        raise BadRecording(_first(error)) from None


def _gathered(lines: Sequence[tuple[str, RecordingLine]]) -> list[tuple[str, RecordedQuestion]]:
    """The recordings of `lines`, each with where its first line stands. Raises BadRecording if parts do not agree."""
    found: dict[object, tuple[str, RecordedQuestion]] = {}
    parts: dict[object, dict[int, RecordedBranch]] = {}
    for where, line in lines:
        recorded = line.recorded()
        kind = where if line.part is None else _kind(recorded)
        place, first = found.setdefault(kind, (where, recorded))
        for name in ("reference", "label_source", "confidence", "split"):
            known, said = getattr(first, name), getattr(recorded, name)
            if known != said:
                raise BadRecording(f"{where}: its {name} is {said}, and {known} in {place}; correct one of them")
        if line.part is not None:
            parts.setdefault(kind, {}).setdefault(line.part, recorded.branches[0])
    for kind, known in parts.items():
        where, recorded = found[kind]
        found[kind] = where, replace(recorded, branches=[known[part] for part in sorted(known)])
    return list(found.values())


def _first(error: ValidationError) -> str:
    """The first thing wrong, in a line."""
    problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = ".".join(map(str, problem["loc"]))
    words = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        owner = BranchLine if problem["loc"][0] == "branches" and len(problem["loc"]) > 1 else RecordingLine
        words = unknown_field(str(problem["loc"][-1]), owner.model_fields)
    return f"{place}: {words}" if place else words


def format_recording_line(recorded: RecordedQuestion, part: int | None = None) -> str:
    """A recording as a line of the generic format, its end included; its one branch is `part`, if that is given."""
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
        part=part,
    )
    return line.model_dump_json(exclude_defaults=True) + "\n"


def _branch_line(branch: RecordedBranch) -> BranchLine:
    lists = {"probes": list(branch.probes), "probe_tokens": list(branch.probe_tokens)}
    return BranchLine.model_construct(**branch._asdict() | lists)
