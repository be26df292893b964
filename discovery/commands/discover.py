"""`autotts discover`: search for controllers on recordings."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from enum import StrEnum
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from controllers.loading import parse_spec
from controllers.sandbox.deadline import Clock
from discovery.answers import Judge
from discovery.commands.console import split_names, wide_console
from discovery.commands.options import (
    Address,
    Answers,
    AnyPlace,
    Models,
    ProbeTokens,
    RecordingsPlace,
    ShownSignals,
    check_cluster_options,
    parse_shown_signals,
)
from discovery.commands.store import with_store
from discovery.data.atomic_files import atomic_write
from discovery.data.recordings import Cell, Recording, Split
from discovery.data.traces import trace_files
from discovery.errors import ExplorerError, install_hint
from discovery.evaluation.engines import EngineName, JobPool, make_job_pool
from discovery.evaluation.evaluate import (
    AnswerComparison,
    each_scorable,
    probe_problem,
    probe_warnings,
    read_scorable_cell,
)
from discovery.evaluation.replay_jobs import ReplayRules
from discovery.evaluation.search_split import export_search_split, exported_questions, recordings_digest
from discovery.evaluation.sources import open_source, select_cells
from discovery.promotion.searched_questions import with_searched
from discovery.search.cascade import Cascade, CascadePlan
from discovery.search.explorers import Candidate, Explorer
from discovery.search.explorers.catalogue import EXPORT, WORKSPACES, ExplorerName, ExplorerOptions, make_explorer
from discovery.search.explorers.tuned import Tuned
from discovery.search.fixed_recordings import fixed_recordings
from discovery.search.halving import FEWEST_ORDERS, last_orders, rungs_below
from discovery.search.history import History
from discovery.search.kernel.jit import is_available
from discovery.search.loop import (
    Digester,
    Finalist,
    SearchLimits,
    SearchLoop,
    better_baseline,
    card,
    final_shuffles,
    read_pairs,
)
from discovery.search.output_files import check_new_run, check_resumed_run, controller_file
from discovery.search.prompt import SYSTEM, USER, join_blocks
from discovery.search.trace_digest import digest_traces
from discovery.search.trial_pool import KEPT_CELLS, TrialPool, TrialSettings, can_be_probed, recording_width_warnings
from discovery.store import SearchRun, StorePlace, TriedCandidate, parse_place

if TYPE_CHECKING:
    from discovery.search.kernel.kernel_pool import KernelRunner

RECORD, CONTEXT = "history.jsonl", "context.md"
VARIED = 24
"""Genomes varied from good ones in each step of a search with the kernel, which has time for them."""

log = logging.getLogger(__name__)


class SearchEngine(StrEnum):
    """Values of `--engine` of `autotts discover`."""

    PROCESS = "process"
    RAY = "ray"


class SearchWorkers(NamedTuple):
    """Workers of a search: processes, or those of a Ray cluster."""

    engine: SearchEngine
    workers: int | None = None
    address: str | None = None

    def job_pool(self, workers: int | None) -> JobPool:
        """Return a pool that plays candidates: of so many processes, or of all workers of the cluster."""
        is_ray = self.engine is SearchEngine.RAY
        return make_job_pool(EngineName(self.engine), self.workers if is_ray else workers, self.address, KEPT_CELLS)


def discover(
    recordings: RecordingsPlace,
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
    shuffles: Annotated[
        int | None,
        typer.Option(
            min=1, help="branch orders per candidate (default: 4; with the kernel up to 100)", show_default=False
        ),
    ] = None,
    probe_tokens: ProbeTokens = None,
    signals: ShownSignals = "all",
    latency: Annotated[float, typer.Option(min=0, help="points subtracted per doubling of the critical path")] = 0.0,
    harm: Annotated[
        float, typer.Option(min=0, help="points subtracted per point that the worst cell loses to adaptive_consistency")
    ] = 0.5,
    champions: Annotated[
        str,
        typer.Option(help="controllers that the winner must beat, separated by commas; they limit its critical path"),
    ] = "",
    engine: Annotated[
        SearchEngine, typer.Option(help="where candidates are tried: in worker processes, or on Ray")
    ] = SearchEngine.PROCESS,
    workers: Annotated[int | None, typer.Option(min=1, help="workers (default: one per core)")] = None,
    address: Address = None,
    folder: Annotated[Path | None, typer.Option(help="for --explorer files: folder of the candidates")] = None,
    llm: Annotated[
        Path | None, typer.Option(help="for --explorer llm: JSON file with base_url, models and prices")
    ] = None,
    command: Annotated[
        str, typer.Option(help="for --explorer agent: command line, with {workspace} for the folder")
    ] = "",
    tune: Annotated[bool, typer.Option("--tune", help="between proposals, tune the numbers in the best file")] = False,
    kernel: Annotated[
        bool | None,
        typer.Option(
            "--kernel/--no-kernel",
            help="for --explorer grammar: play candidates by the compiled kernel (default: if numba is installed)",
            show_default=False,
        ),
    ] = None,
    store: Annotated[
        AnyPlace | None,
        typer.Option(parser=parse_place, metavar="STORE", help="replay store to record the search in as well"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue the run recorded in --out")] = False,
) -> None:
    """Search for controllers on recordings of the search split. No model is called to score them."""
    if rounds is None and minutes is None and budget_usd is None:
        raise ExplorerError("no stopping condition; give --rounds, --minutes or --budget-usd")
    if budget_usd is not None and explorer is not ExplorerName.LLM:
        raise ExplorerError("--budget-usd limits --explorer llm only, whose cost is known; give --rounds or --minutes")
    check_cluster_options(engine, address, workers)
    record, context = out / RECORD, out / CONTEXT
    if resume:
        check_resumed_run(context)
    else:
        of_agent = (out / EXPORT, out / WORKSPACES) if explorer is ExplorerName.AGENT else ()
        check_new_run(record, (context, *of_agent))
    shown = parse_shown_signals(signals)
    compiled = choose_runner(explorer, tune, kernel)
    options = ExplorerOptions(folder, llm, command, budget_usd, VARIED if compiled else 0)
    chosen = None if resume else _explorer(explorer, options, out, tune)
    cells, compared = load_search_split(recordings, split_names(models), split_names(benchmarks), answers)
    rivals = [parse_spec(name) for name in split_names(champions)]
    has_probes = can_be_probed(cells)
    if not has_probes and (probing := [rival.name for rival in rivals if rival.needs_probes]):
        raise ExplorerError(
            f"--champions {','.join(probing)}: needs probes, and branches of the recordings are whole replies, which "
            "have none; name others, or leave such cells out with --benchmarks"
        )
    questions = sum(len(cell_recordings) for cell_recordings in cells.values())
    orders = shuffles or (last_orders(questions) if compiled else CascadePlan().shuffles)
    rungs = rungs_below(orders) if compiled or orders >= FEWEST_ORDERS else ()
    plan = CascadePlan(shuffles=orders, latency=latency, harm=harm, champions=rivals, rungs=rungs)
    settings = {
        "explorer": explorer,
        "runner": "kernel" if compiled else "python",
        "seed": seed,
        "cells": [" ".join(cell) for cell in cells],
        "questions": questions,
        "data": recordings_digest(cells),
        "answers": compared,
        "probe_tokens": probe_tokens,
        "signals": sorted(shown),
        "betas": list(plan.betas),
        "shuffles": orders,
        "latency": latency,
        "harm": harm,
        "champions": [rival.digest for rival in rivals],
        "tune": tune,
        **({} if has_probes else {"has_probes": False}),
    }
    with closing(History.resume(record, settings) if resume else History.begin(record, settings)) as history:
        if chosen is None:  # only now: its transcript may be read when no other process writes it
            chosen = _explorer(explorer, options, out, tune)
        if explorer is ExplorerName.AGENT and not (out / EXPORT).exists():
            export_search_split(recordings, out / EXPORT, answers=answers)
        rules = ReplayRules(probe_tokens=probe_tokens, signals=shown)
        probes = {cell: probe_problem(of_cell, probe_tokens) for cell, of_cell in cells.items()}
        for line in (*recording_width_warnings(cells, rules.max_branches), *probe_warnings(probes)):
            log.warning("%s", line)
        with ExitStack() as stack:
            cascade, arena = make_cascade(stack, cells, rules, plan, SearchWorkers(engine, workers, address), compiled)
            digester = None if explorer is ExplorerName.GRAMMAR else _digester(cascade, arena)
            run = SearchLoop(chosen, cascade, history, seed, digester)
            with SearchProgressBar(rounds) as bar:
                run.search(SearchLimits(rounds, budget_usd, minutes), bar.step)
            with atomic_write(context) as file:
                file.write(join_blocks([*SYSTEM, *USER], run.context()).encode())
            finalist = run.choose_finalist(final_shuffles(questions), choosing=orders if compiled else None)
        if store is not None:
            store_search(run, store, settings)
        about = card(run, finalist, {"cells": settings["cells"], "questions": questions}, settings)
        seen = {recording.question for of_cell in cells.values() for recording in of_cell}
        if explorer is ExplorerName.AGENT:
            seen |= exported_questions(recordings)  # the export has all models and benchmarks
        _write_finalist(run, finalist, out, with_searched(about, seen))


def _explorer(name: ExplorerName, options: ExplorerOptions, out: Path, tune: bool) -> Explorer:
    """Return the explorer of a search, which tunes as well if asked to. Raises ExplorerError."""
    explorer = make_explorer(name, options, out)
    return Tuned(explorer) if tune else explorer


def choose_runner(explorer: ExplorerName, tune: bool, kernel: bool | None) -> bool:
    """Return whether the compiled kernel plays candidates. Raises ExplorerError if it was asked for and cannot."""
    fits = explorer is ExplorerName.GRAMMAR and not tune
    if kernel and not fits:
        raise ExplorerError("--kernel plays genomes of --explorer grammar only, without --tune")
    if not fits or kernel is False:
        return False
    available = is_available()
    if kernel and not available:
        raise ExplorerError(f"--kernel needs numba: {install_hint('search')}")
    if not available:
        slow = "candidates are played by the Python runner; the extra `search` is much faster: %s"
        log.warning(slow, install_hint("search"))
    return available


def make_cascade(
    stack: ExitStack,
    cells: Mapping[Cell, Sequence[Recording]],
    rules: ReplayRules,
    plan: CascadePlan,
    search: SearchWorkers,
    compiled: bool,
) -> tuple[Cascade, TrialPool]:
    """Return the cascade and its pool on `cells`; their workers end with `stack`. Raises EngineError."""
    arena = stack.enter_context(TrialPool(cells, rules, pool=search.job_pool(search.workers)))
    probes = stack.enter_context(TrialPool(fixed_recordings(), ReplayRules(), pool=search.job_pool(1)))
    if not compiled:
        return Cascade(arena, probes, plan), arena
    if search.engine is SearchEngine.RAY:
        from discovery.search.kernel.kernel_pool import KernelRunner  # needs numba
        from discovery.search.kernel.ray_kernel import RayKernel

        runner = KernelRunner(RayKernel(arena, rules), RayKernel(probes, rules))
        runner.compile()
    else:
        runner = make_kernel(stack, cells, rules, search.workers)
    return Cascade(arena, probes, plan, runner), arena


def make_kernel(
    stack: ExitStack, cells: Mapping[Cell, Sequence[Recording]], rules: ReplayRules, workers: int | None
) -> KernelRunner:
    """Return the kernel, compiled; its threads end with `stack`. It sees the signals of `rules`, as files do."""
    from discovery.search.kernel.kernel_pool import KernelPool, KernelRunner  # needs numba

    arena = stack.enter_context(KernelPool(cells, rules, workers))
    runner = KernelRunner(arena, stack.enter_context(KernelPool(fixed_recordings(), rules, 1)))
    runner.compile()
    return runner


def store_search(run: SearchLoop, place: StorePlace, settings: Mapping[str, Any]) -> None:
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
    place: StorePlace, models: Sequence[str], benchmarks: Sequence[str], answers: AnswerComparison
) -> tuple[dict[Cell, list[Recording]], str]:
    """Return the search split's recordings by cell, and a text on how answers are compared. Raises DiscoveryError."""
    source = open_source(place)
    cells = select_cells(source.cells(), models, benchmarks, Split.SEARCH)
    with Judge(clock=Clock.CPU) as judge:
        by_cell = dict(each_scorable(cells, lambda cell: read_scorable_cell(source, cell, answers, judge)))
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


def _write_finalist(run: SearchLoop, finalist: Finalist, out: Path, about: Mapping[str, Any]) -> None:
    """Write the controller and its card, and print a table of the best candidates."""
    file = controller_file(out, run.history, finalist.candidate, run.candidates)
    with atomic_write(file) as opened:
        opened.write(finalist.candidate.source.encode())
    with atomic_write(file.with_suffix(".json")) as opened:
        opened.write((json.dumps(about, indent=2, ensure_ascii=False) + "\n").encode())
    console = wide_console()
    console.print(_leaders(run))
    console.print(f"answer comparison: {about['settings']['answers']}", highlight=False)
    orders = f"{len(finalist.curves[0].points)} β in {finalist.shuffles} new branch orders"
    if rival := better_baseline(run, finalist):
        console.print(f"no gain: {rival}", style="yellow", markup=False, highlight=False)
    console.print(f"{file}: AFS {finalist.afs:.2f} at {orders}, sandboxed; the card is beside it", highlight=False)


def _leaders(run: SearchLoop, most: int = 10) -> Table:
    table = Table(title=f"{len(run.candidates)} candidates in {run.steps} steps", title_justify="left")
    for heading in ("candidate", "score", "β: tokens, accuracy %", "note"):
        table.add_column(heading, justify="right" if heading == "score" else "left")
    for leader in run.context().leaders[:most]:
        points = "  ".join(f"{beta:g}: {tokens:,} {accuracy}" for beta, tokens, accuracy in leader.curve[::2])
        table.add_row(
            escape(leader.candidate.name),
            f"{leader.score:.2f}",
            points,
            escape(shorten(leader.candidate.note, 60, placeholder=" …")),
        )
    return table
