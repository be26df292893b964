"""Searches in a folder, from the histories that `autotts discover` writes. Each is read again when it has changed."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple

from discovery.commands.discover import RECORD
from discovery.errors import HistoryError
from discovery.search.cascade import BASELINE, CandidateVerdict
from discovery.search.explorers import Candidate
from discovery.search.history import History
from discovery.search.loop import read_pairs

MOST_RUNS: Final = 200
"""Latest runs that are listed."""
_MOST_READ: Final = 4
"""Runs that are kept in memory with all candidates."""

Stamp = tuple[int, int]
"""Time of the latest change and size of a history; it differs after every change."""


class JudgedCandidate(NamedTuple):
    """A candidate and its verdict."""

    candidate: Candidate
    verdict: CandidateVerdict

    @property
    def is_baseline(self) -> bool:
        """Whether it is a built-in controller that every run begins with."""
        return self.candidate.explorer == BASELINE


@dataclass(frozen=True)
class SearchRecord:
    """One run, as its history tells it."""

    name: str  # of its folder
    changed: datetime
    head: str  # the latest hash
    settings: Mapping[str, Any]
    judged: Sequence[JudgedCandidate]  # in the order in which they were tried
    usd: float  # cost of proposals
    chosen: Mapping[str, Any] | None  # the winner with its curve; None while the run is not finished

    @cached_property
    def by_digest(self) -> Mapping[str, JudgedCandidate]:
        """Candidates by their digests; of equal ones the first."""
        return {each.candidate.digest: each for each in reversed(self.judged)}

    @cached_property
    def ranked(self) -> Sequence[JudgedCandidate]:
        """Candidates, the best score first; those without a score last."""
        scored = [each for each in self.judged if each.verdict.score is not None]
        others = [each for each in self.judged if each.verdict.score is None]
        return sorted(scored, key=lambda each: -(each.verdict.score or 0.0)) + others

    @property
    def best(self) -> JudgedCandidate | None:
        """The candidate of the explorer with the best score, if one has a score."""
        return next((each for each in self.ranked if each.verdict.score is not None and not each.is_baseline), None)

    @property
    def questions(self) -> int:
        """Number of questions that candidates are tried on."""
        return int(self.settings.get("questions", 0))

    def best_so_far(self) -> list[tuple[int, float]]:
        """Return the best score of the explorer's candidates after each step that raised it."""
        steps: list[tuple[int, float]] = []
        for number, each in enumerate(self.judged, start=1):
            score = each.verdict.score
            if score is not None and not each.is_baseline and (not steps or score > steps[-1][1]):
                steps.append((number, score))
        return [*steps, (len(self.judged), steps[-1][1])] if steps else []

    def lineage(self, digest: str) -> list[JudgedCandidate]:
        """Return a candidate and its ancestors, the oldest first."""
        line: list[JudgedCandidate] = []
        at: str | None = digest
        while at is not None and at in self.by_digest and self.by_digest[at] not in line:
            line.append(self.by_digest[at])
            at = line[-1].candidate.parent
        return line[::-1]


class BrokenRun(NamedTuple):
    """A folder whose history cannot be read."""

    name: str
    changed: datetime
    problem: str


class ListedRun(NamedTuple):
    """A run in the list: its settings and results, without its candidates."""

    name: str
    changed: datetime
    explorer: str
    tried: int  # candidates
    best: str | None  # name of the best candidate; None if none has a score
    score: float | None
    usd: float
    is_finished: bool


class SearchRuns:
    """The runs in a folder. Its methods read files, so that they belong into a thread. Threads may share it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._known: dict[str, tuple[Stamp, SearchRecord | BrokenRun]] = {}
        self._listed: dict[str, tuple[Stamp, ListedRun | BrokenRun]] = {}

    def names(self) -> list[str]:
        """Return the names of the runs, the latest first."""
        try:
            runs = [(path.stat().st_mtime, path.parent.name) for path in self.folder.glob(f"*/{RECORD}")]
        except OSError:
            return []
        return [name for _, name in sorted(runs, reverse=True)[:MOST_RUNS]]

    def read(self, name: str) -> SearchRecord | BrokenRun | None:
        """Return a run by its name; None if there is none."""
        if name not in self.names():  # so that a name cannot lead out of the folder
            return None
        stamp = self._stamp(name)
        return None if stamp is None else self._record(name, stamp)

    def all(self) -> list[ListedRun | BrokenRun]:
        """Return the runs, the latest first. Each history is read once in each of its states."""
        listed: dict[str, tuple[Stamp, ListedRun | BrokenRun]] = {}
        for name in self.names():
            stamp = self._stamp(name)
            if name in self._listed and self._listed[name][0] == stamp:
                listed[name] = self._listed[name]
            elif stamp is not None:
                listed[name] = (stamp, _listed(self._record(name, stamp)))
        self._listed = listed
        return [run for _, run in listed.values()]

    def _record(self, name: str, stamp: Stamp) -> SearchRecord | BrokenRun:
        """Return the run in this state. It is read if it is not known."""
        with self._lock:
            if name in self._known and self._known[name][0] == stamp:
                return self._known[name][1]
            record = _read(self.folder / name / RECORD, name, datetime.fromtimestamp(stamp[0] / 1e9, UTC))
            self._known.pop(name, None)
            while len(self._known) >= _MOST_READ:
                self._known.pop(next(iter(self._known)))
            self._known[name] = (stamp, record)
            return record

    def _stamp(self, name: str) -> Stamp | None:
        """Return the state of a history, or None if it was removed meanwhile."""
        try:
            status = (self.folder / name / RECORD).stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size


def _listed(run: SearchRecord | BrokenRun) -> ListedRun | BrokenRun:
    if isinstance(run, BrokenRun):
        return run
    best = run.best
    return ListedRun(
        run.name,
        run.changed,
        str(run.settings.get("explorer", "")),
        len(run.judged),
        None if best is None else best.candidate.name,
        None if best is None else best.verdict.score,
        run.usd,
        bool(run.chosen),
    )


def _read(path: Path, name: str, changed: datetime) -> SearchRecord | BrokenRun:
    try:
        history = History.read(path)
        judged = [JudgedCandidate(*pair) for pair in read_pairs(history)]
        usd = sum(float(each.candidate.cost.usd) for each in judged)
        chosen = history.bodies("chosen")
        begun = history.bodies("begun")
        settings = begun[0] if begun else {}
        return SearchRecord(name, changed, history.head, settings, judged, usd, chosen[-1] if chosen else None)
    except HistoryError as error:
        return BrokenRun(name, changed, str(error))
    except (KeyError, TypeError, ValueError) as error:
        return BrokenRun(name, changed, f"{path}: written by another version of this program ({type(error).__name__})")
