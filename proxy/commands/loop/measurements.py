"""Replay of a loop's held-out questions: the frontier of several controllers, and predictions for live requests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from controllers.loading import Spec, parse_spec
from discovery.data.recordings import Split
from discovery.evaluation.engines import EngineName, make_engine
from discovery.evaluation.evaluate import Evaluation
from discovery.evaluation.paired_statistics import bootstrap_bounds
from discovery.evaluation.plot import PlotPoint, draw_frontiers
from discovery.evaluation.replay_jobs import ReplayRules
from discovery.evaluation.score_set import ControllerScores, cheapest_at_accuracy, score_controllers
from discovery.evaluation.scores import BOTH_SIDES, Score
from discovery.evaluation.sources import open_source, select_cells
from proxy.commands.loop.live_requests import LiveEstimate, predict

BETAS: Final = (0.0, 0.25, 0.5, 0.75, 1.0)
RIVALS: Final = ("self_consistency", "asc", "adaptive_consistency", "cmc", "parallel_probe", "short_m_at_k")
"""Baselines in the picture of the frontier."""


class HeldOutScores:
    """Scores of controllers on the held-out questions of a recordings file or store."""

    def __init__(self, recordings: Path, names: Sequence[str], shuffles: int) -> None:
        source = open_source(recordings)
        cells = select_cells(source.cells(), [], [], Split.HELD_OUT)
        specs = list({spec.digest: spec for spec in map(parse_spec, names)}.values())
        evaluation = Evaluation(source, cells, specs, BETAS, shuffles, rules=ReplayRules())
        self.scores = score_controllers(evaluation, make_engine(EngineName.PROCESS, None))
        (self.cell,) = self.scores.baselines

    def side(self, name: str) -> ControllerScores:
        """Return the scores of one controller, by its name."""
        return next(side for side in self.scores.sides if side.spec.name == name)

    def score(self, name: str, beta: float) -> Score:
        """Return the score of one controller at one β."""
        return next(score for score in self.side(name).at(self.cell) if score.beta == beta)

    def points(self) -> list[dict[str, Any]]:
        """Return every point of every frontier with 95 % intervals over questions, accuracies in percent."""
        return [_point(side.spec, score) for side in self.scores.sides for score in side.at(self.cell)]

    def draw(self, path: Path) -> None:
        """Draw the frontiers with 95 % intervals."""
        lines: dict[str, list[PlotPoint]] = {}
        for point in self.points():
            half = (point["high"] - point["low"]) / 2
            lines.setdefault(point["controller"], []).append(PlotPoint(point["tokens"], point["accuracy"], half))
        title = f"{self.cell.model}: {len(self.scores.baselines[self.cell].questions)} held-out questions"
        draw_frontiers({f"{title} (bars: 95 %)": lines}, path)

    def tokens_at(self, accuracy: float, name: str) -> float | None:
        """Return the least tokens at which a controller reaches an accuracy in percent; None if it never does."""
        points = self.side(name).curves[self.cell].points
        return cheapest_at_accuracy([(point.tokens, point.accuracy) for point in points], accuracy)

    def predictions(self, before: str, after: str, beta: float, count: int) -> dict[str, LiveEstimate]:
        """Return what is predicted of `count` live questions: accuracies in percent, tokens, and their differences.

        The intervals hold all together with at least 95 %.
        """
        right, tokens = (
            [self._column(name, beta, column) for name in (before, after)] for column in ("right", "tokens")
        )
        episodes = {
            "accuracy before": 100 * right[0],
            "accuracy after": 100 * right[1],
            "accuracy gained": 100 * (right[1] - right[0]),
            "tokens before": tokens[0],
            "tokens after": tokens[1],
            "tokens added": tokens[1] - tokens[0],
        }
        return {name: predict(values, count, figures=len(episodes)) for name, values in episodes.items()}

    def _column(self, name: str, beta: float, column: str) -> NDArray[np.float64]:
        return self.score(name, beta).column(column).astype(np.float64)


def _point(spec: Spec, score: Score) -> dict[str, Any]:
    right = 100 * score.per_question("right")
    low, high = bootstrap_bounds(right, BOTH_SIDES)
    return {
        "controller": spec.name,
        "digest": spec.digest,
        "beta": score.beta,
        "tokens": score.mean("tokens"),
        "accuracy": score.accuracy,
        "low": low,
        "high": high,
        "path_p95": float(np.percentile(score.column("critical_path"), 95)),
    }
