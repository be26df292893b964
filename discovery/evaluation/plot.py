"""Plots of accuracy against tokens, and of intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise, product
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from discovery.data.atomic_files import OutputKind, atomic_write, check_output
from discovery.errors import FileWriteError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.container import ErrorbarContainer
    from matplotlib.figure import Figure

COLOURS: Final = ("#2563eb", "#b45309", "#059669", "#dc2626", "#7c3aed", "#475569", "#db2777", "#65a30d")
LABEL_SIZE: Final = 8
"""Height of the labels of points."""
MARKERS: Final = "os^Dv"
"""Shapes of points; another one for each round of the colours."""
ENTRY_INCHES, LETTER_INCHES = 0.6, 0.07
"""Widths in a legend: of an entry without its text, and of a letter."""
STEPS: Final = 40
"""Points of the line between two settings."""
HEAD: Final = 4096
"""Bytes at the beginning of a file in which the root element of an SVG is looked for."""


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
    check_output(path, "--plot", OutputKind(f"a {path.suffix[1:].upper()} picture", _is_picture))


def _is_picture(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(HEAD)
    return head.startswith(b"\x89PNG\r\n") if path.suffix == ".png" else b"<svg" in head


def mixtures(points: Sequence[PlotPoint]) -> NDArray[np.float64]:
    """Return the line through points as (tokens, accuracy) rows, straight in tokens as AFS is (see `afs.py`).

    Two neighbouring settings, mixed at random, reach what is between them. On a logarithmic axis such a line is bent.
    """
    parts = [np.array([points[0][:2]])]
    for (low, start, *_), (high, end, *_) in pairwise(points):
        tokens = np.geomspace(low, high, STEPS)[1:]
        share = np.linspace(0, 1, STEPS)[1:] if high == low else (tokens - low) / (high - low)
        parts.append(np.column_stack([tokens, start + share * (end - start)]))
    return np.concatenate(parts)


def draw_frontiers(panels: Mapping[str, Panel], path: Path) -> None:
    """Draw lines of accuracy against tokens, one panel for each title; bars are standard errors."""
    from matplotlib.figure import Figure

    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(max(7.0, 4.5 * columns), 4.2 * rows + 0.3), layout="constrained")
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}
    markers = {name: MARKERS[number // len(COLOURS) % len(MARKERS)] for number, name in enumerate(names)}
    handles: dict[str, ErrorbarContainer] = {}
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (title, lines) in zip(grid.flat, panels.items(), strict=False):
        for name, points in lines.items():
            tokens, percents, errors, _ = zip(*points, strict=True)
            handles[name] = axes.errorbar(
                tokens,
                percents,
                errors,
                marker=markers[name],
                markersize=5,
                capsize=2,
                elinewidth=1,
                linestyle="none",
                color=colours[name],
                ecolor=(colours[name], 0.45),
                label=name,
            )
            axes.plot(*mixtures(points).T, color=colours[name])
        axes.set(xscale="log", xlabel="tokens per question, all branches and probes", ylabel="accuracy, %")
        axes.margins(x=0.12)
        label_tokens(axes)
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
    wide = ENTRY_INCHES + LETTER_INCHES * max(map(len, names))
    columns = max(1, min(len(names), int(figure.get_figwidth() / wide)))
    figure.legend(handles=list(handles.values()), loc="outside lower center", ncols=columns, fontsize=8)
    figure.draw_without_rendering()  # the layout is final only now, and labels are placed by it
    for axes, lines in zip(grid.flat, panels.values(), strict=False):
        label_points(figure, axes, lines, colours)
    with atomic_write(path) as file:
        figure.savefig(file, dpi=150, format=path.suffix[1:])


def label_points(figure: Figure, axes: Axes, lines: Panel, colours: Mapping[str, str]) -> None:
    """Write labels beside points, without overlaps: the ends of lines first, others only where they cross no line."""
    from matplotlib.transforms import Bbox

    scale = figure.dpi / 72  # pixels per point
    high, near = 1.3 * LABEL_SIZE * scale, 4 * scale
    places = {name: axes.transData.transform([point[:2] for point in points]) for name, points in lines.items()}
    points_at = np.concatenate(list(places.values()))
    crossed = np.concatenate([axes.transData.transform(mixtures(points)) for points in lines.values()])
    taken: list[Bbox] = []
    labels = [
        (at not in (0, len(points) - 1), point, place, colours[name])
        for name, points in lines.items()
        for at, (point, place) in enumerate(zip(points, places[name], strict=True))
        if point.label
    ]
    for is_inner, point, (x, y), colour in sorted(labels, key=itemgetter(0)):
        wide = 0.62 * LABEL_SIZE * scale * len(point.label)
        corners = [
            (x + near if right else x - near - wide, y + near if up else y - near - high)
            for right, up in product((True, False), (False, True))
        ]
        for obstacles, (left, low) in product((crossed,) if is_inner else (crossed, points_at), corners):
            box = Bbox.from_bounds(left, low, wide, high)
            inside = axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max)
            if inside and not box.count_overlaps(taken) and not box.count_contains(obstacles):
                taken.append(box)
                away = ((left - x) / scale, (low - y) / scale)
                axes.annotate(
                    point.label,
                    point[:2],
                    away,
                    textcoords="offset points",
                    fontsize=LABEL_SIZE,
                    color=colour,
                    verticalalignment="bottom",
                )
                break


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
