"""Whether a canary is worse than the champion, found out by betting on it request by request.

A **quality** is a number a request has, of which less is better: its tokens, whether its controller failed, whether it
ended without an answer, whether its client was not content. Requests are paired as they end, a canary's with the latest
champion's that has no pair yet. Who serves a request is drawn by its id, so under the null

    H0   the canary's mean is no more than the champion's and a margin

a pair's difference d (champion's value and margin taken off, in a unit settled before, clipped to [-1, 1]) has a
mean of at most 0 whatever came before. A gambler who begins with 1 and in every pair stakes the fraction λ of what he
has on d > 0 has, after n pairs,

    K_n(λ) = (1 + λ d_1) … (1 + λ d_n),   0 < λ < 1

which is a non-negative supermartingale, and so is the mean of several such gamblers' wealth: an e-process. By Ville's
inequality it ever reaches 1/a with probability at most a, however often one looks and whenever one stops. With α / 4
for each of four qualities, a canary that is no worse is ever rolled back with probability at most α.

Gamblers with λ on a grid need not know how far apart the means are or how the values scatter: one of them has nearly
the best λ, and in log wealth the mean is at most log(len(BETS)) behind him. Source: I. Waudby-Smith and A. Ramdas,
"Estimating means of bounded random variables by betting", 2023 (JRSS B 86(1), 2024; arXiv:2010.09686).

What is tested is the mean of the clipped difference: one monstrous reply cannot roll a canary back, many can. What is
found out is a difference that lasts: a canary that has done well for long has to do badly for long.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from controllers.rollout_state import RolloutStage
from proxy.types import CanaryMetric

ALPHA: Final = 0.01
"""How probable it may be that a canary which is no worse is ever rolled back."""
BETS: Final = (0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9)
"""Fractions λ of their wealth that the gamblers stake."""
DEAREST: Final = 2.0
"""Times the champion's mean tokens: the difference that counts 1, and so does every larger one."""


MARGINS: Final[Mapping[CanaryMetric, float]] = {
    CanaryMetric.TOKENS: 0.1 / DEAREST,  # a tenth of the champion's mean
    CanaryMetric.FAILURES: 0.01,
    CanaryMetric.UNANSWERED: 0.02,
    CanaryMetric.FEEDBACK: 0.05,
}
"""How much worse a canary may be."""


@dataclass(frozen=True, slots=True)
class EpisodeOutcome:
    """How a request ended that a controller decided."""

    tokens: int  # it cost
    failed: bool  # the controller did, and the baseline took over
    answered: bool  # it stopped because its controller answered


class CanaryFailure(NamedTuple):
    """Why a canary has to go."""

    quality: CanaryMetric
    wealth: float
    pairs: int


class CanaryTest:
    """One canary beside one champion."""

    def __init__(self, alpha: float = ALPHA) -> None:
        self.limit = len(CanaryMetric) / alpha
        self._games = {quality: _Game(MARGINS[quality]) for quality in CanaryMetric}
        self._spent = 0  # tokens of the champion's requests so far
        self._count = 0  # and how many they were
        self._unit = 0.0  # tokens that count 1, settled before either of a pair has been seen; 0: not yet

    def observe(self, stage: RolloutStage, outcome: EpisodeOutcome) -> CanaryFailure | None:
        """Take notice of a request; the verdict if the canary has to go."""
        for quality, value in self._values(outcome).items():
            self._games[quality].take(stage, value)
        if stage is RolloutStage.CHAMPION:
            self._spent += outcome.tokens
            self._count += 1
        if self._count and not self._games[CanaryMetric.TOKENS].waiting:
            self._unit = max(1.0, DEAREST * self._spent / self._count)
        return self.verdict

    def record_feedback(self, stage: RolloutStage, content: bool) -> CanaryFailure | None:
        """Take notice of what a client says of an answer after its request has ended; as `observe`."""
        self._games[CanaryMetric.FEEDBACK].take(stage, float(not content))
        return self.verdict

    @property
    def verdict(self) -> CanaryFailure | None:
        """Why the canary has to go, by all that has been seen; None while nothing is proven."""
        worst = max(CanaryMetric, key=lambda quality: self._games[quality].wealth)
        game = self._games[worst]
        return CanaryFailure(worst, game.wealth, game.pairs) if game.wealth >= self.limit else None

    def _values(self, outcome: EpisodeOutcome) -> dict[CanaryMetric, float]:
        """An outcome in numbers of which less is better."""
        values = {CanaryMetric.FAILURES: float(outcome.failed), CanaryMetric.UNANSWERED: float(not outcome.answered)}
        if self._unit:
            values[CanaryMetric.TOKENS] = outcome.tokens / self._unit
        return values


class BettingProcess:
    """Gamblers who bet that a mean is above 0. Each begins with 1 and stakes a fraction of BETS."""

    def __init__(self) -> None:
        self.bets = 0  # settled so far
        self._wealth = [1.0] * len(BETS)

    @property
    def wealth(self) -> float:
        """The mean of their wealth: the e-value."""
        return sum(self._wealth) / len(self._wealth)

    def settle(self, difference: float) -> None:
        """Pay a bet; `difference` is clipped to [-1, 1]."""
        clipped = max(-1.0, min(1.0, difference))
        self._wealth = [had * (1 + bet * clipped) for had, bet in zip(self._wealth, BETS, strict=True)]
        self.bets += 1


class _Game:
    """The gamblers on one quality."""

    def __init__(self, margin: float) -> None:
        self.waiting: dict[RolloutStage, float] = {}  # the latest value of a stage, until the other has one
        self._margin = margin
        self._gamblers = BettingProcess()

    @property
    def pairs(self) -> int:
        """Pairs of requests so far."""
        return self._gamblers.bets

    @property
    def wealth(self) -> float:
        """The e-value."""
        return self._gamblers.wealth

    def take(self, stage: RolloutStage, value: float) -> None:
        """A request's value; with one of the other stage it makes a pair."""
        self.waiting[stage] = value
        if len(self.waiting) == 2:
            self._gamblers.settle(
                self.waiting[RolloutStage.CANARY] - self.waiting[RolloutStage.CHAMPION] - self._margin
            )
            self.waiting.clear()
