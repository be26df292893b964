"""Fixtures: scripted vLLMs, and proxies in front of several of them."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from openai import AsyncOpenAI

from proxy.requests.chat_request import ChatRequest
from proxy.server import running
from proxy.settings import load
from proxy.upstream.fleet.affinity import affinity_key
from proxy.upstream.fleet.rendezvous import ranked
from tests.fakes import FakeVLLM, chain
from tests.proxy.conftest import INTERVAL, SMALL, Proxy


def question_for(first: str, urls: Sequence[str]) -> str:
    """Return a question that goes to the upstream at `first`, of those at `urls`, if it can."""
    for number in itertools.count():
        text = f"question {number}"
        request = ChatRequest(messages=[{"role": "user", "content": text}])
        if ranked(affinity_key(request), urls, str)[0] == first:
            return text
    raise AssertionError


MakeProxy = Callable[..., AbstractAsyncContextManager[Proxy]]


def scripted() -> FakeVLLM:
    """Return a fake vLLM. All of them have the same chains, as replicas have the same model."""
    chains = [chain("7" if i % 4 else "9", 100 + 17 * (i % 7), ["", "7"], mark=chr(97 + i % 26)) for i in range(64)]
    return FakeVLLM(chains, INTERVAL)


@pytest_asyncio.fixture
async def replicas() -> AsyncIterator[list[FakeVLLM]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(scripted().serve()) for _ in range(3)]


@pytest.fixture
def fleet_proxy(replicas: list[FakeVLLM]) -> MakeProxy:
    """Return a context manager of a proxy in front of all replicas, or of another `upstream`."""

    @asynccontextmanager
    async def make(**settings: Any) -> AsyncIterator[Proxy]:
        upstream = ",".join(replica.url for replica in replicas)
        async with (
            running(load(**{**SMALL, "upstream": upstream, **settings})) as url,
            aiohttp.ClientSession() as http,
            AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as openai,
        ):
            yield Proxy(replicas[0], url, http, openai)

    return make
