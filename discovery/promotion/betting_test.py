"""Anytime-valid test by betting of whether a mean is above 0: it may be checked after every value, at no cost.

Gamblers start with wealth 1. Each stakes a fixed fraction λ of its wealth in every bet on x > 0, where x is a value in
units of `bound`, clipped to [-1, 1]. After n values the wealth is

    K_n(λ) = (1 + λ x_1) … (1 + λ x_n),   0 < λ ≤ 1

and the mean wealth over a grid of λ is the e-value. Under the null hypothesis it is a non-negative supermartingale that
starts at 1, so the probability that it ever reaches 1/α is at most α (Ville's inequality). The null hypothesis is
either of

- the values lie within ±`bound` and their mean is at most 0, whatever their distribution;
- each value is as likely to have the opposite sign, as in the sign-flip test, however large values are.

The order of the values does not change the final e-value. Source: I. Waudby-Smith and A. Ramdas, "Estimating means of
bounded random variables by betting", 2023 (JRSS B 86(1), 2024; arXiv:2010.09686), bets on a grid ("diversified Kelly").
`proxy/rollout/canary_test.py` tests canaries alike.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

FRACTIONS: Final = np.linspace(0.05, 1.0, 20)
"""Fractions λ of the wealth that the gamblers stake, one per gambler."""
HALVINGS: Final = 40
"""Halvings of the interval in which a bound of the mean is searched."""


class BettingResult(NamedTuple):
    """State of a test after all values so far."""

    e_value: float  # mean wealth now
    highest: float  # largest mean wealth so far, at least 1

    @property
    def p(self) -> float:
        """The p-value, valid whenever the test is checked or stopped."""
        return min(1.0, 1 / self.highest)


def log_wealth(values: NDArray[np.float64], bound: float) -> NDArray[np.float64]:
    """Return the log of the mean wealth after each value, along the last axis of `values`."""
    units = np.clip(values / bound, -1, 1)[..., None]
    with np.errstate(divide="ignore"):  # a gambler who stakes everything can lose everything
        logs = np.log1p(units * FRACTIONS).cumsum(axis=-2)
    top = logs.max(axis=-1)
    means: NDArray[np.float64] = top + np.log(np.exp(logs - top[..., None]).mean(axis=-1))
    return means


def bet(values: NDArray[np.float64], bound: float) -> BettingResult:
    """Test whether the mean of values, in their order, is above 0."""
    if not values.size:
        return BettingResult(1.0, 1.0)
    logs = log_wealth(values, bound)
    return BettingResult(_exp(float(logs[-1])), _exp(max(0.0, float(logs.max()))))


def _exp(log: float) -> float:
    return math.exp(min(log, 700.0))


def lower_bound(values: NDArray[np.float64], bound: float, level: float) -> float:
    """Return a bound that the mean is ever below with probability at most `level`, whenever this is computed.

    It is the largest m for which values minus m make the gamblers rich; -`bound` if there is none. Above 0, values
    minus m may be as low as -`bound` - m, so that is the unit: a clipped loss would favour the gamblers.
    """
    low, high = -bound, bound
    if not values.size or bet(values - low, bound).highest < 1 / level:
        return low
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if bet(values - middle, bound + max(middle, 0)).highest >= 1 / level else (low, middle)
        )
    return low


def confidence_interval(values: NDArray[np.float64], bound: float, level: float) -> tuple[float, float]:
    """Return the interval of a confidence sequence of the mean, with error `level` over all times together."""
    return lower_bound(values, bound, level / 2), -lower_bound(-values, bound, level / 2)


def values_missing(values: NDArray[np.float64], bound: float, level: float) -> int | None:
    """Return how many more values like these it likely takes until the test at `level` decides; None if it never does.

    The wealth of the gambler who does best grows on average by its logarithm's mean over the values.
    """
    if not values.size:
        return None
    result = bet(values, bound)
    if result.highest >= 1 / level:
        return 0
    with np.errstate(divide="ignore"):
        growth = float(np.log1p(np.clip(values / bound, -1, 1)[:, None] * FRACTIONS).mean(axis=0).max())
    if growth <= 0:
        return None
    return math.ceil((math.log(1 / level) - math.log(max(result.e_value, 1e-300))) / growth)
