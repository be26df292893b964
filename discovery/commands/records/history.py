"""`autotts history`: inspect a run of `autotts discover`."""

from __future__ import annotations

import difflib
import json
import sys
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.syntax import Syntax
from rich.table import Table

from discovery.commands.console import wide_console
from discovery.commands.discover import RECORD
from discovery.commands.options import AsJson
from discovery.errors import HistoryError
from discovery.evaluation.plot import PlotPoint, check_plot, draw_frontiers
from discovery.search.cascade import BASELINE, CandidateVerdict
from discovery.search.explorers import Candidate
from discovery.search.history import History
from discovery.search.loop import read_pairs

history = typer.Typer(name="history", no_args_is_help=True, help="Inspect runs of `autotts discover`.")

RunPath = Annotated[Path, typer.Argument(help="folder of the run, or its history file")]
Pair = tuple[Candidate, CandidateVerdict]


@history.callback()
def _history() -> None:
    """Inspect runs of `autotts discover`."""


@history.command()
def show(
    path: RunPath,
    name: Annotated[str, typer.Argument(help="name or digest prefix of a candidate (default: list all)")] = "",
    as_json: AsJson = False,
) -> None:
    """List every candidate with its verdict, or show one in full. All hashes are checked."""
    recorded = _read(path)
    pairs = read_pairs(recorded)
    if name:
        candidate, verdict = _find(pairs, name)
        console = wide_console()
        console.print(_describe(candidate, verdict), highlight=False, markup=False)
        console.print(Syntax(candidate.source, "python"))
        return
    if as_json:
        figures = [{"name": c.name, "digest": c.digest, "score": v.score, "failure": v.failure} for c, v in pairs]
        sys.stdout.write(json.dumps({"head": recorded.head, "candidates": figures}, indent=2) + "\n")
        return
    table = Table(title=f"{len(pairs)} candidates; history hash {recorded.head[:16]}", title_justify="left")
    for heading in ("candidate", "digest", "score", "$", "failure or note"):
        table.add_column(heading, justify="right" if heading in ("score", "$") else "left")
    for candidate, verdict in pairs:
        score = "" if verdict.score is None else f"{verdict.score:.2f}"
        text = shorten(verdict.failure or candidate.note, 90, placeholder=" …")
        cells = (
            escape(candidate.name),
            candidate.digest[:12],
            score,
            f"{candidate.cost.usd:.4f}",
            escape(text),
        )
        table.add_row(*cells)
    wide_console().print(table)


@history.command()
def diff(path: RunPath, first: str, second: str) -> None:
    """Show the differences between the files of two candidates."""
    pairs = read_pairs(_read(path))
    old, new = (_find(pairs, name)[0] for name in (first, second))
    lines = difflib.unified_diff(old.source.splitlines(), new.source.splitlines(), old.name, new.name, lineterm="")
    wide_console().print("\n".join(lines), highlight=False, markup=False)


@history.command()
def plot(path: RunPath, to: Annotated[Path, typer.Option(help="file to write the plot to (.png or .svg)")]) -> None:
    """Plot accuracy over tokens for the baselines and the best candidates."""
    check_plot(to)
    scored = [(candidate, verdict) for candidate, verdict in read_pairs(_read(path)) if verdict.score is not None]
    best = sorted(scored, key=lambda pair: -(pair[1].score or 0.0))[:4]
    shown = [pair for pair in scored if pair in best or pair[0].explorer == BASELINE]
    lines = {
        f"{candidate.name} ({verdict.score:.2f})": [
            PlotPoint(tokens, accuracy, 0.0, f"β = {beta:g}") for beta, tokens, accuracy in verdict.curve
        ]
        for candidate, verdict in shown
    }
    draw_frontiers({"search split, all cells": lines}, to)


def _read(path: Path) -> History:
    return History.read(path / RECORD if path.is_dir() else path)


def _find(pairs: list[Pair], name: str) -> Pair:
    """Return the candidate with that name or digest prefix. Raises HistoryError unless there is exactly one."""
    matching = [pair for pair in pairs if pair[0].name == name or pair[0].digest.startswith(name)]
    if len({pair[0].digest for pair in matching}) != 1:
        raise HistoryError(
            f"{name}: {'no candidate has' if not matching else 'several candidates have'} that name or digest prefix"
        )
    return matching[-1]


def _describe(candidate: Candidate, verdict: CandidateVerdict) -> str:
    about: dict[str, Any] = {
        "candidate": candidate.name,
        "digest": candidate.digest,
        "explorer": candidate.explorer,
        "parent": candidate.parent,
        "note": candidate.note,
        "score": verdict.score,
        "AFS by cell": dict(verdict.cells),
        "critical path, doublings": verdict.slowdown,
        "failure": verdict.failure or None,
    }
    return "\n".join(f"{name}: {value}" for name, value in about.items() if value is not None)
