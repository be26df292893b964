"""Rows of the benchmark table, the size of a run, and the formatting of ratios and spreads."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Row(NamedTuple):
    """One row of the table."""

    bench: str
    measured: str
    compared: str  # the same figure of the reference
    ratio: str
    spread: str = ""  # lowest to highest ratio or figure; empty if measured once


class Size(NamedTuple):
    """Size of a benchmark run, and the server that it measures."""

    is_quick: bool = False
    upstream: str = ""  # URL of a vLLM with the embedded model; if empty, each part starts one
    plots: Path = Path("build")  # folder that pictures are written to
    episodes: int = 0  # one more size of the store whose growth is measured; 0: none

    def pick(self, full: int, quick: int) -> int:
        """Return `full`, or `quick` in a quick run."""
        return quick if self.is_quick else full


def percentile(figures: Sequence[float], percent: int) -> float:
    """Return a percentile, which is one of the figures; 0 if there are none."""
    return sorted(figures)[percent * (len(figures) - 1) // 100] if figures else 0.0


def median_ratio(measured: Sequence[float], compared: Sequence[float]) -> tuple[str, str]:
    """Return the median of paired ratios and their spread."""
    ratios = [mine / other for mine, other in zip(measured, compared, strict=True)]
    return f"{statistics.median(ratios):.2f}", spread(ratios)


def spread(figures: Sequence[float], digits: int = 2) -> str:
    """Return the lowest and the highest of several figures as text; empty for a single figure."""
    return f"{min(figures):,.{digits}f} to {max(figures):,.{digits}f}" if len(figures) > 1 else ""
