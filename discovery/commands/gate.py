"""`autotts gate`: compare a finalist with the champion on the sealed split, in a process of its own."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.markup import escape
from rich.table import Table

from controllers.builtin import DEFAULT
from controllers.loading import parse_spec
from discovery.commands.console import wide_console
from discovery.commands.gate_plan import show_plan
from discovery.commands.options import (
    Address,
    Answers,
    Benchmarks,
    Betas,
    EngineChoice,
    LedgerPlace,
    MaxBranches,
    Models,
    ProbeTokens,
    RecordingsPlace,
    Workers,
    check_cluster_options,
    user_name,
)
from discovery.data.atomic_files import check_output
from discovery.data.recordings import Split
from discovery.errors import GateError
from discovery.evaluation.engines import EngineName
from discovery.promotion.conditions import GateTerms
from discovery.promotion.gate import GateJob
from discovery.promotion.ledger import Ledger
from discovery.promotion.power_plan import ORDERS, PLAN_FILE, PlannedOrders
from discovery.promotion.requirements import left_out_by
from discovery.promotion.searched_questions import charged_probe_tokens, check_not_card
from discovery.promotion.verdict import REPORT_FILE, GateReport, GateVerdict, describe_savings, report_of
from discovery.store import child_environment
from discovery.store.records import utc_now

log = logging.getLogger(__name__)
NO_LEDGER: Final = Path()
"""Stands for the ledger of a plan, which judges nothing."""
COLOURS = {GateVerdict.PROMOTE: "green", GateVerdict.REJECT: "red", GateVerdict.UNDECIDED: "yellow"}


def gate(
    file: Annotated[str, typer.Argument(help="finalist: FILE.py or a name", metavar="FILE")],
    recordings: RecordingsPlace,
    ledger: LedgerPlace = None,
    champion: Annotated[str, typer.Option(help="champion to beat: a name or FILE.py")] = DEFAULT,
    split: Annotated[
        Split, typer.Option(help="split of the questions; a verdict on another than held-out promotes nothing")
    ] = Split.HELD_OUT,
    report: Annotated[Path | None, typer.Option(help="file to write the report to (.json)")] = None,
    model: Annotated[
        str, typer.Option(help="the one model it is for: judge on that model's questions only (default: all models)")
    ] = "",
    models: Models = "",
    benchmarks: Benchmarks = "",
    betas: Betas = GateJob.betas,
    shuffles: Annotated[
        int | None,
        typer.Option(min=1, max=10_000, help=f"branch orders per question (default: 100; {ORDERS} with --sequential)"),
    ] = None,
    answers: Answers = GateJob.answers,
    probe_tokens: ProbeTokens = None,
    max_branches: MaxBranches = 64,
    beta: Annotated[
        float, typer.Option(min=0, max=1, help="deployed β, at which accuracy must not drop")
    ] = GateTerms.beta,
    margin: Annotated[
        float, typer.Option(min=0, help="points that accuracy may drop at the deployed β")
    ] = GateTerms.margin,
    plan: Annotated[
        bool, typer.Option("--plan", help="judge nothing: print how many questions and branches a gain needs")
    ] = False,
    sequential: Annotated[
        bool, typer.Option("--sequential", help="judge again whenever questions were added, at one level for all looks")
    ] = False,
    gain: Annotated[
        float, typer.Option(min=0, help="points of AFS that are worth finding, for --plan and --sequential")
    ] = GateTerms.gain,
    power: Annotated[
        float, typer.Option(min=0.5, max=0.999, help="probability of finding the gain, for --plan")
    ] = GateTerms.power,
    bound: Annotated[
        float,
        typer.Option(min=0, max=100, help="largest difference of a question that counts for --sequential, in points"),
    ] = GateTerms.bound,
    engine: EngineChoice = EngineName.PROCESS,
    workers: Workers = None,
    address: Address = None,
) -> None:
    """Compare a controller with the champion on questions that no explorer has seen."""
    if plan and sequential:
        raise typer.BadParameter("give --plan or --sequential, not both")
    if ledger is None and not plan:
        raise typer.BadParameter("--ledger is needed to judge; only --plan works without")
    if model and models:
        raise typer.BadParameter("give --model or --models, not both; --model makes the verdict one about that model")
    check_cluster_options(engine, address, workers)
    if report is not None:
        check_not_card(report, (file, champion))
        check_output(report, "--report", PLAN_FILE if plan else REPORT_FILE)
    with tempfile.TemporaryDirectory(prefix="autotts-") as folder:
        job = GateJob(
            finalist=file,
            champion=champion,
            recordings=recordings,
            ledger=ledger or NO_LEDGER,
            report=report or Path(folder, "report.json"),
            created=utc_now(),
            who=user_name(),
            split=split,
            model=model,
            models=models,
            benchmarks=benchmarks,
            betas=betas,
            shuffles=shuffles or (ORDERS if plan or sequential else GateJob.shuffles),
            answers=answers,
            probe_tokens=probe_tokens,
            max_branches=max_branches,
            engine=engine,
            workers=workers or 0,
            address=address or "",
            beta=beta,
            margin=margin,
            sequential=sequential,
            gain=gain,
            power=power,
            bound=bound,
        )
        if plan:
            orders = PlannedOrders(shuffles or GateJob.shuffles, shuffles or ORDERS)
            made = job.plan(None if ledger is None else Ledger(ledger), orders)
            show_plan(made)
            if report is not None:
                made.write(report)
        else:
            _show(judge_in_subprocess(job))


def judge_in_subprocess(job: GateJob) -> GateReport:
    """Run a gate job in another process, log its warnings, and return its report.

    Raises GateError with that process's message.
    """
    charged = charged_probe_tokens(job.finalist)
    if (
        charged not in (None, job.probe_tokens)
        and Path(job.finalist).exists()
        and parse_spec(job.finalist).needs_probes
    ):
        log.warning(
            "the search for %s charged %d tokens per probe, and this gate charges %s; --probe-tokens %d counts alike",
            job.finalist,
            charged,
            _charge(job.probe_tokens),
            charged,
        )
    command = [sys.executable, "-m", "discovery.promotion.gate", *job.options]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        env=child_environment(job.recordings, job.ledger),
    )
    if done.returncode:
        message = done.stderr.strip().rpartition("\n")[2]
        raise GateError(message or f"the gate's process exited with status {done.returncode} and no message")
    for line in filter(str.strip, done.stderr.splitlines()):
        log.warning("%s", line)
    report = report_of(json.loads(job.report.read_bytes()))
    if report.probe_tokens != job.probe_tokens:
        charge = _charge(report.probe_tokens)
        log.warning("%s was judged before, with %s per probe; that verdict stands", report.name, charge)
    return report


def _charge(probe_tokens: int | None) -> str:
    return "what is recorded" if probe_tokens is None else f"{probe_tokens}"


def _show(report: GateReport) -> None:
    console = wide_console()
    console.print(_conditions(report))
    console.print(_cells(report))
    for cell in report.cells:
        if cell.judged_wrong:
            where = f"{cell.model} {cell.benchmark} {cell.split}"
            console.print(f"{where}: {cell.selected}", markup=False, highlight=False, soft_wrap=True)
    headlines = report.headlines
    if headlines.savings is not None:
        reached = f"{headlines.savings_cells} of {len(report.cells)} cells"
        console.print(
            f"{describe_savings(headlines.savings)} at β = {headlines.beta:g}, in {reached} (an estimate, not a test)",
            highlight=False,
        )
    if headlines.same_cost_beta is not None:
        console.print(
            f"{report.name} spends the tokens of {report.champion} at β = {headlines.beta:g} "
            f"at β = {headlines.same_cost_beta:.2f}",
            markup=False,
            highlight=False,
        )
    if report.sequence is not None:
        console.print(_describe_look(report), highlight=False)
    else:
        detectable = "no gain" if report.mde is None else f"only gains of at least {report.mde:.2f} points"
        console.print(f"{report.questions} questions can reliably detect {detectable}", highlight=False)
        if report.can_grow:
            console.print(_describe_more(report), highlight=False)
    if not report.is_held_out:
        console.print("this verdict promotes nothing: searches may have seen the questions", style="yellow")
    if left_out := left_out_by(report.as_json()):
        console.print(
            f"judged on a selection ({left_out}): it can be promoted with --model only, not for all models",
            style="yellow",
            markup=False,
            highlight=False,
        )
    if report.probe_tokens is not None:
        console.print(f"tokens per probe: {report.probe_tokens}", highlight=False)
    if report.answers:
        console.print(f"answer comparison: {report.answers}", highlight=False)
    console.print(
        f"{report.name}: {report.verdict}{_scope(report)}", style=COLOURS[report.verdict], markup=False, highlight=False
    )


def _scope(report: GateReport) -> str:
    return f" for model {report.model}" if report.model else ""


def _describe_look(report: GateReport) -> str:
    state = report.sequence
    if state is None:
        return ""
    text = f"look {state.look} of this sequence: {report.questions} questions"
    if state.waiting:
        text += f", {state.waiting} more wait for their {state.branches} branches"
    if state.excluded:
        text += f", {state.excluded} were left out because another judgement used them at the same level"
    if report.more is not None:
        text += f"; about {report.more:,} more would end it if they are like these"
    return text


def _describe_more(report: GateReport) -> str:
    if report.more is None:
        return "more questions are unlikely to decide: see the conditions that are not met"
    return f"if the observed gain is real, about {report.more:,} more questions would decide"


def _conditions(report: GateReport) -> Table:
    table = Table(title=escape(f"{report.name} compared with {report.champion}{_scope(report)}"), title_justify="left")
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
