"""`autotts evaluate`: controllers scored on recordings."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from controllers.dial import parse_beta
from controllers.errors import BetaError, SandboxUnavailable, UnknownController
from controllers.loading import Spec, parse_spec
from discovery.commands.console import names, wide_console
from discovery.data.atomic_files import atomic_write, check_writable_path
from discovery.data.recordings import Cell, LabelSource, Split
from discovery.evaluation.engines import EngineName, make_engine
from discovery.evaluation.evaluate import ANSWERS_HELP, DEFAULT_WEIGHTS, AnswerComparison, Evaluation, Weights
from discovery.evaluation.plot import Panel, PlotPoint, check_plot, draw_frontiers
from discovery.evaluation.replay_jobs import ReplayRules, Sealing
from discovery.evaluation.scores import POOLED, Difference, Score, paired_differences, pool_scores
from discovery.evaluation.sources import open_source, select_cells

CONFIDENCE: Final = "confidence"
"""In place of a weight: each question counts for as much as its right answer is sure."""


def evaluate(
    recordings: Annotated[Path, typer.Option(help="a store, or a release folder such as ../shared/replay/autotts")],
    controllers: Annotated[str, typer.Option(help="names, NAME@N for N chains, or files: cmc,asc@64,mine.py")] = "cmc",
    betas: Annotated[str, typer.Option(help="values of β")] = "0,0.5,1",
    shuffles: Annotated[int, typer.Option(min=1, max=10_000, help="branch orders a question is run in")] = 100,
    models: Annotated[str, typer.Option(help="which models; without it all")] = "",
    benchmarks: Annotated[str, typer.Option(help="which benchmarks; without it all")] = "",
    split: Annotated[Split | None, typer.Option(help="which questions; without it all")] = None,
    answers: Annotated[AnswerComparison, typer.Option(help=ANSWERS_HELP)] = AnswerComparison.AUTO,
    labels: Annotated[
        str, typer.Option(help="whose right answers count, and for how much: feedback=0.8,consensus=confidence")
    ] = ",".join(DEFAULT_WEIGHTS),
    version: Annotated[
        str, typer.Option(help="score recordings of the version whose digest begins so; without it the newest")
    ] = "",
    probe_tokens: Annotated[
        int | None, typer.Option(min=0, help="what a probe costs; without it what was recorded")
    ] = None,
    max_branches: Annotated[int, typer.Option(min=1, help="branches an episode may open")] = 64,
    engine: Annotated[EngineName, typer.Option(help="who runs the episodes")] = EngineName.LOCAL,
    workers: Annotated[int | None, typer.Option(min=1, help="for --engine process and ray; as many as cores")] = None,
    sandbox: Annotated[bool, typer.Option("--sandbox", help="seal built-in controllers too")] = False,
    allow_unsandboxed: Annotated[
        bool, typer.Option("--allow-unsandboxed", help="run controllers from files with all your rights")
    ] = False,
    json_to: Annotated[str | None, typer.Option("--json", metavar="FILE|-", help="where figures go as JSON")] = None,
    traces: Annotated[Path | None, typer.Option(help="folder for every round of every episode")] = None,
    plot: Annotated[Path | None, typer.Option(help="where the accuracy-token picture goes (.png or .svg)")] = None,
) -> None:
    """Score controllers on recorded branches, without a model."""
    specs = [parse_spec(text) for text in names(controllers)]
    dials = [parse_beta(text, "--betas") for text in names(betas)]
    if not specs or not dials:
        raise BetaError("--betas names none") if specs else UnknownController("--controllers names none")
    weights = parse_weights(labels)
    if plot is not None:
        check_plot(plot)
    if json_to not in (None, "-"):
        check_writable_path(Path(json_to), "--json")
    source = open_source(recordings)
    cells = select_cells(source.cells(), names(models), names(benchmarks), split)
    rules = ReplayRules(max_branches, probe_tokens, traces, _sealing(specs, sandbox, allow_unsandboxed))
    evaluation = Evaluation(source, cells, specs, dials, shuffles, answers, rules, weights, version)
    with _progress(evaluation.work) as advance:
        found = evaluation.run(make_engine(engine, workers), advance)
    figures = json.dumps([score.as_json() for score in found], indent=2, ensure_ascii=False) + "\n"
    if json_to == "-":
        sys.stdout.write(figures)
    else:
        _show(found)
    if json_to not in (None, "-"):
        with atomic_write(Path(json_to)) as file:
            file.write(figures.encode())
    if plot is not None:
        draw_frontiers(_panels(found), plot)


def parse_weights(text: str) -> Weights:
    """`reference,feedback=0.8,consensus=confidence` as what a question counts for. Raises BadParameter."""
    found: dict[LabelSource, float | None] = {}
    for part in names(text):
        name, _, weight = (piece.strip() for piece in part.partition("="))
        if name not in list(LabelSource):
            raise typer.BadParameter(f"--labels: {name!r} is none of {', '.join(LabelSource)}")
        if LabelSource(name) in found:
            raise typer.BadParameter(f"--labels names {name} twice")
        found[LabelSource(name)] = _weight(part, weight)
    if not found:
        raise typer.BadParameter("--labels names none")
    return found


def _weight(part: str, weight: str) -> float | None:
    if weight == CONFIDENCE:
        return None
    try:
        number = float(weight) if "=" in part else 1.0
    except ValueError:
        number = 0.0
    if not 0 < number <= 1:
        raise typer.BadParameter(f"--labels: {part!r}: a weight is above 0 and at most 1, or {CONFIDENCE!r}")
    return number


def _sealing(specs: Sequence[Spec], everything: bool, nothing: bool) -> Sealing:
    """Which controllers are sealed; that foreign ones are not is said aloud. Raises SandboxUnavailable."""
    if everything and nothing:
        raise SandboxUnavailable("--sandbox and --allow-unsandboxed exclude each other")
    foreign = [spec.name for spec in specs if spec.is_foreign]
    if nothing and foreign:
        words = f"NOT SANDBOXED: {', '.join(foreign)} can read, write and send whatever you can"
        Console(stderr=True).print(words, style="bold red", markup=False, highlight=False, soft_wrap=True)
    return Sealing.ALL if everything else Sealing.NONE if nothing else Sealing.FOREIGN


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """Give a function that moves a bar on; there is one on a terminal only."""
    console = Console(stderr=True)
    columns = (TextColumn("shuffles"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        yield lambda count: progress.advance(task, count)


def _show(found: Sequence[Score]) -> None:
    """The figures for people, and what went wrong."""
    console = wide_console()
    console.print(_table([*found, *pool_scores(found)]))
    for cell, words in _grading(found).items():
        console.print(f"{' '.join(cell)}: {words}", markup=False, highlight=False, soft_wrap=True)
    if compared := paired_differences(found):
        console.print(_differences(compared))
    for score in found:
        if score.failures:
            words = (
                f"{score.controller}, β = {score.beta:g}, {' '.join(score.cell)}: {len(score.failures)} episodes failed"
            )
            console.print(f"{words}: {score.failures[0].message}", style="red", markup=False, highlight=False)


def _table(found: Sequence[Score]) -> Table:
    table = Table(title="per question; ± is a standard error over questions", title_justify="left")
    left, right = ("controller", "model", "benchmark"), ("β", "accuracy %", "tokens", "probes", "rounds", "branches")
    for heading in (left[0], right[0], *left[1:], *right[1:], "path", "path p95", "decisions/s"):
        table.add_column(heading, justify="left" if heading in left else "right", no_wrap=heading in right)
    for score in found:
        figures = score.as_json()
        table.add_row(
            score.controller,
            f"{score.beta:g}",
            score.cell.model,
            _where(score),
            # several models answer the same questions, so the spread over their sum says too little
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


def _grading(found: Sequence[Score]) -> Mapping[Cell, str]:
    """How the answers of each cell are compared, and how right ones are known, where not all are references."""
    told: dict[Cell, str] = {}
    for score in found:
        if score.grading is None:
            continue
        told[score.cell] = f"answers are compared: {score.grading.answers}"
        if set(score.grading.sources) == {LabelSource.REFERENCE}:
            continue
        parts = []
        for source, count in score.grading.by_source.items():
            weight = score.grading.mean_weight(source)
            parts.append(f"{count} by {source}{'' if weight == 1 else f', which count for {weight:.2g} each'}")
        told[score.cell] += f"; right ones are known {'; '.join(parts)}"
    return told


def _differences(compared: Sequence[Difference]) -> Table:
    table = Table(title=f"against {compared[0].against}, 95 % interval paired by question", title_justify="left")
    for heading in ("controller", "β", "model", "questions", "points", "interval", "tokens ×"):
        table.add_column(heading, justify="left" if heading in ("controller", "model") else "right")
    for one in compared:
        interval = f"[{one.low:+.1f}, {one.high:+.1f}]"
        cells = (f"{one.beta:g}", one.model, str(one.questions), f"{one.accuracy:+.1f}", interval, f"{one.tokens:.2f}")
        table.add_row(one.controller, *cells)
    return table


def _panels(found: Sequence[Score]) -> dict[str, Panel]:
    """A panel a cell, a line a controller."""
    panels: dict[str, dict[str, list[PlotPoint]]] = {}
    for score in found:
        lines = panels.setdefault(" ".join(score.cell), {})
        point = PlotPoint(score.mean("tokens"), score.accuracy, score.error, f"β = {score.beta:g}")
        lines.setdefault(score.controller, []).append(point)
    return {title: {name: sorted(points) for name, points in lines.items()} for title, lines in panels.items()}
