"""The load generator and the backend of the benchmarks. Errors in them would make the figures wrong."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import repeat

import pytest

from tests.bench.generator import BODY, BrokenAnswer, Reader, framing, load
from tests.bench.null import Backend

STREAM = BODY | {"stream": True}
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nb\r\n, whole one\r\n0\r\n\r\n"


class FixedReply(asyncio.Protocol):
    """Server that sends the same response to every connection and closes it."""

    def __init__(self, reply: bytes) -> None:
        self.reply = reply
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self.transport.write(self.reply)
        self.transport.close()


@asynccontextmanager
async def serving(protocol: Callable[[], asyncio.Protocol]) -> AsyncIterator[str]:
    """Run a server and yield its URL."""
    async with await asyncio.get_running_loop().create_server(protocol, "127.0.0.1") as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize(
    ("reply", "body"),
    [
        (OK + b"Content-Length: 5\r\n\r\nhello", b"hello"),
        (OK + b"content-length:0\r\n\r\n", b""),
        (CHUNKED, b"hello, whole one"),
    ],
)
def test_a_response_is_complete_with_its_last_byte(reply: bytes, body: bytes, size: int) -> None:
    reader = Reader()
    complete = [reader.feed(reply[at : at + size]) for at in range(0, len(reply), size)]
    assert complete == [False] * (len(complete) - 1) + [True]
    assert reader.body == body


def test_connections_are_kept_as_http_version_and_header_say() -> None:
    assert framing(b"HTTP/1.1 200 OK").kept
    assert framing(b"HTTP/1.0 200 OK\r\nConnection: keep-alive").kept
    assert not framing(b"HTTP/1.0 200 OK").kept
    assert not framing(b"HTTP/1.1 200 OK\r\nConnection: close").kept


async def test_a_stream_of_the_backend_has_forty_events() -> None:
    async with serving(Backend) as url:
        streams, _ = await load(url, STREAM, 2, 0, lambda: repeat(True, 2))
        replies, _ = await load(url, BODY, 2, 1, lambda: repeat(True, 3))
    assert [answer.events for answer in streams] == [40] * 4
    assert all(answer.first < answer.whole for answer in streams)
    assert len(replies) == 6


@pytest.mark.parametrize(
    "reply", [OK + b"connection: close\r\ncontent-length: 2\r\n\r\n{}", b"HTTP/1.0 200 OK\r\n\r\n{}"]
)
async def test_the_generator_reconnects_if_the_server_closes(reply: bytes) -> None:
    async with serving(lambda: FixedReply(reply)) as url:
        answers, _ = await load(url, BODY, 2, 1, lambda: repeat(True, 3))
    assert len(answers) == 6


@pytest.mark.parametrize(
    ("reply", "body", "why"),
    [
        (b"HTTP/1.1 503 Busy\r\ncontent-length: 0\r\n\r\n", BODY, "503"),
        (OK + b"content-length: 5\r\n\r\nhell", BODY, "before the response was complete"),
        (CHUNKED[:-5], BODY, "before the response was complete"),
        (CHUNKED, STREAM, "did not end with"),
    ],
)
async def test_broken_responses_are_errors(reply: bytes, body: dict[str, object], why: str) -> None:
    with pytest.raises(BrokenAnswer, match=why):
        async with serving(lambda: FixedReply(reply)) as url:
            await load(url, body, 1, 0, lambda: repeat(True, 1))
