"""Plots of accuracy against tokens."""

from __future__ import annotations

from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from discovery.evaluation.plot import MARKERS, PlotPoint, draw_frontiers, label_points, mixtures


def test_labels_of_points_cover_no_label_and_no_point() -> None:
    figure = Figure()
    axes = figure.subplots()
    axes.set(xscale="log", xlim=(100, 10_000), ylim=(0, 100))
    lines = {
        name: [PlotPoint(200 + 150 * step, 50 + step + high, 5, f"β = {step / 4:g}") for step in range(5)]
        for name, high in (("one", 0), ("two", 1), ("three", 2))
    }
    figure.draw_without_rendering()
    label_points(figure, axes, lines, dict.fromkeys(lines, "black"))
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert {"β = 0", "β = 1"} <= {text.get_text() for text in axes.texts}
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    points = [axes.transData.transform(point[:2]) for row in lines.values() for point in row]
    assert not any(box.contains(*point) for box, point in product(boxes, points))


def test_lines_are_straight_in_tokens_as_afs_is() -> None:
    line = mixtures([PlotPoint(100, 40, 1), PlotPoint(1100, 60, 1), PlotPoint(1100, 61, 1), PlotPoint(900, 65, 1)])
    assert np.interp(600, line[:40, 0], line[:40, 1]) == pytest.approx(50, abs=0.1)
    assert line[[0, -1]].tolist() == [[100, 40], [900, 65]]
    assert np.isfinite(line).all()
    assert mixtures([PlotPoint(5, 6, 0)]).tolist() == [[5, 6]]


def test_a_legend_of_many_long_names_stays_inside_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    names = [f"controller_with_a_long_name_{number}" for number in range(12)]
    lines = {name: [PlotPoint(100 + number, 50, 1), PlotPoint(900, 60, 1)] for number, name in enumerate(names)}
    draw_frontiers({"m": lines}, tmp_path / "x.png")
    (figure,) = drawn
    box = figure.legends[0].get_window_extent()
    assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
    looks = {
        (line.get_color(), line.get_marker()) for line in figure.axes[0].lines if line.get_marker() in set(MARKERS)
    }
    assert len(looks) == len(names)
