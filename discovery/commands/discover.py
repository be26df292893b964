"""`autotts discover`: search for controllers on recordings."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from controllers.sandbox.deadline import Clock
from discovery.answers import Judge
from discovery.commands.console import split_names, wide_console
from discovery.commands.options import Answers, Models, ProbeTokens, RecordingsPath
from discovery.commands.store import with_store
from discovery.data.atomic_files import atomic_write
from discovery.data.recordings import Cell, Recording, Split
from discovery.data.traces import trace_files
from discovery.errors import ExplorerError
from discovery.evaluation.evaluate import AnswerComparison, read_scorable_cell
from discovery.evaluation.replay_jobs import ReplayRules
from discovery.evaluation.search_split import export_search_split
from discovery.evaluation.sources import open_source, select_cells
from discovery.search.cascade import Cascade, CascadePlan, fixed_recordings
from discovery.search.explorers import Candidate
from discovery.search.explorers.catalogue import EXPORT, ExplorerName, ExplorerOptions, make_explorer
from discovery.search.explorers.tuned import Tuned
from discovery.search.history import History
from discovery.search.loop import Digester, Finalist, SearchLimits, SearchLoop, card, read_pairs
from discovery.search.prompt import SYSTEM, USER, join_blocks
from discovery.search.trace_digest import digest_traces
from discovery.search.trial_pool import TrialPool, TrialSettings
from discovery.store import SearchRun, TriedCandidate

RECORD, CONTEXT = "history.jsonl", "context.md"
PROBE_TOKENS = 20
"""Tokens charged per probe if the recordings do not say."""


log = logging.getLogger(__name__)


def discover(
    recordings: RecordingsPath,
    explorer: Annotated[ExplorerName, typer.Option(help="explorer that proposes candidates")] = ExplorerName.GRAMMAR,
    out: Annotated[Path, typer.Option(help="folder for the history, the best controller and its card")] = Path("run"),
    rounds: Annotated[int | None, typer.Option(min=1, help="stop after this many proposals")] = None,
    minutes: Annotated[float | None, typer.Option(min=0, help="stop after this many minutes")] = None,
    budget_usd: Annotated[
        float | None, typer.Option(min=0, help="stop when proposals have cost this much, in USD")
    ] = None,
    seed: Annotated[int, typer.Option(help="random seed")] = 0,
    models: Models = "",
    benchmarks: Annotated[
        str, typer.Option(help="benchmarks, separated by commas (default: all of the search split)")
    ] = "",
    answers: Answers = AnswerComparison.AUTO,
    shuffles: Annotated[int, typer.Option(min=1, help="branch orders per candidate")] = 4,
    probe_tokens: ProbeTokens = None,
    latency: Annotated[float, typer.Option(min=0, help="points subtracted per doubling of the critical path")] = 0.0,
    workers: Annotated[int | None, typer.Option(min=1, help="worker processes (default: one per core)")] = None,
    folder: Annotated[Path | None, typer.Option(help="for --explorer files: folder of the candidates")] = None,
    llm: Annotated[
        Path | None, typer.Option(help="for --explorer llm: JSON file with base_url, models and prices")
    ] = None,
    command: Annotated[
        str, typer.Option(help="for --explorer agent: command line, with {workspace} for the folder")
    ] = "",
    tune: Annotated[bool, typer.Option("--tune", help="between proposals, tune the numbers in the best file")] = False,
    store: Annotated[Path | None, typer.Option(help="replay store to record the search in as well")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue the run recorded in --out")] = False,
) -> None:
    """Search for controllers on recordings of the search split. No model is called to score them."""
    if rounds is None and minutes is None and budget_usd is None:
        raise ExplorerError("no stopping condition; give --rounds, --minutes or --budget-usd")
    options = ExplorerOptions(folder, llm, command, budget_usd)
    chosen = Tuned(make_explorer(explorer, options, out)) if tune else make_explorer(explorer, options, out)
    cells, compared = load_search_split(recordings, split_names(models), split_names(benchmarks), answers)
    priced = any(recording.has_probe_costs for cell_recordings in cells.values() for recording in cell_recordings)
    cost = probe_tokens if probe_tokens is not None else None if priced else PROBE_TOKENS
    plan = CascadePlan(shuffles=shuffles, latency=latency)
    settings = {
        "explorer": explorer,
        "seed": seed,
        "cells": [" ".join(cell) for cell in cells],
        "questions": sum(len(cell_recordings) for cell_recordings in cells.values()),
        "answers": compared,
        "probe_tokens": cost,
        "betas": list(plan.betas),
        "shuffles": shuffles,
        "latency": latency,
        "tune": tune,
    }
    record = out / RECORD
    history = History.resume(record, settings) if resume else History.begin(record, settings)
    if explorer is ExplorerName.AGENT and not (out / EXPORT).exists():
        export_search_split(recordings, out / EXPORT, answers=answers)
    rules = ReplayRules(probe_tokens=cost)
    for line in recording_width_warnings(cells, rules.max_branches):
        log.warning("%s", line)
    with TrialPool(cells, rules, workers) as arena, TrialPool(fixed_recordings(), ReplayRules(), 1) as probes:
        cascade = Cascade(arena, probes, plan)
        digester = None if explorer is ExplorerName.GRAMMAR else _digester(cascade, arena)
        run = SearchLoop(chosen, cascade, history, seed, digester)
        with SearchProgressBar(rounds) as bar:
            run.search(SearchLimits(rounds, budget_usd, minutes), bar.step)
        with atomic_write(out / CONTEXT) as file:
            file.write(join_blocks([*SYSTEM, *USER], run.context()).encode())
        finalist = run.choose_finalist()
    if store is not None:
        store_search(run, store, settings)
    _write_finalist(run, finalist, out, settings)


def recording_width_warnings(cells: Mapping[Cell, Sequence[Recording]], max_branches: int) -> list[str]:
    """Return a line for each cell whose recordings have fewer branches than controllers may open."""
    recorded = {cell: min(recording.branches for recording in recordings) for cell, recordings in cells.items()}
    return [
        f"{' '.join(cell)}: only {branches} branches are recorded, {max_branches} are allowed: "
        f"candidates that open more are scored with {branches}"
        for cell, branches in recorded.items()
        if branches < max_branches
    ]


def store_search(run: SearchLoop, place: Path, settings: Mapping[str, Any]) -> None:
    """Write a search into a store. Raises StoreError."""
    tried = [
        TriedCandidate(
            candidate.digest,
            candidate.name,
            candidate.explorer,
            candidate.parent,
            verdict.score,
            verdict.failure,
            candidate.cost.usd,
            candidate.source,
        )
        for candidate, verdict in read_pairs(run.history)
    ]
    search = SearchRun(run.history.head, str(settings["explorer"]), int(settings["seed"]), settings, tried)
    with_store(place, lambda opened: opened.add_search(search), create=True)


def load_search_split(
    path: Path, models: Sequence[str], benchmarks: Sequence[str], answers: AnswerComparison
) -> tuple[dict[Cell, list[Recording]], str]:
    """Return the search split's recordings by cell, and a text on how answers are compared. Raises DiscoveryError."""
    source = open_source(path)
    cells = select_cells(source.cells(), models, benchmarks, Split.SEARCH)
    with Judge(clock=Clock.CPU) as judge:
        by_cell = {cell: read_scorable_cell(source, cell, answers, judge) for cell in cells}
    compared = " and ".join(sorted({comparison for _, comparison in by_cell.values()}))
    return {cell: recordings for cell, (recordings, _) in by_cell.items()}, compared


def _digester(cascade: Cascade, arena: TrialPool) -> Digester:
    """Return a function that describes a candidate's traces as text."""

    def digest(candidate: Candidate) -> str:
        with tempfile.TemporaryDirectory(prefix="autotts-") as folder:
            cascade.measure(candidate, TrialSettings((0.5, 1.0), range(2)), traces=Path(folder))
            return digest_traces(trace_files(Path(folder)), arena.cells)

    return digest


class SearchProgressBar:
    """Progress bar of a search with the best score so far; shown on a terminal only."""

    def __init__(self, rounds: int | None) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._rounds = rounds

    def __enter__(self) -> SearchProgressBar:
        self._progress.start()
        self._task = self._progress.add_task("trying the baselines", total=self._rounds)
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def step(self, run: SearchLoop) -> None:
        """Show the state after a step."""
        best = run.context().leaders[:1]
        description = f"{len(run.candidates)} tried, ${run.spent:.2f}"
        if best:
            description += f", best {best[0].score:.2f} ({best[0].candidate.name})"
        self._progress.update(self._task, description=description, completed=max(0, run.steps - 1))


def _write_finalist(run: SearchLoop, finalist: Finalist, out: Path, settings: Mapping[str, Any]) -> None:
    """Write the controller and its card, and print a table of the best candidates."""
    file = out / f"{_stem(finalist.candidate)}.py"
    about = card(run, finalist, {"cells": settings["cells"], "questions": settings["questions"]}, settings)
    with atomic_write(file) as opened:
        opened.write(finalist.candidate.source.encode())
    with atomic_write(file.with_suffix(".json")) as opened:
        opened.write((json.dumps(about, indent=2, ensure_ascii=False) + "\n").encode())
    console = wide_console()
    console.print(_leaders(run))
    console.print(f"answer comparison: {settings['answers']}", highlight=False)
    console.print(
        f"{file}: AFS {finalist.afs:.2f} in new branch orders, sandboxed; the card is beside it", highlight=False
    )


def _stem(candidate: Candidate) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in candidate.name)[:64]


def _leaders(run: SearchLoop, most: int = 10) -> Table:
    table = Table(title=f"{len(run.candidates)} candidates in {run.steps} steps", title_justify="left")
    for heading in ("candidate", "score", "β: tokens, accuracy %", "note"):
        table.add_column(heading, justify="right" if heading == "score" else "left")
    for leader in run.context().leaders[:most]:
        points = "  ".join(f"{beta:g}: {tokens:,} {accuracy}" for beta, tokens, accuracy in leader.curve[::2])
        table.add_row(escape(leader.candidate.name), f"{leader.score:.2f}", points, escape(leader.candidate.note[:60]))
    return table
