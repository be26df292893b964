"""Sequential test by betting of whether a canary is worse than the champion.

A **metric** is a number per request, of which less is better: its tokens, whether its controller failed, whether it
ended without an answer, or whether its client was dissatisfied. Requests are paired as they end: each canary request
with the latest unpaired champion request on the same model, because models differ more than controllers do. The request
id decides at random which controller serves, so under the null hypothesis

    H0   on every model, the canary's mean is at most the champion's mean plus a margin

the difference d of a pair has a mean of at most 0, whatever happened before. The difference is canary minus champion
minus margin, in a unit fixed in advance, clipped to [-1, 1]. A gambler starts with wealth 1 and stakes the fraction λ
of it on d > 0 in every pair. After n pairs the wealth is

    K_n(λ) = (1 + λ d_1) … (1 + λ d_n),   0 < λ < 1

which is a non-negative supermartingale. The mean wealth of several gamblers is one too, an e-process. By Ville's
inequality, the probability that it ever reaches 1/a is at most a, however often it is checked and whenever the test
stops. Each of the four metrics gets α / 4. So a canary that is no worse is rolled back with probability at most α.

A grid of λ needs no knowledge of the means' distance or the values' spread. One λ of the grid is nearly the best, and
the log of the mean wealth is at most log(len(BETS)) below that gambler's log wealth. Source: I. Waudby-Smith and
A. Ramdas, "Estimating means of bounded random variables by betting", 2023 (JRSS B 86(1), 2024; arXiv:2010.09686).

The test is about the mean of the clipped difference, so a single extreme reply cannot roll a canary back. It detects
lasting differences: a canary that did well for a long time must do badly for a long time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from controllers.rollout_state import RolloutStage
from proxy.types import CanaryMetric

ALPHA: Final = 0.01
"""Maximum probability that the processes of a proxy ever roll back a canary that is no worse. Each gets a part."""
BETS: Final = (0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9)
"""Fractions λ of the wealth that the gamblers stake, one per gambler."""
TOKEN_UNIT: Final = 2.0
"""Unit of token differences, as a multiple of the champion's mean. Larger differences are clipped to 1."""
MARGINS: Final[Mapping[CanaryMetric, float]] = {
    CanaryMetric.TOKENS: 0.1 / TOKEN_UNIT,  # a tenth of the champion's mean
    CanaryMetric.FAILURES: 0.01,
    CanaryMetric.UNANSWERED: 0.02,
    CanaryMetric.FEEDBACK: 0.05,
}
"""Margin by which a canary may be worse, in each metric."""


@dataclass(frozen=True, slots=True)
class EpisodeOutcome:
    """Outcome of a request that a controller decided."""

    tokens: int
    failed: bool  # the controller failed and the baseline took over
    answered: bool  # it stopped because its controller answered


class CanaryFailure(NamedTuple):
    """The evidence for rolling a canary back."""

    metric: CanaryMetric
    e_value: float
    pairs: int


class CanaryTest:
    """The test of one canary against one champion, on every model that they serve."""

    def __init__(self, alpha: float = ALPHA) -> None:
        self.limit = len(CanaryMetric) / alpha  # e-value that rolls the canary back
        self._tests = {metric: _PairedTest(MARGINS[metric]) for metric in CanaryMetric}
        self._units: dict[str, _TokenUnit] = {}  # by model

    def observe(self, stage: RolloutStage, outcome: EpisodeOutcome, model: str) -> CanaryFailure | None:
        """Record a request. Return the evidence if the canary has to be rolled back."""
        unit = self._units.setdefault(model, _TokenUnit())
        for metric, value in _values(outcome, unit).items():
            self._tests[metric].observe(stage, value, model)
        if stage is RolloutStage.CHAMPION:
            unit.champion_tokens += outcome.tokens
            unit.champion_requests += 1
        if unit.champion_requests and not self._tests[CanaryMetric.TOKENS].is_waiting(model):
            unit.tokens = max(1.0, TOKEN_UNIT * unit.champion_tokens / unit.champion_requests)
        return self.failure

    def record_feedback(self, stage: RolloutStage, satisfied: bool, model: str) -> CanaryFailure | None:
        """Record feedback on an ended request. Return the evidence if the canary has to be rolled back."""
        self._tests[CanaryMetric.FEEDBACK].observe(stage, float(not satisfied), model)
        return self.failure

    def forget(self, model: str) -> None:
        """Forget the unpaired values on a model that is served no longer. The evidence stays."""
        self._units.pop(model, None)
        for test in self._tests.values():
            test.forget(model)

    @property
    def failure(self) -> CanaryFailure | None:
        """The evidence for a rollback, or None while it is not enough."""
        worst = max(CanaryMetric, key=lambda metric: self._tests[metric].e_value)
        test = self._tests[worst]
        return CanaryFailure(worst, test.e_value, test.pairs) if test.e_value >= self.limit else None


@dataclass(slots=True)
class _TokenUnit:
    """The tokens that count as 1 on a model."""

    tokens: float = 0.0  # fixed before either request of a pair is seen; 0 if not fixed yet
    champion_tokens: int = 0
    champion_requests: int = 0


def _values(outcome: EpisodeOutcome, unit: _TokenUnit) -> dict[CanaryMetric, float]:
    """Return an outcome as numbers of which less is better."""
    values = {
        CanaryMetric.FAILURES: float(outcome.failed),
        CanaryMetric.UNANSWERED: float(not outcome.answered),
    }
    if unit.tokens:
        values[CanaryMetric.TOKENS] = outcome.tokens / unit.tokens
    return values


class BettingProcess:
    """Gamblers who bet that a mean is above 0. Each starts with wealth 1 and stakes a fraction of BETS."""

    def __init__(self) -> None:
        self.bets = 0  # settled so far
        self._wealth = [1.0] * len(BETS)

    @property
    def e_value(self) -> float:
        """The mean wealth of the gamblers."""
        return sum(self._wealth) / len(self._wealth)

    def settle(self, difference: float) -> None:
        """Settle a bet. `difference` is clipped to [-1, 1]."""
        clipped = max(-1.0, min(1.0, difference))
        self._wealth = [wealth * (1 + bet * clipped) for wealth, bet in zip(self._wealth, BETS, strict=True)]
        self.bets += 1


class _PairedTest:
    """The bets on one metric. Both requests of a pair are on the same model; the wealth is that of all models."""

    def __init__(self, margin: float) -> None:
        self._unpaired: dict[str, dict[RolloutStage, float]] = {}
        """By model, the latest value of a stage until the other stage has one."""
        self._margin = margin
        self._process = BettingProcess()

    @property
    def pairs(self) -> int:
        """Number of pairs so far."""
        return self._process.bets

    @property
    def e_value(self) -> float:
        """The evidence against the canary."""
        return self._process.e_value

    def is_waiting(self, model: str) -> bool:
        """Return whether a model has an unpaired value."""
        return model in self._unpaired

    def forget(self, model: str) -> None:
        """Forget an unpaired value."""
        self._unpaired.pop(model, None)

    def observe(self, stage: RolloutStage, value: float, model: str) -> None:
        """Record a request's value, and bet if the other stage has an unpaired one on the same model."""
        values = self._unpaired.setdefault(model, {})
        values[stage] = value
        if len(values) == 2:
            self._process.settle(values[RolloutStage.CANARY] - values[RolloutStage.CHAMPION] - self._margin)
            del self._unpaired[model]
