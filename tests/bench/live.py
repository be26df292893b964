"""Live path: throughput of the proxy and of its rounds, compared with plain vLLM."""

from __future__ import annotations

import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import aiohttp

from controllers import Action, Controller, Limits, State, advance, answer, branch, run_episode
from controllers.baselines import CMC, SelfConsistency
from deploy.embedded.task import held_back
from discovery.answers import parse_kind
from proxy.environment.live_environment import LiveEnvironment
from proxy.types import Call, EnvironmentLimits, Prompt
from proxy.upstream.client import UpstreamClient
from proxy.upstream.embedded import EmbeddedServer
from tests.bench.rows import Row, Size, median_ratio
from tests.bench.servers import chat
from tests.fakes import ScriptedEnvironment, chain

MODEL = "autotts-tiny"
INTERVAL = 64
BRANCHES = 16
LIMIT = 400
REPEATS = 15
QUESTION = held_back(1, lengths=(14, 16))[0].question


class Lockstep:
    """Controller that advances all branches by one interval per round, which gives the most rounds possible."""

    def decide(self, state: State) -> Sequence[Action]:
        if not state.width:
            return [branch()] * BRANCHES
        return [advance(i) for i in state.active] or [answer(state.leader())]


@asynccontextmanager
async def embedded_model(size: Size) -> AsyncIterator[str]:
    """Yield the URL of a vLLM with the embedded model: the one of the run, or else one that is started for it."""
    if size.upstream:
        yield size.upstream
        return
    async with EmbeddedServer() as server:
        yield server.url


async def rows(vllm: str, proxy: str, http: aiohttp.ClientSession, size: Size) -> list[Row]:
    """Return the benchmarks of the live path; compared measurements alternate."""
    engine = UpstreamClient(vllm, http)
    ids = await engine.tokenise_chat({"model": MODEL, "messages": [{"role": "user", "content": QUESTION}]})
    raw, through, stepped = await alternate(
        lambda: _raw(engine, ids),
        lambda: _through(http, proxy),
        lambda: _stepped(engine, ids),
        repeats=size.pick(REPEATS, 1),
    )
    direct, forwarded = await alternate(
        lambda: _completion(http, vllm, ids), lambda: _completion(http, proxy, ids), repeats=size.pick(200, 5)
    )
    decision = await _decision(size.pick(20, 1))
    return [
        ratio_row(f"SC@{BRANCHES} through the proxy, tokens/s", through, raw, "one raw request, n=16"),
        ratio_row(f"lockstep x{BRANCHES}, Δ={INTERVAL}, tokens/s", stepped, raw, "one raw request, n=16"),
        ratio_row("forwarding of a one-token completion, p50 ms", forwarded, direct, "direct", 1000),
        Row("decision of cmc at β = 1, p50 µs", f"{1e6 * decision:,.0f}", "", ""),
    ]


def ratio_row(bench: str, measured: Sequence[float], compared: Sequence[float], name: str, scale: float = 1) -> Row:
    """Return a row of two alternating measurements; `name` describes the second one."""
    mine, other = (scale * statistics.median(figures) for figures in (measured, compared))
    digits = 0 if mine > 100 else 2
    ratios = median_ratio(measured, compared)
    return Row(bench, f"{mine:,.{digits}f}", f"{other:,.{digits}f} {name}", *ratios)


async def alternate(*measures: Callable[[], Awaitable[float]], repeats: int) -> list[list[float]]:
    """Alternate measurements, so that disturbances affect all of them. The first turn is a warm-up and is dropped."""
    taken: list[list[float]] = [[] for _ in measures]
    for turn in range(repeats + 1):
        for figures, measure in zip(taken, measures, strict=True):
            figure = await measure()
            if turn:
                figures.append(figure)
    return taken


async def _raw(engine: UpstreamClient, ids: list[int]) -> float:
    """Return the tokens/s of one plain request for all branches."""
    call = Call([ids], LIMIT, {}, n=BRANCHES)
    started = time.perf_counter()
    await engine.generate(MODEL, call)
    return sum(len(output.ids) for output in call.outputs) / (time.perf_counter() - started)


async def _through(http: aiohttp.ClientSession, proxy: str) -> float:
    """Return the tokens/s of a self-consistency episode, from request to reply."""
    beta = 4 / 6
    if SelfConsistency(beta).samples != BRANCHES:
        raise RuntimeError(f"β = {beta} no longer gives {BRANCHES} samples; change it here")
    body = {
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": LIMIT,
        "tts": {"beta": beta, "controller": "self_consistency", "answer": "boxed"},
    }
    started = time.perf_counter()
    reply = await chat(http, proxy, body)
    return float(reply["usage"]["completion_tokens"]) / (time.perf_counter() - started)


async def _stepped(engine: UpstreamClient, ids: list[int]) -> float:
    """Return the tokens/s of branches that all stop after every interval."""
    environment = LiveEnvironment(
        engine, Prompt(MODEL, ids, "", {}, kind=parse_kind("boxed")), EnvironmentLimits(INTERVAL, LIMIT, 8)
    )
    state = State(Limits(INTERVAL))
    started = time.perf_counter()
    await run_episode(Lockstep(), environment, state)
    return state.spent / (time.perf_counter() - started)


async def _completion(http: aiohttp.ClientSession, url: str, ids: list[int]) -> float:
    """Return the seconds of a one-token completion."""
    body = {"model": MODEL, "prompt": ids, "max_tokens": 1}
    started = time.perf_counter()
    async with http.post(f"{url}/v1/completions", json=body) as response:
        await response.read()
    return time.perf_counter() - started


async def _decision(episodes: int) -> float:
    """Return the median seconds of one decision, over episodes of 64 scripted chains."""
    taken: list[float] = []

    class Timed:
        def __init__(self, controller: Controller) -> None:
            self.controller = controller

        def decide(self, state: State) -> Sequence[Action]:
            started = time.perf_counter()
            actions = self.controller.decide(state)
            taken.append(time.perf_counter() - started)
            return actions

    chains = [chain("7" if i % 3 else "8", 300 + 37 * (i % 20), ["7"], mark=chr(48 + i)) for i in range(64)]
    for _ in range(episodes):
        state = State(Limits(10))
        await run_episode(Timed(CMC(1)), ScriptedEnvironment(chains, 10), state)
    return statistics.median(taken)
