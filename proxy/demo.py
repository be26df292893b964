"""`autotts demo`: what β buys, on the embedded model, asked as any client would ask."""

from __future__ import annotations

import asyncio
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from openai import AsyncOpenAI
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from deploy.embedded.task import Problem, held_back
from discovery.answers import read
from proxy.errors import StartError

BETAS = (0.0, 0.25, 0.5, 0.75, 1.0)
CONCURRENCY = 4
"""Requests under way at once, in every row alike: latencies are comparable with each other only."""

EXAMPLE = held_back(1)[0].question


class Setting(NamedTuple):
    """One row of the table."""

    name: str
    beta: float
    controller: str | None  # None for the server's own


class Asked(NamedTuple):
    """One answered request."""

    right: bool
    tokens: int  # spent beyond the prompt, over all branches and probes
    branches: int
    seconds: float


SETTINGS = (Setting("single sample", 0.0, "single"), *(Setting(f"β = {beta:g}", beta, None) for beta in BETAS))


async def run(base_url: str, problems: int, plot: Path) -> None:
    """Ask every problem at every setting, print the table, write the picture."""
    console = Console()
    questions = held_back(problems)
    rows: dict[Setting, list[Asked]] = {}
    columns = (TextColumn("{task.description:>13}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    async with AsyncOpenAI(base_url=base_url, api_key="unused", max_retries=0) as client:
        with Progress(*columns, console=Console(stderr=True)) as progress:
            for setting in SETTINGS:
                task = progress.add_task(setting.name, total=len(questions))
                rows[setting] = await _ask_all(client, setting, questions, lambda task=task: progress.advance(task))
    console.print(table(rows))
    draw(rows, plot)
    console.print(f"picture: {plot}", highlight=False)


async def _ask_all(client: AsyncOpenAI, setting: Setting, questions: Sequence[Problem], done: object) -> list[Asked]:
    gate = asyncio.Semaphore(CONCURRENCY)

    async def ask(problem: Problem) -> Asked:
        async with gate:
            asked = await _ask(client, setting, problem)
        if callable(done):
            done()
        return asked

    return list(await asyncio.gather(*map(ask, questions)))


async def _ask(client: AsyncOpenAI, setting: Setting, problem: Problem) -> Asked:
    started = time.perf_counter()
    reply = await client.chat.completions.with_raw_response.create(
        model="autotts-tiny",
        messages=[{"role": "user", "content": problem.question}],
        extra_headers={"x-tts-beta": f"{setting.beta:g}"},
        extra_body={"tts": {"controller": setting.controller}} if setting.controller else None,
    )
    seconds = time.perf_counter() - started
    answer = read(reply.parse().choices[0].message.content or "")
    headers = reply.headers
    return Asked(answer == problem.answer, int(headers["x-tts-tokens"]), int(headers["x-tts-branches"]), seconds)


def accuracy(asked: Sequence[Asked]) -> tuple[float, float]:
    """Percent right, and its standard error in points."""
    share = statistics.fmean(one.right for one in asked)
    return 100 * share, 100 * math.sqrt(share * (1 - share) / len(asked))


def table(rows: dict[Setting, list[Asked]]) -> Table:
    """The rows as a table; every figure but the median latency is a mean."""
    shown = Table(title=f"{len(next(iter(rows.values())))} held-back problems, embedded model")
    for heading in ("", "accuracy %", "tokens", "branches", "latency s (p50)"):
        shown.add_column(heading, justify="right")
    for setting, asked in rows.items():
        percent, error = accuracy(asked)
        shown.add_row(
            setting.name,
            f"{percent:.1f} ± {error:.1f}",
            f"{statistics.fmean(one.tokens for one in asked):,.0f}",
            f"{statistics.fmean(one.branches for one in asked):.1f}",
            f"{statistics.median(one.seconds for one in asked):.2f}",
        )
    return shown


def check_plot(path: Path) -> None:
    """Raise StartError, before anything costly, if the picture could not be written to `path`."""
    if path.suffix not in (".png", ".svg"):
        raise StartError(f"--plot {path}: the name must end in .png or .svg")
    if not path.resolve().parent.is_dir():
        raise StartError(f"--plot {path}: there is no folder {path.resolve().parent}")


def draw(rows: dict[Setting, list[Asked]], path: Path) -> None:
    """The accuracy-token frontier as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    points = {s: (statistics.fmean(a.tokens for a in asked), *accuracy(asked)) for s, asked in rows.items()}
    tokens, percents, errors = zip(*(p for s, p in points.items() if s.controller is None), strict=True)
    axes.errorbar(tokens, percents, errors, marker="o", capsize=3, color="#2563eb", label="controller, by β")
    for setting, (spent, percent, error) in points.items():
        if setting.controller is not None:
            axes.errorbar(spent, percent, error, marker="s", capsize=3, color="#b45309", label=setting.name)
        else:
            axes.annotate(setting.name, (spent, percent), textcoords="offset points", xytext=(7, -12), fontsize=9)
    axes.set(xscale="log", xlabel="tokens a question, all branches and probes", ylabel="accuracy, %")
    axes.set_title("What β buys on the embedded model (bars: standard error)", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)
