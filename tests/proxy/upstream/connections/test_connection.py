"""Connections to an upstream parse every kind of body, refuse what is no response, and serve one request at a time."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import repeat

import aiohttp
import pytest
from aiohttp.connector import Connection
from yarl import URL

from proxy.upstream.connections import pooled_request
from proxy.upstream.connections.connection import (
    MAX_FIELD_BYTES,
    MAX_FIELDS,
    MAX_HEAD_BYTES,
    PooledResponse,
    UpstreamConnection,
)
from proxy.upstream.connections.content import MAX_UNREAD_BYTES
from proxy.upstream.connections.pooled_request import PooledRequests, UpstreamResponse
from tests.proxy.upstream.connections.scripted_server import OK, TIMEOUT, ScriptedServer, post

CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


@asynccontextmanager
async def requests_to(url: str, limit: int = 0) -> AsyncIterator[PooledRequests]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=limit)) as session:
        yield PooledRequests(url, session, TIMEOUT)


async def body(response: UpstreamResponse) -> bytes:
    try:
        return await response.content.read()
    finally:
        response.release()


class RawServer:
    """Server whose connections a test reads and writes itself."""

    def __init__(self) -> None:
        self.connections: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
        self.url = ""

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[RawServer]:
        opened: list[asyncio.StreamWriter] = []

        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            opened.append(writer)
            self.connections.put_nowait((reader, writer))

        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()
            for writer in opened:
                writer.transport.abort()

    async def asked(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Return the next connection, whose first request has arrived."""
        reader, writer = await self.connections.get()
        await reader.readuntil(b"{}")
        return reader, writer


async def first_exchange(
    server: RawServer, requests: PooledRequests
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Open a connection by a request that is answered, and return the server's side of it."""
    asking = asyncio.create_task(post(requests))
    reader, writer = await server.asked()
    writer.write(OK)
    assert await body(await asking) == b"ok"
    return reader, writer


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (OK, b"ok"),
        (OK.replace(b"HTTP/1.1", b"HTTP/1.0").replace(b"\r\n\r\n", b"\r\nconnection: keep-alive\r\n\r\n"), b"ok"),
        (CHUNKED + b"2\r\nok\r\n3\r\nay!\r\n0\r\n\r\n", b"okay!"),
        (CHUNKED + b"2;name=value\r\nok\r\n0\r\nx-trailer: 1\r\ncontent-type: x\r\n\r\n", b"ok"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
        (b"HTTP/1.1 304 Not Modified\r\ncontent-length: 5\r\n\r\n", b""),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + OK, b"ok"),
    ],
    ids=["length", "1.0", "chunks", "trailers", "204", "304", "informational"],
)
async def test_a_complete_response_leaves_its_connection_for_the_next_request(answer: bytes, expected: bytes) -> None:
    async with ScriptedServer([answer, OK]).serve() as server, requests_to(server.url) as requests:
        assert await body(await post(requests)) == expected
        response = await post(requests)
        assert await body(response) == b"ok"
        assert dict(response.headers) == {"content-length": "2"}  # nothing is left of the first one
        assert server.connections == 1


@pytest.mark.parametrize(
    "answer",
    [
        OK + b"\r\nHTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nbad",
        OK + b"surplus",
        OK.replace(b"\r\n\r\n", b"\r\nConnection: Close\r\n\r\n"),
        OK.replace(b"HTTP/1.1", b"HTTP/1.0"),
    ],
    ids=["second response", "surplus bytes", "close", "1.0"],
)
async def test_a_connection_that_cannot_be_used_again_is_closed(answer: bytes) -> None:
    async with ScriptedServer([answer, OK]).serve() as server, requests_to(server.url) as requests:
        assert await body(await post(requests)) == b"ok"
        assert await body(await post(requests)) == b"ok"
        assert server.connections == 2


@pytest.mark.parametrize(
    ("answer", "status", "expected"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\nall of it", 200, b"all of it"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: identity\r\n\r\nall", 200, b"all"),
        (b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\nother bytes", 101, b""),
        (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", 101, b""),
    ],
)
async def test_a_body_without_length_ends_with_the_connection(answer: bytes, status: int, expected: bytes) -> None:
    async with ScriptedServer([answer, OK], closes=True).serve() as server, requests_to(server.url) as requests:
        response = await post(requests)
        assert (response.status, await body(response)) == (status, expected)
        assert await body(await post(requests)) == b"ok"
        assert server.connections == 2


@pytest.mark.parametrize(
    ("head", "rest"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n", b"ok"),
        (CHUNKED, b""),
        (CHUNKED, b"2\r\nok\r\n"),
        (CHUNKED, b"2\r\nok\r\n0\r\nx-trailer: 1\r\n"),
        (CHUNKED, b"2\r\nok\r\n0\r\ncontent-length: 2\r\n\r\n"),
        (CHUNKED, b"2\r\nokay\r\n"),
        (CHUNKED, b"-2\r\nok\r\n"),
        (CHUNKED, b"ffffffffffffffffff\r\nok"),
        (CHUNKED, b"0\r\nx: " + b"x" * (MAX_FIELD_BYTES + 1) + b"\r\n\r\n"),
    ],
)
async def test_a_body_that_breaks_off_or_has_wrong_framing_raises_payload_error(head: bytes, rest: bytes) -> None:
    async with RawServer().serve() as server, requests_to(server.url) as requests:
        asking = asyncio.create_task(post(requests))
        _, writer = await server.asked()
        writer.write(head)
        response = await asking
        writer.write(rest)
        writer.close()
        with pytest.raises(aiohttp.ClientPayloadError):
            await body(response)
        assert not requests._free


async def test_pieces_that_arrived_before_a_connection_broke_are_read_first() -> None:
    async with RawServer().serve() as server, requests_to(server.url) as requests:
        asking = asyncio.create_task(post(requests))
        _, writer = await server.asked()
        writer.write(CHUNKED)
        response = await asking
        for piece in (b"2\r\nto\r\n", b"3\r\nken\r\n"):
            writer.write(piece)
        writer.close()
        assert isinstance(response, PooledResponse)
        for _ in range(10_000):  # the reader is busy until the connection has broken
            await asyncio.sleep(0)
        assert response.content._error is not None
        assert await anext(response.content) == b"token"
        for _ in range(2):
            with pytest.raises(aiohttp.ClientPayloadError):
                await anext(response.content)


async def test_a_body_without_length_that_a_reset_ends_raises_payload_error() -> None:
    async with RawServer().serve() as server, requests_to(server.url) as requests:
        asking = asyncio.create_task(post(requests))
        _, writer = await server.asked()
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nhalf")
        response = await asking
        sock: socket.socket = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close() sends a reset
        writer.transport.abort()
        with pytest.raises(aiohttp.ClientPayloadError):
            await body(response)


FIELD = b"x-%d: y\r\n"


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\nx: " + b"x" * (MAX_FIELD_BYTES + 1),
        b"HTTP/1.1 200 OK\r\n" + b"x" * (MAX_FIELD_BYTES + 1) + b": y",
        b"HTTP/1.1 200 OK\r\n" + b"".join(FIELD % number for number in range(MAX_FIELDS + 1)) + b"x: y",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked",
        b"HTTP/1.1 200 OK\r\ncontent-length: two",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked, gzip",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nnot a length",  # in one piece with the head
        b"HTTP/1.1 99999 OK",
        b"HTTP/3.7 200 OK",
        b"GET / HTTP/1.1\r\nhost: x",
    ],
)
async def test_a_malformed_or_too_large_head_raises_response_error_and_closes(head: bytes) -> None:
    async with RawServer().serve() as server, requests_to(server.url) as requests:
        asking = asyncio.create_task(post(requests))
        reader, writer = await server.asked()
        writer.write(head + b"\r\n\r\n")
        with pytest.raises(aiohttp.ClientResponseError):
            await asking
        assert await reader.read() == b""


@pytest.mark.parametrize(
    ("beginning", "endless", "error"),
    [
        (b"HTTP/1.1 200 OK\r\nx: ", b"x" * 1024, aiohttp.ClientResponseError),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 64, aiohttp.ClientResponseError),
        (CHUNKED + b"2;", b"x" * 1024, aiohttp.ClientPayloadError),
        (CHUNKED + b"0\r\nx: ", b"x" * 1024, aiohttp.ClientPayloadError),
    ],
    ids=["field", "informational", "chunk extension", "trailer"],
)
async def test_an_endless_head_or_trailer_is_cut_off(beginning: bytes, endless: bytes, error: type[Exception]) -> None:
    async with RawServer().serve() as server, requests_to(server.url) as requests:
        asking = asyncio.create_task(post(requests))
        _, writer = await server.asked()
        writer.write(beginning)
        sent = 0

        async def flood() -> None:
            nonlocal sent
            for _ in repeat(None):
                writer.write(endless)
                await writer.drain()
                sent += len(endless)

        flooding = asyncio.create_task(flood())
        with pytest.raises(error):
            await body(await asking)
        with pytest.raises(ConnectionError):
            await flooding
        assert sent >= MAX_HEAD_BYTES


async def test_a_free_connection_that_the_server_closes_is_not_used() -> None:
    async with RawServer().serve() as server, requests_to(server.url) as requests:
        _, writer = await first_exchange(server, requests)
        [free] = requests._free
        writer.close()
        for _ in repeat(None):
            if not free.is_open:
                break
            await asyncio.sleep(0)
        asking = asyncio.create_task(post(requests))
        _, writer = await server.asked()  # a new connection
        writer.write(OK)
        assert await body(await asking) == b"ok"


async def test_a_stale_connection_raises_an_error_that_allows_a_retry() -> None:
    """The server closes the connection while the next request is on its way."""
    async with RawServer().serve() as server, requests_to(server.url) as requests:
        reader, writer = await first_exchange(server, requests)
        asking = asyncio.create_task(post(requests))
        await reader.readuntil(b"{}")
        writer.close()
        with pytest.raises(aiohttp.ServerDisconnectedError):
            await asking
        assert not requests._free


async def test_bytes_that_were_not_requested_close_a_free_connection() -> None:
    async with RawServer().serve() as server, requests_to(server.url) as requests:
        reader, writer = await first_exchange(server, requests)
        [free] = requests._free
        writer.write(OK)
        assert await reader.read() == b""
        assert not free.is_open


async def test_a_connection_that_is_free_for_too_long_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pooled_request, "KEEP_ALIVE_S", 0.01)
    async with RawServer().serve() as server, requests_to(server.url) as requests:
        readers = []
        for _ in range(2):
            asking = asyncio.create_task(post(requests))
            reader, writer = await server.asked()
            readers.append(reader)
            writer.write(OK)
            assert await body(await asking) == b"ok"
            assert await reader.read() == b""  # by a timer
        assert not requests._free


async def test_the_connection_that_was_freed_last_is_used_first() -> None:
    async with ScriptedServer([OK] * 3).serve() as server, requests_to(server.url) as requests:
        asking = [asyncio.create_task(post(requests)) for _ in range(2)]
        assert [await body(await response) for response in asking] == [b"ok"] * 2
        oldest, newest = requests._free
        assert await body(await post(requests)) == b"ok"
        assert [*requests._free] == [oldest, newest]


async def test_an_expired_connection_is_not_used_before_the_timer_has_closed_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with ScriptedServer([OK] * 2).serve() as server, requests_to(server.url) as requests:
        assert await body(await post(requests)) == b"ok"
        monkeypatch.setattr(pooled_request, "KEEP_ALIVE_S", -1.0)
        assert await body(await post(requests)) == b"ok"
        assert server.connections == 2


async def test_a_limit_on_connections_lets_a_waiting_request_use_a_free_one() -> None:
    async with ScriptedServer([OK] * 8).serve() as server, requests_to(server.url, limit=1) as requests:
        responses = [asyncio.create_task(post(requests)) for _ in range(8)]
        assert [await body(await response) for response in responses] == [b"ok"] * 8
        assert server.connections == 1
        assert not requests._free


async def test_bytes_that_arrive_in_the_pool_of_aiohttp_answer_no_request() -> None:
    async with RawServer().serve() as server, requests_to(server.url, limit=1) as requests:
        reader, writer = await first_exchange(server, requests)
        connector = requests._session.connector
        assert connector is not None
        [[(handler, _)]] = connector._conns.values()
        writer.write(OK.replace(b"ok", b"no"))
        for _ in repeat(None):
            if handler.should_close:  # it has received the bytes
                break
            await asyncio.sleep(0)
        with pytest.raises(aiohttp.ServerDisconnectedError):
            await post(requests)
        assert await reader.read() == b""
        asking = asyncio.create_task(post(requests))
        _, writer = await server.asked()  # a new connection
        writer.write(OK)
        assert await body(await asking) == b"ok"


async def test_closing_the_session_closes_free_connections_and_ends_bodies() -> None:
    async with RawServer().serve() as server:
        async with requests_to(server.url) as requests:
            first, second = (asyncio.create_task(post(requests)) for _ in range(2))
            ends = [await server.asked(), await server.asked()]
            ends[0][1].write(OK)
            ends[1][1].write(CHUNKED)
            responses = [await first, await second]
        for reader, _ in ends:
            assert await reader.read() == b""
        unfinished = next(response for response in responses if response.content_length is None)
        with pytest.raises(aiohttp.ClientPayloadError):
            await body(unfinished)


async def test_a_slow_reader_pauses_the_connection_and_loses_nothing() -> None:
    async with RawServer().serve() as server, requests_to(server.url) as requests:
        asking = asyncio.create_task(post(requests))
        _, writer = await server.asked()
        size, count = 2**16, 512
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (size * count))
        response = await asking
        assert isinstance(response, PooledResponse)
        for number in range(count):
            writer.write(bytes([number % 256]) * size)
        flushing = asyncio.create_task(writer.drain())
        for _ in range(10_000):
            await asyncio.sleep(0)
        assert not flushing.done()
        assert MAX_UNREAD_BYTES < response.content._arrived < 2**22
        received = await body(response)
        await flushing
        assert received == b"".join(bytes([number % 256]) * size for number in range(count))
        assert len(requests._free) == 1


async def test_a_released_response_closes_its_connection_and_cannot_be_read() -> None:
    async with RawServer().serve() as server, requests_to(server.url) as requests:
        asking = asyncio.create_task(post(requests))
        reader, writer = await server.asked()
        writer.write(CHUNKED + b"2\r\nok\r\n")
        response = await asking
        response.release()
        assert await reader.read() == b""
        with pytest.raises(aiohttp.ClientConnectionError, match="Connection closed"):
            await response.content.read()
        assert not requests._free


async def test_a_cancelled_request_closes_its_connection() -> None:
    async with RawServer().serve() as server, requests_to(server.url) as requests:
        asking = asyncio.create_task(post(requests))
        reader, writer = await server.asked()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        writer.write(OK)  # too late
        assert await reader.read() == b""
        assert not requests._free


async def test_a_request_that_is_cancelled_after_its_response_leaves_the_connection_to_another() -> None:
    async with RawServer().serve() as server, requests_to(server.url) as requests:
        reader, writer = await first_exchange(server, requests)
        [connection] = requests._free
        asking = asyncio.create_task(post(requests))
        await reader.readuntil(b"{}")
        connection.data_received(OK)  # it is free again, and `asking` has not been woken yet
        asking.cancel()
        other = asyncio.create_task(post(requests))
        await reader.readuntil(b"{}")
        with pytest.raises(asyncio.CancelledError):
            await asking
        writer.write(OK)
        assert await body(await other) == b"ok"
        assert server.connections.empty()


async def test_a_response_to_a_cancelled_request_does_not_free_the_connection() -> None:
    async with RawServer().serve() as server, requests_to(server.url) as requests:
        reader, _ = await first_exchange(server, requests)
        [connection] = requests._free
        asking = asyncio.create_task(post(requests))
        await reader.readuntil(b"{}")
        asking.cancel()
        connection.data_received(OK)  # before the cancelled task runs
        assert not requests._free
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert await reader.read() == b""


@asynccontextmanager
async def opened_by_aiohttp(url: str) -> AsyncIterator[Connection]:
    async with aiohttp.ClientSession() as session:
        assert session.connector is not None
        request = aiohttp.ClientRequest("GET", URL(url), loop=asyncio.get_running_loop(), session=session)
        yield await session.connector.connect(request, traces=[], timeout=TIMEOUT)


async def test_a_connection_that_is_closing_is_not_taken_over() -> None:
    async with RawServer().serve() as server, opened_by_aiohttp(server.url) as opened:
        assert opened.transport is not None
        opened.transport.close()
        with pytest.raises(aiohttp.ServerDisconnectedError):
            UpstreamConnection(opened, lambda _: None)
        opened.close()


async def test_a_response_that_came_before_the_request_is_returned() -> None:
    async with RawServer().serve() as server, opened_by_aiohttp(server.url) as opened:
        _, writer = await server.connections.get()
        writer.write(OK)
        for _ in repeat(None):
            if opened.protocol is not None and opened.protocol.should_close:  # it has received the bytes
                break
            await asyncio.sleep(0)
        freed: list[UpstreamConnection] = []
        connection = UpstreamConnection(opened, freed.append)
        response = await connection.send(b"GET / HTTP/1.1\r\n\r\n")
        assert (response.status, await body(response), freed) == (200, b"ok", [connection])


async def test_a_deadline_that_passes_as_the_response_begins_ends_neither_it_nor_the_next_one() -> None:
    async with RawServer().serve() as server, opened_by_aiohttp(server.url) as opened:
        freed: list[UpstreamConnection] = []
        connection = UpstreamConnection(opened, freed.append)
        head = connection.send(b"GET / HTTP/1.1\r\n\r\n")
        connection.data_received(CHUNKED + b"2\r\nok\r\n")
        connection.expire(head)
        connection.data_received(b"0\r\n\r\n")
        assert (await body(await head), freed) == (b"ok", [connection])
        following = connection.send(b"GET / HTTP/1.1\r\n\r\n")
        connection.expire(head)
        assert not following.done()
        connection.expire(following)
        with pytest.raises(aiohttp.SocketTimeoutError):
            await following
        connection.close()
