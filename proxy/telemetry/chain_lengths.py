"""Whether the interval Δ suits a model, by how long its chains are in live traffic; a warning where it does not.

Controllers decide after each interval. Where a chain ends within one or two of them, they can neither prune it nor open
more in time, and β buys far fewer chains than it should.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable
from statistics import median
from typing import Final

from proxy.types import LiveBranch

logger = logging.getLogger(__name__)

ENOUGH: Final = 20
"""Chains after which a model is judged."""
MOST: Final = 100
"""Chains that are remembered, the latest."""
LEAST_INTERVALS: Final = 3
"""Intervals a chain should have at least."""
GOOD_INTERVALS: Final = 8
"""Intervals that a chain has with the suggested Δ."""
STEP: Final = 16
"""Suggestions are multiples of so many tokens."""


class ChainLengths:
    """The lengths of each model's latest chains."""

    def __init__(self) -> None:
        self._lengths: dict[str, deque[int]] = {}
        self._told: dict[str, int] = {}  # the interval a model was warned of

    def observe(self, model: str, interval: int, branches: Iterable[LiveBranch]) -> None:
        """Take notice of an episode's branches, and warn once if the model's chains are too short for `interval`.

        Those that were cut count as what they had, if that is long enough to tell that they are not short.
        """
        lengths = self._lengths.setdefault(model, deque(maxlen=MOST))
        enough = LEAST_INTERVALS * interval
        lengths.extend(len(one.ids) for one in branches if one.finish == "stop" or len(one.ids) >= enough)
        if len(lengths) < ENOUGH or self._told.get(model) == interval:
            return
        usual = median(lengths)
        better = suggested(usual)
        if usual < enough and better < interval:
            self._told[model] = interval
            logger.warning(
                "%s: a chain has %.0f tokens (median of the latest %s), the interval is %s: controllers get to decide "
                "at most %.1f times a chain and open few chains at any β; AUTOTTS_INTERVAL=%s suits this model",
                *(model, usual, len(lengths), interval, usual / interval, better),
            )


def suggested(tokens: float) -> int:
    """The interval for chains of so many tokens."""
    return max(STEP, STEP * round(tokens / GOOD_INTERVALS / STEP))
