"""Values of single questions: what each contributes to a controller's AFS, and to its accuracy at a budget of tokens.

Both are functions of a cell's curve, whose points are means over questions. A question's value is its share of such a
figure to first order (its influence function): its accuracies, weighted as the curve weighs them, plus what its tokens
change about the budgets. So the mean of the values is the figure, and their spread is its sampling error, including
that of the mean tokens. Below β = 0 a question counts with the accuracy of its own chains.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from discovery.data.recordings import Cell
from discovery.evaluation.afs import Anchor, area_under
from discovery.evaluation.score_set import ControllerScores, ScoreSet

STEP: Final = 1e-4
"""Relative change of tokens by which derivatives are computed."""


class CurveAxis(NamedTuple):
    """The points of a controller's curve on a cell, at which questions are valued: one chain, then each β, rising."""

    betas: tuple[float, ...]
    tokens: tuple[float, ...]  # (1 + betas,) mean tokens
    right: tuple[float, ...]  # (1 + betas,) mean accuracy, percent


@dataclass(frozen=True)
class QuestionFigures:
    """A controller's figures on each question of a cell; rows are one chain, then each β, rising."""

    betas: tuple[float, ...]
    tokens: NDArray[np.float64]  # (1 + betas, questions)
    right: NDArray[np.float64]  # (1 + betas, questions), percent

    @property
    def axis(self) -> CurveAxis:
        """The curve through the means over these questions."""
        means = (tuple(map(float, rows.mean(axis=1))) for rows in (self.tokens, self.right))
        return CurveAxis(self.betas, *means)

    def select(self, questions: NDArray[np.int64]) -> QuestionFigures:
        """Return the figures of the questions at these positions."""
        return QuestionFigures(self.betas, self.tokens[:, questions], self.right[:, questions])


def question_figures(measured: ScoreSet, cell: Cell) -> tuple[QuestionFigures, QuestionFigures]:
    """Return the figures of the two sides on a cell."""
    first, second = (figures_of(side, measured, cell) for side in measured.sides)
    return first, second


def figures_of(side: ControllerScores, measured: ScoreSet, cell: Cell) -> QuestionFigures:
    """Return the figures of one controller on a cell."""
    baseline, scores = measured.baselines[cell], side.at(cell)
    return QuestionFigures(
        tuple(score.beta for score in scores),
        np.array([baseline.tokens, *(score.per_question("tokens") for score in scores)]),
        np.array([100 * baseline.right, *(100 * score.per_question("right") for score in scores)]),
    )


def afs_values(figures: QuestionFigures, axis: CurveAxis | None = None) -> NDArray[np.float64]:
    """Return each question's contribution to the AFS, in points: (questions,).

    Their mean is the AFS if `axis` is the curve of the same questions, which is the default.
    """
    axis = figures.axis if axis is None else axis
    tokens, right = np.array(axis.tokens), np.array(axis.right)
    values: NDArray[np.float64] = _area_weights(tokens) @ figures.right
    for at, mean in enumerate(tokens):
        step = np.zeros_like(tokens)
        step[at] = STEP * mean
        slope = (_area_weights(tokens + step) - _area_weights(tokens - step)) @ right / (2 * step[at])
        values += slope * (figures.tokens[at] - mean)
    return values


def _area_weights(tokens: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the weights of a curve's accuracies in its area: (1 + betas,), for so many mean tokens."""
    weights = []
    for unit in np.eye(tokens.size):
        anchor = Anchor(float(tokens[0]), float(unit[0]), 1.0)
        weights.append(area_under(list(zip(tokens[1:].tolist(), unit[1:].tolist(), strict=True)), anchor))
    return np.array(weights)


def equal_token_gains(
    finalist: QuestionFigures,
    champion: QuestionFigures,
    beta: float,
    axes: tuple[CurveAxis, CurveAxis] | None = None,
) -> NDArray[np.float64]:
    """Return the points of accuracy that each question gains at `beta` over the champion at equal tokens: (questions,).

    The champion's accuracy is interpolated on its curve at the mean tokens of the finalist at `beta`, on each question
    between the same two neighbours. Below its β = 0 the neighbour is one chain, and below one chain it stays as
    accurate as one chain; above its β = 1 it stays as accurate as there. `axes` are those of finalist and champion.
    """
    of_finalist, of_champion = axes or (finalist.axis, champion.axis)
    at = 1 + of_finalist.betas.index(beta)
    budget = of_finalist.tokens[at]
    shares, slope = _interpolation(np.array(of_champion.tokens), np.array(of_champion.right), budget)
    accuracy = finalist.right[at] - shares @ champion.right
    extra_tokens = finalist.tokens[at] - budget - shares @ (champion.tokens - np.array(of_champion.tokens)[:, None])
    gains: NDArray[np.float64] = accuracy - slope * extra_tokens
    return gains


def _interpolation(
    tokens: NDArray[np.float64], right: NDArray[np.float64], budget: float
) -> tuple[NDArray[np.float64], float]:
    """Return the share of each point of a curve in its accuracy at a budget, and the points of accuracy per token.

    A point that costs no more than one before it takes the place of that one, as in AFS; so does β = 0 if it costs no
    more than one chain.
    """
    begin = int(tokens[1] <= tokens[0])
    reached = np.maximum.accumulate(tokens[begin:])
    kept = [at for at in range(reached.size) if at + 1 == reached.size or reached[at + 1] > reached[at]]
    shares = np.zeros(tokens.size)
    position = int(np.searchsorted(reached[kept], budget, side="right"))
    if position in (0, len(kept)):  # beyond an end of the curve
        shares[begin + (kept[0] if position == 0 else kept[-1])] = 1
        return shares, 0.0
    left, end = kept[position - 1], kept[position]
    width = float(reached[end] - reached[left])
    share = (budget - reached[left]) / width
    shares[[begin + left, begin + end]] = 1 - share, share
    return shares, float(right[begin + end] - right[begin + left]) / width
