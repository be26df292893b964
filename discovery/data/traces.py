"""Traces: every round of every episode, its actions and its facts, in columns.

Facts are numbered where they first appear and kept once; an episode is a run of those numbers, in which a round that
begins as an earlier one says so instead of repeating it. A fact says which
action it answers, but for how far a branch was asked to run when it finished earlier; that, and the actions that bring
no fact, stand in columns of their own. A file holds one job's episodes.
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
from discovery.data.atomic_files import atomic_write
from discovery.data.recordings import Cell, Recording
from discovery.data.safe_json import parse_json
from discovery.errors import TraceError

FORMAT = 1
ADVANCED, PROBED = 0, 1
NONE = -1
"""In place of a label where there is none."""


class FactNumbers(dict[int, int]):
    """The number of each fact, by its identity: nearly all of them are interned, and hashing them would cost more."""

    def __init__(self) -> None:
        self._facts: list[Fact] = []  # by number; being here keeps a fact's id from being given to another
        self._ends = bytearray()  # by number: whether a branch finished
        self._next = 0

    def __missing__(self, identity: int) -> int:
        code = self[identity] = self._next
        self._next += 1
        return code

    def of(self, facts: Sequence[Fact]) -> tuple[NDArray[np.uint32], list[int]]:
        """The numbers of some facts, and where among them branches finished."""
        mine, ends = self._facts, self._ends
        known = len(mine)
        codes = np.frombuffer(array("I", map(self.__getitem__, map(id, facts))), np.uint32)
        finished: list[int] = []
        if self._next > known:
            new = np.flatnonzero(codes >= known)
            for at, code in zip(new.tolist(), codes[new].tolist(), strict=True):
                if code == len(mine):
                    fact = facts[at]
                    mine.append(fact)
                    ends.append(type(fact) is Advanced and fact.finished)
                if ends[code]:  # it is always new, for its id is forgotten: it will not come again
                    finished.append(at)
                    self.pop(id(facts[at]), None)
        return codes, finished

    @property
    def table(self) -> NDArray[np.int64]:
        """Six figures a fact: what it is, branch, intervals, tokens, finished, label."""
        advanced = [fact if type(fact) is Advanced else None for fact in self._facts]
        columns = (
            [PROBED if fact is None else ADVANCED for fact in advanced],
            [fact.branch for fact in self._facts],
            [0 if fact is None else fact.intervals for fact in advanced],
            [fact.tokens for fact in self._facts],
            self._ends,
            [NONE if fact.label is None else fact.label for fact in self._facts],
        )
        return np.stack([np.array(column, np.int64) for column in columns], axis=1)


class TraceWriter:
    """Collects the rounds of one job's episodes."""

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
        self._repeated: list[int] = []  # how many of them are those of its model
        self._asked: list[int] = []  # intervals each finished branch was asked for
        self._factless = array("q")  # five figures each: round, position in it, verb, branch, label
        self._episodes: list[tuple[int, ...]] = []

    def add(self, state: State, rounds: Sequence[Round], right: bool) -> None:
        """Take the next episode, which ended as `state`."""
        before = len(self._asked), len(self._factless)
        facts: list[Fact] = []
        starts: list[int] = []
        repeated: list[int] = []
        model: Sequence[Fact] = ()  # the last round of some size: what the next may begin as
        for number, (actions, found) in enumerate(rounds):
            same = 0
            if found[: len(model)] == model:
                same = len(model)
                facts += found[same:]
            else:
                facts += found
            starts.append(len(facts) - len(found))
            repeated.append(same)
            if 2 * len(found) > len(model):
                model = found
            missing = len(actions) - len(found)
            for at, action in enumerate(actions) if missing else ():
                if action.verb >= PRUNE:
                    self._factless.extend((number, at, action.verb, action.branch, _number(action.label)))
                    missing -= 1
                    if not missing:
                        break
        codes, finished = self._codes.of(facts)
        for at in finished:
            number = bisect_right(starts, at) - 1
            actions, found = rounds[number]
            asking = actions if len(actions) == len(found) else [one for one in actions if one.verb < PRUNE]
            self._asked.append(asking[at - starts[number]].intervals)
        self._facts.append(codes)
        self._repeated += repeated
        self._counts += [len(played.facts) for played in rounds]
        grown = len(self._asked) - before[0], (len(self._factless) - before[1]) // 5
        lengths = (len(rounds), len(facts), *grown)
        self._episodes.append((*lengths, _number(state.answer), right, state.limits.max_branches))

    def save(self, folder: Path, shuffles: range) -> Path:
        """Write the file of the job that ran `shuffles`, below `folder`; it appears whole or not at all."""
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
    whole: NDArray[Any] = np.concatenate([np.zeros(0, np.uint32), *parts])
    return whole.astype(np.uint16 if whole.max(initial=0) < 1 << 16 else np.uint32)


def _number(label: int | None) -> int:
    return NONE if label is None else label


def _fact(row: Sequence[int]) -> Fact:
    kind, branch, intervals, tokens, finished, number = row
    label = None if number == NONE else number
    if kind == ADVANCED:
        return Advanced(branch, intervals, tokens, bool(finished), label)
    return Probed(branch, label, tokens)


class TracedEpisode(NamedTuple):
    """Which episode of a trace, and how it ended."""

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
        """All of them, in the order they were run in."""
        width, first = len(self.about["questions"]), self.about["shuffles"][0]
        return [
            TracedEpisode(at % width, first + at // width, None if label == NONE else label, bool(right))
            for at, (*_, label, right, _) in enumerate(self.arrays["episodes"].tolist())
        ]

    def rounds(self, at: int) -> list[Round]:
        """The rounds of the episode at position `at`."""
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
            found = [*model[:same], *islice(facts, count - same)]
            if 2 * count > len(model):
                model = found
            actions: list[Action] = []
            for fact in found:
                if isinstance(fact, Probed):
                    actions.append(probe(fact.branch))
                    continue
                intervals = next(asking) if fact.finished else fact.intervals
                actions.append(branch(intervals) if fact.branch == width else advance(fact.branch, intervals))
                width += fact.branch == width
            rounds.append(Round(actions, found))
        for number, place, verb, index, label in factless:
            action = Action(Verb(verb), index, label=None if label == NONE else label)
            rounds[number].actions.insert(place, action)
        return rounds

    def states(self, at: int) -> Iterator[tuple[State, Round]]:
        """The state after each round of the episode at position `at`; it is one object that goes on changing."""
        state = State(Limits(self.about["interval"], int(self.arrays["episodes"][at, 6])))
        for played in self.rounds(at):
            state.apply(played.actions, played.facts)
            yield state, played


def read_trace(path: Path) -> Trace:
    """A file of traces. Raises TraceError."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        about = parse_json(str(arrays.pop("about")))
        if about["format"] != FORMAT:
            raise TraceError(f"{path}: written in format {about['format']}; this program reads {FORMAT}")
        return Trace(about, [_fact(row) for row in arrays.pop("table").tolist()], arrays)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise TraceError(f"{path}: no file of traces ({error})") from None


def trace_files(path: Path) -> list[Path]:
    """The files of traces at or below `path`. Raises TraceError if there are none."""
    found = [path] if path.is_file() else sorted(path.rglob("*.npz"))
    if not found:
        raise TraceError(f"{path}: no traces there; `autotts evaluate --traces DIR` writes some")
    return found
