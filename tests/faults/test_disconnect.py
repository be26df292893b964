"""A disconnect cancels all work for the client within a second, at every stage of a request."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
import uvicorn
from aiohttp import web
from starlette.types import Receive, Scope, Send

from proxy.http.connections import Connections
from proxy.http.protocol import ConnectionLimits, HttpProtocol, ProtocolContext
from proxy.http.sse import StreamedResponse
from proxy.server import listen, running
from proxy.settings import load
from tests.fakes import ASSISTANT, MODEL, FakeVLLM, RawUpstream, chain
from tests.proxy.conftest import SMALL, Proxy, backend, proxy
from tests.proxy.recording.test_episode_log import until

__all__ = ["backend", "proxy"]  # fixtures

BRANCHES: dict[str, Any] = {"tts": {"beta": 1, "controller": "self_consistency"}}
LONG = [chain("7", 1500, ["7"], mark=chr(97 + i)) for i in range(26)]  # no chain finishes, so one has to be closed


async def disconnect_while_upstream_hangs(proxy: Proxy, **fields: Any) -> None:
    """Send a request, disconnect once the upstream hangs, and assert that its calls end within a second."""
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
async def test_a_disconnect_while_branches_run_cancels_their_upstream_calls(
    proxy: Proxy, stream: bool, after: int
) -> None:
    proxy.backend.fault, proxy.backend.fault_after = "hang", after
    await disconnect_while_upstream_hangs(proxy, stream=stream, tts={"beta": 0.5, "controller": "cmc"})
    assert await proxy.metric("autotts_episodes_in_flight") == 0
    assert await proxy.metric("autotts_requests_total", outcome="disconnected") == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_a_disconnect_while_many_branches_run_cancels_all_upstream_calls(proxy: Proxy, stream: bool) -> None:
    proxy.backend.fault = "hang"
    await disconnect_while_upstream_hangs(proxy, stream=stream, **BRANCHES)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_disconnect_while_the_answer_is_closed_cancels_its_upstream_call(proxy: Proxy, stream: bool) -> None:
    proxy.backend.chains = LONG
    tts = {"beta": 0, "controller": "parallel_probe"}
    status, _, _ = await proxy.ask("0", tts=tts)
    assert status == 200
    requests = len(proxy.backend.requests)
    proxy.backend.opened = 0
    proxy.backend.fault, proxy.backend.fault_after = "hang", 2 * requests - 1
    await disconnect_while_upstream_hangs(proxy, stream=stream, tts=tts)
    assert len(proxy.backend.requests) == 2 * requests
    assert await proxy.metric("autotts_requests_total", outcome="disconnected") == 1


class Mute(FakeVLLM):
    """Fake vLLM that never answers a tokenize request."""

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
async def test_a_disconnect_during_tokenisation_cancels_the_call(stream: bool) -> None:
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
                pass  # each request yields to the server


async def test_a_disconnect_cancels_a_forwarded_request(proxy: Proxy) -> None:
    proxy.backend.fault = "hang"
    body = {"model": MODEL, "prompt": [ord(char) for char in ASSISTANT], "max_tokens": 5, "stream": True}
    async with aiohttp.ClientSession() as http, http.post(f"{proxy.url}/v1/completions", json=body) as response:
        assert response.status == 200
        await proxy.backend.hanging.wait()
        response.close()
    async with asyncio.timeout(1):
        await proxy.backend.idle.wait()


# A client that does not read


class Endless(RawUpstream):
    """Streams chunks of a completion for as long as they are read."""

    def __init__(self) -> None:
        super().__init__()
        self.left = asyncio.Event()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        await request.read()
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        chunk = {"choices": [{"index": 0, "delta": {"content": "x"}, "filler": "y" * 30_000}]}
        try:
            await response.prepare(request)
            while True:
                await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        finally:
            self.left.set()


async def stay_without_reading(url: str, body: dict[str, Any]) -> asyncio.StreamWriter:
    """Request a chat completion and never read a byte of it."""
    where = urlsplit(url)
    _, writer = await asyncio.open_connection(where.hostname, where.port, limit=1024)
    data = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "hi"}], **body}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    await writer.drain()
    return writer


async def totals(http: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    """Return what all requests together have reserved and spent."""
    async with http.get(f"{url}/v1/tts/keys", headers={"authorization": "Bearer admin"}) as response:
        reply = await response.json()
    totals: dict[str, Any] = reply["all"]
    return totals


async def test_a_forwarded_stream_that_is_not_read_is_closed_and_charged() -> None:
    async with (
        Endless().serve() as upstream,
        running(load(upstream=upstream.url, admin_key="admin", tokens_per_minute=10_000, write_s=0.2, **SMALL)) as url,
        aiohttp.ClientSession() as http,
    ):
        assert isinstance(upstream, Endless)
        writer = await stay_without_reading(url, {"stream": True, "max_tokens": 50})
        async with asyncio.timeout(10):
            await upstream.left.wait()

        async def is_free() -> bool:
            return bool((await totals(http, url))["passed"] == 0)

        await until(is_free)
        now = await totals(http, url)
        assert (now["reserved"], now["spent"]) == (0, 50)
        async with http.get(f"{url}/metrics") as response:
            assert 'autotts_connections_cut_total{reason="unread"} 1.0' in await response.text()
        writer.close()


async def test_a_served_stream_that_is_not_read_is_closed() -> None:
    ended = asyncio.Event()
    events: list[str] = []

    async def source() -> AsyncGenerator[bytes]:
        try:
            while True:
                yield b"data: " + b"y" * 30_000 + b"\n\n"
                await asyncio.sleep(0)
        finally:
            ended.set()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await StreamedResponse.of(source(), {})(scope, receive, send)

    shared = ProtocolContext(ConnectionLimits(write_s=0.2), Connections(9, 9, events.append), events.append)
    made = partial(HttpProtocol, context=shared)
    config = uvicorn.Config(app, http=made, ws="none", lifespan="off", log_config=None)  # type: ignore[arg-type]
    server = uvicorn.Server(config)
    with listen("127.0.0.1", 0) as listening:
        listening.listen()
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        writer = await stay_without_reading(f"http://127.0.0.1:{listening.getsockname()[1]}", {})
        async with asyncio.timeout(10):
            await ended.wait()
        writer.close()
        server.should_exit = True
        await serving
    assert events == ["unread"]
