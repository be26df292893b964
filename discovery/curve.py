"""Scores: what an evaluation says of each controller at each β on each cell, and how sure a difference is.

Uncertainty comes from the questions: they are few and shuffles of the same branches are no new ones. Intervals are
therefore bootstrapped over questions, each taken with all its shuffles, and two controllers on the same resample.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from discovery.playing import COLUMNS, KINDS, Failure, Job, Played
from discovery.recordings import Cell

RESAMPLES: Final = 10_000
BLOCK: Final = 500
"""Resamples drawn at once, to bound memory."""
SEED: Final = 0
COVERAGE: Final = 95.0
"""Percent of an interval."""


@dataclass(frozen=True)
class Score:
    """One controller at one β on one cell."""

    controller: str
    digest: str  # of the controller
    beta: float
    cell: Cell
    outcomes: NDArray[np.int64]  # (columns, shuffles, questions), see `playing.COLUMNS`
    failures: list[Failure] = field(repr=False)
    seconds: float  # of one core

    def column(self, name: str) -> NDArray[np.int64]:
        """One figure of every episode: (shuffles, questions)."""
        column: NDArray[np.int64] = self.outcomes[COLUMNS.index(name)]
        return column

    def mean(self, name: str) -> float:
        """The mean of a figure over all episodes. The sum is of whole numbers, so it is exact."""
        column = self.column(name)
        return int(column.sum()) / column.size

    def per_question(self, name: str) -> NDArray[np.float64]:
        """The mean of a figure over shuffles: (questions,)."""
        means: NDArray[np.float64] = self.column(name).sum(axis=0) / len(self.column(name))
        return means

    @property
    def episodes(self) -> int:
        """How many there were."""
        return int(self.outcomes[0].size)

    @property
    def accuracy(self) -> float:
        """Percent of episodes that ended with the reference answer; failed ones did not."""
        return 100 * self.mean("right")

    @property
    def error(self) -> float:
        """The standard error of the accuracy in points, by the spread over questions."""
        means = self.per_question("right")
        return float(100 * means.std(ddof=1) / np.sqrt(means.size)) if means.size > 1 else 0.0

    def as_json(self) -> dict[str, Any]:
        """What `--json` writes."""
        path = self.column("critical_path")
        rounds = int(self.column("rounds").sum())
        return {
            "controller": self.controller,
            "beta": self.beta,
            "model": self.cell.model,
            "benchmark": self.cell.benchmark,
            "split": str(self.cell.split),
            "episodes": self.episodes,
            "accuracy": self.accuracy,
            "tokens": self.mean("tokens"),
            "tokens_by_kind": {kind: self.mean(kind) for kind in KINDS},
            "rounds": self.mean("rounds"),
            "branches": self.mean("branches"),
            "critical_path_mean": self.mean("critical_path"),
            "critical_path_p95": float(np.percentile(path, 95)),
            "decisions_per_s": rounds / self.seconds if self.seconds else 0.0,
            "seconds": self.seconds,
            "failures": int(self.column("failed").sum()),
            "failure": self.failures[0].message if self.failures else None,
            "digest": self.digest,
        }


def scores(outcomes: Iterable[tuple[Job, Played]]) -> Iterator[Score]:
    """Gather jobs, in the order of `playing.jobs`, into scores."""
    for (spec, beta, cell), group in groupby(outcomes, key=lambda one: one[0][:3]):
        played = [outcome for _, outcome in group]
        yield Score(
            controller=spec.name,
            digest=spec.digest,
            beta=beta,
            cell=cell,
            outcomes=np.concatenate([one.outcomes for one in played], axis=1),
            failures=[failure for one in played for failure in one.failures],
            seconds=sum(one.seconds for one in played),
        )


class Difference(NamedTuple):
    """By how much one controller beats another on the same questions, with its interval."""

    controller: str
    against: str
    beta: float
    model: str
    questions: int
    accuracy: float  # points
    low: float
    high: float
    tokens: float  # ratio of mean tokens


def differences(found: Sequence[Score]) -> list[Difference]:
    """Every controller against the first one, for each β and model, over all cells of the model together."""
    if not found:
        return []
    first = found[0].controller
    pairs: dict[tuple[str, float, str], list[tuple[Score, Score]]] = {}
    reference = {(score.beta, score.cell): score for score in found if score.controller == first}
    for score in found:
        if score.controller != first:
            key = score.controller, score.beta, score.cell.model
            pairs.setdefault(key, []).append((score, reference[score.beta, score.cell]))
    return [_difference(*key, first, both) for key, both in pairs.items()]


def _difference(
    controller: str, beta: float, model: str, against: str, both: Sequence[tuple[Score, Score]]
) -> Difference:
    one, other = (np.concatenate([pair[side].per_question("right") for pair in both]) for side in (0, 1))
    spent, spent_other = (sum(pair[side].per_question("tokens").sum() for pair in both) for side in (0, 1))
    low, high = paired_interval(100 * (one - other))
    ratio = float(spent / spent_other) if spent_other else float("inf")
    return Difference(controller, against, beta, model, one.size, float(100 * (one - other).mean()), low, high, ratio)


def paired_interval(differences: NDArray[np.float64]) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean of one difference a question: (questions,)."""
    generator = np.random.default_rng(SEED)
    blocks = (generator.integers(0, differences.size, (BLOCK, differences.size)) for _ in range(RESAMPLES // BLOCK))
    means = np.concatenate([differences[drawn].mean(axis=1) for drawn in blocks])
    tail = (100 - COVERAGE) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which of (tokens, accuracy) no other beats in both, by rising tokens."""
    best, kept = float("-inf"), []
    for at in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[at][1] > best:
            best = points[at][1]
            kept.append(at)
    return kept
