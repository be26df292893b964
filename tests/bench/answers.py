"""Answers: what bringing one to its canonical form takes, and what tasks cost of which some have no answer."""

from __future__ import annotations

import statistics
import time
from collections.abc import AsyncIterator, Iterator

import aiohttp

from discovery.answers.algebra import normalize_expression
from discovery.answers.forms import canonical
from proxy.environment.votability import asks, vouches
from proxy.server import running
from proxy.settings import load
from tests.bench.rows import Row, Size
from tests.discovery.answers.answer_pairs import DIFFERENT, SAME
from tests.fakes import Chain, FakeVLLM, chain
from tests.proxy.conftest import INTERVAL, SMALL
from tests.proxy.environment.test_votability import PROSE, TASKS, probed

TIMES = 20


def rows(size: Size) -> Iterator[Row]:
    """Yield the row of canonical forms."""
    spellings = [one for group in SAME.values() for spelled in group for one in spelled]
    spellings += [one for group in DIFFERENT.values() for pair in group for one in pair]
    whole = [one for one in spellings if one.strip("-+").isdigit()]
    spellings, times = spellings[:: size.pick(1, 20)], size.pick(TIMES, 2)
    taken, plain = _median(spellings, times), _median(whole, times)
    yield Row(
        f"canonical form, nothing remembered: {len(spellings)} answers of the tests' table",
        f"{taken * 1e6:.0f} µs (median)",
        f"{plain * 1e6:.1f} µs for whole numbers",
        f"{taken / plain:.0f}",
    )


def vouched() -> Row:
    """Return how often a probe's answer and the signs beside it are wrong about a task."""
    wrong = sum(vouches(asks(question), text, probed(answer)) for question, text, answer in PROSE)
    missed = sum(not vouches(asks(question), text, probed(answer)) for question, text, answer in TASKS)
    return Row(
        "votability by a probe and its signs, the probe always answering",
        f"{wrong} of {len(PROSE)} prose tasks vouched for",
        f"{missed} of {len(TASKS)} votable tasks missed",
        f"{(wrong + missed) / (len(PROSE) + len(TASKS)):.3f}",
    )


async def mixed(size: Size) -> AsyncIterator[Row]:
    """Tokens of a set of tasks half of which are prose, beside the same set with every task taken to have an answer.

    What a model writes is scripted (`tests/fakes.py`): costs are counts of tokens, not times.
    """
    prose = [
        Chain(f"{mark * 40} and so on. " * length) for mark, length in zip("pqrstuvw", range(6, 30, 3), strict=True)
    ]
    tasks = [
        chain("7", 40 * length, ["", "7"], mark=mark) for mark, length in zip("abcdefgh", range(6, 30, 3), strict=True)
    ]
    for controller in ("cmc", "parallel_probe", "self_consistency")[: size.pick(3, 1)]:
        for name, chains in (("prose", prose[: size.pick(8, 1)]), ("votable", tasks[: size.pick(8, 1)])):
            found_out = [await _cost(one, controller, "auto") for one in chains]
            told = [await _cost(one, controller, "boxed") for one in chains]
            yield Row(
                f"tokens of a request, β=1, {controller}: {len(chains)} {name} tasks",
                f"{statistics.fmean(tokens for tokens, _ in found_out):,.0f} under `auto`",
                f"{statistics.fmean(tokens for tokens, _ in told):,.0f} under `boxed`",
                f"{sum(t for t, _ in found_out) / sum(t for t, _ in told):.3f}; at most "
                f"{max(tokens / one.tokens for (tokens, _), one in zip(found_out, chains, strict=True)):.1f} chains",
            )


async def _cost(one: Chain, controller: str, kind: str) -> tuple[int, str]:
    """Tokens of a request whose branches all write `one`, and why it stopped."""
    body = {"messages": [{"role": "user", "content": "hi"}], "tts": {"controller": controller, "answer": kind}}
    async with (
        FakeVLLM([one], INTERVAL).serve() as backend,
        running(load(upstream=backend.url, **SMALL)) as url,
        aiohttp.ClientSession() as http,
        http.post(f"{url}/v1/chat/completions", json=body, headers={"x-tts-beta": "1"}) as response,
    ):
        reply = await response.json()
    return reply["tts"]["tokens"]["total"], reply["tts"]["stop"]


def _median(spellings: list[str], times: int) -> float:
    """Median over the answers of the median seconds each takes."""
    return statistics.median(statistics.median(_seconds(written) for _ in range(times)) for written in spellings)


def _seconds(written: str) -> float:
    canonical.cache_clear()
    normalize_expression.cache_clear()
    began = time.perf_counter()
    canonical(written)
    return time.perf_counter() - began
