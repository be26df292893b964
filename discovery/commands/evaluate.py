"""`autotts evaluate`: score controllers on recordings."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from controllers.builtin import DEFAULT
from controllers.core.compiled import CORE
from controllers.dial import parse_beta
from controllers.errors import BadController, BetaError, SandboxUnavailable, UnknownController
from controllers.loading import Spec, parse_spec
from discovery.commands.console import split_names, wide_console
from discovery.commands.options import (
    Address,
    Answers,
    Benchmarks,
    Betas,
    EngineChoice,
    JsonTarget,
    MaxBranches,
    Models,
    ProbeTokens,
    RecordingsPlace,
    ShownSignals,
    Shuffles,
    Workers,
    check_cluster_options,
    check_json_target,
    output_figures,
    parse_shown_signals,
)
from discovery.data.atomic_files import json_list
from discovery.data.recordings import Cell, LabelSource, Split
from discovery.evaluation.afs import afs_by_cell
from discovery.evaluation.engines import EngineName, make_engine
from discovery.evaluation.evaluate import DEFAULT_WEIGHTS, AnswerComparison, Evaluation, Weights
from discovery.evaluation.plot import Panel, PlotPoint, check_plot, draw_frontiers
from discovery.evaluation.replay_jobs import ReplayRules, Sealing
from discovery.evaluation.scores import POOLED, Difference, Score, paired_differences, pool_scores
from discovery.evaluation.sources import open_source, select_cells

CONFIDENCE: Final = "confidence"
"""Instead of a weight: each question counts by the confidence in its correct answer."""


def evaluate(
    recordings: RecordingsPlace,
    controllers: Annotated[
        str,
        typer.Option(
            help="controllers, separated by commas: names, NAME@N for N chains, or files (cmc,asc@64,mine.py)"
        ),
    ] = DEFAULT,
    betas: Betas = "0,0.5,1",
    shuffles: Shuffles = 100,
    models: Models = "",
    benchmarks: Benchmarks = "",
    split: Annotated[Split | None, typer.Option(help="split of the questions (default: all)")] = None,
    answers: Answers = AnswerComparison.AUTO,
    labels: Annotated[
        str,
        typer.Option(help="sources of correct answers and their weights, such as feedback=0.8,consensus=confidence"),
    ] = ",".join(DEFAULT_WEIGHTS),
    version: Annotated[
        str, typer.Option(help="use recordings of the model version with this digest prefix (default: the newest)")
    ] = "",
    probe_tokens: ProbeTokens = None,
    max_branches: MaxBranches = 64,
    engine: EngineChoice = EngineName.LOCAL,
    workers: Workers = None,
    address: Address = None,
    sandbox: Annotated[bool, typer.Option("--sandbox", help="run built-in controllers in the sandbox too")] = False,
    allow_unsandboxed: Annotated[
        bool,
        typer.Option(
            "--allow-unsandboxed", help="run controllers from files without the sandbox, with all your permissions"
        ),
    ] = False,
    signals: ShownSignals = "all",
    json_to: JsonTarget = None,
    traces: Annotated[Path | None, typer.Option(help="folder to write traces to: every round of every episode")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="file to write the plot of accuracy over tokens to (.png or .svg)")
    ] = None,
) -> None:
    """Score controllers on recorded branches, without calling a model."""
    specs = list({spec.digest: spec for spec in map(parse_spec, split_names(controllers))}.values())
    _check_names(specs)
    beta_values = [parse_beta(text, "--betas") for text in split_names(betas)]
    if not specs or not beta_values:
        raise (
            BetaError("--betas is empty; give at least one value")
            if specs
            else UnknownController("--controllers is empty; name at least one controller")
        )
    weights = parse_weights(labels)
    shown = parse_shown_signals(signals)
    check_cluster_options(engine, address, workers)
    if plot is not None:
        check_plot(plot)
    check_json_target(json_to, json_list("JSON of `autotts evaluate`", "controller", "beta", "accuracy", "tokens"))
    source = open_source(recordings)
    cells = select_cells(source.cells(), split_names(models), split_names(benchmarks), split)
    _warn_of_held_out(cells)
    rules = ReplayRules(max_branches, probe_tokens, traces, _sealing(specs, sandbox, allow_unsandboxed), shown)
    evaluation = Evaluation(source, cells, specs, beta_values, shuffles, answers, rules, weights, version)
    with _progress(evaluation.work) as advance:
        scored = evaluation.run(make_engine(engine, workers, address), advance)
    core = {"core": "compiled" if CORE.compiled else "pure Python"}
    areas = afs_by_cell(scored, evaluation.anchors)
    differences = _differences_as_json(scored)
    rows = [
        score.as_json()
        | {"afs": areas[score.controller, score.digest].get(score.cell)}
        | core
        | differences.get((score.controller, score.beta, score.cell.model), {})
        for score in scored
    ]
    figures = json.dumps(rows, indent=2, ensure_ascii=False) + "\n"
    output_figures(figures, json_to, lambda: _show(scored, areas))
    if plot is not None:
        draw_frontiers(_panels(scored), plot)


def _differences_as_json(scored: Sequence[Score]) -> dict[tuple[str, float, str], dict[str, Any]]:
    """Return the fields of a score's JSON that compare with the first controller, by controller, β and model."""
    fields = {}
    for each in paired_differences(scored):
        interval = {"points": each.accuracy, "low": each.low, "high": each.high}
        compared = {"against": each.against, **interval, "questions": each.questions, "tokens": each.tokens}
        fields[each.controller, each.beta, each.model] = {"difference": compared}
    return fields


def parse_weights(text: str) -> Weights:
    """Parse weights by label source, such as `reference,feedback=0.8,consensus=confidence`. Raises BadParameter."""
    weights: dict[LabelSource, float | None] = {}
    for part in split_names(text):
        name, _, weight = (piece.strip() for piece in part.partition("="))
        if name not in list(LabelSource):
            raise typer.BadParameter(f"--labels: unknown source {name!r}; use {', '.join(LabelSource)}")
        if LabelSource(name) in weights:
            raise typer.BadParameter(f"--labels names {name} twice")
        weights[LabelSource(name)] = _weight(part, weight)
    if not weights:
        raise typer.BadParameter("--labels is empty; name at least one source")
    return weights


def _weight(part: str, weight: str) -> float | None:
    if weight == CONFIDENCE:
        return None
    try:
        number = float(weight) if "=" in part else 1.0
    except ValueError:
        number = 0.0
    if not 0 < number <= 1:
        raise typer.BadParameter(f"--labels: {part!r}: the weight must be above 0 and at most 1, or {CONFIDENCE!r}")
    return number


def _check_names(specs: Sequence[Spec]) -> None:
    """Raise BadController for two controllers of one name, by which figures, plots and traces are kept."""
    names = [spec.name for spec in specs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise BadController(f"--controllers: two are named {twice}; rename a file, because figures are kept by name")


def _sealing(specs: Sequence[Spec], all_sandboxed: bool, none_sandboxed: bool) -> Sealing:
    """Return which controllers run in the sandbox; warn on stderr if foreign ones do not. Raises SandboxUnavailable."""
    if all_sandboxed and none_sandboxed:
        raise SandboxUnavailable("--sandbox and --allow-unsandboxed exclude each other")
    foreign = [spec.name for spec in specs if spec.is_foreign]
    if none_sandboxed and foreign:
        warning = f"NOT SANDBOXED: {', '.join(foreign)} can read, write and send whatever you can"
        Console(stderr=True).print(warning, style="bold red", markup=False, highlight=False, soft_wrap=True)
    return Sealing.ALL if all_sandboxed else Sealing.NONE if none_sandboxed else Sealing.FOREIGN


def _warn_of_held_out(cells: Sequence[Cell]) -> None:
    """Say on stderr that choices must not be made by held-out questions, if there are any among `cells`."""
    held_out = sorted({cell.benchmark for cell in cells if cell.split is Split.HELD_OUT})
    if held_out:
        warning = (
            f"held-out questions are included ({', '.join(held_out)}): do not choose a controller or β by these "
            "figures, or the gate cannot judge it on them; --split search or validation leaves them out"
        )
        Console(stderr=True).print(warning, style="yellow", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """Yield a function that advances a progress bar, which is shown on a terminal only."""
    console = Console(stderr=True)
    columns = (TextColumn("shuffles"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        yield lambda count: progress.advance(task, count)


def _show(scored: Sequence[Score], areas: Mapping[tuple[str, str], Mapping[Cell, float]]) -> None:
    """Print the figures as tables, and the failures."""
    console = wide_console()
    console.print(_table([*scored, *pool_scores(scored)]))
    for cell, text in _grading(scored).items():
        console.print(f"{' '.join(cell)}: {text}", markup=False, highlight=False, soft_wrap=True)
    if compared := paired_differences(scored):
        console.print(_differences(compared))
    if any(areas.values()):
        console.print(_areas(scored, areas))
    for score in scored:
        if score.failures:
            text = (
                f"{score.controller}, β = {score.beta:g}, {' '.join(score.cell)}: {len(score.failures)} episodes failed"
            )
            console.print(f"{text}: {score.failures[0].message}", style="red", markup=False, highlight=False)


def _table(scored: Sequence[Score]) -> Table:
    table = Table(title="means per question; ± is the standard error over questions", title_justify="left")
    left, right = ("controller", "model", "benchmark"), ("β", "accuracy %", "tokens", "probes", "rounds", "branches")
    for heading in (left[0], right[0], *left[1:], *right[1:], "path", "path p95", "decisions/s"):
        table.add_column(heading, justify="left" if heading in left else "right", no_wrap=heading in right)
    for score in scored:
        figures = score.as_json()
        table.add_row(
            score.controller,
            f"{score.beta:g}",
            score.cell.model,
            _where(score),
            # several models answer the same questions, so the error of the pooled mean would be too small
            f"{score.accuracy:.1f}" + ("" if score.cell.model == POOLED else f" ± {score.error:.1f}"),
            f"{figures['tokens']:,.0f}",
            f"{figures['tokens_by_kind']['probe']:,.0f}",
            f"{figures['rounds']:.1f}",
            f"{figures['branches']:.1f}",
            f"{figures['critical_path_mean']:,.0f}",
            f"{figures['critical_path_p95']:,.0f}",
            f"{figures['decisions_per_s']:,.0f}",
        )
    return table


def _where(score: Score) -> str:
    count = score.outcomes.shape[-1]
    if score.cell.model == POOLED:
        return f"{POOLED} ({count} over all models)"
    if score.cell.benchmark == POOLED:
        return f"{POOLED} ({count} questions)"
    return f"{score.cell.benchmark} ({score.cell.split})"


def _grading(scored: Sequence[Score]) -> Mapping[Cell, str]:
    """Describe by cell how answers are compared, where right ones come from, and which questions are left out."""
    texts: dict[Cell, str] = {}
    for score in scored:
        if score.grading is None:
            continue
        texts[score.cell] = f"answer comparison: {score.grading.answers}"
        if score.grading.selected.judged_wrong:
            texts[score.cell] += f"; {score.grading.selected}"
        if set(score.grading.sources) == {LabelSource.REFERENCE}:
            continue
        parts = []
        for source, count in score.grading.by_source.items():
            weight = score.grading.mean_weight(source)
            parts.append(f"{count} from {source}{'' if weight == 1 else f' with weight {weight:.2g}'}")
        texts[score.cell] += f"; correct answers: {', '.join(parts)}"
    return texts


def _differences(compared: Sequence[Difference]) -> Table:
    table = Table(title=f"difference to {compared[0].against}, 95 % interval paired by question", title_justify="left")
    for heading in ("controller", "β", "model", "questions", "points", "interval", "tokens ×"):
        table.add_column(heading, justify="left" if heading in ("controller", "model") else "right")
    for difference in compared:
        interval = f"[{difference.low:+.1f}, {difference.high:+.1f}]"
        cells = (
            f"{difference.beta:g}",
            difference.model,
            str(difference.questions),
            f"{difference.accuracy:+.1f}",
            interval,
            f"{difference.tokens:.2f}",
        )
        table.add_row(difference.controller, *cells)
    return table


def _areas(scored: Sequence[Score], areas: Mapping[tuple[str, str], Mapping[Cell, float]]) -> Table:
    betas = ", ".join(f"{beta:g}" for beta in sorted({score.beta for score in scored}))
    table = Table(title=f"AFS: mean accuracy over budgets of 1 to 64 chains, by β = {betas}", title_justify="left")
    for heading in ("controller", "model", "benchmark", "AFS"):
        table.add_column(heading, justify="right" if heading == "AFS" else "left")
    for (name, _), by_cell in areas.items():
        for cell, area in by_cell.items():
            table.add_row(name, cell.model, f"{cell.benchmark} ({cell.split})", f"{area:.2f}")
        if len(by_cell) > 1:
            table.add_row(name, POOLED, POOLED, f"{sum(by_cell.values()) / len(by_cell):.2f}")
    return table


def _panels(scored: Sequence[Score]) -> dict[str, Panel]:
    """Return the plot's panels, one per cell, with one line per controller."""
    panels: dict[str, dict[str, list[PlotPoint]]] = {}
    for score in scored:
        lines = panels.setdefault(f"{' '.join(score.cell)} (bars: ± 1 standard error)", {})
        point = PlotPoint(score.mean("tokens"), score.accuracy, score.error, f"β = {score.beta:g}")
        lines.setdefault(score.controller, []).append(point)
    return {title: {name: sorted(points) for name, points in lines.items()} for title, lines in panels.items()}
