"""Paired statistics: whether one controller beats another on the same questions, and what difference could be detected.

One question gives one difference, however many models answered it, because its results are correlated. The only
assumption is that without a real effect each difference is as likely to have the opposite sign.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from statistics import NormalDist
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from discovery.evaluation.scores import SEED, paired_interval

C = TypeVar("C")

EXACT: Final = 14
"""Up to this many questions, all sign flips are enumerated."""
FLIPS: Final = 20_000
"""Sign flips drawn per block for more questions."""
MOST_BLOCKS: Final = 100
ENOUGH: Final = 20
"""So many flips are drawn that the smallest possible p-value is at most the tested level divided by this."""
TIE: Final = 1e-9
"""Sums are equal if they differ by at most this share of the sum of absolute differences, to allow for rounding."""
POWER: Final = 0.8
NORMAL_95: Final = NormalDist().inv_cdf(0.975)
"""Half the width of a 95 % interval of a normal variable, in standard errors."""
ONE_SIDED: Final = 5.0
"""Percent beyond a one-sided bound."""
MOST_QUESTIONS: Final = 1_000_000
"""More questions are never asked for."""


def sequential_alpha(k: int, alpha: float) -> float:
    """Return the level of the k-th test on the same questions, from 1: α·6/(π²k²). All tests together spend `alpha`."""
    return alpha * 6 / (math.pi * k) ** 2


def question_values(
    values: Mapping[C, NDArray[np.float64]], questions: Mapping[C, Sequence[str]]
) -> NDArray[np.float64]:
    """Return one value per question, by question id, from (questions,) values of each cell or model.

    Their mean is the mean over cells. If every cell has the same questions, a value is the question's mean over cells.
    Otherwise cells count equally, as in AFS, and a question counts by the cells it is in.
    """
    every = sorted({question for cell in values for question in questions[cell]})
    place = {question: at for at, question in enumerate(every)}
    sums = np.zeros(len(every))
    for cell, of_cell in values.items():
        np.add.at(sums, [place[question] for question in questions[cell]], of_cell / of_cell.size)
    return sums * len(every) / len(values)


def sign_flip_p(differences: NDArray[np.float64], alpha: float = 1.0) -> float:
    """Return the one-sided p-value of a mean above 0 by a sign-flip test; equal sums count against it.

    Exact for up to `EXACT` non-zero differences. Otherwise from seeded draws, with the observed signs as one of them;
    more are drawn if `alpha`, the tested level, is too small for the usual number.
    """
    moved = differences[differences != 0]  # zeros do not change when they are flipped
    if not moved.size:
        return 1.0
    least = moved.sum() - TIE * np.abs(moved).sum()
    if moved.size <= EXACT:
        return float((_every(moved.size) @ moved >= least).mean())
    blocks = min(MOST_BLOCKS, max(1, math.ceil(ENOUGH / (alpha * FLIPS))))
    reached = sum(int((_drawn(moved.size, block) @ moved >= least).sum()) for block in range(blocks))
    return (1 + reached) / (1 + blocks * FLIPS)


def least_p(differences: NDArray[np.float64]) -> float:
    """Return the smallest p-value that the sign-flip test can give for these differences."""
    return max(0.5**differences.size, 1 / (1 + MOST_BLOCKS * FLIPS) if differences.size > EXACT else 0.0)


@lru_cache(maxsize=1)
def _every(count: int) -> NDArray[np.float64]:
    """Return all sign flips: (2 ** count, count) of ±1."""
    ways = np.arange(2**count)[:, None] >> np.arange(count)
    return np.where(ways & 1, 1.0, -1.0)


@lru_cache(maxsize=1)
def _drawn(count: int, block: int) -> NDArray[np.float64]:
    """Return random sign flips: (FLIPS, count) of ±1, the same for the same arguments."""
    return np.random.default_rng((SEED, block)).choice([-1.0, 1.0], (FLIPS, count))


def bootstrap_bounds(differences: NDArray[np.float64], tail: float = ONE_SIDED) -> tuple[float, float]:
    """Return the mean's lower and upper bound, with `tail` percent beyond each, bootstrapped over questions.

    The bounds are infinite for a single question.
    """
    return (-math.inf, math.inf) if differences.size < 2 else paired_interval(differences, tail=tail)


def detectable_difference(differences: NDArray[np.float64], alpha: float) -> float | None:
    """Return the mean that a test at level `alpha` would detect four times in five, given the spread over questions.

    Returns None if no mean could be detected: there are too few questions for the level.
    """
    if differences.size < 2 or least_p(differences) > alpha:
        return None
    return detectable_mean(float(differences.std(ddof=1)), differences.size, alpha, POWER)


def detectable_mean(spread: float, questions: int, alpha: float, power: float) -> float:
    """Return the mean that a test at level `alpha` detects with probability `power`.

    `spread` is the standard deviation over questions.
    """
    quantiles = (student_quantile(part, questions - 1) for part in (1 - alpha, power))
    return sum(quantiles) * spread / math.sqrt(questions)


def questions_needed(gain: float, spread: float, alpha: float, power: float = POWER) -> int | None:
    """Return the fewest questions on which a test at level `alpha` detects a mean of `gain` with probability `power`.

    `spread` is the standard deviation over questions. None if it takes more than `MOST_QUESTIONS`.
    """
    if gain <= 0 or not math.isfinite(spread):
        return None
    least = max(2, math.ceil(math.log2(1 / alpha)))  # the sign-flip test can then give a p-value of `alpha`
    low, high = least, MOST_QUESTIONS
    if detectable_mean(spread, high, alpha, power) > gain:
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if detectable_mean(spread, middle, alpha, power) <= gain else (middle + 1, high)
    return low


def student_quantile(part: float, freedom: int) -> float:
    """Return the `part` quantile of Student's t distribution (Abramowitz and Stegun 26.7.5)."""
    z = NormalDist().inv_cdf(part)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def wilson_interval(share: float, count: float) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share of `count`, in percent."""
    z = NORMAL_95
    middle, width = share + z**2 / (2 * count), z * (share * (1 - share) / count + (z / (2 * count)) ** 2) ** 0.5
    low, high = ((middle + side * width) / (1 + z**2 / count) for side in (-1, 1))
    return 100 * max(0.0, low), 100 * min(1.0, high)
