"""Traces: every round of every episode with its actions and facts, in NumPy columns. A file holds one job's episodes.

Each distinct fact is stored once and has a number. An episode is a sequence of these numbers. A round that begins like
an earlier round refers to it instead of repeating it. A fact determines its action, except for the requested intervals
of a branch that finished before them. These intervals, and actions without facts, have their own columns.
"""

from __future__ import annotations

import json
import zipfile
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from controllers import Action, Advanced, Fact, Limits, Probed, Round, State, Verb, advance, branch, probe
from controllers.actions import PRUNE
from controllers.loading import Spec
from controllers.signals import pack_signals, unpack_signals
from controllers.voting import mean_confidences
from discovery.data.atomic_files import atomic_write
from discovery.data.recordings import Cell, Recording
from discovery.data.safe_json import parse_json
from discovery.errors import TraceError

FORMAT = 1
ADVANCED, PROBED = 0, 1
NONE = -1
"""Stands for a missing label."""


class FactNumbers(dict[int, int]):
    """Numbers of facts, by the facts' `id()`. Nearly all facts are interned, and hashing them would cost more."""

    def __init__(self) -> None:
        self._facts: list[Fact] = []  # by number; the reference keeps a fact's id from being reused
        self._finishes = bytearray()  # by number: whether the fact finishes its branch
        self._next = 0

    def __missing__(self, identity: int) -> int:
        code = self[identity] = self._next
        self._next += 1
        return code

    def encode(self, facts: Sequence[Fact]) -> tuple[NDArray[np.uint32], list[int]]:
        """Return the numbers of some facts, and the positions among them at which branches finished."""
        known_facts, finishes = self._facts, self._finishes
        known = len(known_facts)
        codes = np.frombuffer(array("I", map(self.__getitem__, map(id, facts))), np.uint32)
        finished: list[int] = []
        if self._next > known:
            new = np.flatnonzero(codes >= known)
            for at, code in zip(new.tolist(), codes[new].tolist(), strict=True):
                if code == len(known_facts):
                    fact = facts[at]
                    known_facts.append(fact)
                    finishes.append(type(fact) is Advanced and fact.finished)
                if finishes[code]:  # such facts are not interned: forget the id, so that a later fact may reuse it
                    finished.append(at)
                    self.pop(id(facts[at]), None)
        return codes, finished

    @property
    def table(self) -> NDArray[np.int64]:
        """The facts by number: (facts, 6), with kind, branch, intervals, tokens, finished and label.

        If any fact has signals, there is a seventh column with them.
        """
        advanced = [fact if type(fact) is Advanced else None for fact in self._facts]
        columns: list[Sequence[int]] = [
            [PROBED if fact is None else ADVANCED for fact in advanced],
            [fact.branch for fact in self._facts],
            [0 if fact is None else fact.intervals for fact in advanced],
            [fact.tokens for fact in self._facts],
            self._finishes,
            [NONE if fact.label is None else fact.label for fact in self._facts],
        ]
        signals = [pack_signals(fact.confidence, getattr(fact, "lowest", None)) for fact in self._facts]
        if any(signals):
            columns.append(signals)
        return np.stack([np.array(column, np.int64) for column in columns], axis=1)


class TraceWriter:
    """Collects the rounds of one job's episodes and writes them to a file."""

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
        self._folder = Path(cell.model, cell.benchmark, cell.split, f"{spec.name}-beta-{beta:g}")
        self._codes = FactNumbers()
        self._facts: list[NDArray[np.uint32]] = []
        self._counts: list[int] = []  # facts of each round
        self._repeated: list[int] = []  # how many of them are those of the round it refers to
        self._asked: list[int] = []  # intervals requested of each branch as it finished
        self._factless = array("q")  # actions without facts, five figures each: round, position, verb, branch, label
        self._episodes: list[tuple[int, ...]] = []

    def add(self, state: State, rounds: Sequence[Round], right: bool) -> None:
        """Add the next episode, which ended as `state`."""
        before = len(self._asked), len(self._factless)
        facts: list[Fact] = []
        starts: list[int] = []
        repeated: list[int] = []
        model: Sequence[Fact] = ()  # the last large round; the next one may begin with the same facts
        for number, (actions, round_facts) in enumerate(rounds):
            same = 0
            if round_facts[: len(model)] == model:
                same = len(model)
                facts += round_facts[same:]
            else:
                facts += round_facts
            starts.append(len(facts) - len(round_facts))
            repeated.append(same)
            if 2 * len(round_facts) > len(model):
                model = round_facts
            missing = len(actions) - len(round_facts)
            for at, action in enumerate(actions) if missing else ():
                if action.verb >= PRUNE:
                    self._factless.extend((number, at, action.verb, action.branch, _number(action.label)))
                    missing -= 1
                    if not missing:
                        break
        codes, finished = self._codes.encode(facts)
        for at in finished:
            number = bisect_right(starts, at) - 1
            actions, round_facts = rounds[number]
            asking = (
                actions if len(actions) == len(round_facts) else [action for action in actions if action.verb < PRUNE]
            )
            self._asked.append(asking[at - starts[number]].intervals)
        self._facts.append(codes)
        self._repeated += repeated
        self._counts += [len(played.facts) for played in rounds]
        grown = len(self._asked) - before[0], (len(self._factless) - before[1]) // 5
        lengths = (len(rounds), len(facts), *grown)
        self._episodes.append((*lengths, _number(state.answer), right, state.limits.max_branches))

    def save(self, folder: Path, shuffles: range) -> Path:
        """Write the file of the job that ran `shuffles`, below `folder`; it appears complete or not at all."""
        target = folder / self._folder / f"{shuffles.start:04d}.npz"
        columns = {
            "table": self._codes.table,
            "facts": _small(self._facts),
            "counts": np.array(self._counts, np.uint16),
            "repeated": np.array(self._repeated, np.uint16),
            "asked": np.array(self._asked, np.int32),
            "factless": np.array(self._factless).reshape(-1, 5),
            "episodes": np.array(self._episodes, np.int32).reshape(-1, 7),
        }
        about = json.dumps(self._about | {"shuffles": [shuffles.start, shuffles.stop]})
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TraceError(f"{target.parent}: {error.strerror}") from None
        with atomic_write(target) as file:
            np.savez(file, allow_pickle=False, about=np.array(about), **columns)
        return target


def _small(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    joined: NDArray[Any] = np.concatenate([np.zeros(0, np.uint32), *parts])
    return joined.astype(np.uint16 if joined.max(initial=0) < 1 << 16 else np.uint32)


def _number(label: int | None) -> int:
    return NONE if label is None else label


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
