"""Warn if the interval Δ is too long for a model, judged by the lengths of its chains in live traffic.

Controllers decide after each interval. If a chain ends within one or two intervals, they can neither prune it nor open
more branches in time.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Final, Protocol

from deploy.embedded import SERVED_MODEL_NAME
from proxy.settings.sources import EMBEDDED

logger = logging.getLogger(__name__)

MIN_EPISODES: Final = 20
"""Number of episodes that are needed before a model is checked. The chains of one question are alike."""
MAX_EPISODES: Final = 100
"""Number of latest episodes whose chains are kept per model."""
MIN_INTERVALS: Final = 3
"""Minimum number of intervals that a chain should have."""
GOOD_INTERVALS: Final = 8
"""Number of intervals per chain that the suggested Δ aims at."""
STEP: Final = 16
"""Suggestions are multiples of this many tokens."""
SHIPPED: Final = frozenset({(SERVED_MODEL_NAME, EMBEDDED["interval"])})
"""Models and intervals that are shipped together, so that nobody need change them: the embedded model's."""


class EpisodeBranch(Protocol):
    """A branch: its tokens, and whether it has finished."""

    @property
    def ids(self) -> Sequence[int]:
        """Ids of its tokens."""

    @property
    def finish(self) -> str | None:
        """`stop`, `length`, or None while it runs."""


class ChainLengths:
    """The median lengths of the chains of each model's latest episodes."""

    def __init__(self) -> None:
        self._medians: dict[str, deque[float]] = {}
        self._warned: dict[str, int] = {}  # by model: the interval of the last warning

    @property
    def models(self) -> list[str]:
        """The models of which lengths are known."""
        return list(self._medians)

    def forget(self, model: str) -> None:
        """Forget a model that is served no longer."""
        self._medians.pop(model, None)
        self._warned.pop(model, None)

    def observe(self, model: str, interval: int, branches: Iterable[EpisodeBranch]) -> None:
        """Record an episode's branches. Warn once if the model's chains are too short for `interval`.

        Branches that were cut count only if they were already long enough.
        """
        medians = self._medians.setdefault(model, deque(maxlen=MAX_EPISODES))
        enough = MIN_INTERVALS * interval
        lengths = [len(live.ids) for live in branches if live.finish == "stop" or len(live.ids) >= enough]
        if lengths:
            medians.append(median(lengths))
        if len(medians) < MIN_EPISODES or self._warned.get(model) == interval or (model, interval) in SHIPPED:
            return
        usual = median(medians)
        better = suggested_interval(usual)
        if usual < enough and better < interval:
            self._warned[model] = interval
            logger.warning(
                "%s: chains have %.0f tokens (median of the latest %s requests) and the interval has %s, so "
                "controllers decide only %.1f times per chain, too late to prune or to open some; set "
                "AUTOTTS_INTERVAL=%s for this model",
                *(model, usual, len(medians), interval, usual / interval, better),
            )


def suggested_interval(tokens: float) -> int:
    """Return the interval that suits chains of `tokens` tokens."""
    return max(STEP, STEP * round(tokens / GOOD_INTERVALS / STEP))
