"""`autotts calibrate`: measure the cost and accuracy of each β on each model, for use by the proxy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from controllers.dial import parse_beta
from controllers.loading import parse_spec
from discovery.commands.console import split_names, wide_console
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
from discovery.errors import RecordingsNotFound
from discovery.evaluation.calibration import Arm, Calibrations, calibrate, write_calibrations
from discovery.evaluation.engines import EngineName, make_engine
from discovery.evaluation.evaluate import AnswerComparison
from discovery.evaluation.replay_jobs import ReplayRules
from discovery.evaluation.sources import open_source, select_cells


def calibrate_command(
    recordings: RecordingsPath,
    out: Annotated[Path, typer.Option(help="file to write the calibration to (.json)")],
    controllers: Annotated[
        str, typer.Option(help="controllers to calibrate: names and FILE.py, separated by commas")
    ] = "cmc",
    betas: Betas = "0,0.25,0.5,0.75,1",
    shuffles: Shuffles = 100,
    models: Models = "",
    benchmarks: Benchmarks = "",
    split: Annotated[Split | None, typer.Option(help="split of the questions (default: all but held-out)")] = None,
    answers: Answers = AnswerComparison.AUTO,
    max_branches: MaxBranches = 64,
    engine: EngineChoice = EngineName.PROCESS,
    workers: Workers = None,
) -> None:
    """Measure the cost and accuracy of each β on each model."""
    specs = [parse_spec(text) for text in split_names(controllers)]
    if not specs:
        raise typer.BadParameter("--controllers is empty; name at least one controller")
    check_writable_path(out, "--out")
    source = open_source(recordings)
    available = [cell for cell in source.cells() if split is not None or cell.split is not Split.HELD_OUT]
    if not available:
        raise RecordingsNotFound(f"{recordings}: holds held-out questions only; use them with --split held-out")
    cells = select_cells(available, split_names(models), split_names(benchmarks), split)
    beta_values = [parse_beta(text, "--betas") for text in split_names(betas)]
    if not beta_values:
        raise typer.BadParameter("--betas is empty; give at least one value")
    calibrations = calibrate(
        source, cells, specs, make_engine(engine, workers), ReplayRules(max_branches), beta_values, shuffles, answers
    )
    write_calibrations(calibrations, out)
    console = wide_console()
    for name in dict.fromkeys(one.controller for calibration in calibrations.values() for one in calibration.all):
        console.print(_table(name, calibrations))
    console.print(f"answer comparison: {next(iter(calibrations.values())).answers}", highlight=False)
    console.print(
        f"mean chain: over all recorded chains; controllers are played in {shuffles} orders of them, so one chain of "
        "theirs may differ a little from it",
        highlight=False,
    )


def _table(controller: str, calibrations: Calibrations) -> Table:
    table = Table(title=f"{controller}: accuracy % and tokens, 95 % intervals over questions", title_justify="left")
    for heading in ("model", "β", "accuracy", "tokens", "worth it"):
        table.add_column(heading, justify="right" if heading in ("β", "accuracy", "tokens") else "left")
    for model, calibration in calibrations.items():
        controller_calibration = calibration.of_name(controller)
        if controller_calibration is None:
            continue
        advice = (
            controller_calibration.advice
            if controller_calibration.map.arm is Arm.CONTROLLER
            else f"[yellow]{controller_calibration.advice}[/yellow]"
        )
        table.add_row(
            model,
            "mean chain",
            f"{controller_calibration.single.accuracy:.1f}",
            f"{controller_calibration.single.tokens:,.0f}",
            advice,
        )
        for point in controller_calibration.points:
            accuracy = f"{point.accuracy:.1f} {_between(point.low, point.high, '.1f')}"
            tokens = f"{point.tokens:,.0f} {_between(point.tokens_low, point.tokens_high, ',.0f')}"
            table.add_row("", f"{point.beta:g}", accuracy, tokens)
    return table


def _between(low: float | None, high: float | None, form: str) -> str:
    return "" if low is None or high is None else f"({low:{form}} to {high:{form}})"
