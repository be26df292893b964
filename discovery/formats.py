"""Readers of recordings in others' formats. A malformed file is refused whole, naming the record and the reason."""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from discovery.errors import BadRecording, NotRecorded
from discovery.recordings import Cell, RecordedBranch, RecordedQuestion, Split, question_id

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
        with lzma.open(path, "rt") if path.suffix == ".xz" else path.open() as file:
            questions = json.load(file)
    except (OSError, EOFError, lzma.LZMAError, ValueError) as error:
        raise BadRecording(f"{path}: {error}") from None
    if not isinstance(questions, list):
        raise BadRecording(f"{path}: not a list of questions")
    return [_question(path, number, question) for number, question in enumerate(questions)]


def _question(path: Path, number: int, question: object) -> RecordedQuestion:
    try:
        if not isinstance(question, Mapping):
            raise TypeError("not an object")
        branches = list(_branches(question["each_branch"]))
        interval = question["probe_freq"]
        if type(interval) is not int or interval < 1:
            raise ValueError(f"probe_freq is {interval!r}, not a number of tokens")
        text, cell = str(question["question"]), release_cell(path)
        return RecordedQuestion(
            question=question_id(text),
            model=cell.model,
            benchmark=cell.benchmark,
            interval=interval,
            branches=branches,
            reference=str(question["gold_answer"]),
            split=cell.split,
            text=text,
        )
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
