"""The real proxy and vLLM with the embedded model, measured for `tests/bench/simulate.py` and compared with it."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import aiohttp

from controllers.loading import Spec
from deploy.embedded.task import held_back
from proxy.server import running
from proxy.settings import EMBEDDED, load
from proxy.types import Call
from proxy.upstream.client import UpstreamClient
from tests.bench.fleet import BatchCurve, poisson
from tests.bench.live import MODEL, QUESTION, embedded_model
from tests.bench.rows import Size
from tests.bench.servers import chat

CHAMPION: Final = Path("deploy/embedded/champion")
BATCHES: Final = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of sequences whose steps are measured; the last is also the most that a replica runs."""
STEPS: Final = 128
"""Tokens of each sequence while the batch curve is measured."""
SEED: Final = 20_261_129


class Policy(NamedTuple):
    """A controller at one β."""

    label: str
    spec: Spec
    beta: float


class Speeds(NamedTuple):
    """Speeds of vLLM and of the proxy, measured on this machine."""

    curve: BatchCurve
    points: Sequence[tuple[int, float]]  # sequences, seconds of a step
    request_cpu_s: float
    round_cpu_s: float


async def measure_curve(engine: UpstreamClient, repeats: int, batches: Sequence[int]) -> list[tuple[int, float]]:
    """Return the median seconds of one step for each number of sequences."""
    ids = await engine.tokenise_chat({"model": MODEL, "messages": [{"role": "user", "content": QUESTION}]})
    points = []
    for sequences in batches:
        taken = []
        for _ in range(repeats + 1):  # the first is a warm-up
            call = Call([ids], STEPS, {"ignore_eos": True}, n=sequences)
            started = time.perf_counter()
            await engine.generate(MODEL, call)
            longest = max(len(output.ids) for output in call.outputs)
            taken.append((time.perf_counter() - started) / longest)
        points.append((sequences, statistics.median(taken[1:])))
    return points


async def measure_cpu(url: str, http: aiohttp.ClientSession, requests: int) -> tuple[float, float]:
    """Return the seconds of this process, which serves the proxy and its client, per request and per round.

    Two policies are compared, one of which decides many more rounds. The client's own share counts as the proxy's.
    """
    costs = []
    for controller, beta in (("self_consistency", 0.0), ("parallel_probe", 0.5)):
        rounds, began = 0, time.process_time()
        for problem in held_back(requests, SEED):
            reply = await ask(http, url, problem.question, {"controller": controller, "beta": beta})
            rounds += reply["tts"]["rounds"]
        costs.append(((time.process_time() - began) / requests, rounds / requests))
    (plain, few), (stepped, many) = costs
    per_round = max(0.0, (stepped - plain) / (many - few)) if many > few else 0.0
    return max(0.0, plain - few * per_round), per_round


async def ask(http: aiohttp.ClientSession, url: str, question: str, tts: Mapping[str, Any]) -> dict[str, Any]:
    """Send a question of the embedded task and return the reply."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": question}], "tts": {"answer": "boxed", **tts}}
    return await chat(http, url, body)


@asynccontextmanager
async def real_stack(size: Size) -> AsyncIterator[tuple[str, UpstreamClient, aiohttp.ClientSession]]:
    """Start a proxy on a real vLLM with the embedded model; yield its URL, a client of vLLM and an HTTP session."""
    async with embedded_model(size) as upstream, aiohttp.ClientSession() as http:
        settings = load(upstream=upstream, **{**EMBEDDED, "interval": 32, "controller": str(CHAMPION / "champion.py")})
        async with running(settings) as url:
            yield url, UpstreamClient(upstream, http), http


async def measure(size: Size) -> Speeds:
    """Measure the batch curve of the embedded model and the proxy's own work."""
    async with real_stack(size) as (url, engine, http):
        points = await measure_curve(engine, size.pick(5, 1), BATCHES if not size.is_quick else BATCHES[:3])
        request, each_round = await measure_cpu(url, http, size.pick(40, 2))
    return Speeds(BatchCurve.fit(points), points, request, each_round)


async def serve_really(
    http: aiohttp.ClientSession, url: str, policy: Policy, rate: float, requests: int
) -> tuple[float, float]:
    """Send requests to the real proxy at Poisson times; return the mean latency in seconds and the tokens a second."""
    name = None if policy.spec.is_foreign else policy.spec.name
    tts = {"beta": policy.beta, **({"controller": name} if name else {})}

    async def one(when: float, question: str) -> tuple[float, int]:
        await asyncio.sleep(max(0.0, began + when - time.perf_counter()))
        asked = time.perf_counter()
        reply = await ask(http, url, question, tts)
        return time.perf_counter() - asked, int(reply["tts"]["tokens"]["total"])

    times = poisson(rate, random.Random(SEED))
    began = time.perf_counter()
    problems = held_back(requests, SEED)
    replies = await asyncio.gather(*(one(next(times), problem.question) for problem in problems))
    seconds = time.perf_counter() - began
    return statistics.fmean(latency for latency, _ in replies), sum(tokens for _, tokens in replies) / seconds
