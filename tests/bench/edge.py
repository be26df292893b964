"""Forwarding: the proxy compared with a minimal FastAPI proxy. Servers and the load generator are processes."""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, NamedTuple

import aiohttp

from proxy.upstream.embedded import free_port
from tests.bench.generator import BODY, CONNECTIONS, STREAMS, Figures
from tests.bench.peers import Peer, PeerMissing
from tests.bench.rows import Row, Size, spread

ROUNDS: Final = 3
LOAD: Final = ("--seconds", "2", "--alone", "400", "--each", "8", "--warm", "1")
QUICK_LOAD: Final = ("--seconds", "0.3", "--alone", "20", "--each", "1", "--warm", "0")
PEER_LOAD: Final = ("--seconds", "2", "--alone", "30", "--each", "1", "--warm", "0")
"""Smaller load for peers, whose two hundred streams take seconds. The first round is a warm-up."""
LIMIT_S: Final = 90
"""Time limit of one round on a server, and of its start."""


class Measured(NamedTuple):
    """Figures of each server."""

    direct: Figures
    bare: Figures
    proxy: Figures
    # Figures of direct, bare and proxy by round. The fields above are their medians.
    rounds: Sequence[Sequence[Figures]]
    peers: Mapping[str, Figures | str]  # by name; a text says why a peer could not be measured


class ServerFailed(Exception):
    """A server did not start, or returned an invalid response."""


async def measured(size: Size, peers: Sequence[Peer] = ()) -> Measured:
    """Measure the servers in turn for several rounds, then each peer alone so that it slows down no other server."""
    load = QUICK_LOAD if size.is_quick else LOAD
    async with _own("-m", "tests.bench.null", "backend") as backend:
        async with (
            _own("-m", "tests.bench.null", "bare", upstream=backend) as bare,
            _own("-m", "proxy.cli", "serve", upstream=backend) as proxy,
        ):
            rounds = [
                [await _measure(url, load) for url in (backend, bare, proxy)] for _ in range(size.pick(ROUNDS, 1))
            ]
        direct, plain, ours = (_median(figures) for figures in zip(*rounds, strict=True))
        return Measured(direct, plain, ours, rounds, {str(peer): await _measure_peer(peer, backend) for peer in peers})


def rows(results: Measured) -> list[Row]:
    """Return the benchmarks of forwarding."""
    direct, plain, ours, rounds, _ = results
    rates = [mine.rate / other.rate for _, other, mine in rounds]
    added = [mine.alone_ms - other.alone_ms for other, _, mine in rounds]
    of_direct = [mine.streams / other.streams for other, _, mine in rounds]
    of_bare = [mine.streams / other.streams for _, other, mine in rounds]
    first = [mine.first_ms - other.first_ms for other, _, mine in rounds]
    return [
        Row(
            f"forwarding, {CONNECTIONS} connections",
            f"{ours.rate:,.0f} /s",
            f"bare FastAPI: {plain.rate:,.0f} /s; direct: {direct.rate:,.0f} /s",
            f"{ours.rate / plain.rate:.2f}",
            spread(rates),
        ),
        Row(
            "forwarding, one connection, p50",
            f"{ours.alone_ms:.2f} ms",
            f"direct: {direct.alone_ms:.2f} ms; bare FastAPI: {plain.alone_ms:.2f} ms",
            f"{ours.alone_ms - direct.alone_ms:+.2f} ms",
            spread(added),
        ),
        _streams("direct", ours, direct, spread(of_direct)),
        _streams("bare FastAPI", ours, plain, spread(of_bare)),
        Row(
            f"{STREAMS} SSE streams, first byte p50",
            f"{ours.first_ms:.0f} ms",
            f"direct: {direct.first_ms:.0f} ms; bare FastAPI: {plain.first_ms:.0f} ms",
            f"{ours.first_ms - direct.first_ms:+.0f} ms",
            spread(first, 0),
        ),
    ]


def _streams(name: str, ours: Figures, other: Figures, ratios: str) -> Row:
    compared, ratio = f"{name}: {other.streams:,.0f} /s", f"{ours.streams / other.streams:.2f}"
    return Row(f"{STREAMS} SSE streams", f"{ours.streams:,.0f} /s", compared, ratio, ratios)


HEADINGS: Final = (
    "server, one worker",
    f"requests/s, {CONNECTIONS} connections",
    f"streams/s, {STREAMS} at once",
    "first byte, p50",
    "events per stream",
)
CAPTION: Final = (
    "A proxy with fewer than forty events per stream requested a complete reply from the backend and split it itself."
)


def peer_rows(results: Measured) -> list[tuple[str, ...]]:
    """Return one row per server, with the columns of HEADINGS."""
    named = {"direct": results.direct, "bare FastAPI": results.bare, "this proxy": results.proxy, **results.peers}
    return [(name, *_cells(figures)) for name, figures in named.items()]


def _cells(figures: Figures | str) -> tuple[str, ...]:
    if isinstance(figures, str):
        return (figures,)
    return (
        f"{figures.rate:,.0f}",
        f"{figures.streams:,.0f}",
        f"{figures.first_ms:,.0f} ms",
        f"{figures.events:.0f}",
    )


def _median(rounds: Sequence[Figures]) -> Figures:
    return Figures(*(statistics.median(column) for column in zip(*rounds, strict=True)))


async def _measure_peer(peer: Peer, backend: str) -> Figures | str:
    """Return the figures of a peer, or why it could not be measured."""
    port = free_port()
    try:
        await peer.install()
        async with _served(port, peer.serve(peer.folder, port, backend), peer.environment(), peer.folder) as url:
            return _median([await _measure(url, PEER_LOAD) for _ in range(ROUNDS)])
    except (PeerMissing, ServerFailed) as error:
        return str(error)


@asynccontextmanager
async def _own(*module: str, upstream: str | None = None) -> AsyncIterator[str]:
    """Run a server of this project and yield its URL."""
    port = free_port()
    if module[-1] == "serve":
        arguments = ["--port", str(port), "--upstream", str(upstream), "--no-record"]
    else:
        arguments = [str(port), *([] if upstream is None else [upstream])]
    environment = os.environ | {"COVERAGE_PROCESS_START": ""}
    async with _served(port, [sys.executable, *module, *arguments], environment) as url:
        yield url


@asynccontextmanager
async def _served(
    port: int, command: Sequence[str], environment: Mapping[str, str], folder: Path | None = None
) -> AsyncIterator[str]:
    quiet = asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(*command, stdout=quiet, stderr=quiet, env=environment, cwd=folder)
    url = f"http://127.0.0.1:{port}"
    try:
        await _wait_until_ready(url, process)
        yield url
    finally:
        await _terminate(process)


async def _wait_until_ready(url: str, process: asyncio.subprocess.Process) -> None:
    loop = asyncio.get_running_loop()
    end = loop.time() + LIMIT_S
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(10)) as http:
        while loop.time() < end and process.returncode is None:
            try:
                async with http.post(f"{url}/v1/chat/completions", json=BODY) as response:
                    if response.status == 200:
                        return
            except (aiohttp.ClientError, TimeoutError):
                pass
            await asyncio.sleep(0.1)
    raise ServerFailed("the server did not start")


async def _measure(url: str, load: Sequence[str]) -> Figures:
    """Run the load generator on a server, with the options `load`. Raises ServerFailed."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.bench.generator", url, *load, stdout=pipe, stderr=pipe
    )
    try:
        output, errors = await asyncio.wait_for(process.communicate(), LIMIT_S)
    except TimeoutError:
        raise ServerFailed(f"no response within {LIMIT_S} s") from None
    finally:
        await _terminate(process)
    if process.returncode:
        raise ServerFailed((output or errors).decode().strip().rpartition("\n")[2])
    return Figures(**json.loads(output))


async def _terminate(process: asyncio.subprocess.Process) -> None:
    """End a process: by SIGTERM, or after ten seconds by SIGKILL."""
    if process.returncode is None:
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), 10)
        except TimeoutError:
            process.kill()
            await process.wait()
