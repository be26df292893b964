"""AFS, the area under the frontier score: one number for a controller at every β, over every cell.

A cell's curve has a point a β: mean tokens and accuracy. AFS is the mean accuracy over budgets drawn log-uniformly from
one chain to SC@64 (64 chains): each doubling of what an answer may cost counts the same. Between neighbouring β tokens
and accuracy go in a straight line (so would a mix of the two), beyond β = 1 nothing is gained, and a budget below that
of β = 0 buys one chain. Cells count equally. The paper's score (arXiv 2605.08083), re-implemented from its description.
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
"""The budgets end where so many chains would be paid."""


class CurvePoint(NamedTuple):
    """A controller at one β on one cell."""

    beta: float
    tokens: float  # mean of an episode, probes included
    accuracy: float  # percent
    path: float  # 95th percentile of the critical path, in tokens


class Anchor(NamedTuple):
    """What budgets are measured by: one whole chain of a cell."""

    tokens: float  # mean length of a chain
    accuracy: float  # percent of chains that end in the reference answer
    path: float  # 95th percentile of a chain's length


@dataclass(frozen=True)
class Curve:
    """One controller on one cell; points by rising β."""

    cell: Cell
    anchor: Anchor
    points: Sequence[CurvePoint]

    @property
    def afs(self) -> float:
        """Its area, in points of accuracy."""
        return area_under([(one.tokens, one.accuracy) for one in self.points], self.anchor)

    @property
    def slowdown(self) -> float:
        """How many doublings longer than a chain's its critical path is, p95, averaged over β; never below 0."""
        return float(np.mean([max(0.0, math.log2(max(one.path, 1) / self.anchor.path)) for one in self.points]))

    @property
    def rises(self) -> bool:
        """Whether a larger β never spends less, by more than chance may."""
        return all(later.tokens >= 0.98 * sooner.tokens for sooner, later in pairwise(self.points))

    def accuracy_at(self, budget: float) -> float:
        """Percent of answers right at a mean of `budget` tokens."""
        return accuracy_at([(one.tokens, one.accuracy) for one in self.points], self.anchor, budget)


def chain_anchor(recordings: Sequence[Recording]) -> Anchor:
    """One chain of a cell: questions count equally, and each one's chains do."""
    lengths = np.concatenate([recording.tokens for recording in recordings])
    right = [float((one.finals == one.reference).mean()) if one.reference >= 0 else 0.0 for one in recordings]
    tokens = float(np.mean([recording.tokens.mean() for recording in recordings]))
    return Anchor(tokens, 100 * float(np.mean(right)), float(np.percentile(lengths, 95)))


def curves(scores: Sequence[Score], anchors: Mapping[Cell, Anchor]) -> list[Curve]:
    """The curves of one controller's scores, a cell each, in order of their first."""
    cells = dict.fromkeys(score.cell for score in scores)
    return [
        Curve(cell, anchors[cell], sorted(_point(score) for score in scores if score.cell == cell)) for cell in cells
    ]


def _point(score: Score) -> CurvePoint:
    path = float(np.percentile(score.column("critical_path"), 95))
    return CurvePoint(score.beta, score.mean("tokens"), score.accuracy, path)


def mean_afs(found: Sequence[Curve]) -> float:
    """The mean over cells, in points of accuracy."""
    return float(np.mean([curve.afs for curve in found]))


def area_under(line: Sequence[tuple[float, float]], anchor: Anchor) -> float:
    """The area under (tokens, accuracy) points by rising β."""
    low, high = anchor.tokens, CHAINS * anchor.tokens
    total = 0.0
    for (start, at_start), (end, at_end) in pairwise(_whole(line, anchor)):
        left, right = max(start, low), min(end, high)
        if left >= right:
            continue
        slope = (at_end - at_start) / (end - start)
        total += (at_start - slope * start) * math.log(right / left) + slope * (right - left)
    return total / math.log(CHAINS)


def afs_per_question(line: Sequence[tuple[float, NDArray[np.float64]]], anchor: Anchor) -> NDArray[np.float64]:
    """Each question's part in the area, accuracies given per question: (questions,). Their mean is the area.

    The budget axis is the cell's mean tokens, for all questions alike; below β = 0 a question counts as `anchor` does.
    """
    questions = len(line[0][1])
    parts = np.zeros(questions)
    for at in range(questions):
        parts[at] = area_under([(tokens, float(accuracy[at])) for tokens, accuracy in line], anchor)
    return parts


def accuracy_at(line: Sequence[tuple[float, float]], anchor: Anchor, budget: float) -> float:
    """Percent at a budget of tokens."""
    for (start, at_start), (end, at_end) in pairwise(_whole(line, anchor)):
        if start <= budget < end:
            return at_start + (at_end - at_start) * (budget - start) / (end - start)
    return line[-1][1] if budget > 0 else 0.0


def _whole(line: Sequence[tuple[float, float]], anchor: Anchor) -> list[tuple[float, float]]:
    """The line from nothing to more than any budget. A point that costs no more than the one before takes its place."""
    first, last = line[0], line[-1]
    whole = [(0.0, anchor.accuracy), (first[0], anchor.accuracy)] if first[0] > anchor.tokens else [(0.0, first[1])]
    for tokens, accuracy in line:
        whole.append((max(tokens, whole[-1][0]), accuracy))
    return [*whole, (max(2 * CHAINS * anchor.tokens, 2 * whole[-1][0]), last[1])]
