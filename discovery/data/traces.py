"""Traces: every round of every episode with its actions and facts, in NumPy columns. A file holds one job's episodes.

Each distinct fact is stored once and has a number. An episode is a sequence of these numbers. A round that begins like
an earlier round refers to it instead of repeating it. A fact determines its action, except for the requested intervals
of a branch that finished before them. These intervals, and actions without facts, have their own columns.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from controllers import Action, Advanced, Fact, Limits, Probed, Round, State, Verb, advance, branch, probe
from controllers.loading import Spec
from controllers.signals import unpack_signals
from controllers.voting import mean_confidences
from discovery.data.atomic_files import atomic_write
from discovery.data.recordings import Cell, Recording
from discovery.data.safe_json import parse_json
from discovery.errors import TraceError

FORMAT = 1
ADVANCED: Final = 0
PROBED: Final = 1
"""Kinds of facts."""
NONE: Final = -1
"""Stands for a missing label."""
LONGEST_PART: Final = 240
"""Maximum bytes of a folder's name before a hash is added; file systems allow 255."""
_UNFIT = re.compile(r"[\0-\x1f\x7f\ud800-\udfff]")
"""Characters that no folder is named with: control characters and half characters."""


def _folder_of(name: str) -> Path:
    """Return the relative folder for a name: `org/model` is two folders, and the root and `..` are left out.

    Ends in a hash of the name if the folder says less than it, as for `/models/Qwen3-8B`.
    """
    named = [_UNFIT.sub("_", part) for part in name.split("/") if part not in ("", ".", "..")]
    parts = [part.encode()[:LONGEST_PART].decode(errors="ignore") for part in named]
    if not parts or "/".join(parts) != name:
        digest = sha256(name.encode(errors="surrogatepass")).hexdigest()[:8]
        parts[-1:] = ["-".join([*parts[-1:], digest])]
    return Path(*parts)


class TraceWriter:
    """Writes the file of one job's episodes."""

    def __init__(self, spec: Spec, beta: float, cell: Cell, recordings: Sequence[Recording]) -> None:
        self._about = {
            "format": FORMAT,
            "controller": spec.name,
            "digest": spec.digest,
            "beta": beta,
            "model": cell.model,
            "benchmark": cell.benchmark,
            "split": cell.split,
            "interval": recordings[0].interval,
            "questions": [recording.question for recording in recordings],
        }
        names = (cell.model, cell.benchmark, cell.split, f"{spec.name}-beta-{beta:g}")
        self._folder = Path(*map(_folder_of, names))

    def save(self, folder: Path, shuffles: range, columns: Mapping[str, NDArray[Any]]) -> Path:
        """Write the columns of the job that ran `shuffles`, below `folder`; the file appears complete or not at all."""
        target = folder / self._folder / f"{shuffles.start:04d}.npz"
        about = json.dumps(self._about | {"shuffles": [shuffles.start, shuffles.stop]})
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TraceError(f"{target.parent}: {error.strerror}") from None
        with atomic_write(target) as file:
            np.savez(file, allow_pickle=False, about=np.array(about), **columns)
        return target


def _fact(row: Sequence[int]) -> Fact:
    kind, branch, intervals, tokens, finished, number, *signals = row
    label = None if number == NONE else number
    confidence, lowest = unpack_signals(*signals) if signals else (None, None)
    if kind == ADVANCED:
        return Advanced(branch, intervals, tokens, bool(finished), label, confidence, lowest)
    return Probed(branch, label, tokens, confidence)


class TracedEpisode(NamedTuple):
    """Position of an episode in a trace, and its result."""

    question: int  # position in its cell
    shuffle: int
    answer: int | None  # the label answered with
    right: bool


@dataclass(frozen=True)
class Trace:
    """One file of traces."""

    about: dict[str, Any]  # controller, digest, beta, model, benchmark, split, interval, questions (hashes), shuffles
    facts: list[Fact]  # by number
    arrays: dict[str, NDArray[Any]]

    def episodes(self) -> list[TracedEpisode]:
        """Return all episodes, in the order they were run."""
        width, first = len(self.about["questions"]), self.about["shuffles"][0]
        return [
            TracedEpisode(at % width, first + at // width, None if label == NONE else label, bool(right))
            for at, (*_, label, right, _) in enumerate(self.arrays["episodes"].tolist())
        ]

    def rounds(self, at: int) -> list[Round]:
        """Return the rounds of the episode at position `at`."""
        episodes = self.arrays["episodes"]
        columns = (("counts", 0), ("repeated", 0), ("facts", 1), ("asked", 2), ("factless", 3))
        counts, repeated, codes, asked, factless = (
            self.arrays[name][begin : begin + episodes[at, length]].tolist()
            for name, length in columns
            for begin in [episodes[:at, length].sum()]
        )
        facts, asking, width = iter([self.facts[code] for code in codes]), iter(asked), 0
        rounds: list[Round] = []
        model: Sequence[Fact] = ()
        for count, same in zip(counts, repeated, strict=True):
            round_facts = [*model[:same], *islice(facts, count - same)]
            if 2 * count > len(model):
                model = round_facts
            actions: list[Action] = []
            for fact in round_facts:
                if isinstance(fact, Probed):
                    actions.append(probe(fact.branch))
                    continue
                intervals = next(asking) if fact.finished else fact.intervals
                actions.append(branch(intervals) if fact.branch == width else advance(fact.branch, intervals))
                width += fact.branch == width
            rounds.append(Round(actions, round_facts))
        for number, place, verb, index, label in factless:
            action = Action(Verb(verb), index, label=None if label == NONE else label)
            rounds[number].actions.insert(place, action)
        return rounds

    def states(self, at: int) -> Iterator[tuple[State, Round]]:
        """Yield the state after each round of the episode at position `at`. It is one object that keeps changing."""
        state = State(Limits(self.about["interval"], int(self.arrays["episodes"][at, 6])))
        for played in self.rounds(at):
            state.apply(played.actions, played.facts)
            yield state, played


def finished_confidences(state: State) -> dict[int, int]:
    """Return the mean confidence of the finished branches by label; empty if none is known."""
    finished = (state.branches[i] for i in state.finished)
    return mean_confidences((branch.label, branch.confidence) for branch in finished)


def running_confidences(state: State) -> dict[int, int]:
    """Return the mean confidence of the running branches' latest probes by label; empty if none is known."""
    running = (state.branches[i] for i in state.active)
    return mean_confidences((branch.label, branch.probe_confidence) for branch in running)


def read_trace(path: Path) -> Trace:
    """Read a file of traces. Raises TraceError."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        about = parse_json(str(arrays.pop("about")))
        if about["format"] != FORMAT:
            raise TraceError(f"{path}: is in format {about['format']}, but this program reads format {FORMAT}")
        return Trace(about, [_fact(row) for row in arrays.pop("table").tolist()], arrays)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise TraceError(f"{path}: not a file of traces ({error})") from None


def trace_files(path: Path) -> list[Path]:
    """Return the files of traces at or below `path`. Raises TraceError if there are none."""
    files = [path] if path.is_file() else sorted(path.rglob("*.npz"))
    if not files:
        raise TraceError(f"{path}: no traces there; `autotts evaluate --traces DIR` writes some")
    return files
