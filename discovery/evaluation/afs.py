"""AFS, the area under the frontier score: one number for a controller at every β, over every cell.

A cell's curve has one point per β: mean tokens and accuracy. AFS is the mean accuracy over budgets drawn log-uniformly
between the cost of one chain and that of SC@64 (64 chains), so that each doubling of the budget counts the same. Tokens
and accuracy are interpolated linearly between neighbouring β (a mix of the two would achieve that). Beyond β = 1 the
accuracy is constant. A budget below that of β = 0 gets the accuracy of one chain. Cells count equally. This is the
score of the paper (arXiv 2605.08083), re-implemented from its description.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from discovery.data.recordings import Cell, Recording
from discovery.evaluation.scores import Score

CHAINS: Final = 64
"""Budgets end at the cost of this many chains."""


class CurvePoint(NamedTuple):
    """A controller at one β on one cell."""

    beta: float
    tokens: float  # mean per episode, probes included
    accuracy: float  # percent
    path: float  # 95th percentile of the critical path, in tokens


class Anchor(NamedTuple):
    """One whole chain of a cell, by which budgets are measured."""

    tokens: float  # mean length of a chain
    accuracy: float  # percent of chains that end in the reference answer
    path: float  # 95th percentile of a chain's length


@dataclass(frozen=True)
class Curve:
    """One controller's curve on one cell; points by rising β."""

    cell: Cell
    anchor: Anchor
    points: Sequence[CurvePoint]

    @property
    def afs(self) -> float:
        """The area under the curve, in points of accuracy."""
        return area_under([(point.tokens, point.accuracy) for point in self.points], self.anchor)

    @property
    def slowdown(self) -> float:
        """Doublings by which its critical path (p95) is longer than one chain, averaged over β; never below 0."""
        return float(np.mean([max(0.0, math.log2(max(point.path, 1) / self.anchor.path)) for point in self.points]))

    @property
    def rises(self) -> bool:
        """Whether a larger β never spends less, with a tolerance of 2 % for chance."""
        return all(later.tokens >= 0.98 * sooner.tokens for sooner, later in pairwise(self.points))

    def accuracy_at(self, budget: float) -> float:
        """Return the percentage of right answers at a mean of `budget` tokens."""
        return accuracy_at([(point.tokens, point.accuracy) for point in self.points], self.anchor, budget)


def chain_anchor(recordings: Sequence[Recording]) -> Anchor:
    """Return the anchor of a cell. Questions count equally, and so do the chains of one question."""
    lengths = np.concatenate([recording.tokens for recording in recordings])
    right = [chain_accuracy(recording) for recording in recordings]
    tokens = float(np.mean([recording.tokens.mean() for recording in recordings]))
    return Anchor(tokens, 100 * float(np.mean(right)), float(np.percentile(lengths, 95)))


def chain_accuracy(recording: Recording) -> float:
    """Return the share of a question's chains that end in its reference answer."""
    return float(recording.are_right(recording.finals).mean())


def curves(scores: Sequence[Score], anchors: Mapping[Cell, Anchor]) -> list[Curve]:
    """Return the curves of one controller's scores, one per cell, in order of first appearance."""
    cells = dict.fromkeys(score.cell for score in scores)
    return [
        Curve(cell, anchors[cell], sorted(_point(score) for score in scores if score.cell == cell)) for cell in cells
    ]


def _point(score: Score) -> CurvePoint:
    path = float(np.percentile(score.column("critical_path"), 95))
    return CurvePoint(score.beta, score.mean("tokens"), score.accuracy, path)


def afs_by_cell(scores: Sequence[Score], anchors: Mapping[Cell, Anchor]) -> dict[tuple[str, str], dict[Cell, float]]:
    """Return the AFS on cells by name and digest of controllers. Cells with one β or weighted questions have none."""
    areas: dict[tuple[str, str], dict[Cell, float]] = {}
    for named in dict.fromkeys((score.controller, score.digest) for score in scores):
        own = [score for score in scores if (score.controller, score.digest) == named and score.weights is None]
        areas[named] = {curve.cell: curve.afs for curve in curves(own, anchors) if len(curve.points) > 1}
    return areas


def mean_afs(by_cell: Sequence[Curve]) -> float:
    """Return the mean AFS over cells, in points of accuracy."""
    return float(np.mean([curve.afs for curve in by_cell]))


def mean_paths(by_cell: Sequence[Curve]) -> NDArray[np.float64]:
    """Return the p95 critical path at each β, averaged over cells, in tokens."""
    paths: NDArray[np.float64] = np.mean([[point.path for point in curve.points] for curve in by_cell], axis=0)
    return paths


def mean_curve(curves: Sequence[Curve]) -> list[tuple[float, float, float]]:
    """Return β, tokens and percent correct, averaged over cells."""
    points: Sequence[Sequence[CurvePoint]] = list(zip(*(curve.points for curve in curves), strict=True))
    return [
        (row[0].beta, float(np.mean([one.tokens for one in row])), float(np.mean([one.accuracy for one in row])))
        for row in points
    ]


def area_under(line: Sequence[tuple[float, float]], anchor: Anchor) -> float:
    """Return the area under (tokens, accuracy) points by rising β."""
    low, high = anchor.tokens, CHAINS * anchor.tokens
    total = 0.0
    for (start, at_start), (end, at_end) in pairwise(_extended(line, anchor)):
        left, right = max(start, low), min(end, high)
        if left >= right:
            continue
        slope = (at_end - at_start) / (end - start)
        total += (at_start - slope * start) * math.log(right / left) + slope * (right - left)
    return total / math.log(CHAINS)


def accuracy_at(line: Sequence[tuple[float, float]], anchor: Anchor, budget: float) -> float:
    """Return the interpolated accuracy, in percent, at a budget of tokens."""
    for (start, at_start), (end, at_end) in pairwise(_extended(line, anchor)):
        if start <= budget < end:
            return at_start + (at_end - at_start) * (budget - start) / (end - start)
    return line[-1][1] if budget > 0 else 0.0


def _extended(line: Sequence[tuple[float, float]], anchor: Anchor) -> list[tuple[float, float]]:
    """Return the line extended to cover all budgets from 0 upwards.

    A point that costs no more than the one before takes its place.
    """
    first, last = line[0], line[-1]
    extended = [(0.0, anchor.accuracy), (first[0], anchor.accuracy)] if first[0] > anchor.tokens else [(0.0, first[1])]
    for tokens, accuracy in line:
        extended.append((max(tokens, extended[-1][0]), accuracy))
    return [*extended, (max(2 * CHAINS * anchor.tokens, 2 * extended[-1][0]), last[1])]
