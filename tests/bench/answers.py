"""Answers: time to compute a canonical form, and tokens of tasks with and without an answer to vote on."""

from __future__ import annotations

import statistics
import time
from collections.abc import AsyncIterator, Iterator

import aiohttp

from discovery.answers.algebra import normalize_expression
from discovery.answers.forms import canonical
from proxy.environment.votability import asks_for_answer, is_votable
from proxy.server import running
from proxy.settings import load
from tests.bench.rows import Row, Size
from tests.discovery.answers.answer_pairs import DIFFERENT, SAME
from tests.fakes import Chain, FakeVLLM, chain
from tests.proxy.conftest import INTERVAL, SMALL
from tests.proxy.environment.test_votability import PROSE, TASKS, probed

TIMES = 20


def rows(size: Size) -> Iterator[Row]:
    """Yield the benchmark of canonical forms."""
    spellings = [one for group in SAME.values() for spelled in group for one in spelled]
    spellings += [one for group in DIFFERENT.values() for pair in group for one in pair]
    integers = [spelling for spelling in spellings if spelling.strip("-+").isdigit()]
    spellings, times = spellings[:: size.pick(1, 20)], size.pick(TIMES, 2)
    taken, plain = _median(spellings, times), _median(integers, times)
    yield Row(
        f"canonical form without a cache: {len(spellings)} answers of the test tables",
        f"{taken * 1e6:.0f} µs (median)",
        f"{plain * 1e6:.1f} µs for integers",
        f"{taken / plain:.0f}",
    )


def votability() -> Row:
    """Return the error rate of the votability check, which judges a task by its question and a probe's answer."""
    wrong = sum(is_votable(asks_for_answer(question), text, probed(answer)) for question, text, answer in PROSE)
    missed = sum(not is_votable(asks_for_answer(question), text, probed(answer)) for question, text, answer in TASKS)
    return Row(
        "errors of the votability check if every probe returns an answer",
        f"{wrong} of {len(PROSE)} prose tasks taken as votable",
        f"{missed} of {len(TASKS)} votable tasks missed",
        f"{(wrong + missed) / (len(PROSE) + len(TASKS)):.3f}",
    )


async def mixed(size: Size) -> AsyncIterator[Row]:
    """Yield the tokens of prose tasks and of votable tasks: with the votability check, and with all taken as votable.

    The model's output is scripted (`tests/fakes.py`), so costs are counts of tokens, not times.
    """
    prose = [
        Chain(f"{mark * 40} and so on. " * length) for mark, length in zip("pqrstuvw", range(6, 30, 3), strict=True)
    ]
    tasks = [
        chain("7", 40 * length, ["", "7"], mark=mark) for mark, length in zip("abcdefgh", range(6, 30, 3), strict=True)
    ]
    for controller in ("cmc", "parallel_probe", "self_consistency")[: size.pick(3, 1)]:
        for name, chains in (("prose", prose[: size.pick(8, 1)]), ("votable", tasks[: size.pick(8, 1)])):
            checked = [await _cost(script, controller, "auto") for script in chains]
            declared = [await _cost(script, controller, "boxed") for script in chains]
            most = max(tokens / script.tokens for tokens, script in zip(checked, chains, strict=True))
            yield Row(
                f"tokens per request at β = 1, {controller}: {len(chains)} {name} tasks",
                f"{statistics.fmean(checked):,.0f} with `auto`",
                f"{statistics.fmean(declared):,.0f} with `boxed`",
                f"{sum(checked) / sum(declared):.3f}; at most {most:.1f} chains",
            )


async def _cost(script: Chain, controller: str, kind: str) -> int:
    """Return the tokens of a request whose branches all produce `script`."""
    body = {"messages": [{"role": "user", "content": "hi"}], "tts": {"controller": controller, "answer": kind}}
    async with (
        FakeVLLM([script], INTERVAL).serve() as backend,
        running(load(upstream=backend.url, **SMALL)) as url,
        aiohttp.ClientSession() as http,
        http.post(f"{url}/v1/chat/completions", json=body, headers={"x-tts-beta": "1"}) as response,
    ):
        reply = await response.json()
    return int(reply["tts"]["tokens"]["total"])


def _median(spellings: list[str], times: int) -> float:
    """Return the median over answers of each answer's median time, in seconds."""
    return statistics.median(statistics.median(_seconds(written) for _ in range(times)) for written in spellings)


def _seconds(written: str) -> float:
    """Return the seconds that the canonical form of an answer takes without caches."""
    canonical.cache_clear()
    normalize_expression.cache_clear()
    began = time.perf_counter()
    canonical(written)
    return time.perf_counter() - began
