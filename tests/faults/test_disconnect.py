"""A client that leaves takes everything with it that was done for it, whatever was being done, within a second."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from proxy.server import running
from proxy.settings import load
from tests.fakes import ASSISTANT, MODEL, FakeVLLM, chain
from tests.proxy.conftest import SMALL, Proxy, backend, proxy

__all__ = ["backend", "proxy"]  # fixtures

BRANCHES: dict[str, Any] = {"tts": {"beta": 1, "controller": "self_consistency"}}
LONG = [chain("7", 1500, ["7"], mark=chr(97 + i)) for i in range(26)]  # none finishes: one is made to close


async def leave_while_it_hangs(proxy: Proxy, **fields: Any) -> None:
    """Ask, and leave once the upstream hangs. Everything there must have been aborted within a second."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], **fields}

    async def ask() -> None:
        async with (
            aiohttp.ClientSession() as http,
            http.post(f"{proxy.url}/v1/chat/completions", json=body) as response,
        ):
            await response.read()

    proxy.backend.hanging.clear()
    asking = asyncio.create_task(ask())
    await proxy.backend.hanging.wait()
    assert proxy.backend.running > 0
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    async with asyncio.timeout(1):
        await proxy.backend.idle.wait()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("after", [0, 1, 3])
async def test_while_branches_run(proxy: Proxy, stream: bool, after: int) -> None:
    proxy.backend.fault, proxy.backend.fault_after = "hang", after
    await leave_while_it_hangs(proxy, stream=stream, tts={"beta": 0.5, "controller": "cmc"})
    assert await proxy.metric("autotts_episodes_in_flight") == 0
    assert await proxy.metric("autotts_requests_total", outcome="disconnected") == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_while_many_branches_run(proxy: Proxy, stream: bool) -> None:
    proxy.backend.fault = "hang"
    await leave_while_it_hangs(proxy, stream=stream, **BRANCHES)


@pytest.mark.parametrize("stream", [False, True])
async def test_while_the_reply_is_being_closed(proxy: Proxy, stream: bool) -> None:
    proxy.backend.chains = LONG
    tts = {"beta": 0, "controller": "parallel_probe"}
    status, _, _ = await proxy.ask("0", tts=tts)
    assert status == 200
    requests = len(proxy.backend.requests)
    proxy.backend.opened = 0
    proxy.backend.fault, proxy.backend.fault_after = "hang", 2 * requests - 1
    await leave_while_it_hangs(proxy, stream=stream, tts=tts)
    assert len(proxy.backend.requests) == 2 * requests
    assert await proxy.metric("autotts_requests_total", outcome="disconnected") == 1


class Mute(FakeVLLM):
    """Says nothing to who asks it for ids."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.left = asyncio.Event(), asyncio.Event()

    async def _tokenise(self, request: web.Request) -> web.Response:
        self.asked.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.left.set()
        raise AssertionError


@pytest.mark.parametrize("stream", [False, True])
async def test_while_it_is_planned(stream: bool) -> None:
    mute = Mute()
    async with (
        mute.serve(),
        running(load(upstream=mute.url, **SMALL)) as url,
        aiohttp.ClientSession() as http,
    ):
        proxy = Proxy(mute, url, http, None)  # type: ignore[arg-type]
        asking = asyncio.create_task(proxy.ask("0.5", stream=stream))
        await mute.asked.wait()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        async with asyncio.timeout(1):
            await mute.left.wait()
            while not await proxy.metric("autotts_requests_total", model=MODEL, outcome="disconnected"):
                pass  # asking is what gives way to the server


async def test_while_it_is_passed_through(proxy: Proxy) -> None:
    proxy.backend.fault = "hang"
    body = {"model": MODEL, "prompt": [ord(char) for char in ASSISTANT], "max_tokens": 5, "stream": True}
    async with aiohttp.ClientSession() as http, http.post(f"{proxy.url}/v1/completions", json=body) as response:
        assert response.status == 200
        await proxy.backend.hanging.wait()
        response.close()
    async with asyncio.timeout(1):
        await proxy.backend.idle.wait()
