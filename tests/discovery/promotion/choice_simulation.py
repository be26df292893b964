"""Simulate how often a choice of controllers is worse than the default, and what it gains: a table in Markdown.

    python -m tests.discovery.promotion.choice_simulation

True differences of AFS are drawn for each model and candidate. The differences on single questions have a standard
deviation of 8 points, as `short_m_at_k` has against adaptive consistency on AIME24 and AIME25. 70 % of the questions
show no difference, as most questions are solved by all controllers or by none. Half of the variance is common to all
candidates. Some questions are easier or harder for all controllers, which makes no difference here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from discovery.promotion.controller_choice import CONFIDENCE, ModelGains, choose

CANDIDATES: Final = 4
SPREAD: Final = 8.0  # standard deviation over questions, in points of AFS
DIFFERING: Final = 0.3  # share of questions that show a difference
COMMON: Final = 0.5  # share of the variance that candidates have in common
MODELS_DRAWN: Final = 2000  # per row, in as many calibrations as that takes


class Scenario(NamedTuple):
    """The truth of a simulation."""

    name: str
    mean: float  # of the true differences, in points of AFS
    deviation: float  # of the true differences
    models: int = 10
    questions: int = 30


class Outcome(NamedTuple):
    """The result of a way of choosing, over all simulated models."""

    chosen: float  # percent of models for which another controller than the default was chosen
    worse: float  # percent of models for which a controller was chosen that is truly worse than the default
    gain: float  # mean true gain over the default, in points of AFS


SCENARIOS: Final = (
    Scenario("all are worse by 0.5", -0.5, 0.0),
    Scenario("all are worse by 0.5, one model", -0.5, 0.0, models=1),
    Scenario("0 ± 0.5", 0.0, 0.5),
    Scenario("0 ± 1.5", 0.0, 1.5),
    Scenario("0 ± 1.5, one model", 0.0, 1.5, models=1),
    Scenario("-1 ± 1.5", -1.0, 1.5),
    Scenario("-1 ± 4", -1.0, 4.0),
    Scenario("-1 ± 4, one model", -1.0, 4.0, models=1),
    Scenario("0 ± 1.5, 120 questions", 0.0, 1.5, questions=120),
    Scenario("0 ± 1.5, 400 questions", 0.0, 1.5, questions=400),
)


def simulate(
    scenario: Scenario, drawn: int = MODELS_DRAWN, confidence: float = CONFIDENCE, seed: int = 0
) -> tuple[Outcome, Outcome, float]:
    """Return the outcomes of `choose` and of the best mean, and the mean gain of the truly best controller."""
    rng = np.random.default_rng(seed)
    ours: list[float | None] = []
    naive: list[float | None] = []
    best = []
    for _ in range(max(1, drawn // scenario.models)):
        truths, by_model = _draw(rng, scenario)
        choices = choose(by_model, confidence)
        for model, truth in truths.items():
            candidate, largest = choices[model].candidate, by_model[model].best()
            ours.append(None if candidate is None else float(truth[candidate]))
            naive.append(None if largest is None else float(truth[largest]))
            best.append(max(0.0, float(truth.max())))
    return _outcome(ours), _outcome(naive), float(np.mean(best))


def _draw(rng: np.random.Generator, scenario: Scenario) -> tuple[dict[str, NDArray[np.float64]], dict[str, ModelGains]]:
    """Return the true gains of the candidates by model, and their gains on questions."""
    questions = [str(number) for number in range(scenario.questions)]
    truths, by_model = {}, {}
    for number in range(scenario.models):
        truth = rng.normal(scenario.mean, scenario.deviation, CANDIDATES)
        common = np.sqrt(COMMON) * _sparse_noise(rng, (scenario.questions, 1))
        own = np.sqrt(1 - COMMON) * _sparse_noise(rng, (scenario.questions, CANDIDATES))
        truths[str(number)] = truth
        by_model[str(number)] = ModelGains(questions, truth + SPREAD * (common + own), np.ones(CANDIDATES, bool))
    return truths, by_model


def _sparse_noise(rng: np.random.Generator, shape: tuple[int, int]) -> NDArray[np.float64]:
    noise: NDArray[np.float64] = rng.normal(size=shape) * (rng.random(shape) < DIFFERING) / np.sqrt(DIFFERING)
    return noise


def _outcome(gains: list[float | None]) -> Outcome:
    chosen = [gain for gain in gains if gain is not None]
    worse = sum(gain < 0 for gain in chosen)
    return Outcome(100 * len(chosen) / len(gains), 100 * worse / len(gains), sum(chosen) / len(gains))


def rows() -> Iterator[str]:
    """Yield the table in Markdown, line by line."""
    yield "| true differences | chosen | worse than the default | gain | best mean: worse | gain | best possible |"
    yield "|---|---|---|---|---|---|---|"
    for scenario in SCENARIOS:
        ours, naive, best = simulate(scenario)
        yield (
            f"| {scenario.name} | {ours.chosen:.1f} % | {ours.worse:.1f} % | {ours.gain:+.2f} | "
            f"{naive.worse:.1f} % | {naive.gain:+.2f} | {best:+.2f} |"
        )


if __name__ == "__main__":
    for line in rows():
        sys.stdout.write(f"{line}\n")
