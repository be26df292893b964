"""Plots of accuracy against tokens, and of intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from discovery.data.atomic_files import atomic_write, check_writable_path
from discovery.errors import FileWriteError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS: Final = ("#2563eb", "#b45309", "#059669", "#dc2626", "#7c3aed", "#475569", "#db2777", "#65a30d")


class PlotPoint(NamedTuple):
    """One setting's tokens and accuracy."""

    tokens: float
    accuracy: float  # percent
    error: float  # standard error of the accuracy, points
    label: str = ""


Panel = Mapping[str, Sequence[PlotPoint]]
"""Lines by name; points from left to right."""


def check_plot(path: Path) -> None:
    """Raise FileWriteError, before costly work, if a plot could not be written to `path`."""
    if path.suffix not in (".png", ".svg"):
        raise FileWriteError(f"--plot {path}: the name must end in .png or .svg")
    check_writable_path(path, "--plot")


def draw_frontiers(panels: Mapping[str, Panel], path: Path) -> None:
    """Draw lines of accuracy against tokens, one panel for each title; bars are standard errors."""
    from matplotlib.figure import Figure

    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(max(7.0, 4.5 * columns), 4.2 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (title, lines) in zip(grid.flat, panels.items(), strict=False):
        for number, (name, points) in enumerate(lines.items()):
            tokens, percents, errors, _ = zip(*points, strict=True)
            colour = COLOURS[number % len(COLOURS)]
            marker = "o" if len(points) > 1 else "s"
            axes.errorbar(tokens, percents, errors, marker=marker, capsize=3, color=colour, label=name)
            for point in points:
                axes.annotate(
                    point.label, point[:2], textcoords="offset points", xytext=(6, -11), fontsize=8, color=colour
                )
        axes.set(xscale="log", xlabel="tokens per question, all branches and probes", ylabel="accuracy, %")
        axes.margins(x=0.12)
        label_tokens(axes)
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right", fontsize=8)
    with atomic_write(path) as file:
        figure.savefig(file, dpi=150, format=path.suffix[1:])


def label_tokens(axes: Axes) -> None:
    """Label a logarithmic axis of tokens with whole numbers, few enough that they do not overlap."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_xlim()
    digits = (1, 1.5, 2, 3, 5, 7) if high < 10 * low else (1, 2, 5) if high < 100 * low else (1,)
    axes.xaxis.set_major_locator(LogLocator(subs=digits))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: f"{tokens:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


class PlotInterval(NamedTuple):
    """A mean and its interval; None without an interval."""

    mean: float
    low: float | None
    high: float | None


PlotRows = Mapping[str, Mapping[str, PlotInterval]]
"""Intervals by name, in rows by row name."""


def draw_intervals(panels: Mapping[str, PlotRows], path: Path) -> None:
    """Draw intervals, one panel for each title, rows from top to bottom, and a row's intervals one below the other."""
    from matplotlib.figure import Figure

    most = max(len(rows) for rows in panels.values())
    figure = Figure(figsize=(6.0 * len(panels), 1.6 + 0.7 * most), layout="constrained")
    for axes, (title, rows) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for number, compared in enumerate(rows.values()):
            for at, (name, (mean, low, high)) in enumerate(compared.items()):
                place = number + 0.3 * (at - (len(compared) - 1) / 2)
                ends = [[mean - (mean if low is None else low)], [(mean if high is None else high) - mean]]
                label = name if number == 0 else None
                axes.errorbar(
                    [mean], [place], xerr=ends, marker="os^v"[at % 4], capsize=3, color=COLOURS[at], label=label
                )
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3, axis="x")
        axes.legend(fontsize=8)
    with atomic_write(path) as file:
        figure.savefig(file, dpi=150, format=path.suffix[1:])
