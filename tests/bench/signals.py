"""Cost of signals: tokens per second of the embedded model with and without log-probabilities."""

from __future__ import annotations

import time
from functools import partial

import aiohttp

from controllers import advance, branch, probe
from controllers.signals import ALL_SIGNALS, NO_SIGNALS, Signal
from proxy.environment.live_environment import LiveEnvironment
from proxy.types import EnvironmentLimits, Prompt
from proxy.upstream.client import UpstreamClient
from tests.bench.live import INTERVAL, MODEL, QUESTION, alternate, ratio_row
from tests.bench.rows import Row, Size

BRANCHES = (16, 64)
ROUNDS = 2
PROBE = 16


async def rows(vllm: str, http: aiohttp.ClientSession, size: Size) -> list[Row]:
    """Return the cost of the signals of intervals and of probes; measurements with and without them alternate."""
    engine = UpstreamClient(vllm, http)
    ids = await engine.tokenise_chat({"model": MODEL, "messages": [{"role": "user", "content": QUESTION}]})
    repeats, counts = size.pick(9, 1), BRANCHES[: size.pick(len(BRANCHES), 1)]
    measured = []
    for count in counts:
        measure = partial(_tokens_per_second, engine, ids, count)
        asked, plain = await alternate(partial(measure, ALL_SIGNALS), partial(measure, NO_SIGNALS), repeats=repeats)
        bench = f"{count} branches with signals of intervals, tokens/s"
        measured.append(ratio_row(bench, asked, plain, "without signals"))
    for count in counts:
        timed = partial(_probe_seconds, engine, ids, count)
        asked, plain = await alternate(
            partial(timed, frozenset({Signal.PROBES})), partial(timed, NO_SIGNALS), repeats=repeats
        )
        bench = f"round of {count} probes with signals, p50 ms"
        measured.append(ratio_row(bench, asked, plain, "without signals", 1000))
    return measured


async def _tokens_per_second(engine: UpstreamClient, ids: list[int], count: int, signals: frozenset[Signal]) -> float:
    """Return the tokens/s of branches that advance by one interval a round and never end."""
    environment = _environment(engine, ids, signals)
    started = time.perf_counter()
    await environment.execute([branch()] * count)
    for _ in range(ROUNDS - 1):
        await environment.execute([advance(index) for index in range(count)])
    seconds = time.perf_counter() - started
    if any(live.log_probabilities for live in environment.branches) is not bool(signals):
        raise RuntimeError("the server sent log-probabilities where none were asked for, or none where they were")
    return sum(len(live.ids) for live in environment.branches) / seconds


async def _probe_seconds(engine: UpstreamClient, ids: list[int], count: int, signals: frozenset[Signal]) -> float:
    """Return the seconds of a round that probes every branch after its first interval."""
    environment = _environment(engine, ids, signals)
    await environment.execute([branch()] * count)
    started = time.perf_counter()
    await environment.execute([probe(index) for index in range(count)])
    return time.perf_counter() - started


def _environment(engine: UpstreamClient, ids: list[int], signals: frozenset[Signal]) -> LiveEnvironment:
    limits = EnvironmentLimits(INTERVAL, ROUNDS * INTERVAL, PROBE)
    prompt = Prompt(MODEL, ids, "", {"ignore_eos": True})
    return LiveEnvironment(engine, prompt, limits, keeps_all_branches=True, signals=signals)
