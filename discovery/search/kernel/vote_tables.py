"""Tables of statistics of vote counts, computed with Python's exact integers."""

from __future__ import annotations

from functools import cache
from math import comb
from typing import Final

import numpy as np
from numpy.typing import NDArray

from controllers.dial import MOST_CHAINS

MOST_VOTES: Final = 2 * MOST_CHAINS
"""Largest count: all chains vote for an answer, and all count once more as unfinished ones."""


@cache
def vote_tables() -> NDArray[np.float64]:
    """Return `controllers.voting.confidence` and `controllers.stopping.e_value`: (2, first votes, second votes).

    The values for counts up to `MOST_VOTES` are equal to the bit to what controllers compute. The functions are not
    called, because they would add up each binomial tail from its beginning.
    """
    size = MOST_VOTES + 1
    confidence, e_value = tables = np.zeros((2, size, size))
    for throws in range(1, 2 * size):
        tail = 0
        for first in range(min(size, throws)):
            tail += comb(throws, first)
            second = throws - 1 - first
            if first and second < size:
                confidence[first, second] = sure = float(tail / 2**throws)
                e_value[first, second] = (1 << throws) / (throws * comb(throws - 1, first)) * sure
    return tables
