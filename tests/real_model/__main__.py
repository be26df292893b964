"""Print the gain and cost of β on SmolLM2-135M-Instruct against greedy decoding and a single sample.

    python -m tests.real_model [--sums 60] [--betas 0,0.3,0.6,1] [--controllers cmc,parallel_probe] [--votability]

The exit status is 1 if a bill exceeds its stated bound or a sum is classified as not votable.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time

from rich.console import Console
from rich.table import Table

from tests.bench.__main__ import machine
from tests.real_model import study
from tests.real_model.asking import EXAMPLES, INTERVAL, serving
from tests.real_model.model import build, is_built


async def run(sums: int, betas: list[float], controllers: list[str], votability: bool, console: Console) -> bool:
    """Print the tables; return whether every bill is within its bound and every sum was votable."""
    began = time.monotonic()
    measured: list[study.Measured] = []
    async with serving() as model:
        async for row in study.rows(model, sums, betas, controllers):
            measured.append(row)
            sys.stderr.write(f"{time.monotonic() - began:5.0f} s: {row.name}\n")
        console.print(_table(measured, sums))
        if votability:
            for line in (await study.tell_apart(model, 0.3, controllers[0])).lines():
                console.print(line, highlight=False, markup=False)
    return all(row.is_within_bound and not row.not_votable for row in measured)


def _table(measured: list[study.Measured], sums: int) -> Table:
    title = f"SmolLM2-135M-Instruct, {sums} sums after {EXAMPLES} worked examples, Δ = {INTERVAL}"
    table = Table(title=f"{title}; {machine()}", title_justify="left")
    for heading in study.HEADINGS:
        table.add_column(heading, justify="right" if heading else "left")
    for row in measured:
        table.add_row(*row.cells(measured[0]))
    return table


def main() -> int:
    """Build the model if it is missing, then run the study."""
    parser = argparse.ArgumentParser(prog="python -m tests.real_model")
    parser.add_argument("--sums", type=int, default=60, help="how many sums each row asks")
    parser.add_argument("--betas", default="0,0.3,0.6,1", help="β of the rows, joined by commas")
    parser.add_argument("--controllers", default="cmc", help="names of controllers, joined by commas")
    parser.add_argument("--votability", action="store_true", help="also ask the prose and the tasks of the tests")
    options = parser.parse_args()
    if not is_built():
        build()
    betas = [float(beta) for beta in options.betas.split(",")]
    controllers = options.controllers.split(",")
    console = Console(width=190)
    return 0 if asyncio.run(run(options.sums, betas, controllers, options.votability, console)) else 1


if __name__ == "__main__":
    sys.exit(main())
