"""The proxy's own processor time for a request: everything but waiting for the upstream, which does no work here."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, NamedTuple

import aiohttp

from tests.bench.generator import BODY, CONNECTIONS, load
from tests.bench.process_usage import tree_seconds
from tests.bench.rows import Row, Size, median_ratio, spread
from tests.bench.servers import ServerFailed, ServerProcess, chat, own_module, own_proxy

BRANCHES: Final = 16
ROUNDS: Final = 10
INTERVAL: Final = 64
LONG_INTERVAL: Final = 512
LENGTHS: Final = (1024, 4096, 16384)
"""Tokens of each branch, for the cost by length."""
BATCHES: Final = 5
EACH: Final = 40
"""Forwarded requests of each connection in a batch."""
REQUESTS: Final = 20
"""Requests per batch of ten rounds. Longer requests make up smaller batches."""
CONTROLLER: Final = f'''
from controllers import advance, answer, branch


class Lockstep:
    """Opens {BRANCHES} branches, and advances all of them in each round."""

    def __init__(self, beta):
        pass

    def decide(self, state):
        if not state.width:
            return [branch()] * {BRANCHES}
        return [advance(index) for index in state.active] or [answer(state.leader())]
'''


class Proxies(NamedTuple):
    """Proxies in front of the same upstream."""

    trusted: ServerProcess  # runs the controller in its process
    sealed: ServerProcess  # runs the controller in a sandbox process
    long: ServerProcess  # like the first, with longer intervals


async def rows(size: Size) -> list[Row]:
    """Return the benchmarks of the proxy's own processor time. Compared measurements alternate."""
    async with _proxies() as proxies, aiohttp.ClientSession() as http:
        batches, requests = size.pick(BATCHES, 1), size.pick(REQUESTS, 1)
        lengths = LENGTHS[: size.pick(len(LENGTHS), 2)]
        inside, sealed = list[float](), list[float]()
        by_length: dict[int, list[float]] = defaultdict(list)
        for server in (proxies.trusted, proxies.sealed):
            await cost_ms(server, http, INTERVAL * ROUNDS, ROUNDS, requests)  # warm up
        for _ in range(batches):
            inside.append(await cost_ms(proxies.trusted, http, INTERVAL * ROUNDS, ROUNDS, requests))
            sealed.append(await cost_ms(proxies.sealed, http, INTERVAL * ROUNDS, ROUNDS, requests))
        for _ in range(batches):
            for length in lengths:
                rounds = length // LONG_INTERVAL
                count = max(1, requests * ROUNDS // rounds // (LONG_INTERVAL // INTERVAL))
                by_length[length].append(await cost_ms(proxies.long, http, length, rounds, count) / rounds)
    forwarded, bare = await _forwarding(size)
    what = f"own CPU of a request, {BRANCHES} branches, {ROUNDS} rounds of {INTERVAL} tokens"
    shortest = by_length[lengths[0]]
    return [
        Row(
            f"own CPU of a forwarded request, {CONNECTIONS} connections",
            f"{statistics.median(forwarded):.0f} µs",
            f"bare FastAPI: {statistics.median(bare):.0f} µs",
            *median_ratio(forwarded, bare),
        ),
        Row(f"{what}: controller in the process", f"{statistics.median(inside):.1f} ms", "", "", spread(inside, 1)),
        Row(
            f"{what}: controller in a sandbox",
            f"{statistics.median(sealed):.1f} ms, sandbox included",
            f"{statistics.median(inside):.1f} ms in the process",
            *median_ratio(sealed, inside),
        ),
        *(
            Row(
                f"own CPU of a round, {BRANCHES} branches by {LONG_INTERVAL} tokens, to {length:,} tokens each",
                f"{statistics.median(by_length[length]):.1f} ms",
                f"{statistics.median(shortest):.1f} ms to {lengths[0]:,} tokens",
                *median_ratio(by_length[length], shortest),
            )
            for length in lengths[1:]
        ),
    ]


async def _forwarding(size: Size) -> tuple[list[float], list[float]]:
    """Return the processor time of forwarded requests in microseconds: those of the proxy, and of a bare one."""
    each = size.pick(EACH, 10)

    async def cost_us(server: ServerProcess) -> float:
        before = tree_seconds(server.pid)
        answers, _ = await load(server.url, BODY, CONNECTIONS, 0, lambda: repeat(True, each))
        return 1e6 * (tree_seconds(server.pid) - before) / len(answers)

    async with (
        own_module("tests.bench.null", "backend") as backend,
        own_module("tests.bench.null", "bare", backend.url) as bare,
        own_proxy(backend.url, {"ui": "false"}) as proxy,
    ):
        costs = [(await cost_us(proxy), await cost_us(bare)) for _ in range(size.pick(BATCHES, 1) + 1)]
    mine, others = zip(*costs[1:], strict=True)  # the first is a warm-up
    return list(mine), list(others)


@asynccontextmanager
async def _proxies() -> AsyncIterator[Proxies]:
    async with AsyncExitStack() as stack:
        file = Path(stack.enter_context(TemporaryDirectory())) / "lockstep.py"
        file.write_text(CONTROLLER)
        upstream = await stack.enter_async_context(own_module("tests.bench.null_vllm", "serve"))

        async def proxy(interval: int, *, is_sealed: bool) -> ServerProcess:
            settings = {
                "controller": str(file),
                "interval": str(interval),
                "allow_unsandboxed": str(not is_sealed).lower(),
                "decision_s": "5",  # on a busy machine too
                "ui": "false",
            }
            return await stack.enter_async_context(own_proxy(upstream.url, settings))

        yield Proxies(
            await proxy(INTERVAL, is_sealed=False),
            await proxy(INTERVAL, is_sealed=True),
            await proxy(LONG_INTERVAL, is_sealed=False),
        )


async def cost_ms(server: ServerProcess, http: aiohttp.ClientSession, length: int, rounds: int, requests: int) -> float:
    """Return the processor time of one request in milliseconds, on average over several."""
    body = {
        "model": "null",
        "messages": [{"role": "user", "content": str(length)}],
        "tts": {"beta": 0.5, "answer": "number"},
    }
    before = tree_seconds(server.pid)
    for _ in range(requests):
        reply = await chat(http, server.url, body)
        tts = reply.get("tts", {})  # its last round is the answer
        if (tts.get("branches"), tts.get("rounds"), tts.get("stop")) != (BRANCHES, rounds + 1, "answered"):
            raise ServerFailed(f"the proxy did not play {rounds} rounds: {tts}")
    return 1e3 * (tree_seconds(server.pid) - before) / requests
