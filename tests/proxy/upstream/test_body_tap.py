"""A body from the upstream is passed on piece by piece on every event loop and connection, also on errors."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, NamedTuple

import aiohttp
import pytest
import trustme
import uvloop

from proxy.http.sse import StreamedResponse
from proxy.upstream.body_tap import BodySink, start_eagerly, stream_body
from proxy.upstream.connections.content import ResponseContent
from proxy.upstream.connections.pooled_request import PooledRequests, UpstreamResponse

CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
UNTIL_CLOSED = b"HTTP/1.1 200 OK\r\n\r\n"
END = b"0\r\n\r\n"
LONG_S = 600.0
TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=5)

Run = Callable[[Coroutine[Any, Any, None]], None]


async def _limited(work: Coroutine[Any, Any, None]) -> None:
    async with asyncio.timeout(10):
        await work


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """Run a test's coroutine on each kind of event loop. An error in a callback of the loop fails the test."""
    raised: list[Any] = []
    with asyncio.Runner(loop_factory=request.param) as runner:
        runner.get_loop().set_exception_handler(lambda _, context: raised.append(context))
        yield lambda work: runner.run(_limited(work))
    assert raised == []


@pytest.fixture(params=[True, False], ids=["tap", "plain"])
def is_pooled(request: pytest.FixtureRequest) -> bool:
    """Whether to read a pooled response through a tap, or one of aiohttp as with an untested version."""
    return bool(request.param)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class Exchange(NamedTuple):
    """A response that has begun, and the server's end of its connection."""

    response: UpstreamResponse
    reader: asyncio.StreamReader
    server: asyncio.StreamWriter

    @property
    def is_tapped(self) -> bool:
        assert isinstance(self.response.content, ResponseContent)
        return self.response.content._listener is not None

    async def stream(self, sink: BodySink) -> asyncio.Task[None]:
        """Start a task that streams the body to `sink`."""
        streaming = asyncio.create_task(stream_body(self.response, sink, LONG_S))
        await asyncio.sleep(0)
        return streaming


class Upstream(NamedTuple):
    """A server scripted by a test."""

    requests: PooledRequests | None  # None to send requests through the session
    session: aiohttp.ClientSession
    url: str
    connections: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]]

    async def begin(self, head: bytes = CHUNKED) -> Exchange:
        """Send a request over a new connection and answer it with `head`."""
        asking = self.ask()
        return await self.answer(asking, *await self.connections.get(), head)

    def ask(self) -> asyncio.Task[UpstreamResponse]:
        return asyncio.create_task(self._ask())

    async def _ask(self) -> UpstreamResponse:
        if self.requests is None:
            return await self.session.post(self.url, data=b"?")
        return await self.requests.send("POST", "/", lambda: b"?", headers={})

    async def answer(
        self,
        asking: asyncio.Task[UpstreamResponse],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        head: bytes,
    ) -> Exchange:
        await reader.readuntil(b"?")
        writer.write(head)
        return Exchange(await asking, reader, writer)


@asynccontextmanager
async def upstream(authority: trustme.CA | None = None, *, is_pooled: bool = True) -> AsyncIterator[Upstream]:
    connections: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
    served, trusted = None, None
    if authority is not None:
        served, trusted = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), ssl.create_default_context()
        authority.issue_cert("localhost").configure_cert(served)
        authority.configure_trust(trusted)
    opened: list[asyncio.StreamWriter] = []

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        opened.append(writer)
        connections.put_nowait((reader, writer))

    server = await asyncio.start_server(connected, "127.0.0.1", 0, ssl=served)
    port = server.sockets[0].getsockname()[1]
    connector = aiohttp.TCPConnector(ssl=trusted or True, family=socket.AF_INET, limit=0)
    try:
        async with aiohttp.ClientSession(connector=connector) as session:
            url = f"{'http' if authority is None else 'https'}://localhost:{port}"
            requests = PooledRequests(url, session, TIMEOUT) if is_pooled else None
            yield Upstream(requests, session, url, connections)
    finally:
        for writer in opened:
            writer.transport.abort()
        server.close()


class Client:
    """Sink that collects pieces. While `is_slow`, it accepts the next one only once `go` is set."""

    def __init__(self) -> None:
        self.pieces: asyncio.Queue[bytes] = asyncio.Queue()
        self.is_slow = False
        self.has_last = False
        self.go = asyncio.Event()
        self.tasks: list[asyncio.Task[Any] | None] = []  # current task at each piece

    def hand(self, piece: bytes, is_last: bool) -> Awaitable[None]:
        assert not self.has_last
        self.has_last = is_last
        self.tasks.append(asyncio.current_task())
        self.pieces.put_nowait(piece)
        return self.take()

    async def take(self) -> None:
        if self.is_slow:
            await self.go.wait()


@pytest.mark.parametrize("is_secure", [False, True], ids=["http", "https"])
def test_each_piece_is_passed_on_at_once_and_the_connection_is_reused(run: Run, is_secure: bool) -> None:
    async def work() -> None:
        async with upstream(trustme.CA() if is_secure else None) as server:
            client = Client()
            first = await server.begin()
            streaming = await first.stream(client.hand)
            for piece in (b"one", b"two", b"3" * 100_000):
                first.server.write(chunk(piece))
                received = b""
                while len(received) < len(piece):
                    received += await client.pieces.get()
                assert received == piece
            assert first.is_tapped
            first.server.write(END)
            await streaming
            assert client.has_last
            assert set(client.tasks) == {None}  # no task was woken to pass them on

            again = await server.answer(server.ask(), first.reader, first.server, CHUNKED + chunk(b"again") + END)
            client = Client()
            await stream_body(again.response, client.hand, LONG_S)
            assert client.pieces.get_nowait() == b"again"
            assert server.connections.empty()

    run(work())


def test_the_connection_is_free_and_the_tap_removed_once_the_last_piece_is_forwarded(run: Run) -> None:
    """Another request may use the connection before the streaming task wakes up."""

    async def work() -> None:
        async with upstream() as server:
            exchange, seen = await server.begin(), list[bool]()
            assert server.requests is not None
            free = server.requests._free

            async def hand(_: bytes, is_last: bool) -> None:
                if is_last:
                    seen.append(bool(free))
                    asyncio.get_running_loop().call_soon(lambda: seen.append(exchange.is_tapped))

            streaming = await exchange.stream(hand)
            exchange.server.write(chunk(b"one") + END)
            await streaming
            assert seen == [True, False]

    run(work())


def test_body_pieces_received_with_the_head_are_passed_on(run: Run) -> None:
    async def work() -> None:
        async with upstream() as server:
            client = Client()
            exchange = await server.begin(CHUNKED + chunk(b"a") + chunk(b"b") + END)
            await stream_body(exchange.response, client.hand, LONG_S)
            assert client.pieces.get_nowait() == b"ab"
            assert client.pieces.empty()

    run(work())


def test_a_body_without_length_ends_when_the_connection_closes(run: Run, is_pooled: bool) -> None:
    async def work() -> None:
        async with upstream(is_pooled=is_pooled) as server:
            client = Client()
            exchange = await server.begin(UNTIL_CLOSED)
            streaming = await exchange.stream(client.hand)
            exchange.server.write(b"all")
            assert await client.pieces.get() == b"all"
            exchange.server.close()
            await streaming
            assert client.has_last

    run(work())


@pytest.mark.parametrize(
    ("is_pooled", "rest"),
    [(True, b"5\r\nhalf"), (True, b"not a length\r\n"), (False, b"5\r\nhalf")],
    ids=["tap-cut", "tap-garbage", "plain-cut"],  # aiohttp's own reader ignores garbage
)
def test_a_body_that_breaks_off_raises_client_error(run: Run, is_pooled: bool, rest: bytes) -> None:
    async def work() -> None:
        async with upstream(is_pooled=is_pooled) as server:
            client = Client()
            exchange = await server.begin()
            streaming = await exchange.stream(client.hand)
            exchange.server.write(chunk(b"one"))
            assert await client.pieces.get() == b"one"
            exchange.server.write(rest)
            exchange.server.close()
            with pytest.raises(aiohttp.ClientError):
                await streaming
            assert not client.has_last
            exchange.response.release()

    run(work())


def test_a_released_response_ends_its_stream_with_an_error(run: Run) -> None:
    async def work() -> None:
        async with upstream() as server:
            exchange = await server.begin()
            streaming = await exchange.stream(Client().hand)
            exchange.response.release()
            with pytest.raises(aiohttp.ClientConnectionError, match="Connection closed"):
                await streaming
            assert await exchange.reader.read() == b""  # the server sees the end of the connection

    run(work())


def test_a_slow_client_pauses_the_upstream_without_losing_bytes(run: Run) -> None:
    async def work() -> None:
        async with upstream() as server:
            client = Client()
            client.is_slow = True
            exchange = await server.begin()
            streaming = await exchange.stream(client.hand)
            exchange.server.write(chunk(b"first"))
            assert await client.pieces.get() == b"first"
            piece, count = chunk(b"x" * 2**16), 512
            for _ in range(count):
                exchange.server.write(piece)
            exchange.server.write(END)
            flushing = asyncio.create_task(exchange.server.drain())
            held = exchange.response.content
            assert isinstance(held, ResponseContent)
            for _ in range(10_000):  # it reads ahead, but not without limit
                await asyncio.sleep(0)
            assert not flushing.done()
            assert 2**16 < held._arrived < 2**22
            assert client.pieces.empty()

            client.is_slow = False
            client.go.set()
            await streaming
            await flushing
            received = 0
            while not client.pieces.empty():
                received += len(client.pieces.get_nowait())
            assert received == 2**16 * count

    run(work())


@pytest.mark.parametrize("is_slow", [False, True])
def test_an_error_of_the_sink_is_raised_and_the_tap_removed(run: Run, is_pooled: bool, is_slow: bool) -> None:
    async def work() -> None:
        async with upstream(is_pooled=is_pooled) as server:
            come = asyncio.Event()
            go = asyncio.Event()

            async def hand(_: bytes, __: bool) -> None:
                come.set()
                if is_slow:
                    await go.wait()
                raise OSError("gone")

            exchange = await server.begin()
            streaming = await exchange.stream(hand)
            exchange.server.write(chunk(b"one"))
            await come.wait()
            go.set()
            with pytest.raises(OSError, match="gone"):
                await streaming
            assert not is_pooled or not exchange.is_tapped
            exchange.response.release()

    run(work())


@pytest.mark.parametrize("is_slow", [False, True])
def test_cancelling_removes_the_tap(run: Run, is_slow: bool) -> None:
    async def work() -> None:
        async with upstream() as server:
            client = Client()
            client.is_slow = is_slow
            exchange = await server.begin()
            streaming = await exchange.stream(client.hand)
            exchange.server.write(chunk(b"one"))
            await client.pieces.get()
            streaming.cancel()
            with pytest.raises(asyncio.CancelledError):
                await streaming
            assert not exchange.is_tapped
            exchange.response.release()
            assert await exchange.reader.read() == b""  # the server sees the end of the connection

    run(work())


def test_only_a_stalled_body_times_out(run: Run, is_pooled: bool) -> None:
    async def work() -> None:
        async with upstream(is_pooled=is_pooled) as server:
            loop, client = asyncio.get_running_loop(), Client()
            exchange = await server.begin()
            began, idle_s = loop.time(), 0.5
            last_write = began
            streaming = asyncio.create_task(stream_body(exchange.response, client.hand, idle_s))
            while loop.time() < began + 2 * idle_s:
                last_write = loop.time()
                exchange.server.write(chunk(b"still here"))
                await client.pieces.get()
            with pytest.raises(TimeoutError):
                await streaming
            assert loop.time() - last_write >= 0.9 * idle_s  # however slow the machine is
            exchange.response.release()

    run(work())


async def test_a_streamed_response_that_cannot_be_sent_closes_its_exit_stack() -> None:
    left: list[str] = []

    async def send(_: object) -> None:
        raise OSError("gone")

    async def receive() -> dict[str, Any]:
        return {"type": "http.request"}

    async def stream(_: BodySink) -> None:
        left.append("streamed")

    opened = AsyncExitStack()
    opened.callback(left.append, "left")
    with pytest.raises(OSError, match="gone"):
        await StreamedResponse(stream, opened)({"type": "http"}, receive, send)
    assert left == ["left"]


# Eager tasks


def test_start_eagerly_runs_until_it_has_to_wait(run: Run) -> None:
    done: list[str] = []

    async def work(go: asyncio.Event) -> None:
        try:
            done.append("begun")
            await go.wait()
            await asyncio.sleep(0)
            done.append("done")
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            done.append("cancelled")
            raise

    async def pass_() -> None: ...

    async def fail() -> None:
        raise OSError("no")

    async def test() -> None:
        go = asyncio.Event()
        left = start_eagerly(work(go))
        assert left is not None
        assert done == ["begun"]
        go.set()
        await left
        assert done == ["begun", "done"]
        assert start_eagerly(pass_()) is None
        done.clear()
        left = start_eagerly(work(asyncio.Event()))
        assert left is not None
        waiting = asyncio.ensure_future(left)
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert done == ["begun", "cancelled"]

        with pytest.raises(OSError, match="no"):
            start_eagerly(fail())

    run(test())
