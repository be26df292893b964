"""Scores together with what they are measured by: which questions a cell has, and what one chain of it is."""

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
    """What a cell is like, whichever controller is scored on it."""

    questions: Sequence[str]  # `question_id`s, in the order of the scores
    anchor: Anchor
    right: NDArray[np.float64]  # (questions,) part of the chains that end in the reference answer
    tokens: NDArray[np.float64]  # (questions,) mean length of a chain
    interval: int  # tokens


@dataclass(frozen=True)
class ControllerScores:
    """One controller's scores on some cells, and its curves."""

    spec: Spec
    scores: Sequence[Score]
    curves: dict[Cell, Curve]

    def at(self, cell: Cell) -> list[Score]:
        """Its scores on one cell, by rising β."""
        return sorted((one for one in self.scores if one.cell == cell), key=lambda one: one.beta)

    def parts(self, cell: Cell) -> NDArray[np.float64]:
        """Each question's part in the AFS of a cell: (questions,)."""
        line = [(one.mean("tokens"), 100 * one.per_question("right")) for one in self.at(cell)]
        return afs.afs_per_question(line, self.curves[cell].anchor)

    def right(self, cell: Cell, beta: float) -> NDArray[np.float64]:
        """Percent of a cell's episodes that ended right at one β: (questions,)."""
        (score,) = (one for one in self.at(cell) if one.beta == beta)
        return 100 * score.per_question("right")


@dataclass(frozen=True)
class ScoreSet:
    """Controllers on the same cells, in the order asked for."""

    ground: dict[Cell, CellBaseline]
    sides: Sequence[ControllerScores]

    @property
    def answers(self) -> str:
        """How answers were compared, in words; nothing if that is unknown."""
        graded = [score.grading for side in self.sides for score in side.scores if score.grading is not None]
        return " and ".join(sorted({one.answers for one in graded}))


def score_controllers(evaluation: Evaluation, engine: Engine) -> ScoreSet:
    """Score everything, and keep what the scores are measured by. Raises what `Evaluation.run` raises."""
    ground: dict[Cell, CellBaseline] = {}

    def noting(batches: Iterable[RecordingBatch], rules: ReplayRules) -> Iterator[tuple[Job, JobResult]]:
        return engine((_noted(batch, ground) for batch in batches), rules)

    found = evaluation.run(noting)
    anchors = {cell: about.anchor for cell, about in ground.items()}
    sides = []
    for spec in evaluation.specs:
        scores = [score for score in found if score.digest == spec.digest]
        sides.append(ControllerScores(spec, scores, {curve.cell: curve for curve in afs.curves(scores, anchors)}))
    return ScoreSet(ground, sides)


def _noted(batch: RecordingBatch, ground: dict[Cell, CellBaseline]) -> RecordingBatch:
    recordings = batch.recordings
    right = [(one.finals == one.reference).mean() if one.reference >= 0 else 0.0 for one in recordings]
    ground[batch.jobs[0].cell] = CellBaseline(
        questions=[one.question for one in recordings],
        anchor=afs.chain_anchor(recordings),
        right=np.array(right, float),
        tokens=np.array([one.tokens.mean() for one in recordings], float),
        interval=recordings[0].interval,
    )
    return batch


def cheapest_at_accuracy(line: Sequence[tuple[float, float]], accuracy: float) -> float | None:
    """Tokens at which (tokens, accuracy) points by rising β, joined by straight lines, first are so accurate."""
    if line[0][1] >= accuracy:
        return line[0][0]
    for (start, at_start), (end, at_end) in pairwise(line):
        if at_start < accuracy <= at_end:
            return start + (end - start) * (accuracy - at_start) / (at_end - at_start)
    return None
