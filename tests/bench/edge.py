"""The pass-through beside the bare one, both before a backend that does nothing; every server is its own process."""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import NamedTuple

import aiohttp

from proxy.embedded import free_port
from tests.bench.live import Row

CONNECTIONS = 50
REQUESTS = 4000
ALONE = 400
STREAMS = 200
ROUNDS = 3
BODY = {"model": "null", "messages": [{"role": "user", "content": "hi"}]}


class Figures(NamedTuple):
    """Of one server."""

    rate: float  # requests a second, over fifty connections
    alone_ms: float  # a request, one at a time, p50
    streams: float  # streams a second, two hundred at once
    first_ms: float  # a stream's first byte, p50


async def rows() -> list[Row]:
    """Every row; servers are measured by turns."""
    async with AsyncExitStack() as stack:
        backend = await stack.enter_async_context(_served("-m", "tests.bench.null", "backend"))
        bare = await stack.enter_async_context(_served("-m", "tests.bench.null", "bare", upstream=backend))
        proxy = await stack.enter_async_context(_served("-m", "proxy.cli", "serve", upstream=backend))
        connector = aiohttp.TCPConnector(limit=0)
        http = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))
        taken: dict[str, list[Figures]] = {"direct": [], "bare": [], "proxy": []}
        for _ in range(ROUNDS):
            for name, url in (("direct", backend), ("bare", bare), ("proxy", proxy)):
                taken[name].append(await _measure(http, url))
    direct, plain, ours = (_median(taken[name]) for name in ("direct", "bare", "proxy"))
    return [
        _row(f"pass-through, {CONNECTIONS} connections", ours.rate, plain.rate, "/s", "bare FastAPI"),
        Row(
            "pass-through, one connection, p50",
            f"{ours.alone_ms:.2f} ms",
            f"direct: {direct.alone_ms:.2f} ms",
            f"{ours.alone_ms - direct.alone_ms:+.2f} ms",
        ),
        _row(f"{STREAMS} SSE streams", ours.streams, direct.streams, "/s", "direct"),
        _row(f"{STREAMS} SSE streams", ours.streams, plain.streams, "/s", "bare FastAPI"),
        Row(
            f"{STREAMS} SSE streams, first byte p50",
            f"{ours.first_ms:.0f} ms",
            f"direct: {direct.first_ms:.0f} ms, bare: {plain.first_ms:.0f} ms",
            "",
        ),
    ]


def _row(bench: str, measured: float, beside: float, unit: str, what: str) -> Row:
    return Row(bench, f"{measured:,.0f} {unit}", f"{what}: {beside:,.0f} {unit}", f"{measured / beside:.2f}")


def _median(taken: Sequence[Figures]) -> Figures:
    return Figures(*(statistics.median(column) for column in zip(*taken, strict=True)))


@asynccontextmanager
async def _served(*command: str, upstream: str | None = None) -> AsyncIterator[str]:
    """The URL of a server that runs as long as the context."""
    port = free_port()
    if command[-1] == "serve":
        arguments = [*command, "--port", str(port), "--upstream", str(upstream), "--no-record"]
    else:
        arguments = [*command, str(port), *([] if upstream is None else [upstream])]
    quiet = asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, stdout=quiet, stderr=quiet, env=os.environ | {"COVERAGE_PROCESS_START": ""}
    )
    url = f"http://127.0.0.1:{port}"
    try:
        await _up(url, process)
        yield url
    finally:
        process.terminate()
        await process.wait()


async def _up(url: str, process: asyncio.subprocess.Process) -> None:
    async with aiohttp.ClientSession() as http:
        for _ in range(600):
            if process.returncode is not None:
                break
            try:
                async with http.post(f"{url}/v1/chat/completions", json=BODY) as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.1)
    raise RuntimeError(f"{url} does not come up")


async def _measure(http: aiohttp.ClientSession, url: str) -> Figures:
    alone = []
    for _ in range(ALONE):
        began = time.perf_counter()
        await _ask(http, url)
        alone.append(time.perf_counter() - began)
    began = time.perf_counter()
    await asyncio.gather(*(_repeat(http, url, REQUESTS // CONNECTIONS) for _ in range(CONNECTIONS)))
    rate = REQUESTS / (time.perf_counter() - began)
    began = time.perf_counter()
    first = await asyncio.gather(*(_stream(http, url) for _ in range(STREAMS)))
    streams = STREAMS / (time.perf_counter() - began)
    return Figures(rate, 1000 * statistics.median(alone), streams, 1000 * statistics.median(first))


async def _repeat(http: aiohttp.ClientSession, url: str, count: int) -> None:
    for _ in range(count):
        await _ask(http, url)


async def _ask(http: aiohttp.ClientSession, url: str) -> None:
    async with http.post(f"{url}/v1/chat/completions", json=BODY) as response:
        response.raise_for_status()
        await response.read()


async def _stream(http: aiohttp.ClientSession, url: str) -> float:
    """Seconds to the first byte of a stream that is read to its end."""
    began = time.perf_counter()
    async with http.post(f"{url}/v1/chat/completions", json={**BODY, "stream": True}) as response:
        response.raise_for_status()
        await response.content.readany()
        first = time.perf_counter() - began
        data = b""
        async for part in response.content.iter_any():
            data = (data + part)[-64:]
    if not data.endswith(b"data: [DONE]\n\n"):
        raise RuntimeError(f"{url} cut a stream")
    return first
