"""`autotts signals`: how well confidences and lengths tell right chains from wrong ones."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.table import Table

from discovery.answers import Judge
from discovery.commands.console import split_names, wide_console
from discovery.commands.options import (
    Answers,
    Benchmarks,
    JsonTarget,
    Models,
    RecordingsPlace,
    check_json_target,
    output_figures,
)
from discovery.data.atomic_files import json_list
from discovery.data.recordings import Cell, Split
from discovery.evaluation.evaluate import AnswerComparison, intern_compared, scorable_recordings
from discovery.evaluation.signal_quality import QualityFigure, SignalQuality, measure_signals
from discovery.evaluation.sources import open_source, select_cells


def signals(
    recordings: RecordingsPlace,
    models: Models = "",
    benchmarks: Benchmarks = "",
    split: Annotated[
        Split | None, typer.Option(help="split of the questions (default: all but held-out ones, if there are others)")
    ] = None,
    answers: Answers = AnswerComparison.AUTO,
    orders: Annotated[int, typer.Option(min=1, max=1000, help="branch orders over which votes are averaged")] = 20,
    json_to: JsonTarget = None,
) -> None:
    """Measure how well confidences and lengths tell right chains from wrong ones of the same question."""
    check_json_target(json_to, json_list("JSON of `autotts signals`", "model", "benchmark", "split", "by_chain"))
    source = open_source(recordings)
    available = source.cells()
    open_cells = [cell for cell in available if cell.split is not Split.HELD_OUT]
    cells = select_cells(
        available if split is not None else open_cells or available, split_names(models), split_names(benchmarks), split
    )
    measured: dict[Cell, SignalQuality] = {}
    with Judge() as judge:
        for cell in cells:
            recorded = scorable_recordings(source, cell)
            comparison = answers.resolve(recorded)
            interned = [intern_compared(question, comparison, judge) for question in recorded]
            measured[cell] = measure_signals(recorded, interned, orders)
    data = [
        {"model": cell.model, "benchmark": cell.benchmark, "split": str(cell.split), **quality.as_json()}
        for cell, quality in measured.items()
    ]
    output_figures(json.dumps(data, indent=2, ensure_ascii=False) + "\n", json_to, lambda: _show(measured))


def _show(measured: dict[Cell, SignalQuality]) -> None:
    console = wide_console()
    for cell, quality in measured.items():
        title = f"{' '.join(cell)}: {quality.questions} questions, {quality.chains} chains each"
        console.print(f"{title}, a single chain is right in {quality.accuracy:.1f} %", markup=False, highlight=False)
        table = Table(title="AUROC within a question, % (50: no information)", title_justify="left")
        table.add_column("chains ranked by")
        for heading in ("AUROC", "95 % interval", "questions"):
            table.add_column(heading, justify="right")
        for name, figure in quality.by_chain.items():
            table.add_row(name, *_row(figure, ".1f"), str(figure.questions))
        console.print(table)
        table = Table(title="probes", title_justify="left")
        for heading in ("share of the chain", "right %", "AUROC of its confidence", "95 % interval"):
            table.add_column(heading, justify="right")
        for probe in quality.probes:
            auroc = ("unknown", "") if probe.auroc is None else _row(probe.auroc, ".1f")
            table.add_row(f"{probe.share:.0%}", f"{probe.accuracy:.1f}", *auroc)
        console.print(table)
        table = Table(title="accuracy of votes, %", title_justify="left")
        for heading in ("chains", "plain", "gain by log-probability", "95 % interval"):
            table.add_column(heading, justify="right")
        for vote in quality.votes:
            gain = ("unknown", "") if vote.weighted is None else _row(vote.weighted, "+.1f")
            table.add_row(str(vote.chains), f"{vote.plain:.1f}", *gain)
        console.print(table)


def _row(figure: QualityFigure, form: str) -> tuple[str, str]:
    return f"{figure.value:{form}}", f"{figure.low:{form}} to {figure.high:{form}}"
