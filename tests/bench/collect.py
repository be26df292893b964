"""Collecting recordings of the embedded model: several branches a request against one, in branches per second."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from deploy.embedded.task import held_back
from discovery.data.collect import BRANCHES_PER_REQUEST, collect
from discovery.data.collection_plan import CollectionPlan
from discovery.data.questions import Question
from proxy.server import running
from proxy.settings import EMBEDDED, load
from tests.bench.live import embedded_model
from tests.bench.rows import Row, Size, median_ratio

ADMIN_KEY = "bench"
AT_ONCE = 64
EARLIER_AT_ONCE = 8
REPEATS = 3
QUESTIONS = 4
BRANCHES = 32


class Way(NamedTuple):
    """A way to collect."""

    per_request: int  # branches
    at_once: int  # branches

    def __str__(self) -> str:
        return f"{self.per_request} a request, {self.at_once} in flight"


WAYS = (Way(BRANCHES_PER_REQUEST, AT_ONCE), Way(1, AT_ONCE), Way(1, EARLIER_AT_ONCE))
"""The way that is measured, and the ways it is compared with."""


async def rows(size: Size) -> list[Row]:
    """Return one row for each way that is compared; all ways alternate within the run."""
    rates: dict[Way, list[float]] = {way: [] for way in WAYS}
    count, branches = size.pick(QUESTIONS, 1), size.pick(BRANCHES, 2)
    questions = [Question.model_validate({"question": problem.question}) for problem in held_back(count)]
    async with embedded_model(size) as upstream:
        settings = load(upstream=upstream, **{**EMBEDDED, "admin_key": ADMIN_KEY})
        async with running(settings) as url:
            await _branches_per_second(url, questions[:1], 2, WAYS[0])  # the first request warms the server up
            for _ in range(size.pick(REPEATS, 1)):
                for way in WAYS:
                    rates[way].append(await _branches_per_second(url, questions, branches, way))
    measured, *compared = WAYS
    return [_row(measured, rates[measured], way, rates[way]) for way in compared]


def _row(measured: Way, rates: Sequence[float], compared: Way, others: Sequence[float]) -> Row:
    mine, other = statistics.median(rates), statistics.median(others)
    return Row(
        f"collect, {measured}, branches/s", f"{mine:.1f}", f"{other:.1f} {compared}", *median_ratio(rates, others)
    )


async def _branches_per_second(url: str, questions: Sequence[Question], branches: int, way: Way) -> float:
    """Collect into a new file. Return the branches per second. Raises RuntimeError if a branch is missing."""
    plan = CollectionPlan("", "bench", branches, "boxed")
    with TemporaryDirectory() as folder:
        started = time.perf_counter()
        progress = await collect(
            url, ADMIN_KEY, questions, plan, Path(folder) / "out.jsonl", way.at_once, per_request=way.per_request
        )
        seconds = time.perf_counter() - started
    if progress.mine != len(questions) * branches:
        raise RuntimeError(f"{progress.mine} branches were collected: {progress.skipped}")
    return progress.mine / seconds
