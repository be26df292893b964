"""`autotts calibrate`: what β costs and brings on each model, for the proxy to go by."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from controllers.dial import parse_beta
from controllers.loading import parse_spec
from discovery.commands.console import names, wide_console
from discovery.data.atomic_files import check_writable_path
from discovery.data.recordings import Split
from discovery.errors import RecordingsNotFound
from discovery.evaluation.calibration import Arm, Calibrations, calibrate, write_calibrations
from discovery.evaluation.engines import EngineName, make_engine
from discovery.evaluation.evaluate import ANSWERS_HELP, AnswerComparison
from discovery.evaluation.replay_jobs import ReplayRules
from discovery.evaluation.sources import open_source, select_cells


def calibrating(
    recordings: Annotated[Path, typer.Option(help="a store, or a release folder such as ../shared/replay/autotts")],
    out: Annotated[Path, typer.Option(help="where the calibration goes (.json)")],
    controllers: Annotated[str, typer.Option(help="whom to calibrate: names and FILE.py, with commas")] = "cmc",
    betas: Annotated[str, typer.Option(help="values of β")] = "0,0.25,0.5,0.75,1",
    shuffles: Annotated[int, typer.Option(min=1, max=10_000, help="branch orders a question is run in")] = 100,
    models: Annotated[str, typer.Option(help="which models; without it all")] = "",
    benchmarks: Annotated[str, typer.Option(help="which benchmarks; without it all")] = "",
    split: Annotated[Split | None, typer.Option(help="which questions; without it all but held-out ones")] = None,
    answers: Annotated[AnswerComparison, typer.Option(help=ANSWERS_HELP)] = AnswerComparison.AUTO,
    max_branches: Annotated[int, typer.Option(min=1, help="branches an episode may open")] = 64,
    engine: Annotated[EngineName, typer.Option(help="who runs the episodes")] = EngineName.PROCESS,
    workers: Annotated[int | None, typer.Option(min=1, help="for --engine process and ray; as many as cores")] = None,
) -> None:
    """Measure what β costs and brings on each model."""
    specs = [parse_spec(text) for text in names(controllers)]
    if not specs:
        raise typer.BadParameter("--controllers names none")
    check_writable_path(out, "--out")
    source = open_source(recordings)
    seen = [cell for cell in source.cells() if split is not None or cell.split is not Split.HELD_OUT]
    if not seen:
        raise RecordingsNotFound(
            f"{recordings}: only held-out questions are there; --split held-out uses them all the same"
        )
    cells = select_cells(seen, names(models), names(benchmarks), split)
    dials = [parse_beta(text, "--betas") for text in names(betas)]
    if not dials:
        raise typer.BadParameter("--betas names none")
    found = calibrate(
        source, cells, specs, make_engine(engine, workers), ReplayRules(max_branches), dials, shuffles, answers
    )
    write_calibrations(found, out)
    console = wide_console()
    for name in dict.fromkeys(one.controller for first in found.values() for one in first.all):
        console.print(_table(name, found))
    console.print(f"answers are compared: {next(iter(found.values())).answers}", highlight=False)
    console.print(
        f"mean chain: over all recorded chains; controllers are played in {shuffles} orders of them, so one chain of "
        "theirs may differ a little from it",
        highlight=False,
    )


def _table(controller: str, found: Calibrations) -> Table:
    table = Table(title=f"{controller}: accuracy % and tokens, 95 % intervals over questions", title_justify="left")
    for heading in ("model", "β", "accuracy", "tokens", "worth it"):
        table.add_column(heading, justify="right" if heading in ("β", "accuracy", "tokens") else "left")
    for model, first in found.items():
        one = first.of_name(controller)
        if one is None:
            continue
        advice = one.advice if one.map.arm is Arm.CONTROLLER else f"[yellow]{one.advice}[/yellow]"
        table.add_row(model, "mean chain", f"{one.single.accuracy:.1f}", f"{one.single.tokens:,.0f}", advice)
        for point in one.points:
            accuracy = f"{point.accuracy:.1f} {_between(point.low, point.high, '.1f')}"
            tokens = f"{point.tokens:,.0f} {_between(point.tokens_low, point.tokens_high, ',.0f')}"
            table.add_row("", f"{point.beta:g}", accuracy, tokens)
    return table


def _between(low: float | None, high: float | None, form: str) -> str:
    return "" if low is None or high is None else f"({low:{form}} to {high:{form}})"
