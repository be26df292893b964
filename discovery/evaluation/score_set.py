"""Scores of several controllers on the same cells, together with the baselines that they are measured by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from controllers.loading import Spec
from discovery.data.recordings import Cell
from discovery.evaluation import afs
from discovery.evaluation.afs import Anchor, Curve
from discovery.evaluation.engines import Engine, RecordingBatch
from discovery.evaluation.evaluate import Evaluation
from discovery.evaluation.replay_jobs import Job, JobResult, ReplayRules
from discovery.evaluation.scores import Score


class CellBaseline(NamedTuple):
    """Facts about a cell that do not depend on the controller."""

    questions: Sequence[str]  # `question_id`s, in the order of the scores
    anchor: Anchor
    right: NDArray[np.float64]  # (questions,) share of the chains that end in the reference answer
    tokens: NDArray[np.float64]  # (questions,) mean length of a chain
    interval: int  # tokens between probes


@dataclass(frozen=True)
class ControllerScores:
    """One controller's scores on some cells, and its curves."""

    spec: Spec
    scores: Sequence[Score]
    curves: dict[Cell, Curve]

    def at(self, cell: Cell) -> list[Score]:
        """Return its scores on one cell, by rising β."""
        return sorted((score for score in self.scores if score.cell == cell), key=lambda score: score.beta)


@dataclass(frozen=True)
class ScoreSet:
    """Scores of controllers on the same cells, in the order they were given."""

    baselines: dict[Cell, CellBaseline]
    sides: Sequence[ControllerScores]

    @property
    def answers(self) -> str:
        """How answers were compared, as text; empty if unknown."""
        gradings = [score.grading for side in self.sides for score in side.scores if score.grading is not None]
        return " and ".join(sorted({grading.answers for grading in gradings}))


def score_controllers(evaluation: Evaluation, engine: Engine) -> ScoreSet:
    """Score all controllers and keep the baselines of their cells. Raises the errors of `Evaluation.run`."""
    baselines: dict[Cell, CellBaseline] = {}

    def with_baselines(batches: Iterable[RecordingBatch], rules: ReplayRules) -> Iterator[tuple[Job, JobResult]]:
        return engine((_with_baseline_noted(batch, baselines) for batch in batches), rules)

    all_scores = evaluation.run(with_baselines)
    anchors = {cell: baseline.anchor for cell, baseline in baselines.items()}
    sides = []
    for spec in evaluation.specs:
        scores = [score for score in all_scores if score.digest == spec.digest]
        sides.append(ControllerScores(spec, scores, {curve.cell: curve for curve in afs.curves(scores, anchors)}))
    return ScoreSet(baselines, sides)


def _with_baseline_noted(batch: RecordingBatch, baselines: dict[Cell, CellBaseline]) -> RecordingBatch:
    """Add the baseline of a batch's cell to `baselines`, and return the batch."""
    recordings = batch.recordings
    right = [afs.chain_accuracy(recording) for recording in recordings]
    baselines[batch.jobs[0].cell] = CellBaseline(
        questions=[recording.question for recording in recordings],
        anchor=afs.chain_anchor(recordings),
        right=np.array(right, float),
        tokens=np.array([recording.tokens.mean() for recording in recordings], float),
        interval=recordings[0].interval,
    )
    return batch


def cheapest_at_accuracy(line: Sequence[tuple[float, float]], accuracy: float) -> float | None:
    """Return the tokens at which a line of (tokens, accuracy) points by rising β first reaches `accuracy`, or None."""
    if line[0][1] >= accuracy:
        return line[0][0]
    for (start, at_start), (end, at_end) in pairwise(line):
        if at_start < accuracy <= at_end:
            return start + (end - start) * (accuracy - at_start) / (at_end - at_start)
    return None
