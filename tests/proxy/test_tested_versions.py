"""The main paths work with tested versions of aiohttp and uvicorn, and with others, whose internals are not used."""

from __future__ import annotations

import asyncio
import logging
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import aiohttp
import pytest
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from proxy import tested_versions
from proxy.http.connections import Connections
from proxy.http.protocol import ConnectionLimits, ProtocolContext, protocol_class
from proxy.passthrough.forward import MAX_BUFFERED_BYTES
from proxy.server import running
from proxy.settings import load
from proxy.tested_versions import TESTED, has_tested_internals
from proxy.upstream import body_tap
from proxy.upstream.circuit_breaker import Breaker
from proxy.upstream.connections.pooled_request import PooledRequests
from proxy.upstream.transport import UpstreamTransport
from proxy.upstream_observer import UpstreamObserver
from tests.fakes import MODEL, FakeVLLM, RawUpstream
from tests.proxy.conftest import SMALL

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture(params=["tested", "untested"])
def libraries(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run a test with the installed library versions as tested and as untested ones."""
    has_tested_internals.cache_clear()
    if request.param == "untested":
        monkeypatch.setattr(tested_versions, "TESTED", dict.fromkeys(TESTED, "0.0"))
    yield request.param
    has_tested_internals.cache_clear()


@pytest.fixture
def uses_taps(libraries: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Assert after a test that body taps were used with tested versions and only with those."""
    taps: list[object] = []

    class CountedTap(body_tap._BodyTap):
        async def run(self) -> bool:
            taps.append(self)
            return await super().run()

    monkeypatch.setattr(body_tap, "_BodyTap", CountedTap)
    yield
    assert bool(taps) == (libraries == "tested")


def is_pooled(session: aiohttp.ClientSession) -> bool:
    """Return whether forwarded requests are sent without aiohttp's session."""
    transport = UpstreamTransport(
        "http://127.0.0.1:9",
        session,
        read_timeout_s=1,
        breaker=Breaker(),
        observer=UpstreamObserver(),
        on_event=lambda _: None,
    )
    return isinstance(transport._pooled, PooledRequests)


@pytest.mark.usefixtures("uses_taps")
async def test_a_stream_is_forwarded_piece_by_piece() -> None:
    events = [b'data: {"id": "a"}\n\n', b"data: [DONE]\n\n"]
    async with (
        RawUpstream(events, content_type="text/event-stream").serve() as upstream,
        running(load(upstream=upstream.url, **SMALL)) as url,
        aiohttp.ClientSession() as http,
    ):
        upstream.go.clear()
        async with http.post(f"{url}/v1/chat/completions", json={**CHAT, "stream": True}) as response:
            assert response.status == 200
            assert await response.content.readexactly(len(events[0])) == events[0]  # while the upstream waits
            upstream.go.set()
            assert await response.read() == events[1]


@pytest.mark.usefixtures("uses_taps")
async def test_a_large_response_is_forwarded_unchanged() -> None:
    pieces = [b'{"id": "a", "text": "' + b"x" * MAX_BUFFERED_BYTES, b"y" * MAX_BUFFERED_BYTES + b'"}']
    async with (
        RawUpstream(pieces, content_type="application/json").serve() as upstream,
        running(load(upstream=upstream.url, **SMALL)) as url,
        aiohttp.ClientSession() as http,
        http.post(f"{url}/v1/chat/completions", json=CHAT) as response,
    ):
        assert response.status == 200
        assert await response.read() == b"".join(pieces)


@pytest.mark.usefixtures("uses_taps")
async def test_a_stalled_stream_breaks_off_after_the_read_timeout() -> None:
    async with (
        RawUpstream([b"data: 1\n\n", b"data: 2\n\n"], content_type="text/event-stream").serve() as upstream,
        running(load(upstream=upstream.url, **{**SMALL, "read_timeout_s": 0.3})) as url,
        aiohttp.ClientSession() as http,
    ):
        upstream.go.clear()
        async with http.post(f"{url}/v1/chat/completions", json={**CHAT, "stream": True}) as response:
            assert await response.content.readexactly(9) == b"data: 1\n\n"
            with pytest.raises(aiohttp.ClientPayloadError):
                async with asyncio.timeout(30):
                    await response.read()


@pytest.mark.usefixtures("libraries")
async def test_an_episode_is_streamed_up_to_done(backend: FakeVLLM) -> None:
    async with (
        running(load(upstream=backend.url, **SMALL)) as url,
        aiohttp.ClientSession() as http,
        http.post(
            f"{url}/v1/chat/completions", json={**CHAT, "stream": True}, headers={"x-tts-beta": "0.5"}
        ) as response,
    ):
        assert (response.status, response.headers["x-tts-beta"]) == (200, "0.5")
        assert (await response.read()).endswith(b"data: [DONE]\n\n")


async def test_internals_are_used_only_with_tested_versions(libraries: str, caplog: pytest.LogCaptureFixture) -> None:
    context = ProtocolContext(ConnectionLimits(), Connections(9, 9), lambda _: None)
    with caplog.at_level(logging.WARNING, "proxy.tested_versions"):
        for _ in range(2):
            async with aiohttp.ClientSession() as session:
                assert is_pooled(session) == (libraries == "tested")
            assert (protocol_class(context) is not HttpToolsProtocol) == (libraries == "tested")
    messages = [record.getMessage() for record in caplog.records]
    expected = [] if libraries == "tested" else ["aiohttp", "uvicorn"]
    assert [message.partition(":")[0] for message in messages] == [
        f"{library} {version(library)} is installed but 0.0 was tested" for library in expected
    ]


def test_the_dependency_bounds_in_pyproject_are_the_tested_versions() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    for library, minor in TESTED.items():
        major, number = minor.split(".")
        assert f"{library}>={minor},<{major}.{int(number) + 1}" in project["dependencies"]
        assert version(library).startswith(f"{minor}.")
