"""The canary test rarely rejects a canary that is no worse, and soon rejects one that is worse."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator

import pytest

from controllers.rollout_state import RolloutStage
from proxy.rollout.canary_test import CanaryFailure, CanaryTest, EpisodeOutcome
from proxy.types import CanaryMetric

REQUESTS = 500
SCATTER = 0.6  # standard deviation of a request's tokens, in their mean

M = "model"
Draw = Callable[[random.Random], tuple[EpisodeOutcome, bool | None]]
"""Draws a request's outcome and its client's feedback, None without feedback."""


def requests(tokens: float = 3000, failing: float = 0.02, unanswered: float = 0.05, dissatisfied: float = 0.3) -> Draw:
    """Return a source of requests with lognormal tokens, one in three of which has feedback."""
    variance = math.log(1 + SCATTER**2)

    def draw(chance: random.Random) -> tuple[EpisodeOutcome, bool | None]:
        outcome = EpisodeOutcome(
            tokens=round(chance.lognormvariate(math.log(tokens) - variance / 2, math.sqrt(variance))),
            failed=chance.random() < failing,
            answered=chance.random() >= unanswered,
        )
        return outcome, chance.random() >= dissatisfied if chance.random() < 1 / 3 else None

    return draw


def ends(
    streams: int, share: float, canary: Draw, champion: Draw, most: int = REQUESTS
) -> Iterator[tuple[int, CanaryFailure]]:
    """Yield for each canary that was rolled back (after how many requests, the failure)."""
    for seed in range(streams):
        chance, test = random.Random(seed), CanaryTest()
        for number in range(1, most + 1):
            stage = RolloutStage.CANARY if chance.random() < share else RolloutStage.CHAMPION
            outcome, satisfied = (canary if stage is RolloutStage.CANARY else champion)(chance)
            failure = test.observe(stage, outcome, M)
            if satisfied is not None:
                failure = test.record_feedback(stage, satisfied, M)
            if failure is not None:
                yield number, failure
                break


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_canary_equal_to_the_champion_is_almost_never_rejected(share: float) -> None:
    assert len(list(ends(200, share, requests(), requests()))) <= 0.02 * 200


@pytest.mark.slow
def test_a_canary_worse_by_the_margin_is_almost_never_rejected() -> None:
    canary = requests(tokens=3300, failing=0.03, unanswered=0.07, dissatisfied=0.35)
    assert len(list(ends(200, 0.5, canary, requests()))) <= 0.02 * 200


@pytest.mark.parametrize(("tokens", "is_rejected"), [(1080, False), (1200, True)])
def test_constant_extra_tokens_are_rejected_only_beyond_the_margin(tokens: int, is_rejected: bool) -> None:
    test = CanaryTest()
    for _ in range(5000):
        test.observe(RolloutStage.CHAMPION, EpisodeOutcome(1000, False, True), M)
        test.observe(RolloutStage.CANARY, EpisodeOutcome(tokens, False, True), M)
    assert (test.failure is not None) == is_rejected


def test_a_better_canary_is_never_rejected() -> None:
    assert not list(ends(50, 0.5, requests(tokens=1500, failing=0, unanswered=0, dissatisfied=0), requests()))


@pytest.mark.slow
def test_checking_after_each_of_5000_requests_rejects_no_more_often() -> None:
    assert len(list(ends(50, 0.5, requests(), requests(), most=5000))) <= 0.02 * 50


@pytest.mark.parametrize(
    ("canary", "share", "within", "metric"),
    [
        (requests(tokens=6000), 0.5, 300, CanaryMetric.TOKENS),
        (requests(tokens=6000), 0.1, 800, CanaryMetric.TOKENS),
        (requests(failing=0.22), 0.5, 500, CanaryMetric.FAILURES),
        (requests(unanswered=0.35), 0.5, 500, CanaryMetric.UNANSWERED),
        (requests(dissatisfied=0.8), 0.5, 800, CanaryMetric.FEEDBACK),
    ],
)
def test_a_worse_canary_is_rejected_for_the_metric_that_is_worse(
    canary: Draw, share: float, within: int, metric: CanaryMetric
) -> None:
    rollbacks = list(ends(50, share, canary, requests(), most=within))
    assert len(rollbacks) >= 0.95 * 50
    assert sum(failure.metric is metric for _, failure in rollbacks) >= 0.95 * 50


def test_a_failing_canary_is_rejected_next_to_a_champion_without_failures() -> None:
    rollbacks = list(ends(50, 0.5, requests(failing=0.2), requests(failing=0), most=400))
    assert len(rollbacks) >= 0.95 * 50


def test_a_single_huge_reply_does_not_reject_a_canary() -> None:
    test = CanaryTest()
    for _ in range(20):
        assert test.observe(RolloutStage.CHAMPION, EpisodeOutcome(1000, False, True), M) is None
        assert test.observe(RolloutStage.CANARY, EpisodeOutcome(1000, False, True), M) is None
    test.observe(RolloutStage.CHAMPION, EpisodeOutcome(1000, False, True), M)
    assert test.observe(RolloutStage.CANARY, EpisodeOutcome(10**9, False, True), M) is None


def test_a_canary_is_not_rejected_without_requests_of_the_champion() -> None:
    test = CanaryTest()
    assert all(test.observe(RolloutStage.CANARY, EpisodeOutcome(10**6, True, False), M) is None for _ in range(1000))


def test_the_failure_is_kept_with_its_metric_e_value_and_pairs() -> None:
    test = CanaryTest()
    failures = []
    for _ in range(60):
        test.observe(RolloutStage.CHAMPION, EpisodeOutcome(1000, False, True), M)
        failures.append(test.observe(RolloutStage.CANARY, EpisodeOutcome(1000, True, True), M))
    first = next(failure for failure in failures if failure is not None)
    assert first.metric is CanaryMetric.FAILURES
    assert first.e_value >= test.limit
    assert first.pairs == failures.index(first) + 1 < 20
    assert test.failure is not None


def test_requests_are_paired_only_with_requests_on_the_same_model() -> None:
    """Check that a canary on a model with long replies is not compared with a champion on one with short replies."""
    test = CanaryTest()
    for _ in range(1000):
        assert test.observe(RolloutStage.CHAMPION, EpisodeOutcome(100, False, True), "short replies") is None
        assert test.observe(RolloutStage.CANARY, EpisodeOutcome(10_000, True, False), "long replies") is None
        assert test.record_feedback(RolloutStage.CHAMPION, True, "short replies") is None
        assert test.record_feedback(RolloutStage.CANARY, False, "long replies") is None


def test_tokens_are_counted_in_units_of_each_model() -> None:
    test = CanaryTest()
    for _ in range(1000):
        for model, tokens in (("short replies", 100), ("long replies", 100_000)):
            test.observe(RolloutStage.CHAMPION, EpisodeOutcome(tokens, False, True), model)
            test.observe(RolloutStage.CANARY, EpisodeOutcome(tokens, False, True), model)
    assert test.failure is None
    pairs = 0
    while test.failure is None and pairs < 200:
        test.observe(RolloutStage.CHAMPION, EpisodeOutcome(100, False, True), "short replies")
        test.observe(RolloutStage.CANARY, EpisodeOutcome(400, False, True), "short replies")
        pairs += 1
    assert test.failure is not None
    assert (test.failure.metric, pairs > 10) == (CanaryMetric.TOKENS, True)
