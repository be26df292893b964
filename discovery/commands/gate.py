"""`autotts gate`: a finalist judged against the champion on the sealed split, in a process of its own."""

from __future__ import annotations

import getpass
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from discovery.commands.console import wide_console
from discovery.data.atomic_files import check_writable_path
from discovery.data.recordings import Split
from discovery.errors import GateError
from discovery.evaluation.engines import EngineName
from discovery.evaluation.evaluate import ANSWERS_HELP, AnswerComparison
from discovery.promotion.gate import GateJob
from discovery.promotion.verdict import GateReport, GateTerms, GateVerdict, report_of
from discovery.store.records import utc_now

COLOURS = {GateVerdict.PROMOTE: "green", GateVerdict.REJECT: "red", GateVerdict.UNDECIDED: "yellow"}


def gate(
    file: Annotated[str, typer.Argument(help="the finalist: FILE.py, or a name", metavar="FILE")],
    recordings: Annotated[Path, typer.Option(help="a store, or a release folder such as ../shared/replay/autotts")],
    ledger: Annotated[Path, typer.Option(help="where every judgement on these recordings is kept, for good")],
    champion: Annotated[str, typer.Option(help="whom to beat: a name or FILE.py")] = "cmc",
    split: Annotated[Split, typer.Option(help="which questions")] = Split.HELD_OUT,
    report: Annotated[Path | None, typer.Option(help="where the report goes (.json)")] = None,
    models: Annotated[str, typer.Option(help="which models; without it all")] = "",
    benchmarks: Annotated[str, typer.Option(help="which benchmarks; without it all")] = "",
    betas: Annotated[str, typer.Option(help="values of β")] = GateJob.betas,
    shuffles: Annotated[int, typer.Option(min=1, max=10_000, help="branch orders a question is run in")] = 100,
    answers: Annotated[AnswerComparison, typer.Option(help=ANSWERS_HELP)] = GateJob.answers,
    max_branches: Annotated[int, typer.Option(min=1, help="branches an episode may open")] = 64,
    beta: Annotated[
        float, typer.Option(min=0, max=1, help="deployed β, at which accuracy must not fall")
    ] = GateTerms.beta,
    margin: Annotated[float, typer.Option(min=0, help="points it may fall there")] = GateTerms.margin,
    engine: Annotated[EngineName, typer.Option(help="who runs the episodes")] = EngineName.PROCESS,
    workers: Annotated[int | None, typer.Option(min=1, help="for --engine process and ray; as many as cores")] = None,
) -> None:
    """Judge a controller against the champion on questions no explorer has seen."""
    if report is not None:
        check_writable_path(report, "--report")
    with tempfile.TemporaryDirectory(prefix="autotts-") as folder:
        order = GateJob(
            finalist=file,
            champion=champion,
            recordings=recordings,
            ledger=ledger,
            report=report or Path(folder, "report.json"),
            created=utc_now(),
            who=getpass.getuser(),
            split=split,
            models=models,
            benchmarks=benchmarks,
            betas=betas,
            shuffles=shuffles,
            answers=answers,
            max_branches=max_branches,
            engine=engine,
            workers=workers or 0,
            beta=beta,
            margin=margin,
        )
        _show(judge_in_subprocess(order))


def judge_in_subprocess(order: GateJob) -> GateReport:
    """The report of an order carried out in another process. Raises GateError with what that one said."""
    command = [sys.executable, "-m", "discovery.promotion.gate", *order.options]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        words = done.stderr.strip().rpartition("\n")[2]
        raise GateError(words or f"the judging process ended with status {done.returncode}")
    return report_of(json.loads(order.report.read_bytes()))


def _show(report: GateReport) -> None:
    console = wide_console()
    console.print(_conditions(report))
    console.print(_cells(report))
    headlines = report.headlines
    if headlines.savings is not None:
        saved = f"{headlines.savings:.0f} % fewer tokens at equal accuracy in {headlines.savings_cells} cells, "
    else:
        saved = ""
    console.print(
        f"at β = {headlines.beta:g}: {saved}{headlines.accuracy:+.1f} points at equal tokens", highlight=False
    )
    if report.verdict is GateVerdict.UNDECIDED:
        noticed = "no gain would be" if report.mde is None else f"a gain of {report.mde:.2f} points would mostly be"
        console.print(f"on {report.questions} questions {noticed} noticed", highlight=False)
    if report.answers:
        console.print(f"answers are compared: {report.answers}", highlight=False)
    console.print(f"{report.name}: {report.verdict}", style=COLOURS[report.verdict], markup=False, highlight=False)


def _conditions(report: GateReport) -> Table:
    table = Table(title=escape(f"{report.name} against {report.champion}"), title_justify="left")
    for heading in ("condition", "holds", "found"):
        table.add_column(heading)
    for one in report.conditions:
        holds = "yes" if one.held else "[red]NO[/red]" if one.final else "[yellow]no[/yellow]"
        table.add_row(one.name, holds, escape(one.words))
    return table


def _cells(report: GateReport) -> Table:
    table = Table(title="accuracy % and tokens by β, the champion's in brackets", title_justify="left")
    for heading in ("model", "benchmark", "ΔAFS"):
        table.add_column(heading, justify="right" if heading == "ΔAFS" else "left")
    for point in report.cells[0].finalist:
        table.add_column(f"β = {point['beta']:g}", justify="right")
    for cell in report.cells:
        points = (
            f"{one['accuracy']:.1f} ({other['accuracy']:.1f}) {one['tokens']:,.0f} ({other['tokens']:,.0f})"
            for one, other in zip(cell.finalist, cell.champion, strict=True)
        )
        table.add_row(cell.model, f"{cell.benchmark} ({cell.split})", f"{cell.delta_afs:+.2f}", *points)
    return table
