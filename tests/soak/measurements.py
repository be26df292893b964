"""Measure the proxy from outside: descriptors, memory, tasks, processes, slots, `/health`, and vLLM's counters."""

from __future__ import annotations

import asyncio
import http.client
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable
from itertools import repeat
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

import aiohttp
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from controllers.builtin import BUILT_IN
from proxy.rollout.sandbox_pool import MAKERS
from tests.bench.process_usage import descendants, resident_bytes
from tests.bench.rows import percentile
from tests.proxy.admission.test_api_keys import ROOT, bearer
from tests.soak.server import MAKER

HEALTH_EVERY_S: Final = 0.2
CONTROL: Final = """
import http.server

class Idle(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Idle)
print(server.server_port, flush=True)
server.serve_forever()
"""
IDLE: Final = (
    *("autotts_episodes_in_flight", "autotts_branches_in_flight", "autotts_calls_waiting", "autotts_queue"),
    *("autotts_recorder_queue", "autotts_recorder_spill_bytes"),
)
"""Metrics that are 0 if nothing runs and everything is recorded."""
SCRAPE_EVERY_S: Final = 1.0
"""Seconds between two readings of counters, far less than the time for which retired ones are kept."""
MOST_CONTROLLERS: Final = 2
"""Controllers from files that metrics of the idle proxy may name: the shadow, and one more."""
OWN_REQUESTS: Final = 2
"""Requests of the soak itself that may run at one count and not at the other. A leak grows beyond them."""


class IdleResources(NamedTuple):
    """Resources of the idle proxy: descriptors, tasks, processes, memory, and reserved tokens and slots."""

    descriptors: int
    tasks: tuple[str, ...]  # names of their coroutines
    processes: int  # its own and those below it
    rss_mb: float
    reserved: int  # tokens and slots that no request holds any more
    series: int  # samples of `/metrics`
    controllers: int  # from files, that these name

    def growth(self, before: IdleResources) -> list[str]:
        """Return a line for each resource that grew; memory is compared over all cycles."""
        grown = []
        if self.descriptors > before.descriptors + OWN_REQUESTS:
            grown.append(f"{before.descriptors} -> {self.descriptors} descriptors")
        usual = [*before.tasks, *OWN_REQUESTS * ["ResponseCycle.run_asgi"], *MAKERS * [MAKER]]
        if more := Counter(self.tasks) - Counter(usual):
            grown.append(f"more tasks: {dict(more)}")
        if self.controllers > MOST_CONTROLLERS:
            grown.append(f"metrics name {self.controllers} controllers from files, above {MOST_CONTROLLERS}")
        if self.processes > before.processes:
            grown.append(f"{before.processes} -> {self.processes} processes")
        return grown


async def metrics(http_session: aiohttp.ClientSession, url: str) -> dict[str, float]:
    """Return the sum of the samples of each metric."""
    sums: dict[str, float] = {}
    for sample in await samples(http_session, url):
        sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
    return sums


async def samples(http_session: aiohttp.ClientSession, url: str) -> list[Sample]:
    """Return all samples of the metrics."""
    async with http_session.get(f"{url}/metrics", headers=bearer(ROOT)) as response:
        families = list(text_string_to_metric_families(await response.text()))
    return [sample for family in families for sample in family.samples]


def from_files(found: Iterable[Sample]) -> set[str]:
    """Return the controllers from files that samples name."""
    names = {sample.labels["controller"] for sample in found if "controller" in sample.labels}
    return names - {"", *BUILT_IN}


class CounterTotals:
    """Sums of counters as Prometheus knows them: a series that is removed keeps its last value, and may begin anew."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        self._ended: Counter[str] = Counter()

    def add(self, found: Iterable[Sample]) -> dict[str, float]:
        """Take over the samples of one reading, and return the sums by name."""
        for sample in found:
            key = sample.name, frozenset(sample.labels.items())
            last = self._last.get(key, 0.0)
            if sample.value < last:
                self._ended[sample.name] += last  # type: ignore[assignment]
            self._last[key] = sample.value
        sums = dict[str, float](self._ended)
        for (name, _), value in self._last.items():
            sums[name] = sums.get(name, 0.0) + value
        return sums

    async def read(self, http_session: aiohttp.ClientSession, url: str) -> dict[str, float]:
        """Read the metrics, and return the sums by name."""
        return self.add(await samples(http_session, url))

    async def keep_reading(self, http_session: aiohttp.ClientSession, url: str) -> None:
        """Read the metrics again and again, as Prometheus does, until this is cancelled."""
        while True:
            await self.read(http_session, url)
            await asyncio.sleep(SCRAPE_EVERY_S)


async def wait_until_idle(http_session: aiohttp.ClientSession, url: str, vllm: str) -> str:
    """Wait until nothing runs in the proxy and in vLLM; return what still does after two minutes."""
    busy = ""
    try:
        async with asyncio.timeout(120):
            for _ in repeat(None):
                now = await metrics(http_session, url)
                running = await metrics(http_session, vllm)
                busy = ", ".join(f"{name} {now[name]}" for name in IDLE if now.get(name))
                if not busy and not running["vllm:num_requests_running"] + running["vllm:num_requests_waiting"]:
                    return ""
                await asyncio.sleep(0.2)
    except TimeoutError:
        return busy or "vLLM still runs requests"
    return busy


async def idle_resources(
    http_session: aiohttp.ClientSession, url: str, pid: int, tasks: Path, baseline: IdleResources | None
) -> IdleResources:
    """Return the resources of the idle proxy, after up to 40 s in which they may fall to those of `baseline`.

    Idle connections end by themselves.
    """
    measured = await _resources_now(http_session, url, pid, tasks)
    for _ in range(40):
        if baseline is None or not measured.growth(baseline):
            break
        await asyncio.sleep(1)
        measured = await _resources_now(http_session, url, pid, tasks)
    return measured


async def _resources_now(http_session: aiohttp.ClientSession, url: str, pid: int, tasks: Path) -> IdleResources:
    async with http_session.get(f"{url}/v1/tts/keys", headers=bearer(ROOT)) as response:
        all_keys: dict[str, Any] = (await response.json())["all"]
    found = await samples(http_session, url)
    return IdleResources(
        descriptors=len(os.listdir(f"/proc/{pid}/fd")),
        tasks=await asyncio.to_thread(_list_tasks, pid, tasks),
        processes=1 + len(list(descendants(pid))),
        rss_mb=resident_bytes(pid) / 2**20,
        reserved=sum(all_keys.get(name) or 0 for name in ("reserved", "passed", "episodes")),
        series=len(found),
        controllers=len(from_files(found)),
    )


def _list_tasks(pid: int, file: Path) -> tuple[str, ...]:
    """Return the names of the proxy's asyncio tasks, which it writes on a signal."""
    file.unlink(missing_ok=True)
    os.kill(pid, signal.SIGUSR1)
    for _ in repeat(None, 1500):
        if file.exists():
            return tuple(file.read_text().splitlines())
        time.sleep(0.02)  # no event announces what another process has done
    raise TimeoutError("the proxy does not list its tasks")


class HealthProbe:
    """Asks `/health` from a thread of its own, so that a busy event loop of the clients does not count.

    A server that does nothing is asked in turn. What it takes longer for is the machine's load, not the proxy's fault.
    """

    def __init__(self, url: str) -> None:
        self.seconds: list[float] = []
        self.control_seconds: list[float] = []
        self.failures: list[str] = []
        self._url = url
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> HealthProbe:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        with subprocess.Popen([sys.executable, "-c", CONTROL], stdout=subprocess.PIPE, text=True) as control:
            assert control.stdout is not None
            idle = f"http://127.0.0.1:{int(control.stdout.readline())}"
            while not self._is_over.wait(HEALTH_EVERY_S):
                self._ask(self._url, self.seconds)
                self._ask(idle, self.control_seconds)
            control.kill()

    def _ask(self, url: str, seconds: list[float]) -> None:
        where, began = urlsplit(url), time.perf_counter()
        try:
            connection = http.client.HTTPConnection(str(where.hostname), where.port, timeout=10)
            connection.request("GET", "/health")
            status = connection.getresponse().status
            connection.close()
        except OSError as error:
            self.failures.append(str(error))
            return
        seconds.append(time.perf_counter() - began)
        if status != 200:
            self.failures.append(f"status {status}")


def p99_ms(seconds: list[float]) -> float:
    """Return the 99th percentile in milliseconds."""
    return 1000 * percentile(seconds, 99)
