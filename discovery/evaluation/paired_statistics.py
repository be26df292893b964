"""Paired statistics: whether one controller beats another on the same questions, and what could have been noticed.

One question is one difference, however many models answered it: what they say of it hangs together. No more is assumed
than that a difference would have been as likely the other way round if the two controllers were equally good.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from statistics import NormalDist
from typing import Final

import numpy as np
from numpy.typing import NDArray

from discovery.data.recordings import Cell
from discovery.evaluation.scores import BLOCK, RESAMPLES, SEED

EXACT: Final = 14
"""So many questions, and fewer, are flipped in every way there is."""
FLIPS: Final = 20_000
"""Ways of flipping drawn for more questions, a block."""
MOST_BLOCKS: Final = 100
ENOUGH: Final = 20
"""The least p that draws can show is at most one so-manieth of the level tested at."""
TIE: Final = 1e-9
"""Sums closer than this part of all differences' size are equal: the order of adding may tell them apart."""
POWER: Final = 0.8
ONE_SIDED: Final = 5.0
"""Percent beyond a bound."""


def sequential_alpha(k: int, alpha: float) -> float:
    """What the k-th test on the same questions, from 1, may spend of `alpha`: α·6/(π²k²). All of them spend α."""
    return alpha * 6 / (math.pi * k) ** 2


def question_values(
    values: Mapping[Cell, NDArray[np.float64]], questions: Mapping[Cell, Sequence[str]]
) -> NDArray[np.float64]:
    """One value a question from each cell's (questions,), by the questions' ids; their mean is the mean over cells.

    Where every cell has the same questions it is a question's mean over cells. Where not, cells count equally, as in
    AFS, and a question counts by the cells it is in.
    """
    every = sorted({question for cell in values for question in questions[cell]})
    place = {question: at for at, question in enumerate(every)}
    sums = np.zeros(len(every))
    for cell, of_cell in values.items():
        np.add.at(sums, [place[question] for question in questions[cell]], of_cell / of_cell.size)
    return sums * len(every) / len(values)


def sign_flip_p(differences: NDArray[np.float64], alpha: float = 1.0) -> float:
    """The one-sided p of a mean above 0, by flipping signs; equal sums count against it.

    Exact for `EXACT` questions that differ at all; else of seeded draws, counting what was seen as one of them. There
    are more draws where `alpha`, the level tested at, is too small for the usual number to show.
    """
    moved = differences[differences != 0]  # what is 0 stays 0 whichever way it is flipped
    if not moved.size:
        return 1.0
    least = moved.sum() - TIE * np.abs(moved).sum()
    if moved.size <= EXACT:
        return float((_every(moved.size) @ moved >= least).mean())
    blocks = min(MOST_BLOCKS, max(1, math.ceil(ENOUGH / (alpha * FLIPS))))
    reached = sum(int((_drawn(moved.size, block) @ moved >= least).sum()) for block in range(blocks))
    return (1 + reached) / (1 + blocks * FLIPS)


def least_p(differences: NDArray[np.float64]) -> float:
    """The smallest p the sign-flip test can come to on so many questions."""
    return max(0.5**differences.size, 1 / (1 + MOST_BLOCKS * FLIPS) if differences.size > EXACT else 0.0)


@lru_cache(maxsize=1)
def _every(count: int) -> NDArray[np.float64]:
    """All ways of flipping: (2 ** count, count) of ±1."""
    ways = np.arange(2**count)[:, None] >> np.arange(count)
    return np.where(ways & 1, 1.0, -1.0)


@lru_cache(maxsize=1)
def _drawn(count: int, block: int) -> NDArray[np.float64]:
    """Some ways of flipping: (FLIPS, count) of ±1, the same for the same arguments."""
    return np.random.default_rng((SEED, block)).choice([-1.0, 1.0], (FLIPS, count))


def bootstrap_bounds(differences: NDArray[np.float64], tail: float = ONE_SIDED) -> tuple[float, float]:
    """The mean's lower and upper bound, `tail` percent beyond each, bootstrapped over questions.

    One question says nothing of how far others may lie: then they are infinite.
    """
    if differences.size < 2:
        return -math.inf, math.inf
    generator = np.random.default_rng(SEED)
    blocks = (generator.integers(0, differences.size, (BLOCK, differences.size)) for _ in range(RESAMPLES // BLOCK))
    means = np.concatenate([differences[drawn].mean(axis=1) for drawn in blocks])
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)


def detectable_difference(differences: NDArray[np.float64], alpha: float) -> float | None:
    """The mean that a test at `alpha` would notice four times in five, by the spread over questions.

    None where nothing would be noticed however large it is: too few questions for so small a level.
    """
    if differences.size < 2 or least_p(differences) > alpha:
        return None
    error = float(differences.std(ddof=1)) / math.sqrt(differences.size)
    return (_student(1 - alpha, differences.size - 1) + _student(POWER, differences.size - 1)) * error


def _student(part: float, freedom: int) -> float:
    """Student's t below which `part` lies, as heavy-tailed as the test (Abramowitz and Stegun 26.7.5)."""
    z = NormalDist().inv_cdf(part)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `count`, in percent."""
    z = NormalDist().inv_cdf(0.975)
    middle, width = share + z**2 / (2 * count), z * (share * (1 - share) / count + (z / (2 * count)) ** 2) ** 0.5
    low, high = ((middle + side * width) / (1 + z**2 / count) for side in (-1, 1))
    return 100 * max(0.0, low), 100 * min(1.0, high)
