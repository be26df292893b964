"""Pooled requests send what aiohttp's session would send, reuse its connections and raise its errors."""

from __future__ import annotations

import asyncio
import socket

import aiohttp
import pytest

from proxy.upstream.connections.connection import PooledResponse
from proxy.upstream.connections.pooled_request import PooledRequests
from proxy.upstream.retry import NO_RESPONSE_ERRORS
from tests.proxy.upstream.connections.scripted_server import OK, TIMEOUT, ScriptedServer, post


def fields(request: bytes) -> dict[str, str]:
    lines = request.partition(b"\r\n\r\n")[0].decode().split("\r\n")[1:]
    return {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}


@pytest.mark.parametrize("method", ["POST", "GET"])
@pytest.mark.parametrize(
    "own", [{}, {"content-type": "application/json", "accept": "text/event-stream", "x-request-id": "req-1"}]
)
async def test_a_request_has_the_headers_that_the_session_would_send(method: str, own: dict[str, str]) -> None:
    body = b"{}" if method == "POST" else b""
    session_headers = {"authorization": "Bearer k", "accept-encoding": "identity"}
    async with ScriptedServer([OK] * 2).serve() as server, aiohttp.ClientSession(headers=session_headers) as session:
        requests = PooledRequests(server.url, session, TIMEOUT)
        response = await requests.send(method, "/v1/embeddings", lambda: body, headers=own)
        assert (response.status, response.ok, await response.content.read()) == (200, True, b"ok")
        async with session.request(method, f"{server.url}/v1/embeddings", data=body or None, headers=own) as expected:
            assert await expected.read() == b"ok"
    mine, theirs = server.requests
    assert mine.startswith(f"{method} /v1/embeddings HTTP/1.1\r\n".encode())
    assert mine.endswith(b"\r\n\r\n" + body)
    assert fields(mine) == fields(theirs)


async def test_credentials_and_a_path_of_the_url_are_sent() -> None:
    async with ScriptedServer([OK]).serve() as server, aiohttp.ClientSession() as session:
        url = server.url.replace("http://", "http://user:word@") + "/below"
        response = await post(PooledRequests(url, session, TIMEOUT), {})
        response.release()
    assert server.requests[0].startswith(b"POST /below/v1/embeddings HTTP/1.1\r\n")
    assert fields(server.requests[0])["authorization"] == aiohttp.encode_basic_auth("user", "word")


async def test_a_connection_is_reused_once_its_body_has_been_read() -> None:
    async with ScriptedServer([OK] * 3).serve() as server, aiohttp.ClientSession() as session:
        requests = PooledRequests(server.url, session, TIMEOUT)
        for _ in range(3):
            response = await post(requests, {})
            await response.content.read()
            response.release()
        assert server.connections == 1


@pytest.mark.parametrize("answer", [OK[:-1], OK.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")])
async def test_a_connection_is_closed_if_its_body_is_unread_or_the_server_closes_it(answer: bytes) -> None:
    async with ScriptedServer([answer, OK]).serve() as server, aiohttp.ClientSession() as session:
        requests = PooledRequests(server.url, session, TIMEOUT)
        (await post(requests, {})).release()
        assert (await post(requests, {})).status == 200
        assert server.connections == 2


async def test_informational_responses_are_skipped() -> None:
    answer = b"HTTP/1.1 103 Early Hints\r\n\r\n" + OK
    async with ScriptedServer([answer]).serve() as server, aiohttp.ClientSession() as session:
        response = await post(PooledRequests(server.url, session, TIMEOUT), {})
        assert (response.status, response.content_length) == (200, 2)


async def test_the_media_type_has_no_parameters() -> None:
    head = b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\ncontent-type: Text/Plain; charset=x\r\n\r\n"
    async with ScriptedServer([head]).serve() as server, aiohttp.ClientSession() as session:
        response = await post(PooledRequests(server.url, session, TIMEOUT), {})
        assert (response.content_type, response.status, response.ok) == ("text/plain", 404, False)
        assert isinstance(response, PooledResponse)
        assert response.connection is None  # there is no body, so that the connection is free


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (b"", aiohttp.ServerDisconnectedError),
        (b"HTTP/1.1 200 OK\r\ncontent-le", aiohttp.ServerDisconnectedError),
        (b"garbage\r\n\r\n", aiohttp.ClientResponseError),
    ],
)
async def test_a_server_that_does_not_answer_properly_raises_the_error_of_aiohttp(
    answer: bytes, expected: type[Exception]
) -> None:
    async with ScriptedServer([answer], closes=True).serve() as server, aiohttp.ClientSession() as session:
        with pytest.raises(expected):
            await post(PooledRequests(server.url, session, TIMEOUT), {})


async def test_a_server_that_is_not_there_raises_an_error_without_a_response() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        async with aiohttp.ClientSession() as session:
            url = f"http://127.0.0.1:{unused.getsockname()[1]}"
            with pytest.raises(NO_RESPONSE_ERRORS):
                await post(PooledRequests(url, session, TIMEOUT), {})


async def test_a_silent_server_times_out_and_a_cancelled_request_closes_its_connection() -> None:
    async with ScriptedServer([b""] * 2).serve() as server, aiohttp.ClientSession() as session:
        hasty = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=0.01)
        with pytest.raises(TimeoutError):
            await post(PooledRequests(server.url, session, hasty), {})
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await post(PooledRequests(server.url, session, TIMEOUT), {})
        assert session.connector is not None
        assert not session.connector._acquired


async def test_a_head_that_arrives_without_end_times_out() -> None:
    async def trickle(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        opened.append(writer)
        writer.write(b"HTTP/1.1 200 OK\r\n")
        while not writer.is_closing():
            writer.write(b"a: b\r\n")
            await asyncio.sleep(0.01)

    opened: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(trickle, "127.0.0.1", 0)
    async with server, aiohttp.ClientSession() as session:
        requests = PooledRequests(
            f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}",
            session,
            aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=0.1),
        )
        with pytest.raises(TimeoutError):
            await post(requests, {})
        for writer in opened:
            writer.transport.abort()


async def test_a_server_that_answers_before_it_has_read_the_request_gets_no_other_one() -> None:
    async def refuse(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        opened.append(writer)
        writer.write(OK)

    opened: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(refuse, "127.0.0.1", 0, limit=1)
    async with server, aiohttp.ClientSession() as session:
        requests = PooledRequests(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", session, TIMEOUT)
        for _ in range(2):
            response = await post(requests, {}, b"x" * 2**24)
            assert await response.content.read() == b"ok"
        assert len(opened) == 2
        for writer in opened:
            writer.transport.abort()


@pytest.mark.parametrize("value", ["a\r\nb: c", "a\nb", "a\0"])
async def test_a_header_that_would_end_its_line_is_refused(value: str) -> None:
    async with ScriptedServer([]).serve() as server, aiohttp.ClientSession() as session:
        with pytest.raises(ValueError, match="line end"):
            await post(PooledRequests(server.url, session, TIMEOUT), {"accept": value})
        assert not server.connections
