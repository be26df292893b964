"""Descriptions of charts. `charts.js` draws them, and a template writes their figures as a table beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from discovery.data.safe_json import compact_json

ChartValue = float | str | None


class ChartKind(StrEnum):
    """Way to draw the series of a chart."""

    LINE = "line"
    AREA = "area"  # stacked
    BAR = "bar"  # stacked


class Scale(StrEnum):
    """Scale of an axis."""

    LINEAR = "value"
    LOG = "log"
    TIME = "time"  # Unix seconds, shown in the viewer's time zone
    CATEGORY = "category"


@dataclass(frozen=True, slots=True)
class Axis:
    """An axis with its label and unit."""

    label: str
    unit: str = ""  # such as tokens, s or %
    scale: Scale = Scale.LINEAR
    minimum: float | None = None
    maximum: float | None = None
    is_count: bool = False  # its values are whole numbers


@dataclass(frozen=True, slots=True)
class Series:
    """Points that belong together. A point is (x, y) and whatever `notes` says about it."""

    name: str
    points: Sequence[tuple[ChartValue, float | None]]
    low: Sequence[float | None] = ()  # lower ends of the band, one for each point; empty without a band
    high: Sequence[float | None] = ()
    notes: Sequence[str] = ()  # shown when a point is pointed at
    values: Sequence[str] = ()  # text that a page's script gets when a point is clicked
    is_reference: bool = False  # drawn grey and dashed


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart with its title, axes and series."""

    name: str  # id in the page
    title: str
    kind: ChartKind
    x: Axis
    y: Axis
    series: Sequence[Series]
    summary: str = ""  # what there is to see, in a sentence
    empty: str = "There is nothing to show yet."

    @property
    def is_empty(self) -> bool:
        """Whether no series has a point."""
        return not any(series.points for series in self.series)

    @property
    def text(self) -> str:
        """The description for `charts.js`, as JSON for an attribute; NaN and infinities are null.

        It is no script element, because htmx drops those of parts of pages.
        """
        return compact_json(asdict(self))

    @property
    def is_pivoted(self) -> bool:
        """Whether the table has a row for each x and a column for each series: they share all x and have no bands."""
        first = [x for x, _ in self.series[0].points] if self.series else []
        return len(self.series) > 1 and all(
            not series.low and [x for x, _ in series.points] == first for series in self.series
        )

    @property
    def columns(self) -> list[str]:
        """Names of the table's columns."""
        if self.is_pivoted:
            return [titled(self.x), *(series.name for series in self.series)]
        has_band = any(series.low for series in self.series)
        return ["Series", titled(self.x), titled(self.y), *(["Low", "High"] if has_band else [])]

    @property
    def rows(self) -> list[list[Any]]:
        """Rows of the table: name, x, y, and the ends of the band if any series has one; or x and each series' y."""
        if self.is_pivoted:
            values = zip(*([y for _, y in series.points] for series in self.series), strict=True)
            return [[x, *ys] for (x, _), ys in zip(self.series[0].points, values, strict=True)]
        has_band = any(series.low for series in self.series)
        table = []
        for series in self.series:
            for index, (x, y) in enumerate(series.points):
                ends = [series.low[index], series.high[index]] if series.low else [None, None]
                table.append([series.name, x, y, *(ends if has_band else [])])
        return table


def titled(axis: Axis) -> str:
    """Return the label of an axis with its unit."""
    return f"{axis.label} ({axis.unit})" if axis.unit else axis.label
