"""`autotts doctor`: whether this machine can seal controllers, layer by layer, by trying to break out."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.table import Table

from controllers.sandbox.proof import Proof, Trial
from controllers.sandbox.seal import Layer
from controllers.sandbox.spawner import spawner
from discovery.commands.console import wide_console

NOT_SEALED = 1
"""Exit status of a machine that cannot seal controllers."""


def doctor(as_json: Annotated[bool, typer.Option("--json", help="as JSON")] = False) -> None:
    """Try to break out of the sandbox in every way it is to hold, and tell how that ended."""
    proof = spawner().check()
    if as_json:
        sys.stdout.write(json.dumps(_figures(proof), indent=2) + "\n")
    else:
        _show(proof)
    if not proof.sealed:
        raise typer.Exit(NOT_SEALED)


def _parts(proof: Proof) -> dict[str, Sequence[Trial]]:
    """The trials of each layer alone, and of all of them together."""
    return {**{str(layer.name).lower(): proof.of(layer) for layer in Layer}, "all together": proof.together}


def _figures(proof: Proof) -> dict[str, Any]:
    trials = {
        part: [{"attempt": one.what, "held": one.held, "words": one.message} for one in trials]
        for part, trials in _parts(proof).items()
    }
    return {"sealed": proof.sealed, "lacking": proof.lacking, "layers": trials}


def _show(proof: Proof) -> None:
    console = wide_console()
    if proof.trials:
        table = Table(title="what a sealed child could not do", title_justify="left")
        for heading in ("layer", "holds", "attempt", "how it ended"):
            table.add_column(heading)
        for part, trials in _parts(proof).items():
            for number, trial in enumerate(trials):
                held = "yes" if trial.held else "[red]NO[/red]"
                table.add_row("" if number else part, held, trial.what, trial.message)
        console.print(table)
    if proof.sealed:
        console.print("controllers from files run, each sealed in a process of its own", highlight=False)
    else:
        words = f"controllers from files are refused: {proof.lacking}"
        console.print(words, style="red", markup=False, highlight=False)
