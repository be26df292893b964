"""Command `autotts demo`: measure accuracy and tokens by β on the embedded model, through the public API."""

from __future__ import annotations

import asyncio
import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from openai import AsyncOpenAI, omit
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from deploy.embedded import SERVED_MODEL_NAME
from deploy.embedded.task import Problem, held_back
from discovery.answers import canonical_answer
from discovery.evaluation.paired_statistics import NORMAL_95
from discovery.evaluation.plot import Panel, PlotPoint, draw_frontiers
from discovery.evaluation.score_set import cheapest_at_accuracy

BETAS = (0.0, 0.25, 0.5, 0.75, 1.0)
CONCURRENCY = 8
"""Number of concurrent requests in every row. Latencies are therefore comparable between rows only."""
VOTERS = 32
"""Chains of self-consistency, with which the controller is compared."""


class DemoSetting(NamedTuple):
    """Settings of one row of the table."""

    name: str
    beta: float
    controller: str | None  # None for the server's default
    temperature: float | None = None  # None for the model's default


class AnsweredRequest(NamedTuple):
    """Outcome and cost of one request."""

    right: bool
    tokens: int  # spent beyond the prompt, over all branches and probes
    branches: int
    seconds: float


SETTINGS = (
    DemoSetting("greedy", 0.0, "single", 0.0),
    DemoSetting("single sample", 0.0, "single"),
    DemoSetting(f"SC@{VOTERS}", 1.0, f"self_consistency@{VOTERS}"),
    *(DemoSetting(f"β = {beta:g}", beta, None) for beta in BETAS),
)
"""Rows of the table: a single branch without and with sampling, a vote of many, then the controller at each β."""


async def run(base_url: str, problems: int, plot: Path) -> None:
    """Send every problem with the settings of every row, print the table and write the plot."""
    console = Console()
    questions = held_back(problems)
    rows: dict[DemoSetting, list[AnsweredRequest]] = {}
    columns = (TextColumn("{task.description:>13}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    async with AsyncOpenAI(base_url=base_url, api_key="unused", max_retries=0) as client:
        with Progress(*columns, console=Console(stderr=True)) as progress:
            for setting in SETTINGS:
                task = progress.add_task(setting.name, total=len(questions))
                rows[setting] = await _ask_all(client, setting, questions, partial(progress.advance, task))
    console.print(table(rows))
    for line in comparison(rows):
        console.print(line, highlight=False)
    draw_frontiers({"What β buys on the embedded model (bars: 95 %)": panel(rows)}, plot)
    console.print(f"picture: {plot}", highlight=False)


async def _ask_all(
    client: AsyncOpenAI, setting: DemoSetting, questions: Sequence[Problem], on_answer: Callable[[], object]
) -> list[AnsweredRequest]:
    gate = asyncio.Semaphore(CONCURRENCY)

    async def ask(problem: Problem) -> AnsweredRequest:
        async with gate:
            answered = await _ask(client, setting, problem)
        on_answer()
        return answered

    return list(await asyncio.gather(*map(ask, questions)))


async def _ask(client: AsyncOpenAI, setting: DemoSetting, problem: Problem) -> AnsweredRequest:
    started = time.perf_counter()
    reply = await client.chat.completions.with_raw_response.create(
        model=SERVED_MODEL_NAME,
        messages=[{"role": "user", "content": problem.question}],
        extra_headers={"x-tts-beta": f"{setting.beta:g}"},
        extra_body={"tts": {"controller": setting.controller}} if setting.controller else None,
        temperature=omit if setting.temperature is None else setting.temperature,
    )
    seconds = time.perf_counter() - started
    headers = reply.headers
    right = canonical_answer(reply.parse().choices[0].message.content or "") == problem.answer
    return AnsweredRequest(right, int(headers["x-tts-tokens"]), int(headers["x-tts-branches"]), seconds)


def accuracy(answered: Sequence[AnsweredRequest]) -> tuple[float, float]:
    """Return the accuracy in percent and half the width of its 95 % interval in percentage points."""
    share = statistics.fmean(request.right for request in answered)
    return 100 * share, 100 * NORMAL_95 * math.sqrt(share * (1 - share) / len(answered))


def comparison(rows: dict[DemoSetting, list[AnsweredRequest]]) -> list[str]:
    """Return what fraction of self-consistency's tokens buys its accuracy, and whether accuracy rises with β."""
    by_beta = [(setting.beta, answered) for setting, answered in rows.items() if setting.controller is None]
    vote = next((answered for setting, answered in rows.items() if setting.name == f"SC@{VOTERS}"), None)
    lines = []
    if vote is not None and by_beta:
        (percent, _), tokens = accuracy(vote), _mean_tokens(vote)
        line = [(_mean_tokens(answered), accuracy(answered)[0]) for _, answered in by_beta]
        needed = cheapest_at_accuracy(line, percent)
        if needed is None:
            beta, answered = by_beta[-1]
            share = 100 * _mean_tokens(answered) / tokens
            reached = f"β = {beta:g} has {accuracy(answered)[0]:.1f} % for {share:.0f} % of its tokens"
            lines.append(f"The accuracy of SC@{VOTERS} ({percent:.1f} %) is not reached; {reached}.")
        else:
            share = 100 * needed / tokens
            lines.append(f"The accuracy of SC@{VOTERS} ({percent:.1f} %) takes {share:.0f} % of its tokens.")
    for (low, fewer), (high, more) in pairwise(by_beta):
        loss = [100.0 * (one.right - other.right) for one, other in zip(fewer, more, strict=True)]
        error = statistics.stdev(loss) / math.sqrt(len(loss)) if len(loss) > 1 else math.inf
        if statistics.fmean(loss) > NORMAL_95 * error:
            lines.append(f"Accuracy falls from β = {low:g} to β = {high:g} by more than chance.")
    return lines


def _mean_tokens(answered: Sequence[AnsweredRequest]) -> float:
    return statistics.fmean(request.tokens for request in answered)


def table(rows: dict[DemoSetting, list[AnsweredRequest]]) -> Table:
    """Return the rows as a table. Every figure is a mean, except that the latency is a median."""
    shown = Table(title=f"{len(next(iter(rows.values())))} held-back problems, embedded model, 95 % intervals")
    for heading in ("", "accuracy %", "tokens", "branches", "latency s (p50)"):
        shown.add_column(heading, justify="right")
    for setting, answered in rows.items():
        percent, error = accuracy(answered)
        shown.add_row(
            setting.name,
            f"{percent:.1f} ± {error:.1f}",
            f"{_mean_tokens(answered):,.0f}",
            f"{statistics.fmean(request.branches for request in answered):.1f}",
            f"{statistics.median(request.seconds for request in answered):.2f}",
        )
    return shown


def panel(rows: dict[DemoSetting, list[AnsweredRequest]]) -> Panel:
    """Return the rows as lines of a plot: the controller by β, with greedy and a single sample for comparison."""
    lines: dict[str, list[PlotPoint]] = {"controller, by β": []}
    for setting, answered in rows.items():
        tokens = _mean_tokens(answered)
        if setting.controller is None:
            lines["controller, by β"].append(PlotPoint(tokens, *accuracy(answered), setting.name))
        else:
            lines[setting.name] = [PlotPoint(tokens, *accuracy(answered))]
    return lines
