"""Responses are written in as few pieces as possible, and no piece is lost or late."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from proxy.http.response_cycle import Header, ResponseCycle

HEAD = b"HTTP/1.1 200 OK\r\n"


class RecordingTransport:
    """Transport that keeps what is written, by call."""

    def __init__(self) -> None:
        self.written: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def is_closing(self) -> bool:
        return False


class Exchange:
    """A request whose response is recorded."""

    def __init__(self, *, method: str = "GET", version: str = "1.1", expects_continue: bool = False) -> None:
        self.events: list[str] = []
        self.transport = RecordingTransport()
        self.is_read = asyncio.Event()  # set when a client that has paused reads again
        self.flow = flow = SimpleNamespace(
            write_paused=False, resume_reading=lambda: None, drain=lambda: self.is_read.wait()
        )
        is_sent = asyncio.get_running_loop().create_future()
        is_sent.set_result(None)
        self.cycle = ResponseCycle(
            {"method": method, "http_version": version},
            cast(asyncio.Transport, self.transport),
            cast(Any, flow),
            default_headers=[(b"server", b"test")],
            expects_continue=expects_continue,
            keep_alive=version == "1.1",
            is_sent=is_sent,
            on_response=lambda: self.events.append("complete"),
            close=lambda: self.events.append("closed"),
        )

    async def begin(self, headers: Sequence[Header] = (), status: int = 200) -> None:
        """Send the head of the response."""
        await self.cycle.send({"type": "http.response.start", "status": status, "headers": headers})

    async def go_on(self, body: bytes, *, is_last: bool = False) -> None:
        """Send a piece of the body of the response."""
        await self.cycle.send({"type": "http.response.body", "body": body, "more_body": not is_last})

    async def send_piece(self, piece: bytes) -> None:
        """Send a piece of the body past the middleware."""
        await self.cycle.send_piece(piece)

    async def turn(self) -> None:
        """Wait until all callbacks have run that are due now."""
        loop = asyncio.get_running_loop()
        due = loop.create_future()
        loop.call_soon(due.set_result, None)
        await due

    @property
    def written(self) -> list[bytes]:
        """Return the bytes of each write to the connection, without the default header."""
        return [piece.replace(b"server: test\r\n", b"") for piece in self.transport.written]


def length(size: int) -> Sequence[Header]:
    """Return the headers of a body of known length."""
    return [(b"content-length", str(size).encode())]


async def test_a_head_is_written_with_a_body_of_known_length() -> None:
    exchange = Exchange(expects_continue=True)
    exchange.cycle.message_event.set()
    await exchange.cycle.receive()
    await exchange.begin(length(6))
    assert len(exchange.written) == 1
    await exchange.go_on(b"abc")
    await exchange.go_on(b"def", is_last=True)
    head = HEAD + b"content-length: 6\r\n\r\n"
    assert exchange.written == [b"HTTP/1.1 100 Continue\r\n\r\n", head + b"abc", b"def"]
    assert exchange.events == ["complete"]


@pytest.mark.parametrize(
    ("method", "version", "headers", "status", "line"),
    [
        ("GET", "1.1", length(0), 200, b"content-length: 0\r\n"),
        ("GET", "1.1", (), 204, b""),
        ("GET", "1.0", (), 200, b"connection: close\r\n"),
        ("HEAD", "1.1", length(5), 200, b"content-length: 5\r\n"),
        ("HEAD", "1.1", (), 200, b""),
    ],
)
async def test_a_head_is_written_at_once_if_no_body_follows_at_once(
    method: str, version: str, headers: Sequence[Header], status: int, line: bytes
) -> None:
    exchange = Exchange(method=method, version=version)
    await exchange.begin(headers, status)
    (head,) = exchange.written
    assert head.partition(b"\r\n")[2] == line + b"\r\n"


async def test_a_head_whose_body_never_comes_is_written_before_the_connection_closes() -> None:
    exchange = Exchange()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": length(5)})

    await exchange.cycle.run_asgi(app)
    assert exchange.written == [HEAD + b"content-length: 5\r\n\r\n"]
    assert exchange.events == ["closed"]


async def test_a_body_of_unknown_length_is_sent_in_chunks() -> None:
    exchange = Exchange()
    await exchange.begin()
    for piece in (b"", b"abc", b""):
        await exchange.go_on(piece)
    await exchange.send_piece(b"f")
    await exchange.go_on(b"de", is_last=True)
    await exchange.turn()
    first = HEAD + b"transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n"
    assert exchange.written == [first, b"1\r\nf\r\n", b"2\r\nde\r\n0\r\n\r\n"]


async def test_the_head_of_a_body_in_chunks_waits_for_none_of_them() -> None:
    exchange = Exchange()
    await exchange.begin()
    assert exchange.written == []
    await exchange.turn()
    head = HEAD + b"transfer-encoding: chunked\r\n\r\n"
    assert exchange.written == [head]
    await exchange.go_on(b"a", is_last=True)
    assert exchange.written == [head, b"1\r\na\r\n0\r\n\r\n"]


async def test_nothing_is_written_to_a_client_that_has_left() -> None:
    exchange = Exchange()
    await exchange.begin()
    exchange.cycle.disconnected = True
    await exchange.send_piece(b"abc")
    await exchange.turn()
    assert exchange.written == []


async def test_a_piece_waits_for_a_client_that_does_not_read() -> None:
    exchange = Exchange()
    await exchange.begin()
    await exchange.go_on(b"a")
    exchange.flow.write_paused = True
    sending = asyncio.ensure_future(exchange.cycle.send_piece(b"b"))
    await exchange.turn()
    assert len(exchange.written) == 1
    exchange.is_read.set()
    await sending
    assert exchange.written[1:] == [b"1\r\nb\r\n"]


async def test_a_body_of_unknown_length_ends_with_the_connection_in_http_1_0() -> None:
    exchange = Exchange(version="1.0")
    await exchange.begin()
    await exchange.go_on(b"abc")
    await exchange.go_on(b"de", is_last=True)
    assert exchange.written[1:] == [b"abc", b"de"]
    assert exchange.events == ["closed", "complete"]


@pytest.mark.parametrize(("body", "problem"), [(b"abcd", "longer"), (b"ab", "shorter")])
async def test_a_body_of_another_length_than_announced_is_an_error(body: bytes, problem: str) -> None:
    exchange = Exchange()
    await exchange.begin(length(3))
    with pytest.raises(RuntimeError, match=f"{problem} than its content-length"):
        await exchange.go_on(body, is_last=True)


@pytest.mark.parametrize(
    "header",
    [(b"x-a", b"b\r\nx-c: d"), (b"x-a", b"b\nc"), (b"x-a", b"b\0"), (b"x a", b"b"), (b"x-a\r\n", b"b"), (b"X-A", b"b")],
)
async def test_a_header_that_could_be_read_as_another_is_an_error(header: Header) -> None:
    exchange = Exchange()
    with pytest.raises(RuntimeError, match="invalid name or value of a response header"):
        await exchange.begin([header])
    assert exchange.written == []


async def test_messages_in_a_wrong_order_are_an_error() -> None:
    exchange = Exchange()
    with pytest.raises(RuntimeError, match=r"expected ASGI message 'http\.response\.start'"):
        await exchange.go_on(b"a")
    with pytest.raises(RuntimeError, match=r"expected ASGI message 'http\.response\.start'"):
        await exchange.send_piece(b"a")
    await exchange.begin()
    with pytest.raises(RuntimeError, match=r"expected ASGI message 'http\.response\.body'"):
        await exchange.begin()
    await exchange.go_on(b"a", is_last=True)
    with pytest.raises(RuntimeError, match="the response is complete"):
        await exchange.go_on(b"a")
    with pytest.raises(RuntimeError, match="the response is complete"):
        await exchange.send_piece(b"a")


async def test_an_app_that_fails_is_answered_for() -> None:
    exchange = Exchange()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise ValueError

    await exchange.cycle.run_asgi(app)
    (answer,) = exchange.written
    assert answer.startswith(b"HTTP/1.1 500 ")
    assert b"connection: close\r\n" in answer
    assert answer.endswith(b"\r\n\r\nInternal Server Error")
    assert exchange.events == ["closed", "complete"]
