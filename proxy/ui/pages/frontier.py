"""Frontier: accuracy over tokens of each controller, and over the critical path, with what the questions can show."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from starlette.responses import Response

from controllers.builtin import BUILT_IN
from discovery.data.recordings import Split
from proxy.errors import BadRequest
from proxy.ui.charts import Axis, Chart, ChartKind, Scale, Series
from proxy.ui.page import Page, PageContext, UiRoute, ViewAccess
from proxy.ui.paging import choice
from proxy.ui.sources.frontier_points import PUBLISHED, FrontierPoint, detectable_points, frontier_files, read_frontier
from proxy.ui.sources.jobs import jobs_of, missing_settings

HOME: Final = "/ui/frontier"
KIND: Final = "frontier"
COMPUTED: Final = "frontier.json"
"""File in the folder of runs that holds the frontier computed from the store."""
CONTROLLERS: Final = ("self_consistency", "asc", "adaptive_consistency", "cmc", "short_m_at_k")
BETAS: Final = "0,0.25,0.5,0.75,1"
SHUFFLES: Final = "20"
LIMIT_S: Final = 3600.0
LABELS: Final = {
    "reference,feedback": "references and feedback",
    "reference,feedback,consensus=confidence": "votes too, by their confidence; they favour controllers that vote",
}
"""Sources of right answers that a computed frontier may be graded by, with their titles."""
ALL_SPLITS: Final = "all"
SPLITS: Final = (ALL_SPLITS, *Split)
PARTS: Final = ("model", "benchmark", "split")
REFERENCE: Final = "self_consistency"


async def show(context: PageContext) -> Response:
    """Show both charts of one file, for one model, benchmark and split."""
    settings = context.service.settings
    sources = await asyncio.to_thread(frontier_files, settings.ui_runs if context.viewer.is_admin else None)
    name = choice(context.query, "source", sources, PUBLISHED)
    data = await asyncio.to_thread(read_frontier, name, sources[name])
    cells = sorted({(point.model, point.benchmark, point.split) for point in data.points})
    options = {part: sorted({cell[place] for cell in cells}) for place, part in enumerate(PARTS)}
    wanted = [context.query.get(part) for part in PARTS]
    cell = max(cells, key=lambda each: [want == have for want, have in zip(wanted, each, strict=True)], default=None)
    has_baselines = context.query.get("baselines", "on") != "off"
    points = [
        point
        for point in data.points
        if (point.model, point.benchmark, point.split) == cell and (has_baselines or point.controller not in BUILT_IN)
    ]
    return context.render(
        "frontier.html",
        sources=list(sources),
        source=name,
        problem=data.problem,
        options=options,
        cell=dict(zip(PARTS, cell, strict=True)) if cell else {},
        has_baselines=has_baselines,
        points=points,
        header_of=header_of,
        questions=min((point.questions for point in points), default=0),
        detectable=detectable_points(points),
        tokens_chart=_chart(
            "frontier", "Accuracy over mean tokens", "mean tokens per question", points, lambda point: point.tokens
        ),
        path_chart=_chart(
            "path",
            "Accuracy over the critical path",
            "95th percentile of the critical path",
            points,
            lambda point: point.path,
        ),
        labels=LABELS,
        splits=SPLITS,
        lacks=missing_settings(settings),
        job=jobs_of(context).running(KIND),
        failed=jobs_of(context).failed(KIND),
    )


async def compute(context: PageContext) -> Response:
    """Start to replay the recordings of the store under the built-in controllers and the installed champion."""
    settings, form = context.service.settings, await context.form()
    labels = choice(form, "labels", LABELS, next(iter(LABELS)))
    split = choice(form, "split", SPLITS, ALL_SPLITS)
    if settings.store is None or settings.ui_runs is None:
        raise BadRequest(f"set {' and '.join(missing_settings(settings))} to compute a frontier from recordings")
    folder: Path = settings.ui_runs
    champions = [assignment.champion for assignment in context.service.controllers.stages.current]
    names = [*CONTROLLERS, *sorted({spec.name for spec in champions if not spec.is_foreign} - set(CONTROLLERS))]
    arguments = ["evaluate", "--recordings", str(settings.store), "--controllers", ",".join(names), "--betas", BETAS]
    arguments += ["--labels", labels, *([] if split == ALL_SPLITS else ["--split", split])]
    arguments += ["--shuffles", SHUFFLES, "--json", str(folder / COMPUTED)]
    await asyncio.to_thread(lambda: folder.mkdir(parents=True, exist_ok=True))
    await jobs_of(context).start(KIND, "of the store", arguments, folder / "frontier.log", LIMIT_S, settings.store)
    return context.redirect(HOME)


async def stop(context: PageContext) -> Response:
    """Stop computing."""
    await jobs_of(context).stop(KIND)
    return context.redirect(HOME)


def header_of(point: FrontierPoint) -> str:
    """Return the header with which a request gets the setting of a point."""
    return f"x-tts-beta: {point.beta:g}"


def _chart(
    name: str, title: str, label: str, points: Sequence[FrontierPoint], x_of: Callable[[FrontierPoint], float]
) -> Chart:
    series = []
    for controller in dict.fromkeys(point.controller for point in points):
        own = [point for point in points if point.controller == controller]  # by β
        series.append(
            Series(
                controller,
                [(x_of(point), point.accuracy) for point in own],
                low=[point.low for point in own],
                high=[point.high for point in own],
                notes=[f"β = {point.beta:g}, {point.questions} questions" for point in own],
                values=[f"{controller}\n{header_of(point)}" for point in own],
                is_reference=controller == REFERENCE,
            )
        )
    x, y = Axis(label, "tokens", Scale.LOG), Axis("accuracy", "%")
    summary = "Bands are 95 % intervals. Further up and to the left is better."
    return Chart(name, title, ChartKind.LINE, x, y, series, summary)


PAGE: Final = Page(
    "frontier",
    "Frontier",
    (
        UiRoute(HOME, show),
        UiRoute(f"{HOME}/compute", compute, ViewAccess.ADMIN, "POST"),
        UiRoute(f"{HOME}/stop", stop, ViewAccess.ADMIN, "POST"),
    ),
    href=HOME,
)
