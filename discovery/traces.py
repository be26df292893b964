"""Traces: every round of every episode, its actions and its facts, in columns.

Actions and facts are numbered where they first appear and kept once; an episode is two runs of those numbers. A file
holds one job's episodes; a folder holds the files of one controller at one β over one cell.
"""

from __future__ import annotations

import itertools
import json
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from controllers import Action, Advanced, Fact, Limits, Probed, Round, State, Verb
from controllers.loading import Spec
from discovery.errors import TraceError
from discovery.files import whole
from discovery.recordings import Cell, Recording

FORMAT = 1
_ADVANCED, _PROBED = 10, 11  # beside the verbs, in the first column of the table
_NONE = -1


class Codes:
    """Numbers for actions and facts. Looking one up goes by identity: nearly all of them are interned."""

    def __init__(self) -> None:
        self.items: list[Action | Fact] = []
        self._by_id: dict[int, int] = {}
        self._by_value: dict[Action | Fact, int] = {}

    def of(self, items: Sequence[Action | Fact]) -> list[int]:
        """The number of each item."""
        codes: list[Any] = list(map(self._by_id.get, map(id, items)))
        if None in codes:
            at = codes.index(None)
            while True:
                codes[at] = self._number(items[at])
                try:
                    at = codes.index(None, at + 1)
                except ValueError:
                    break
        return codes

    def _number(self, item: Action | Fact) -> int:
        code = self._by_value.get(item)
        if code is None:
            code = self._by_value[item] = len(self.items)
            self.items.append(item)  # which also keeps its id from being given to another
            self._by_id[id(item)] = code
        return code


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
        self._codes = Codes()
        self._rounds: list[Round] = []
        self._actions: list[NDArray[Any]] = []
        self._facts: list[NDArray[Any]] = []
        self._lengths: list[int] = []  # actions of each round
        self._episodes: list[tuple[int, ...]] = []

    def on_round(self, state: State, played: Round) -> None:
        """For `run_episode`."""
        self._rounds.append(played)

    def end_episode(self, state: State, right: bool) -> None:
        """Take the rounds since the last episode as one."""
        actions = list(itertools.chain.from_iterable(played.actions for played in self._rounds))
        facts = list(itertools.chain.from_iterable(played.facts for played in self._rounds))
        self._actions.append(np.array(self._codes.of(actions), np.uint32))
        self._facts.append(np.array(self._codes.of(facts), np.uint32))
        self._lengths += [len(played.actions) for played in self._rounds]
        label = _NONE if state.answer is None else state.answer
        self._episodes.append((len(self._rounds), len(actions), len(facts), label, right, state.limits.max_branches))
        self._rounds.clear()

    def save(self, folder: Path, shuffles: range) -> Path:
        """Write the file of the job that ran `shuffles`, below `folder`; it appears whole or not at all."""
        target = folder / self._folder / f"{shuffles.start:04d}.npz"
        columns = {
            "table": np.array([_row(item) for item in self._codes.items], np.int64).reshape(-1, 6),
            "actions": _small(self._actions),
            "facts": _small(self._facts),
            "lengths": np.array(self._lengths, np.uint16),
            "episodes": np.array(self._episodes, np.int32).reshape(-1, 6),
        }
        about = json.dumps(self._about | {"shuffles": [shuffles.start, shuffles.stop]})
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TraceError(f"{target.parent}: {error.strerror}") from None
        with whole(target) as file:
            np.savez(file, allow_pickle=False, about=np.array(about), **columns)
        return target


def _small(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    whole: NDArray[Any] = np.concatenate([np.zeros(0, np.uint32), *parts])
    return whole.astype(np.uint16 if whole.max(initial=0) < 1 << 16 else np.uint32)


def _row(item: Action | Fact) -> tuple[int, int, int, int, int, int]:
    if isinstance(item, Action):
        return item.verb, item.branch, item.intervals, 0, 0, _NONE if item.label is None else item.label
    label = _NONE if item.label is None else item.label
    if isinstance(item, Advanced):
        return _ADVANCED, item.branch, item.intervals, item.tokens, item.finished, label
    return _PROBED, item.branch, 0, item.tokens, 0, label


def _item(row: Sequence[int]) -> Action | Fact:
    kind, branch, intervals, tokens, finished, number = row
    label = None if number == _NONE else number
    if kind == _ADVANCED:
        return Advanced(branch, intervals, tokens, bool(finished), label)
    if kind == _PROBED:
        return Probed(branch, label, tokens)
    return Action(Verb(kind), branch, intervals, label)


class Episode(NamedTuple):
    """Which episode of a trace, and how it ended."""

    question: int  # position in its cell
    shuffle: int
    answer: int | None  # the label answered with
    right: bool


@dataclass(frozen=True)
class Trace:
    """One file of traces."""

    about: dict[str, Any]  # controller, digest, beta, model, benchmark, split, interval, questions (hashes), shuffles
    items: list[Action | Fact]
    arrays: dict[str, NDArray[Any]]

    def episodes(self) -> list[Episode]:
        """All of them, in the order they were run in."""
        width, first = len(self.about["questions"]), self.about["shuffles"][0]
        return [
            Episode(at % width, first + at // width, None if label == _NONE else label, bool(right))
            for at, (_, _, _, label, right, _) in enumerate(self.arrays["episodes"].tolist())
        ]

    def rounds(self, at: int) -> list[Round]:
        """The rounds of the episode at position `at`."""
        episodes = self.arrays["episodes"]
        lengths, actions, facts = (
            self.arrays[name][begin : begin + count].tolist()
            for name, begin, count in zip(
                ("lengths", "actions", "facts"),
                episodes[:at, :3].sum(axis=0).tolist(),
                episodes[at, :3].tolist(),
                strict=True,
            )
        )
        doing, done = iter(actions), iter(facts)
        return [self._round(list(itertools.islice(doing, length)), done) for length in lengths]

    def _round(self, codes: Sequence[int], facts: Iterator[int]) -> Round:
        actions: list[Any] = [self.items[code] for code in codes]
        count = sum(action.verb < Verb.PRUNE for action in actions)
        answers: list[Any] = [self.items[code] for code in itertools.islice(facts, count)]
        return Round(actions, answers)

    def states(self, at: int) -> Iterator[tuple[State, Round]]:
        """The state after each round of the episode at position `at`; it is one object that goes on changing."""
        state = State(Limits(self.about["interval"], int(self.arrays["episodes"][at, 5])))
        for played in self.rounds(at):
            state.apply(played.actions, played.facts)
            yield state, played


def read_trace(path: Path) -> Trace:
    """A file of traces. Raises TraceError."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        about = json.loads(str(arrays.pop("about")))
        if about["format"] != FORMAT:
            raise TraceError(f"{path}: written in format {about['format']}; this program reads {FORMAT}")
        return Trace(about, [_item(row) for row in arrays["table"].tolist()], arrays)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise TraceError(f"{path}: no file of traces ({error})") from None


def trace_files(path: Path) -> list[Path]:
    """The files of traces at or below `path`. Raises TraceError if there are none."""
    found = [path] if path.is_file() else sorted(path.rglob("*.npz"))
    if not found:
        raise TraceError(f"{path}: no traces there; `autotts evaluate --traces DIR` writes some")
    return found
