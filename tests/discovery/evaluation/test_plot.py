"""Plots of accuracy against tokens."""

from __future__ import annotations

from itertools import combinations, product

from matplotlib.figure import Figure

from discovery.evaluation.plot import PlotPoint, label_points


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
