"""Dashboard: the time of each query of usage, and of each page, over a store of a month, 95th percentile."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import aiohttp

from discovery.store.usage.periods import Bucket, Period, Scope
from discovery.store.usage.reader import UsageReader
from discovery.store.usage.requests import RequestFilter
from discovery.store.usage.sums import Measure
from proxy.server import running
from proxy.settings import load
from proxy.ui.pages.registry import PAGES
from tests import large_store
from tests.bench.rows import Row, Size, percentile
from tests.fakes import FakeVLLM

TURNS = 20
QUERY_LIMIT_MS = 100
PAGE_LIMIT_MS = 300
TENANT = large_store.TENANTS[1]


def rows(size: Size) -> list[Row]:
    """Return the benchmarks of queries and pages."""
    episodes, recordings = size.pick(large_store.EPISODES, 200), size.pick(large_store.RECORDINGS, 5)
    turns = size.pick(TURNS, 1)
    with tempfile.TemporaryDirectory(dir=Path(__file__).parent) as folder:
        path = Path(folder) / "bench.db"
        asyncio.run(large_store.fill(path, episodes, recordings))
        queries = asyncio.run(_measure_queries(path, turns))
        pages = asyncio.run(_measure_pages(path, turns))
    return [
        Row(f"{name}, {episodes:,} episodes, p95", f"{ms:.1f} ms", f"limit {limit_ms} ms", f"{ms / limit_ms:.2f}")
        for times, limit_ms in ((queries, QUERY_LIMIT_MS), (pages, PAGE_LIMIT_MS))
        for name, ms in times.items()
    ]


async def _percentile(run: Callable[[], Awaitable[object]], turns: int) -> float:
    """Return the 95th percentile of a call's duration, in milliseconds."""
    times = []
    for _ in range(turns):
        began = time.perf_counter()
        await run()
        times.append(1000 * (time.perf_counter() - began))
    return percentile(times, 95)


# Queries


async def _measure_queries(path: Path, turns: int) -> dict[str, float]:
    """Return the 95th percentile of each group's slowest query, in milliseconds."""
    slowest = {}
    async with UsageReader(path) as reader:
        await reader.choices()  # opens the store
        for group, queries in _queries(reader).items():
            slowest[group] = max([await _percentile(query, turns) for query in queries.values()])
    return slowest


def _queries(reader: UsageReader) -> Mapping[str, Mapping[str, Callable[[], Awaitable[object]]]]:
    now = datetime.now(UTC)
    periods = {
        "sums of an hour by minute": Period(now - timedelta(hours=1), now, Bucket.MINUTE),
        "sums of a week by hour": Period(now - timedelta(days=7), now, Bucket.HOUR),
        "sums of a month by day": Period(now - timedelta(days=30), now, Bucket.DAY),
    }
    sums = {
        name: {
            f"{measure} {scope}": partial(reader.series, measure, period, scope)
            for measure in Measure
            for scope in (Scope(), Scope(TENANT))
        }
        for name, period in periods.items()
    }
    filters = {
        "latest": RequestFilter(),
        "tenant": RequestFilter(tenant=TENANT, beta_min=0.7),
        "oldest": RequestFilter(until=now - timedelta(days=29)),
        "none": RequestFilter(stop="deadline", tokens_min=10**9),
    }
    lists = {name: partial(reader.requests, which) for name, which in filters.items()}
    costs = {"costs": partial(reader.costs, large_store.MODELS[0], now - timedelta(days=30))}
    return {**sums, "pages of requests": lists, "cost of β": costs, "choices of filters": {"choices": reader.choices}}


# Pages


async def _measure_pages(path: Path, turns: int) -> dict[str, float]:
    """Return the 95th percentile of the milliseconds that each page takes, over the store at `path`."""
    async with (
        FakeVLLM().serve() as backend,
        running(load(upstream=backend.url, store=path)) as url,
        aiohttp.ClientSession(url) as http,
    ):
        latest = await _until_open(http)
        hrefs = [page.href for page in PAGES if page.href]
        paths = [*hrefs, "/ui?range=hour", "/ui?range=week", "/ui/requests?stop=deadline&key=none", latest]
        return {_name(at, latest): await _percentile(partial(_read_page, http, at), turns) for at in paths}


async def _until_open(http: aiohttp.ClientSession) -> str:
    """Return the path of the latest request, once the store is open."""
    while True:
        async with http.get("/ui/requests") as response:
            _, found, rest = (await response.text()).partition('<a href="/ui/requests/')
        if found:
            return f"/ui/requests/{rest.partition(chr(34))[0]}"


def _name(path: str, latest: str) -> str:
    return "page of a request" if path == latest else f"page {path}"


async def _read_page(http: aiohttp.ClientSession, path: str) -> None:
    async with http.get(path) as response:
        await response.read()
        response.raise_for_status()
