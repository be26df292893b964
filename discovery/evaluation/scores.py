"""Scores of an evaluation: each controller at each β on each cell, with intervals.

The uncertainty comes from the small number of questions, not from shuffles of the same branches. Intervals are
therefore bootstrapped over questions, each with all its shuffles. Two controllers are compared on the same resample.

Questions may have weights below 1 that depend on the source of their reference answers. Without weights, sums are of
integers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from discovery.data.recordings import Cell, LabelSource
from discovery.evaluation.replay_jobs import OUTCOME_COLUMNS, TOKEN_KINDS, EpisodeFailure, Job, JobResult

RESAMPLES: Final = 10_000
BLOCK: Final = 500
"""Resamples drawn at once, to bound memory."""
SEED: Final = 0
BOTH_SIDES: Final = 2.5
"""Percent beyond each end of a 95 % interval."""


@dataclass(frozen=True)
class SelectedByOutcome:
    """Questions that are left out, because which of them have a right answer depends on how they were answered."""

    judged_wrong: int = 0  # clients judged them wrong, and their right answer is unknown
    left_out: Mapping[LabelSource, int] = field(default_factory=dict)  # the others, by the source of their right answer

    def __str__(self) -> str:
        others = "".join(f", and therefore {count} by {source}" for source, count in self.left_out.items())
        return f"left out: {self.judged_wrong} judged wrong{others}"


@dataclass(frozen=True)
class QuestionGrading:
    """Sources of the reference answers of a cell's questions, and the questions' weights."""

    sources: Sequence[LabelSource]  # (questions,)
    weights: Sequence[float]  # (questions,), above 0
    answers: str = ""  # how answers were compared, as in `AnswerComparison`; empty if unknown
    selected: SelectedByOutcome = field(default_factory=SelectedByOutcome)

    @property
    def by_source(self) -> dict[LabelSource, int]:
        """Number of questions by source, surest first."""
        counts = Counter(self.sources)
        return {source: counts[source] for source in LabelSource if counts[source]}

    def mean_weight(self, source: LabelSource) -> float:
        """Return the mean weight of the questions of a source."""
        weights = [weight for weight, own in zip(self.weights, self.sources, strict=True) if own is source]
        return sum(weights) / len(weights)


@dataclass(frozen=True)
class Score:
    """One controller at one β on one cell."""

    controller: str
    digest: str  # of the controller
    beta: float
    cell: Cell
    outcomes: NDArray[np.int64]  # (columns, shuffles, questions), see `replay_jobs.OUTCOME_COLUMNS`
    failures: list[EpisodeFailure] = field(repr=False)
    seconds: float  # of one core
    grading: QuestionGrading | None = None  # None if unknown: all questions count the same
    recorded: Sequence[int] | None = None  # branches of each question: (questions,); None if unknown
    max_branches: int = 0  # allowed per episode, if so many were recorded

    @cached_property
    def weights(self) -> NDArray[np.float64] | None:
        """Weights of the questions: (questions,); None if all are one."""
        if self.grading is None or all(weight == 1 for weight in self.grading.weights):
            return None
        return np.array(self.grading.weights, np.float64)

    def column(self, name: str) -> NDArray[np.int64]:
        """Return one figure of every episode: (shuffles, questions)."""
        column: NDArray[np.int64] = self.outcomes[OUTCOME_COLUMNS.index(name)]
        return column

    def mean(self, name: str) -> float:
        """Return the mean of a figure over all episodes. Without weights it is a sum of integers, and so exact."""
        column = self.column(name)
        if self.weights is not None:
            return float(np.average(column.sum(axis=0), weights=self.weights)) / len(column)
        return int(column.sum()) / column.size

    def per_question(self, name: str) -> NDArray[np.float64]:
        """Return the mean of a figure over shuffles: (questions,)."""
        means: NDArray[np.float64] = self.column(name).sum(axis=0) / len(self.column(name))
        return means

    @property
    def episodes(self) -> int:
        """Number of episodes."""
        return int(self.outcomes[0].size)

    @property
    def accuracy(self) -> float:
        """Percent of episodes that ended with the reference answer; failed ones count as wrong."""
        return 100 * self.mean("right")

    @property
    def error(self) -> float:
        """Standard error of the accuracy in points, from the spread over questions."""
        means = self.per_question("right")
        if means.size < 2:
            return 0.0
        if self.weights is not None:
            deviations = self.weights * (means - np.average(means, weights=self.weights))
            return float(100 * np.sqrt(means.size / (means.size - 1) * (deviations**2).sum()) / self.weights.sum())
        return float(100 * means.std(ddof=1) / np.sqrt(means.size))

    @property
    def limited(self) -> float:
        """Share of episodes that opened all recorded branches although more were allowed."""
        if self.recorded is None or "@" in self.controller:  # a pinned number of chains
            return 0.0
        recorded = np.array(self.recorded, np.int64)
        return float(((self.column("branches") >= recorded) & (recorded < self.max_branches)).mean())

    def as_json(self) -> dict[str, Any]:
        """Return the score as `--json` writes it. Episodes, failures and decisions per second are counted without
        weights.
        """
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
            "tokens_by_kind": {kind: self.mean(kind) for kind in TOKEN_KINDS},
            "rounds": self.mean("rounds"),
            "branches": self.mean("branches"),
            "critical_path_mean": self.mean("critical_path"),
            "critical_path_p95": self._path(95),
            "decisions_per_s": rounds / self.seconds if self.seconds else 0.0,
            "seconds": self.seconds,
            "failures": int(self.column("failed").sum()),
            "failure": self.failures[0].message if self.failures else None,
            "digest": self.digest,
            "questions": self.outcomes.shape[-1],
            "error": self.error,
            **({} if self.recorded is None else {"recorded_branches": min(self.recorded)}),
            **({"limited_by_recordings": self.limited} if self.limited else {}),
            **self._graded(),
        }

    def _path(self, percent: float) -> float:
        """Return a percentile of the critical path."""
        path = self.column("critical_path")
        if self.weights is None:
            return float(np.percentile(path, percent))
        weights = np.broadcast_to(self.weights, path.shape)
        return float(np.percentile(path.ravel(), percent, weights=weights.ravel(), method="inverted_cdf"))

    def _graded(self) -> dict[str, Any]:
        """Return the counts of questions by source as JSON, and their mean weights unless all are one."""
        if self.grading is None:
            return {}
        sources = self.grading.by_source
        data: dict[str, Any] = {"label_sources": {str(source): count for source, count in sources.items()}}
        if self.grading.selected.judged_wrong:
            left_out = {str(source): count for source, count in self.grading.selected.left_out.items()}
            data |= {"judged_wrong": self.grading.selected.judged_wrong, "left_out_by_outcome": left_out}
        if self.grading.answers:
            data["answers"] = str(self.grading.answers)
        if self.weights is not None:
            data["weights"] = {str(source): self.grading.mean_weight(source) for source in sources}
        return data


def gather_scores(outcomes: Iterable[tuple[Job, JobResult]]) -> Iterator[Score]:
    """Combine job results, in the order of `make_jobs`, into scores."""
    for (spec, beta, cell), group in groupby(outcomes, key=lambda item: item[0][:3]):
        played = [result for _, result in group]
        yield Score(
            controller=spec.name,
            digest=spec.digest,
            beta=beta,
            cell=cell,
            outcomes=np.concatenate([result.outcomes for result in played], axis=1),
            failures=[failure for result in played for failure in result.failures],
            seconds=sum(result.seconds for result in played),
        )


def recording_limit_warnings(all_scores: Iterable[Score]) -> list[str]:
    """Return one warning for each cell in which recordings limited the number of branches."""
    by_cell: dict[Cell, list[Score]] = {}
    for score in all_scores:
        if score.limited:
            by_cell.setdefault(score.cell, []).append(score)
    lines = []
    for cell, scores_ in by_cell.items():
        betas: dict[str, list[str]] = {}
        for score in scores_:
            betas.setdefault(score.controller, []).append(f"{score.beta:g}")
        limited = "; ".join(f"{name} at β = {', '.join(values)}" for name, values in betas.items())
        most = min(scores_[0].recorded or (0,))
        lines.append(
            f"{' '.join(cell)}: only {most} branches are recorded, {scores_[0].max_branches} are allowed: {limited} "
            "opened all of them, and might score differently with more branches"
        )
    return lines


POOLED: Final = "all"
"""Stands for a model, a benchmark or a split of pooled scores."""


def pool_scores(unpooled: Sequence[Score]) -> list[Score]:
    """Return each controller's scores at each β pooled over cells; a question counts as in its cell.

    Cells are pooled for each model that has several, and over all cells if there are several models.
    """
    cells = list(dict.fromkeys(score.cell for score in unpooled))
    models = list(dict.fromkeys(cell.model for cell in cells))
    groups = {model: [cell for cell in cells if cell.model == model] for model in models}
    if len(models) > 1:
        groups[POOLED] = cells
    by_key: dict[tuple[str, str, float], list[Score]] = {}
    for model, members in groups.items():
        if len(members) > 1:
            for score in unpooled:
                if score.cell in members:
                    by_key.setdefault((model, score.digest, score.beta), []).append(score)
    return [_pooled(model, scores_) for (model, _, _), scores_ in by_key.items()]


def _pooled(model: str, parts: Sequence[Score]) -> Score:
    gradings = [score.grading for score in parts if score.grading is not None]
    sources = [source for grading in gradings for source in grading.sources]
    weights = [weight for grading in gradings for weight in grading.weights]
    return replace(
        parts[0],
        cell=Cell(model, POOLED, POOLED),  # type: ignore[arg-type]
        outcomes=np.concatenate([score.outcomes for score in parts], axis=2),
        failures=[failure for score in parts for failure in score.failures],
        seconds=sum(score.seconds for score in parts),
        grading=QuestionGrading(sources, weights) if len(gradings) == len(parts) else None,
        recorded=None,
    )


class Difference(NamedTuple):
    """How much more accurate one controller is than another on the same questions, with an interval."""

    controller: str
    against: str
    beta: float
    model: str
    questions: int
    accuracy: float  # points
    low: float
    high: float
    tokens: float  # ratio of mean tokens


def paired_differences(compared: Sequence[Score]) -> list[Difference]:
    """Compare every controller with the first one, for each β and model, over all cells of the model."""
    if not compared:
        return []
    first = compared[0].controller
    pairs: dict[tuple[str, float, str], list[tuple[Score, Score]]] = {}
    reference = {(score.beta, score.cell): score for score in compared if score.controller == first}
    for score in compared:
        if score.controller != first:
            key = score.controller, score.beta, score.cell.model
            pairs.setdefault(key, []).append((score, reference[score.beta, score.cell]))
    return [_difference(*key, first, both) for key, both in pairs.items()]


def _difference(
    controller: str, beta: float, model: str, against: str, both: Sequence[tuple[Score, Score]]
) -> Difference:
    own, other = (np.concatenate([pair[side].per_question("right") for pair in both]) for side in (0, 1))
    weights = _weights([pair[0] for pair in both])
    spent, spent_other = (sum(_sum(pair[side], "tokens") for pair in both) for side in (0, 1))
    gained = 100 * (own - other)
    low, high = paired_interval(gained, weights)
    ratio = float(spent / spent_other) if spent_other else float("inf")
    mean = gained.mean() if weights is None else np.average(gained, weights=weights)
    return Difference(controller, against, beta, model, own.size, float(mean), low, high, ratio)


def _weights(of_scores: Sequence[Score]) -> NDArray[np.float64] | None:
    """Return the weights of the questions of several scores, concatenated; None if all are one."""
    if all(score.weights is None for score in of_scores):
        return None
    ones = (np.ones(score.outcomes.shape[-1]) if score.weights is None else score.weights for score in of_scores)
    return np.concatenate(list(ones))


def _sum(score: Score, name: str) -> float:
    """Return the weighted sum of a figure over the questions of a score."""
    means = score.per_question(name)
    return float(means.sum() if score.weights is None else score.weights @ means)


def paired_interval(
    differences: NDArray[np.float64], weights: NDArray[np.float64] | None = None, tail: float = BOTH_SIDES
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean of paired differences: (questions,).

    Questions are drawn with equal probability; each counts by its weight in the mean of a resample. `tail` percent of
    these means are beyond each end.
    """
    generator = np.random.default_rng(SEED)
    blocks = (generator.integers(0, differences.size, (BLOCK, differences.size)) for _ in range(RESAMPLES // BLOCK))
    means = np.concatenate([_means(differences, weights, drawn) for drawn in blocks])
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)


def _means(
    differences: NDArray[np.float64], weights: NDArray[np.float64] | None, drawn: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return the mean of each resample, given as (resamples, questions) indices: (resamples,)."""
    if weights is None:
        means: NDArray[np.float64] = differences[drawn].mean(axis=1)
        return means
    return (weights * differences)[drawn].sum(axis=1) / weights[drawn].sum(axis=1)  # type: ignore[no-any-return]
