"""`autotts gate`: compare a finalist with the champion on the sealed split, in a process of its own."""

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
from discovery.commands.options import (
    Answers,
    Benchmarks,
    Betas,
    EngineChoice,
    MaxBranches,
    Models,
    RecordingsPath,
    Shuffles,
    Workers,
)
from discovery.data.atomic_files import check_writable_path
from discovery.data.recordings import Split
from discovery.errors import GateError
from discovery.evaluation.engines import EngineName
from discovery.promotion.gate import GateJob
from discovery.promotion.verdict import GateReport, GateTerms, GateVerdict, report_of
from discovery.store.records import utc_now

COLOURS = {GateVerdict.PROMOTE: "green", GateVerdict.REJECT: "red", GateVerdict.UNDECIDED: "yellow"}


def gate(
    file: Annotated[str, typer.Argument(help="finalist: FILE.py or a name", metavar="FILE")],
    recordings: RecordingsPath,
    ledger: Annotated[Path, typer.Option(help="file that keeps every judgement on these recordings permanently")],
    champion: Annotated[str, typer.Option(help="champion to beat: a name or FILE.py")] = "cmc",
    split: Annotated[Split, typer.Option(help="split of the questions")] = Split.HELD_OUT,
    report: Annotated[Path | None, typer.Option(help="file to write the report to (.json)")] = None,
    models: Models = "",
    benchmarks: Benchmarks = "",
    betas: Betas = GateJob.betas,
    shuffles: Shuffles = 100,
    answers: Answers = GateJob.answers,
    max_branches: MaxBranches = 64,
    beta: Annotated[
        float, typer.Option(min=0, max=1, help="deployed β, at which accuracy must not drop")
    ] = GateTerms.beta,
    margin: Annotated[
        float, typer.Option(min=0, help="points that accuracy may drop at the deployed β")
    ] = GateTerms.margin,
    engine: EngineChoice = EngineName.PROCESS,
    workers: Workers = None,
) -> None:
    """Compare a controller with the champion on questions that no explorer has seen."""
    if report is not None:
        check_writable_path(report, "--report")
    with tempfile.TemporaryDirectory(prefix="autotts-") as folder:
        job = GateJob(
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
        _show(judge_in_subprocess(job))


def judge_in_subprocess(job: GateJob) -> GateReport:
    """Run a gate job in another process and return its report. Raises GateError with that process's message."""
    command = [sys.executable, "-m", "discovery.promotion.gate", *job.options]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        message = done.stderr.strip().rpartition("\n")[2]
        raise GateError(message or f"the gate's process exited with status {done.returncode} and no message")
    return report_of(json.loads(job.report.read_bytes()))


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
        detectable = "no gain" if report.mde is None else f"only gains of at least {report.mde:.2f} points"
        console.print(f"{report.questions} questions can reliably detect {detectable}", highlight=False)
    if report.answers:
        console.print(f"answer comparison: {report.answers}", highlight=False)
    console.print(f"{report.name}: {report.verdict}", style=COLOURS[report.verdict], markup=False, highlight=False)


def _conditions(report: GateReport) -> Table:
    table = Table(title=escape(f"{report.name} compared with {report.champion}"), title_justify="left")
    for heading in ("condition", "met", "result"):
        table.add_column(heading)
    for condition in report.conditions:
        met = "yes" if condition.held else "[red]NO[/red]" if condition.final else "[yellow]no[/yellow]"
        table.add_row(condition.name, met, escape(condition.words))
    return table


def _cells(report: GateReport) -> Table:
    table = Table(title="accuracy % and tokens by β (champion in parentheses)", title_justify="left")
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
