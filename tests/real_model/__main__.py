"""Print the gain and cost of β on SmolLM2-135M-Instruct against greedy decoding and a single sample.

    python -m tests.real_model [--sums 60] [--betas 0,0.3,0.6,1] [--controllers cmc,parallel_probe] [--votability]

With `--extraction ITEMS` it instead asks for JSON under a schema and for results of `reasoning-gym`.
With `--discover MINUTES` it instead records branches of the model, searches for a controller, gates and evaluates it.
With `--questions-to FILE` it writes questions whose replies are JSON, and asks no model. The exit status is 1 if a bill
exceeds its stated bound or a sum is classified as not votable.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.bench.__main__ import machine
from tests.real_model import extraction, study
from tests.real_model.asking import EXAMPLES, INTERVAL, serving
from tests.real_model.discovery import discover
from tests.real_model.model import DTYPE, build, is_built
from tests.real_model.questions import write_questions


async def run(
    sums: int, betas: list[float], controllers: list[str], dtype: str, votability: bool, console: Console
) -> bool:
    """Print the tables; return whether every bill is within its bound and every sum was votable."""
    began = time.monotonic()
    measured: list[study.Measured] = []
    async with serving(dtype) as model:
        async for row in study.rows(model, sums, betas, controllers):
            measured.append(row)
            sys.stderr.write(f"{time.monotonic() - began:5.0f} s: {row.name}\n")
        title = f"{sums} sums after {EXAMPLES} worked examples, Δ = {INTERVAL}"
        console.print(_table(title, study.HEADINGS, [row.cells(measured[0]) for row in measured]))
        if votability:
            for line in (await study.tell_apart(model, 0.3, controllers[0])).lines():
                console.print(line, highlight=False, markup=False)
    return all(row.is_within_bound and not row.not_votable for row in measured)


async def extract(count: int, betas: list[float], console: Console) -> None:
    """Print the table of JSON under a schema and of results of `reasoning-gym`."""
    rows: list[tuple[str, ...]] = []
    greedy: dict[str, extraction.AskedRow] = {}
    began = time.monotonic()
    async with serving() as model:
        async for row in extraction.rows(model, count, betas):
            rows.append(row.cells(greedy.setdefault(row.task, row)))
            sys.stderr.write(f"{time.monotonic() - began:5.0f} s: {' | '.join(rows[-1])}\n")
    console.print(_table(f"{count} questions of each task", extraction.HEADINGS, rows))


def _table(about: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=f"SmolLM2-135M-Instruct, {about}; {machine()}", title_justify="left")
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        table.add_row(*row)
    return table


def main() -> int:
    """Build the model if it is missing, then run the study."""
    parser = argparse.ArgumentParser(prog="python -m tests.real_model")
    parser.add_argument("--sums", type=int, default=60, help="how many sums each row asks")
    parser.add_argument("--betas", default="0,0.3,0.6,1", help="β of the rows, joined by commas")
    parser.add_argument("--controllers", default="cmc", help="names of controllers, joined by commas")
    parser.add_argument("--dtype", default=DTYPE, help="type of the weights while sums are asked")
    parser.add_argument("--votability", action="store_true", help="also ask the prose and the tasks of the tests")
    parser.add_argument("--extraction", type=int, metavar="ITEMS", help="ask for JSON and results, this many each")
    parser.add_argument("--discover", type=float, metavar="MINUTES", help="record, search this long, gate and evaluate")
    parser.add_argument(
        "--questions",
        type=int,
        default=120,
        help="for --discover: questions, half of them held out; for --questions-to: of each task",
    )
    parser.add_argument("--branches", type=int, default=16, help="for --discover: branches recorded per question")
    parser.add_argument("--folder", type=Path, default=Path("run/real-model"), help="for --discover: its files")
    parser.add_argument("--questions-to", type=Path, metavar="FILE", help="only write questions for `autotts collect`")
    options = parser.parse_args()
    if options.questions_to is not None:
        write_questions(options.questions_to, options.questions)
        return 0
    if not is_built():
        build()
    if options.discover is not None:
        asyncio.run(discover(options.discover, options.questions, options.branches, options.folder, print))
        return 0
    betas = [float(beta) for beta in options.betas.split(",")]
    if options.extraction is not None:
        asyncio.run(extract(options.extraction, betas, Console(width=190)))
        return 0
    controllers = options.controllers.split(",")
    console = Console(width=190)
    return 0 if asyncio.run(run(options.sums, betas, controllers, options.dtype, options.votability, console)) else 1


if __name__ == "__main__":
    sys.exit(main())
