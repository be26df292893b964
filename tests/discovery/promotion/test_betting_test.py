"""The anytime-valid test: its error with a look after every value, its power, and its intervals, by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from discovery.promotion.betting_test import bet, confidence_interval, log_wealth, lower_bound, values_missing

ALPHA = 0.05
RUNS = 400
LENGTH = 200


def rejections(values: NDArray[np.float64], bound: float) -> int:
    """Count the runs that reject at any look, if there is one after every value."""
    return int((log_wealth(values, bound).max(axis=1) >= math.log(1 / ALPHA)).sum())


def nulls(rng: np.random.Generator) -> dict[str, tuple[NDArray[np.float64], float]]:
    """Return values without a gain, and the bound at which they are tested."""
    size = (RUNS, LENGTH)
    return {
        "normal": (rng.normal(0, 6, size), 25),
        "larger than the bound": (40 * rng.standard_t(2, size), 25),
        "mostly zero": (np.where(rng.random(size) < 0.9, 0, rng.normal(0, 20, size)), 25),
        "rare large losses": (np.where(rng.random(size) < 0.01, -99, 1), 100),
        "coin flips": (100 * rng.choice([-1.0, 1.0], size), 100),
        "of depending size": (np.cumsum(rng.normal(0, 1, size), axis=1) * rng.choice([-1.0, 1.0], size), 25),
    }


@pytest.mark.parametrize("kind", nulls(np.random.default_rng(0)))
def test_without_a_gain_a_look_after_every_value_rejects_no_more_often_than_alpha(kind: str) -> None:
    values, bound = nulls(np.random.default_rng(1))[kind]
    assert rejections(values, bound) <= 34  # 20 are allowed on average; more than 34 come up once in a thousand


def test_peeking_at_a_test_for_a_fixed_number_would_reject_more_often() -> None:
    values = nulls(np.random.default_rng(1))["normal"][0]
    counts = np.arange(1, LENGTH + 1)
    means = values.cumsum(axis=1) / counts
    errors = np.sqrt(np.maximum(values**2, 0).cumsum(axis=1) / counts**2)
    assert ((means / errors)[:, 19:].max(axis=1) > 1.645).sum() > 60


@pytest.mark.parametrize(("gain", "spread", "length"), [(3, 6, 80), (2, 5, 120), (3, 12, 200)])
def test_a_real_gain_is_detected(gain: float, spread: float, length: int) -> None:
    values = np.random.default_rng(2).normal(gain, spread, (RUNS, length))
    assert rejections(values, 25) > 0.8 * RUNS


def test_the_default_bound_takes_about_a_third_of_the_questions_of_the_largest() -> None:
    values = np.random.default_rng(7).normal(2, 5, (RUNS, 500))
    narrow, wide = ((log_wealth(values, bound) >= math.log(1 / ALPHA)).argmax(axis=1) for bound in (25, 100))
    assert 0.2 < np.median(narrow) / np.median(wide) < 0.4


def test_the_final_evidence_does_not_depend_on_the_order() -> None:
    values = np.random.default_rng(3).normal(1, 6, 50)
    assert bet(values, 25).e_value == pytest.approx(bet(values[::-1], 25).e_value)
    assert bet(values, 25).highest >= max(1.0, bet(values, 25).e_value)


def test_no_values_are_no_evidence() -> None:
    nothing = np.array([])
    assert (bet(nothing, 25).p, confidence_interval(nothing, 25, 0.05)) == (1.0, (-25, 25))
    assert values_missing(nothing, 25, 0.05) is None


def test_a_loss_beyond_the_bound_leaves_the_cautious_gamblers_some_wealth() -> None:
    result = bet(np.array([5.0] * 40 + [-99.0]), 25)
    assert 0 < result.e_value < result.highest
    assert math.isfinite(bet(np.full(2000, 24.0), 25).e_value)


@pytest.mark.slow
def test_the_confidence_sequence_contains_the_mean_at_all_looks() -> None:
    rng = np.random.default_rng(4)
    missed = 0
    for _ in range(60):
        values = rng.normal(1.5, 6, 120)
        intervals = [confidence_interval(values[:count], 25, 0.1) for count in (10, 30, 60, 120)]
        missed += not all(low <= 1.5 <= high for low, high in intervals)
        widths = [high - low for low, high in intervals]
        assert widths == sorted(widths, reverse=True)
    assert missed <= 13  # 6 are allowed on average; more than 13 come up twice in a thousand


@pytest.mark.parametrize("mean", [2, 6])
def test_the_lower_bound_is_where_the_test_starts_to_reject(mean: float) -> None:
    values = np.random.default_rng(5).normal(mean, 5, 100)
    low = lower_bound(values, 25, 0.05)
    assert (low > 0) == (mean == 6)
    reach = 25 + max(low, 0)
    assert bet(values - low + 0.01, reach).highest >= 20 > bet(values - low - 0.01, reach).highest


def test_the_interval_of_values_at_their_bounds_contains_their_mean() -> None:
    values = np.tile([25.0] * 9 + [-25.0], 100)  # less 20, a loss is 45: clipped at 25, it would be too cheap
    for sign in (1, -1):
        low, high = confidence_interval(sign * values, 25, 0.05)
        assert low < sign * 20 < high


def test_the_missing_values_are_about_as_many_as_it_takes() -> None:
    rng = np.random.default_rng(6)
    values = rng.normal(2, 5, 4000)
    missing = values_missing(values[:30], 25, 0.001)
    taken = int((log_wealth(values, 25) >= math.log(1000)).argmax()) + 1
    assert missing is not None
    assert 0.4 < (30 + missing) / taken < 2.5
    assert values_missing(values[:1000], 25, 0.001) == 0
    assert values_missing(-values[:30], 25, 0.001) is None
