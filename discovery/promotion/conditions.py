"""Conditions that a finalist must meet: how each is checked, apart from the test of its gain.

No I/O, no randomness.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from discovery.data.recordings import Cell, Split
from discovery.evaluation.afs import Curve, mean_paths
from discovery.evaluation.paired_statistics import POWER, bootstrap_bounds, question_values
from discovery.evaluation.score_set import ControllerScores, ScoreSet
from discovery.promotion.question_gains import afs_values, equal_token_gains, question_figures

ValuesByCell = Mapping[Cell, NDArray[np.float64]]
"""One value per question of each cell, in the order of its baseline."""


@dataclass(frozen=True)
class GateTerms:
    """Requirements on a finalist."""

    alpha: float = 0.05  # probability of ever promoting a finalist that is no better, over the split's lifetime
    beta: float = 0.5  # the deployed β, at which accuracy must not drop
    margin: float = 1.0  # points of accuracy that may be lost at the deployed β, compared at equal tokens
    losing: float = 2.0  # points of AFS that no single cell may lose
    slowdown: float = 1.25  # maximum critical path as a multiple of the champion's, plus one interval
    power: float = POWER  # probability of promoting a finalist that is as good as planned or observed
    gain: float = 1.0  # points of AFS that are worth finding; a plan and the futility of a sequence depend on it
    bound: float = 25.0  # largest difference of a question that a sequential judgement counts, in points of AFS
    futility: float = 0.1  # probability that a sequence ever dismisses a finalist that gains `gain`


DEFAULT_TERMS: Final = GateTerms()
HELD_OUT: Final = "held-out"
"""Name of the condition that no search has seen the questions."""


@dataclass(frozen=True)
class Condition:
    """One condition and whether it is met."""

    name: str
    held: bool
    final: bool  # if it is not met, more questions would not change that
    figure: float | None  # None if unknown
    bound: float | None
    words: str


def afs_gains(measured: ScoreSet) -> dict[Cell, NDArray[np.float64]]:
    """Return the points of AFS that the finalist gains on each question, by cell."""
    gains = {}
    for cell in measured.baselines:
        finalist, champion = question_figures(measured, cell)
        gains[cell] = afs_values(finalist) - afs_values(champion)
    return gains


def accuracy_gains(measured: ScoreSet, beta: float) -> dict[Cell, NDArray[np.float64]]:
    """Return the points of accuracy that the finalist gains at `beta` over the champion at equal tokens, by cell."""
    gains = {}
    for cell in measured.baselines:
        finalist, champion = question_figures(measured, cell)
        gains[cell] = equal_token_gains(finalist, champion, beta)
    return gains


def pool_questions(values: ValuesByCell, measured: ScoreSet) -> NDArray[np.float64]:
    """Return one value per question, over all cells."""
    return question_values(values, {cell: measured.baselines[cell].questions for cell in values})


def check_held_out(cells: Iterable[Cell], searched: int | None) -> Condition:
    """Check that no search has seen the questions. Never final, because held-out questions can still decide.

    `searched` counts those that the search for the finalist played; None: unknown.
    """
    open_splits = sorted({cell.split for cell in cells} - {Split.HELD_OUT})
    if open_splits:
        text = f"questions of the {' and '.join(open_splits)} split, which searches may see; judge on held-out ones"
    elif searched:
        text = f"the search that found it has seen {searched} of the questions; judge on others"
    else:
        text = "held-out questions" + ("" if searched is None else ", none of which the search has seen")
    return Condition(HELD_OUT, not open_splits and not searched, False, searched, 0, text)


def check_source(advice: Sequence[str]) -> Condition:
    """Check that the static check had no findings."""
    return Condition("static", not advice, True, len(advice), 0, "; ".join(advice) or "no findings in the source")


def check_failures(finalist: ControllerScores) -> Condition:
    """Check that no episode failed."""
    failures = [failure for score in finalist.scores for failure in score.failures]
    text = f"{len(failures)} episodes failed: {failures[0].message}" if failures else "no episode failed"
    return Condition("failures", not failures, True, len(failures), 0, text)


def check_accuracy(gains: NDArray[np.float64], tokens: str, terms: GateTerms) -> Condition:
    """Check non-inferiority at equal tokens; final only if accuracy is significantly below the champion's."""
    low, high = bootstrap_bounds(gains)
    text = f"{gains.mean():+.2f} points {at_equal_tokens(terms)}, {describe_interval(low, high, 90)}; {tokens}"
    return Condition("accuracy", low >= -terms.margin, high < 0, finite_or_none(low), -terms.margin, text)


def at_equal_tokens(terms: GateTerms) -> str:
    """Return in words where accuracy is compared."""
    return f"at the finalist's tokens at β = {terms.beta:g}"


def describe_tokens(measured: ScoreSet, beta: float) -> str:
    """Return the finalist's tokens and accuracy at `beta` relative to the champion's at the same β, as text."""
    ratios, points = [], []
    for cell in measured.baselines:
        (own, theirs) = (
            next(point for point in side.curves[cell].points if point.beta == beta) for side in measured.sides
        )
        ratios.append(own.tokens / theirs.tokens if theirs.tokens else math.inf)
        points.append(own.accuracy - theirs.accuracy)
    return f"at β = {beta:g} it has {np.mean(ratios):.2f} times the tokens and {np.mean(points):+.2f} points"


def check_cells(gains: ValuesByCell, terms: GateTerms) -> Condition:
    """Check that no cell loses more than allowed, significantly."""
    means = {cell: float(values.mean()) for cell, values in gains.items()}
    lost = [
        cell
        for cell, values in gains.items()
        if values.size > 1 and means[cell] < -terms.losing and bootstrap_bounds(values)[1] < 0
    ]
    worst = min(lost or means, key=means.__getitem__)
    text = f"{worst.model} {worst.benchmark}: ΔAFS {means[worst]:+.2f}"
    return Condition("cells", not lost, True, means[worst], -terms.losing, text)


def check_path(measured: ScoreSet, terms: GateTerms) -> Condition:
    """Check the p95 critical path, averaged over cells, at the β where it exceeds its limit most."""
    finalist, champion = ([side.curves[cell] for cell in measured.baselines] for side in measured.sides)
    interval = float(np.mean([baseline.interval for baseline in measured.baselines.values()]))
    mean, bound = mean_paths(finalist), path_limits(champion, interval, terms.slowdown)
    at = int(np.argmax(mean - bound))
    text = f"{mean[at]:,.0f} tokens at β = {finalist[0].points[at].beta:g}, {bound[at]:,.0f} allowed"
    return Condition("path", bool(mean[at] <= bound[at]), True, float(mean[at]), float(bound[at]), text)


def path_limits(
    champion: Sequence[Curve], interval: float, slowdown: float = DEFAULT_TERMS.slowdown
) -> NDArray[np.float64]:
    """Return the longest critical path that a finalist may have at each β, in tokens."""
    return slowdown * mean_paths(champion) + interval


def check_without_each_model(gains: ValuesByCell, measured: ScoreSet) -> Condition:
    """Check that the gain remains if any one model is left out. Never final, because it does not show a loss."""
    left: dict[str, float] = {}
    for model in dict.fromkeys(cell.model for cell in gains):
        rest = {cell: values for cell, values in gains.items() if cell.model != model}
        if rest:
            left[model] = float(pool_questions(rest, measured).mean())
    if not left:
        return Condition("models", True, False, None, 0.0, "only one model; none can be left out")
    model = min(left, key=left.__getitem__)
    text = f"without {model}: ΔAFS {left[model]:+.2f}"
    return Condition("models", left[model] > 0, False, left[model], 0.0, text)


def describe_interval(low: float, high: float, percent: int = 95) -> str:
    """Return an interval as text."""
    return f"{percent} % in [{low:+.2f}, {high:+.2f}]" if math.isfinite(low) else "only one question"


def finite_or_none(bound: float) -> float | None:
    """Return the bound, or None if it is infinite."""
    return bound if math.isfinite(bound) else None
