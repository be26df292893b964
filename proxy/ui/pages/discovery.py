"""Discovery: searches for controllers with their candidates, and the search that runs now."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Final

from starlette.responses import Response

from discovery.evaluation.paired_statistics import wilson_interval
from proxy.errors import BadRequest, NotFound
from proxy.ui.charts import Axis, Chart, ChartKind, Scale, Series
from proxy.ui.page import Page, PageContext, UiRoute, ViewAccess
from proxy.ui.paging import link, number
from proxy.ui.sources.highlighted import diff_html, python_html
from proxy.ui.sources.jobs import jobs_of, missing_settings, replay_slots_of
from proxy.ui.sources.search_runs import BrokenRun, JudgedCandidate, ListedRun, SearchRecord, SearchRuns
from proxy.ui.sources.worst_questions import worst_questions

HOME: Final = "/ui/discovery"
RUN: Final = "/ui/discovery/run"
CANDIDATE: Final = "/ui/discovery/candidate"
KIND: Final = "search"
LOG: Final = "discover.log"
PAGE_SIZE: Final = 50
MOST_MINUTES: Final = 240
GRACE_S: Final = 3600.0
"""Seconds that a search may take after its time limit, to compare its finalists."""
SHOWN_CURVES: Final = 4
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


async def show(context: PageContext) -> Response:
    """List the runs, and offer to start one."""
    runs, jobs, settings = _runs_or_none(context), jobs_of(context), context.service.settings
    listed = [] if runs is None else await asyncio.to_thread(runs.all)
    return context.render(
        "discovery.html",
        runs=[run for run in listed if isinstance(run, ListedRun)],
        broken=[run for run in listed if isinstance(run, BrokenRun)],
        folder=settings.ui_runs,
        lacks=missing_settings(settings),
        running=jobs.running(KIND),
        failed=jobs.failed(KIND),
        most_minutes=MOST_MINUTES,
    )


async def show_run(context: PageContext) -> Response:
    """Show one run, with its candidates by score."""
    name = context.query.get("run", "")
    running = jobs_of(context).running(KIND)
    job = running if running is not None and running.name == name else None
    run = await _read(context, name, is_optional=job is not None)
    template = "discovery_progress.html" if context.is_fragment else "discovery_run.html"
    if run is None:
        return context.render(template, name=name, run=None, job=job, log=job.tail() if job else "")
    start = int(number(context.query, "from", 0, len(run.ranked), default=0))
    end = start + PAGE_SIZE
    return context.render(
        template,
        name=name,
        run=run,
        job=job,
        log=job.tail() if job else "",
        rows=list(enumerate(run.ranked, start=1))[start:end],
        first=run_link(name) if start else None,
        following=link(RUN, {"run": name, "from": str(end)}) if end < len(run.ranked) else None,
        progress=_progress_chart(run),
        curves=_curves_chart(run),
        chosen=run.by_digest.get(str(run.chosen["digest"])) if run.chosen else None,
    )


async def show_candidate(context: PageContext) -> Response:
    """Show one candidate: its scores, its lineage, its source, and what differs from its parent."""
    name = context.query.get("run", "")
    run, each = await _candidate(context, name)
    parent = run.by_digest.get(each.candidate.parent or "")
    difference = None
    if parent is not None:
        names = (parent.candidate.name, each.candidate.name)
        difference = await asyncio.to_thread(diff_html, parent.candidate.source, each.candidate.source, names)
    return context.render(
        "discovery_candidate.html",
        run=run,
        each=each,
        lineage=run.lineage(each.candidate.digest),
        source=await asyncio.to_thread(python_html, each.candidate.source),
        difference=difference,
        parent=parent,
        has_store=context.service.settings.store is not None,
        curves=_curve_chart("curve", "Accuracy over tokens", [each], run.questions),
    )


async def show_worst(context: PageContext) -> Response:
    """Show traces of the questions that one candidate decides worst."""
    name, store = context.query.get("run", ""), context.service.settings.store
    run, each = await _candidate(context, name)
    runs = _runs_or_none(context)
    if store is None or runs is None:
        raise BadRequest("set AUTOTTS_STORE and AUTOTTS_UI_RUNS to replay recordings from here")
    async with replay_slots_of(context).worst_questions:
        text = await worst_questions(store, runs.folder / run.name, each.candidate.digest)
    return context.render("discovery_worst.html", text=text)


async def start(context: PageContext) -> Response:
    """Start a search of the grammar on the recordings of the store."""
    form = await context.form()
    settings, runs = context.service.settings, _runs_or_none(context)
    if runs is None or settings.store is None:
        raise BadRequest("set AUTOTTS_STORE and AUTOTTS_UI_RUNS to start searches from here")
    name = form.get("name", "").strip()
    if not _NAME.fullmatch(name):
        raise BadRequest("name: use at most 64 letters, digits, dots, _ and -, beginning with a letter or digit")
    minutes = number(form, "minutes", 0.1, MOST_MINUTES, default=20)
    seed = int(number(form, "seed", 0, 2**31, default=0))
    folder: Path = runs.folder / name
    try:
        await asyncio.to_thread(lambda: folder.mkdir(parents=True))
    except FileExistsError:
        raise BadRequest(f"name: there is a run {name!r} already; choose another name") from None
    except OSError as error:
        raise BadRequest(f"{folder}: {error.strerror}; check AUTOTTS_UI_RUNS") from None
    arguments = ["discover", "--recordings", str(settings.store), "--explorer", "grammar", "--minutes", f"{minutes:g}"]
    arguments += ["--seed", str(seed), "--out", str(folder)]
    try:
        await jobs_of(context).start(KIND, name, arguments, folder / LOG, 60 * minutes + GRACE_S, settings.store)
    except BadRequest:
        await asyncio.to_thread(folder.rmdir)  # the name stays free
        raise
    return context.redirect(run_link(name))


async def stop(context: PageContext) -> Response:
    """Stop the search that runs."""
    await jobs_of(context).stop(KIND)
    return context.redirect(HOME)


def run_link(name: str) -> str:
    """Return the address of a run's page. Names are parameters, because paths have no encoded characters."""
    return link(RUN, {"run": name})


def _progress_chart(run: SearchRecord) -> Chart:
    points = run.best_so_far()
    return Chart(
        "progress",
        "Best score so far",
        ChartKind.LINE,
        Axis("candidates tried"),
        Axis("score", "points"),
        [Series("best of the explorer", points)] if points else [],
        "AFS on the search split, minus charges for latency and harm.",
        "No candidate has been tried on all questions yet.",
    )


def _curves_chart(run: SearchRecord) -> Chart:
    scored = [each for each in run.ranked if each.verdict.score is not None]
    shown = [each for each in scored if not each.is_baseline][:SHOWN_CURVES]
    shown += [each for each in scored if each.is_baseline]
    return _curve_chart("curves", "The best candidates and the baselines", shown, run.questions)


def _curve_chart(name: str, title: str, judged: Sequence[JudgedCandidate], questions: int) -> Chart:
    """Return accuracy over tokens. Bands are Wilson's intervals, as if each question had been tried once."""
    series = []
    for each in judged:
        curve = each.verdict.curve
        ends = [wilson_interval(accuracy / 100, questions) for _, _, accuracy in curve] if questions else []
        series.append(
            Series(
                each.candidate.name,
                [(tokens, accuracy) for _, tokens, accuracy in curve],
                low=[low for low, _ in ends],
                high=[high for _, high in ends],
                notes=[f"β = {beta:g}" for beta, _, _ in curve],
                is_reference=each.candidate.name == "self_consistency",
            )
        )
    summary = f"Bands are 95 % intervals for {questions} questions of the search split." if questions else ""
    x, y = Axis("mean tokens per question", "tokens", Scale.LOG), Axis("accuracy", "%")
    return Chart(name, title, ChartKind.LINE, x, y, [one for one in series if one.points], summary)


async def _candidate(context: PageContext, name: str) -> tuple[SearchRecord, JudgedCandidate]:
    """Return a run and the candidate that the query names. Raises NotFound."""
    run = await _read(context, name)
    each = None if run is None else run.by_digest.get(context.query.get("digest", ""))
    if run is None or each is None:
        raise NotFound(f"run {name[:64]!r} has no such candidate; go back to its list", code="not_found")
    return run, each


async def _read(context: PageContext, name: str, *, is_optional: bool = False) -> SearchRecord | None:
    """Return a run. Raises NotFound unless it may be missing because it has just been started, or BadRequest."""
    runs = _runs_or_none(context)
    run = None if runs is None else await asyncio.to_thread(runs.read, name)
    if isinstance(run, BrokenRun):
        if is_optional:  # its first line is being written
            return None
        raise BadRequest(run.problem)
    if run is None and not is_optional:
        raise NotFound(f"there is no run {name[:64]!r}; go back to the list", code="not_found")
    return run


@cache
def _runs_of(folder: Path) -> SearchRuns:
    return SearchRuns(folder)


def _runs_or_none(context: PageContext) -> SearchRuns | None:
    folder = context.service.settings.ui_runs
    return None if folder is None else _runs_of(folder)


PAGE: Final = Page(
    "discovery",
    "Discovery",
    (
        UiRoute(HOME, show, ViewAccess.ADMIN),
        UiRoute(RUN, show_run, ViewAccess.ADMIN),
        UiRoute(CANDIDATE, show_candidate, ViewAccess.ADMIN),
        UiRoute(f"{CANDIDATE}/worst", show_worst, ViewAccess.ADMIN),
        UiRoute(f"{HOME}/start", start, ViewAccess.ADMIN, "POST"),
        UiRoute(f"{HOME}/stop", stop, ViewAccess.ADMIN, "POST"),
    ),
    href=HOME,
    access=ViewAccess.ADMIN,
)
