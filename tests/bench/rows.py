"""One line of the bench's table, how large a run is, and how a spread is written."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Row(NamedTuple):
    """One line of the table."""

    bench: str
    measured: str
    beside: str
    ratio: str
    spread: str = ""  # of the ratio or of the figure, lowest to highest, where it was taken several times


class Size(NamedTuple):
    """How much a part of the bench does."""

    is_quick: bool = False

    def pick(self, full: int, quick: int) -> int:
        """Return the number of repetitions."""
        return quick if self.is_quick else full


def median_ratio(measured: Sequence[float], beside: Sequence[float]) -> tuple[str, str]:
    """Return the median of paired ratios and their spread."""
    ratios = [mine / other for mine, other in zip(measured, beside, strict=True)]
    return f"{statistics.median(ratios):.2f}", spread(ratios)


def spread(figures: Sequence[float], digits: int = 2) -> str:
    """Return the lowest and the highest of several figures."""
    return f"{min(figures):,.{digits}f} to {max(figures):,.{digits}f}" if len(figures) > 1 else ""
