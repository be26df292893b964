"""Fixtures: a proxy over the fake vLLM, both real servers on loopback, and clients of the proxy."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import aiohttp
import pytest_asyncio
from openai import AsyncOpenAI

from controllers.builtin import ADMIN_ONLY, BUILT_IN
from proxy.server import running
from proxy.settings import load
from tests.fakes import FakeVLLM, chain

INTERVAL = 40
SMALL = {
    "interval": INTERVAL,
    "finalise_tokens": 60,
    "probe_tokens": 8,
    "ping_s": 0.05,
    "read_timeout_s": 5,
    "controller": "cmc",  # it opens several branches at every β, and probes
}

SERVED = [name for name in BUILT_IN if name not in ADMIN_ONLY]
"""Controllers that any client may name."""


class Proxy(NamedTuple):
    """A running proxy, the fake vLLM behind it, and clients to send requests with."""

    backend: FakeVLLM
    url: str
    http: aiohttp.ClientSession
    openai: AsyncOpenAI

    async def ask(self, beta: str | None = "0.5", raw: bytes | None = None, **fields: Any) -> tuple[int, Any, Any]:
        """Send a chat request and return (status, headers, JSON). `fields` override its body."""
        body = {"model": "fake-model", "messages": [{"role": "user", "content": "hi"}], **fields}
        headers = {} if beta is None else {"x-tts-beta": beta}
        sent: dict[str, Any] = {"json": body} if raw is None else {"data": io.BytesIO(raw)}
        headers["content-type"] = "application/json"
        async with self.http.post(f"{self.url}/v1/chat/completions", headers=headers, **sent) as response:
            return response.status, response.headers, await response.json(content_type=None)

    async def metric(self, name: str, **labels: str) -> float:
        """Return the sum of a metric's samples that carry `labels`."""
        from prometheus_client.parser import text_string_to_metric_families

        async with self.http.get(f"{self.url}/metrics") as response:
            lines = (await response.text()).splitlines(keepends=True)
        families = text_string_to_metric_families("".join(line for line in lines if line.startswith(name)))
        samples = (sample for family in families for sample in family.samples if sample.name == name)
        return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


@pytest_asyncio.fixture
async def backend() -> AsyncIterator[FakeVLLM]:
    """Serve chains of several lengths that mostly answer 7."""
    chains = [chain("7" if i % 4 else "9", 100 + 17 * (i % 7), ["", "7"], mark=chr(97 + i % 26)) for i in range(64)]
    async with FakeVLLM(chains, INTERVAL).serve() as fake:
        yield fake


@pytest_asyncio.fixture
async def proxy(backend: FakeVLLM) -> AsyncIterator[Proxy]:
    async with (
        running(load(upstream=backend.url, **SMALL)) as url,
        aiohttp.ClientSession() as http,
        AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as openai,
    ):
        yield Proxy(backend, url, http, openai)
