"""Data: recordings, labels, collections, drift and retention, and the import of a file."""

from __future__ import annotations

import asyncio
from functools import cache
from typing import Final

from starlette.responses import Response

from discovery.errors import StoreError
from discovery.store import StorePlace
from discovery.store.usage.recordings import recorded_data
from proxy.errors import BadRequest
from proxy.ui.charts import Axis, Chart, ChartKind, Scale, Series
from proxy.ui.page import Page, PageContext, UiRoute, ViewAccess
from proxy.ui.sources.collections import collection_files
from proxy.ui.sources.uploads import RecordingImport

HOME: Final = "/ui/recordings"
IMPORT: Final = "/ui/data/import"


async def show(context: PageContext) -> Response:
    """Show what the store holds, and what is being recorded."""
    service = context.service
    settings, data, problem = service.settings, None, ""
    if service.usage is not None:
        try:
            data = await recorded_data(service.usage)
        except StoreError as error:
            problem = str(error)
    return context.render(
        "recordings.html",
        store=settings.store,
        data=data,
        problem=problem,
        chart=None if data is None else _chart([(cell.model, cell.benchmark, cell.recordings) for cell in data.cells]),
        settings=settings,
        folder=settings.ui_runs,
        files=await asyncio.to_thread(collection_files, settings.ui_runs),
        drift=service.drift.changes,
        recorder=service.episode_log.writer.as_json(),
    )


async def import_file(context: PageContext) -> Response:
    """Import the file that is the body of the request."""
    settings = context.service.settings
    if settings.store is None:
        raise BadRequest("this proxy has no store; start it with AUTOTTS_STORE=FILE", code="no_store")
    result = await _importer(settings.store, settings.ui_import_bytes).run(context.request.stream())
    return context.json({**result.added._asdict(), "known": result.known})


@cache
def _importer(store: StorePlace, most_bytes: int) -> RecordingImport:
    return RecordingImport(store, most_bytes)


def _chart(totals: list[tuple[str, str, int]]) -> Chart:
    models = list(dict.fromkeys(model for model, _, _ in totals))
    series = []
    for benchmark in dict.fromkeys(benchmark for _, benchmark, _ in totals):
        counts = [sum(count for model, of, count in totals if (model, of) == (name, benchmark)) for name in models]
        series.append(Series(benchmark, list(zip(models, map(float, counts), strict=True))))
    x, y = Axis("model", scale=Scale.CATEGORY), Axis("recordings", minimum=0)
    return Chart("recordings", "Recordings by model and benchmark", ChartKind.BAR, x, y, series)


PAGE: Final = Page(
    "recordings",
    "Data",
    (UiRoute(HOME, show, ViewAccess.ADMIN), UiRoute(IMPORT, import_file, ViewAccess.ADMIN, "POST")),
    href=HOME,
    access=ViewAccess.ADMIN,
)
