"""Forwarding: the proxy compared with a minimal FastAPI proxy. Servers and the load generator are processes."""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from proxy.upstream.embedded import free_port
from tests.bench.generator import CONNECTIONS, STREAMS, Figures
from tests.bench.peers import Peer, PeerMissing
from tests.bench.rows import Row, Size, spread
from tests.bench.servers import ServerFailed, own_module, own_proxy, served, terminate

ROUNDS: Final = 3
LOAD: Final = ("--seconds", "2", "--alone", "400", "--each", "8", "--warm", "1")
QUICK_LOAD: Final = ("--seconds", "0.3", "--alone", "20", "--each", "1", "--warm", "0")
PEER_LOAD: Final = ("--seconds", "2", "--alone", "30", "--each", "1", "--warm", "0")
"""Smaller load for peers, whose two hundred streams take seconds. The first round is a warm-up."""
LIMIT_S: Final = 90
"""Time limit of one round on a server."""


class Measured(NamedTuple):
    """Figures of each server."""

    direct: Figures
    bare: Figures
    proxy: Figures
    plain_proxy: Figures  # the proxy without the dashboard
    two_workers: Figures  # the same with two worker processes
    # Figures of the servers above by round. The fields above are their medians.
    rounds: Sequence[Sequence[Figures]]
    peers: Mapping[str, Figures | str]  # by name; a text says why a peer could not be measured


async def measured(size: Size, peers: Sequence[Peer] = ()) -> Measured:
    """Measure the servers in turn for several rounds, then each peer alone so that it slows down no other server."""
    load = QUICK_LOAD if size.is_quick else LOAD
    async with own_module("tests.bench.null", "backend") as backend:
        async with (
            own_module("tests.bench.null", "bare", backend.url) as bare,
            own_proxy(backend.url) as proxy,
            own_proxy(backend.url, {"ui": "false"}) as plain_proxy,
            own_proxy(backend.url, {"workers": "2"}) as two_workers,
        ):
            servers = (backend, bare, proxy, plain_proxy, two_workers)
            rounds = [[await _measure(server.url, load) for server in servers] for _ in range(size.pick(ROUNDS, 1))]
        medians = [_median(figures) for figures in zip(*rounds, strict=True)]
        others = {str(peer): await _measure_peer(peer, backend.url) for peer in peers}
        direct, plain, ours, without, doubled = medians
        return Measured(direct, plain, ours, without, doubled, rounds, others)


def rows(results: Measured) -> list[Row]:
    """Return the benchmarks of forwarding."""
    direct, plain, ours, without, doubled, rounds, _ = results
    rates = [mine.rate / other.rate for _, other, mine, *_ in rounds]
    added = [mine.alone_ms - other.alone_ms for other, _, mine, *_ in rounds]
    of_direct = [mine.streams / other.streams for other, _, mine, *_ in rounds]
    of_bare = [mine.streams / other.streams for _, other, mine, *_ in rounds]
    first = [mine.first_ms - other.first_ms for other, _, mine, *_ in rounds]
    of_without = [mine.rate / other.rate for *_, mine, other, _ in rounds]
    of_single = [mine.rate / other.rate for *_, other, mine in rounds]
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
        Row(
            f"forwarding with the dashboard, {CONNECTIONS} connections",
            f"{ours.rate:,.0f} /s",
            f"without: {without.rate:,.0f} /s",
            f"{ours.rate / without.rate:.2f}",
            spread(of_without),
        ),
        Row(
            f"forwarding by two workers, {CONNECTIONS} connections, {os.cpu_count()} cores for all processes",
            f"{doubled.rate:,.0f} /s",
            f"one: {without.rate:,.0f} /s",
            f"{doubled.rate / without.rate:.2f}",
            spread(of_single),
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
        async with served(port, peer.serve(peer.folder, port, backend), peer.environment(), peer.folder) as server:
            return _median([await _measure(server.url, PEER_LOAD) for _ in range(ROUNDS)])
    except (PeerMissing, ServerFailed) as error:
        return str(error)


async def _measure(url: str, load: Sequence[str]) -> Figures:
    """Run the load generator on a server, with the options `load`. Raises ServerFailed."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.bench.generator", url, *load, stdout=pipe, stderr=pipe
    )
    try:
        async with asyncio.timeout(LIMIT_S):
            output, errors = await process.communicate()
    except TimeoutError:
        raise ServerFailed(f"no response within {LIMIT_S} s") from None
    finally:
        await terminate(process)
    if process.returncode:
        raise ServerFailed((output or errors).decode().strip().rpartition("\n")[2])
    return Figures(**json.loads(output))
