"""Rows of the benchmark table, the size of a run, and the formatting of ratios and spreads."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Row(NamedTuple):
    """One row of the table."""

    bench: str
    measured: str
    compared: str  # the same figure of the reference
    ratio: str
    spread: str = ""  # lowest to highest ratio or figure; empty if measured once


class Size(NamedTuple):
    """Size of a benchmark run."""

    is_quick: bool = False

    def pick(self, full: int, quick: int) -> int:
        """Return `full`, or `quick` in a quick run."""
        return quick if self.is_quick else full


def median_ratio(measured: Sequence[float], compared: Sequence[float]) -> tuple[str, str]:
    """Return the median of paired ratios and their spread."""
    ratios = [mine / other for mine, other in zip(measured, compared, strict=True)]
    return f"{statistics.median(ratios):.2f}", spread(ratios)


def spread(figures: Sequence[float], digits: int = 2) -> str:
    """Return the lowest and the highest of several figures as text; empty for a single figure."""
    return f"{min(figures):,.{digits}f} to {max(figures):,.{digits}f}" if len(figures) > 1 else ""
