"""`autotts doctor`: check that this machine can sandbox controllers, by trying to break out of every layer.

It also says whether the core of evaluation is compiled.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import typer
from rich.table import Table

from controllers.core.compiled import CORE
from controllers.sandbox.proof import Proof, Trial
from controllers.sandbox.seal import Layer
from controllers.sandbox.spawner import spawner
from discovery.commands.console import wide_console
from discovery.commands.options import AsJson

NOT_SEALED = 1
"""Exit status if this machine cannot sandbox controllers."""


def doctor(as_json: AsJson = False) -> None:
    """Test the sandbox: try every break-out it must prevent, and report the results."""
    proof = spawner().check()
    if as_json:
        sys.stdout.write(json.dumps(_figures(proof), indent=2) + "\n")
    else:
        _show(proof)
    if not proof.sealed:
        raise typer.Exit(NOT_SEALED)


def _parts(proof: Proof) -> dict[str, Sequence[Trial]]:
    """Return the trials of each layer alone, and of all layers together."""
    return {**{str(layer.name).lower(): proof.of(layer) for layer in Layer}, "all together": proof.together}


def _figures(proof: Proof) -> dict[str, Any]:
    trials = {
        part: [{"attempt": one.what, "held": one.held, "words": one.message} for one in trials]
        for part, trials in _parts(proof).items()
    }
    core = {"compiled": CORE.compiled, "reason": CORE.reason}
    return {"sealed": proof.sealed, "lacking": proof.lacking, "core": core, "layers": trials}


def _show(proof: Proof) -> None:
    console = wide_console()
    if proof.trials:
        table = Table(title="break-out attempts from a sandboxed process", title_justify="left")
        for heading in ("layer", "prevented", "attempt", "result"):
            table.add_column(heading)
        for part, trials in _parts(proof).items():
            for number, trial in enumerate(trials):
                held = "yes" if trial.held else "[red]NO[/red]"
                table.add_row("" if number else part, held, trial.what, trial.message)
        console.print(table)
    console.print(f"core of evaluation: {CORE}", markup=False, highlight=False)
    if proof.sealed:
        console.print(
            "controllers from files are accepted; each runs in a sandboxed process of its own", highlight=False
        )
    else:
        message = f"controllers from files are refused: {proof.lacking}"
        console.print(message, style="red", markup=False, highlight=False)
