"""Choose the controller of each model among several, by cross-validation over questions.

A controller's gain on a question is its contribution to the AFS minus the default's (`question_gains.py`), so that the
mean gain is the difference of AFS. With 30 questions the best of several mean gains is often above 0 by chance. So a
controller replaces the default for a model only after two corrections:

1. Cross-validation. The questions are split into folds. For each fold the controller with the largest mean gain on the
   other folds is chosen, or the default if no mean is above 0. Its gains on the fold are the held-out gains. Their
   mean A is what this way of choosing gains on questions that it has not seen; s is the standard error of A over
   questions.
2. Shrinkage towards the default (empirical Bayes). True advantages are assumed to be normal around 0, the default's,
   with variance t². It is estimated over the models as max(0, mean of A² - s²). The posterior advantage of a model has
   mean w·A and standard deviation √w·s, where w = t² / (t² + s²).

The controller with the largest mean gain on all questions is chosen if the lower bound of the posterior is above 0 at a
given confidence: w·A - q·√w·s > 0, where q is the quantile of Student's t distribution. That is A > q·s·√(1 + s²/t²):
the standard error counts the more, the less the models differ. `tests/discovery/promotion/choice_simulation.py` has
simulated how often this picks a controller that is worse than the default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from discovery.evaluation.afs import mean_paths
from discovery.evaluation.paired_statistics import bootstrap_bounds, question_values, student_quantile
from discovery.evaluation.score_set import ControllerScores, ScoreSet
from discovery.evaluation.scores import BOTH_SIDES
from discovery.promotion.conditions import path_limits
from discovery.promotion.question_gains import afs_values, figures_of

FOLDS: Final = 10
FEWEST_QUESTIONS: Final = 10
"""Questions of a model below which the default is always chosen."""
CONFIDENCE: Final = 0.9
"""Default probability that a chosen controller is better than the default."""
SLOWDOWN: Final = 1.25
"""Default limit of a candidate's critical path, as a multiple of the default's, plus one interval."""


@dataclass(frozen=True)
class ModelGains:
    """Gains of the candidates over the default on the questions of one model."""

    questions: Sequence[str]  # ids; folds are made in this order
    gains: NDArray[np.float64]  # (questions, candidates), in points of AFS
    allowed: NDArray[np.bool_]  # (candidates,): may serve this model

    def best(self) -> int | None:
        """Return the allowed candidate with the largest mean gain; None if no mean gain is above 0."""
        means = np.where(self.allowed, self.gains.mean(axis=0), -math.inf)
        best = int(means.argmax())
        return best if means[best] > 0 else None

    def select(self, rows: NDArray[np.bool_]) -> ModelGains:
        """Return the gains on some of the questions."""
        questions = [question for question, is_in in zip(self.questions, rows, strict=True) if is_in]
        return ModelGains(questions, self.gains[rows], self.allowed)

    def of(self, candidate: int | None) -> NDArray[np.float64]:
        """Return the gains of a candidate; zeros for the default: (questions,)."""
        return np.zeros(len(self.questions)) if candidate is None else self.gains[:, candidate]


class Choice(NamedTuple):
    """The candidate chosen for a model, and the evidence, in points of AFS."""

    candidate: int | None  # None: the default
    advantage: float  # over the default, cross-validated
    error: float  # its standard error
    shrunk: float  # advantage, shrunk towards 0
    bound: float  # lower bound of the shrunk advantage; above 0 if a candidate is chosen
    questions: int


def gains_over(
    default: ControllerScores, candidates: Sequence[ControllerScores], measured: ScoreSet, slowdown: float = SLOWDOWN
) -> dict[str, ModelGains]:
    """Return the gains of the candidates over the default by model; the cells of a model count equally.

    A candidate may serve a model if its critical path is at most `slowdown` times the default's plus an interval.
    """
    by_model = {}
    for model in dict.fromkeys(cell.model for cell in measured.baselines):
        cells = [cell for cell in measured.baselines if cell.model == model]
        places = {cell: measured.baselines[cell].questions for cell in cells}
        values = [
            question_values({cell: afs_values(figures_of(side, measured, cell)) for cell in cells}, places)
            for side in (default, *candidates)
        ]
        interval = float(np.mean([measured.baselines[cell].interval for cell in cells]))
        limits = path_limits([default.curves[cell] for cell in cells], interval, slowdown)
        paths = [mean_paths([side.curves[cell] for cell in cells]) for side in candidates]
        allowed = [bool((path <= limits).all()) for path in paths]
        benchmark = {question: cell.benchmark for cell in reversed(cells) for question in places[cell]}
        questions = sorted(benchmark)  # as `question_values` has them
        order = sorted(range(len(questions)), key=lambda at: (benchmark[questions[at]], questions[at]))
        gains = np.column_stack([of_candidate - values[0] for of_candidate in values[1:]])[order]
        by_model[model] = ModelGains([questions[at] for at in order], gains, np.array(allowed))
    return by_model


def choose(by_model: Mapping[str, ModelGains], confidence: float = CONFIDENCE) -> dict[str, Choice]:
    """Choose a candidate, or the default, for each model, as the module describes."""
    held_out = {model: _held_out_gains(gains) for model, gains in by_model.items()}
    advantages = {model: float(values.mean()) for model, values in held_out.items()}
    errors = {model: _standard_error(values) for model, values in held_out.items()}
    enough = [model for model in by_model if len(by_model[model].questions) >= FEWEST_QUESTIONS]
    excess = [advantages[model] ** 2 - errors[model] ** 2 for model in enough]
    variance = max(0.0, float(np.mean(excess))) if excess else 0.0
    choices = {}
    for model, gains in by_model.items():
        advantage, error, count = advantages[model], errors[model], len(gains.questions)
        weight = variance / (variance + error**2) if variance else 0.0
        shrunk = weight * advantage
        quantile = student_quantile(confidence, count - 1) if count > 1 else math.inf
        bound = shrunk - (quantile * math.sqrt(weight) * error if weight and error else 0.0)
        candidate = gains.best() if model in enough and bound > 0 else None
        choices[model] = Choice(candidate, advantage, error, shrunk, bound, count)
    return choices


def _held_out_gains(gains: ModelGains) -> NDArray[np.float64]:
    """Return the gain on each question of the candidate that is best on the other folds: (questions,)."""
    fold = np.arange(len(gains.questions)) % FOLDS
    held_out = np.zeros(len(gains.questions))
    for number in range(min(FOLDS, len(gains.questions))):
        inside = fold == number
        if not inside.all():
            held_out[inside] = gains.select(inside).of(gains.select(~inside).best())
    return held_out


def _standard_error(values: NDArray[np.float64]) -> float:
    return float(values.std(ddof=1)) / math.sqrt(values.size) if values.size > 1 else math.inf


# Comparison


class Advantage(NamedTuple):
    """A mean difference of AFS with its 95 % interval over questions; the bounds are infinite with one question."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class ChoiceComparison:
    """Cross-validated advantages of a controller for each model over one for all models."""

    over_default: Advantage  # mean over models
    over_single: Advantage  # over the one controller that is best for all models in the other folds
    models: Mapping[str, tuple[Advantage, Advantage]]  # both, by model
    chosen: Mapping[str, Sequence[int | None]]  # candidate of each model by fold; None: the default
    singles: Sequence[int | None]  # the one controller for all models by fold


def compare_choices(by_model: Mapping[str, ModelGains], confidence: float = CONFIDENCE) -> ChoiceComparison:
    """Compare the choice for each model with one controller for all, on questions that neither choice has seen.

    Both are chosen on nine tenths of the questions, for all models together, and compared on the others.
    """
    folds = _folds_of_all(by_model)
    over_default, over_single = ({model: np.zeros(len(by_model[model].questions)) for model in by_model} for _ in "12")
    chosen: dict[str, list[int | None]] = {model: [] for model in by_model}
    singles = []
    for number in range(FOLDS):
        inside = {model: folds[model] == number for model in by_model}
        seen = {model: gains.select(~inside[model]) for model, gains in by_model.items()}
        choices = choose(seen, confidence)
        single = _best_for_all(seen)
        singles.append(single)
        for model, gains in by_model.items():
            chosen[model].append(choices[model].candidate)
            unseen = gains.select(inside[model])
            over_default[model][inside[model]] = unseen.of(choices[model].candidate)
            over_single[model][inside[model]] = unseen.of(choices[model].candidate) - unseen.of(single)
    questions = {model: by_model[model].questions for model in by_model}
    return ChoiceComparison(
        over_default=_advantage(question_values(over_default, questions)),
        over_single=_advantage(question_values(over_single, questions)),
        models={model: (_advantage(over_default[model]), _advantage(over_single[model])) for model in by_model},
        chosen=chosen,
        singles=singles,
    )


def _folds_of_all(by_model: Mapping[str, ModelGains]) -> dict[str, NDArray[np.int64]]:
    """Return the fold of each question by model. A question is in the same fold for every model."""
    every = list(dict.fromkeys(question for gains in by_model.values() for question in gains.questions))
    fold = {question: at % FOLDS for at, question in enumerate(every)}
    return {model: np.array([fold[question] for question in gains.questions]) for model, gains in by_model.items()}


def _best_for_all(by_model: Mapping[str, ModelGains]) -> int | None:
    """Return the candidate, allowed for every model, with the largest mean gain over models; None: the default."""
    allowed = np.all([gains.allowed for gains in by_model.values()], axis=0)
    means = np.mean([gains.gains.mean(axis=0) for gains in by_model.values()], axis=0)
    means = np.where(allowed, means, -math.inf)
    best = int(means.argmax())
    return best if means[best] > 0 else None


def _advantage(values: NDArray[np.float64]) -> Advantage:
    return Advantage(float(values.mean()), *bootstrap_bounds(values, BOTH_SIDES))
