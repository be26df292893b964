"""Recorder: records acknowledged per second, and the time it adds to a request."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import aiohttp

from controllers import Advanced, Probed, Round, advance, branch, probe
from discovery.data.packed_rounds import pack_rounds
from discovery.store import ServedEpisode, StorePlace
from proxy.recording.store_writer import StoreWriter
from proxy.server import running
from proxy.settings import load
from proxy.telemetry.metrics import Metrics
from tests.bench.rows import Row, Size
from tests.fakes import MODEL, FakeVLLM, chain
from tests.postgres_server import running_server

PRODUCERS = 64
EACH = 300
BRANCHES = 8
STEPS = 5
REQUESTS = 40
TURNS = 10
INTERVAL = 40
HERE = Path(__file__).parent
"""Folder of the store: on disk, because the temporary folder may be in memory."""


async def rows(size: Size) -> list[Row]:
    """Return the benchmarks of the recorder."""
    each = size.pick(EACH, 5)
    with tempfile.TemporaryDirectory(dir=HERE) as folder:
        in_file = await _acknowledged("SQLite synchronous=FULL", Path(folder) / "bench.db", Path(folder), each)
        with running_server(is_synced=True) as server:
            in_server = await _acknowledged("PostgreSQL", server.create_database(), Path(folder), each)
    return [in_file, in_server, await _added(size.pick(TURNS, 1), size.pick(REQUESTS, 4))]


async def _acknowledged(database: str, place: StorePlace, folder: Path, each: int) -> Row:
    """Measure episodes of six rounds with eight branches; each producer waits until one is on disk before the next."""
    async with recording(place, folder / f"{database}.spill") as recorder:
        await _produce(recorder, "warm", 10)
        began = time.perf_counter()
        await asyncio.gather(*(_produce(recorder, str(number), each) for number in range(PRODUCERS)))
        seconds = time.perf_counter() - began
    rate = PRODUCERS * each / seconds
    return Row(f"episodes acknowledged, {database}", f"{rate:,.0f} /s", f"{PRODUCERS} producers", "")


@asynccontextmanager
async def recording(place: StorePlace, spill: Path) -> AsyncIterator[StoreWriter]:
    """Yield a recorder that writes to a store, with a spill file."""
    recorder = StoreWriter(load(upstream="http://127.0.0.1:1", store=place, spill=spill), Metrics())
    await recorder.open()
    try:
        yield recorder
    finally:
        await recorder.close()


async def _produce(recorder: StoreWriter, name: str, count: int) -> None:
    for number in range(count):
        identity = f"{name}-{number}"
        if not await recorder.put(identity, partial(_episode, identity)):
            raise RuntimeError("a record was lost")


def _episode(identity: str) -> ServedEpisode:
    ledger = {"winner": 300, "agreeing": 900, "losing": 400, "probe": 400}
    about = {"spent": 2000, "limits": {"interval": 64, "max_branches": 64}, "answers": ["veiled:0123456789abcdef"]}
    identities = (identity, identity, "model", "cmc", "d" * 64)
    figures = (0.5, STEPS + 1, BRANCHES, ledger, "answered")
    return ServedEpisode(*identities, *figures, about=about, trace=pack_rounds(_ROUNDS))  # type: ignore[arg-type]


def _rounds() -> list[Round]:
    opened = Round([branch()] * BRANCHES, [Advanced(i, 1, 64, False) for i in range(BRANCHES)])
    moves = [move for i in range(BRANCHES) for move in (advance(i), probe(i))]
    facts = [fact for i in range(BRANCHES) for fact in (Advanced(i, 1, 64, False), Probed(i, 0, 12))]
    return [opened, *([Round(moves, facts)] * STEPS)]


_ROUNDS = _rounds()


async def _added(turns: int, requests: int) -> Row:
    """Measure requests to two proxies in turn, of which one records."""
    chains = [chain("7", 100 + 17 * (i % 7), ["", "7"], mark=chr(97 + i % 26)) for i in range(64)]
    settings = {"interval": INTERVAL, "finalise_tokens": 60, "probe_tokens": 8, "record_fraction": 0.0}
    with tempfile.TemporaryDirectory(dir=HERE) as folder:
        async with FakeVLLM(chains, INTERVAL).serve() as backend, aiohttp.ClientSession() as http:
            off = load(upstream=backend.url, **settings)
            on = load(upstream=backend.url, store=Path(folder) / "bench.db", **settings)
            async with running(off) as plain, running(on) as recording:
                times = await _alternate([partial(_ask, http, url) for url in (plain, recording)], turns, requests)
    plain_ms, recording_ms = (1000 * statistics.median(seconds) for seconds in times)
    without = f"{plain_ms:.2f} ms without"
    added = f"{recording_ms - plain_ms:+.2f} ms"
    return Row("request with recording, p50", f"{recording_ms:.2f} ms", without, added)


async def _alternate(asks: Sequence[Callable[[], Awaitable[None]]], turns: int, requests: int) -> list[list[float]]:
    """Return the seconds of each request. A turn has many requests, because writes after one slow down the next."""
    times: list[list[float]] = [[] for _ in asks]
    for turn in range(turns + 1):
        for ask, mine in zip(asks, times, strict=True):
            for _ in range(requests):
                began = time.perf_counter()
                await ask()
                if turn:
                    mine.append(time.perf_counter() - began)
    return times


async def _ask(http: aiohttp.ClientSession, url: str) -> None:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "hi"}],
        "tts": {"beta": 0.5, "answer": "boxed", "controller": "cmc"},
    }
    async with http.post(f"{url}/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        await response.read()
