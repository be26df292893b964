"""Figures of the benchmarks of growth and of a busy server, computed from measurements that are known."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from deploy.embedded.task import Problem, held_back
from tests.bench.busy import Use, serve
from tests.bench.growth import REASONS, Curve, draw, row_of
from tests.bench.process_usage import listener
from tests.bench.servers import ServerFailed, lists_models, served
from tests.fakes import FakeVLLM

SIZES = (1, 10, 100)
TOKENS = next(iter(REASONS))


@pytest.mark.parametrize(("figures", "exponent"), [((9.0, 1.0, 10.0), 1), ((1.0, 1.0, 100.0), 2), ((1.0, 5.0, 5.0), 0)])
def test_the_exponent_is_the_slope_between_the_largest_sizes(figures: tuple[float, ...], exponent: float) -> None:
    assert Curve("work", "rows", SIZES, figures).exponent == pytest.approx(exponent)


def test_a_row_says_whether_growth_is_linear_and_why_not() -> None:
    linear, steep, known = (
        row_of(Curve("work", axis, SIZES, figures))
        for axis, figures in (("rows", (1.0, 10.0, 100.0)), ("rows", (0.1, 1.0, 100.0)), (TOKENS, (0.1, 1.0, 100.0)))
    )
    assert (linear.compared, linear.ratio) == ("linear or less", "exponent 1.00")
    assert (steep.compared, steep.ratio) == ("steeper than linear", "exponent 2.00")
    assert known.compared == f"steeper than linear: {REASONS[TOKENS]}"
    assert steep.bench == "growth, work; rows 1 → 10 → 100"
    short = row_of(Curve("work", "rows", SIZES[:2], (1.0, 5.0)))
    assert short.bench == "growth, work; rows 1 → 10"
    assert steep.measured == "100.00 ms → 1.00 s → 100.00 s"


def test_curves_are_drawn(tmp_path: Path) -> None:
    time, memory = (Curve("work", "rows", SIZES, (1.0, 2.0, 3.0), is_memory=is_memory) for is_memory in (False, True))
    draw([time, memory], tmp_path / "growth.svg")
    assert "</svg>" in (tmp_path / "growth.svg").read_text()


@pytest.mark.process
async def test_a_server_that_lost_its_port_to_another_is_not_taken_for_it() -> None:
    async with FakeVLLM().serve() as other:
        port = urlsplit(other.url).port
        assert port is not None
        assert listener(port) == os.getpid()
        with pytest.raises(ServerFailed, match="the server did not start"):
            async with served(port, [sys.executable, "-c", "pass"], os.environ, ready=lists_models):
                pass


async def test_right_answers_of_concurrent_clients_are_all_counted() -> None:
    """All answers arrive while the others are waited for."""
    arrived = asyncio.Event()
    waiting = 0

    async def ask(problem: Problem) -> bool:
        nonlocal waiting
        waiting += 1
        if waiting == 8:
            arrived.set()
        await arrived.wait()
        return int(problem.answer) >= 0

    outcome = await serve(ask, held_back(8), 8, lambda: Use(0.0, 0.0, 0.0))
    assert (outcome.asked, outcome.right, len(outcome.latencies_s)) == (8, 8, 8)
    assert outcome.p95_s <= outcome.seconds
