"""Forward the body of an upstream response piece by piece, without waking a task for each piece.

Waking a task that waits for aiohttp's reader costs more than the rest of the work on a piece. While there is nothing to
read, a tap therefore stands between the connection and aiohttp. It forwards a piece within the step of the event loop
in which the piece arrives. aiohttp still parses frames, applies its limits, pools connections and pauses reading if the
client is slower than the upstream. The tap uses internals of aiohttp. With an untested version the body is read through
aiohttp's public reader.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator
from types import coroutine
from typing import Any

import aiohttp

from proxy.tested_versions import has_tested_internals
from proxy.upstream.pooled_request import UpstreamResponse
from proxy.upstream.response_body import read_buffered

BodySink = Callable[[bytes, bool], Awaitable[None]]
"""Function that takes a piece of a body and whether it is the last. Await its result before the next piece."""
BodySource = Callable[[BodySink], Awaitable[None]]
"""Function that sends a body to a sink. When it returns it has sent the last piece, which may be empty."""


async def stream_body(response: UpstreamResponse, sink: BodySink, idle_timeout_s: float) -> None:
    """Send the body of `response`, of which nothing has been read yet, to `sink`.

    Raises what aiohttp and `sink` raise, and TimeoutError if nothing arrives for `idle_timeout_s` seconds. In a stream
    of server-sent events only data resets that timeout: comments could keep the stream alive for ever.
    """
    if not has_tested_internals("aiohttp"):
        await _stream_plainly(response, sink, idle_timeout_s)
        return
    content = response.content
    is_over = False
    while not is_over:
        piece, is_over = read_buffered(content), content.is_eof()
        if piece or is_over:
            await sink(piece, is_over)
        else:
            is_over = await _BodyTap(response, sink, idle_timeout_s).run()


async def _stream_plainly(response: UpstreamResponse, sink: BodySink, idle_timeout_s: float) -> None:
    """Send the body through aiohttp's public reader. A slow sink does not count as silence of the upstream."""
    loop = asyncio.get_running_loop()
    is_event_stream = response.content_type == "text/event-stream"
    deadline = loop.time() + idle_timeout_s
    pieces = response.content.iter_any()
    while True:
        try:
            async with asyncio.timeout_at(deadline):
                piece = await anext(pieces)
        except StopAsyncIteration:
            break
        await sink(piece, False)
        if not is_event_stream or b"data" in piece:
            deadline = loop.time() + idle_timeout_s
    await sink(b"", True)


def convert_pieces(source: BodySource, convert: Callable[[bytes, bool], bytes]) -> BodySource:
    """Return `source` with each piece replaced by `convert(piece, is_last)`. An empty result is sent only if last."""

    async def converted(sink: BodySink) -> None:
        def take(piece: bytes, is_last: bool) -> Awaitable[None]:
            ready = convert(piece, is_last)
            return sink(ready, is_last) if ready or is_last else _nothing()

        await source(take)

    return converted


async def _nothing() -> None:
    pass


class _BodyTap(asyncio.Protocol):
    """Connection protocol that wraps aiohttp's own and forwards each piece of the body as it arrives."""

    def __init__(self, response: UpstreamResponse, sink: BodySink, idle_timeout_s: float) -> None:
        connection = response.connection
        if connection is None or connection.transport is None or connection.protocol is None:
            raise aiohttp.ServerDisconnectedError  # aiohttp has reported neither an end nor an error
        connection.protocol.read_timeout = None  # one timer per piece would cost as much as reading it
        self._loop = asyncio.get_running_loop()
        self._transport = connection.transport
        self._inner: Any = connection.transport.get_protocol()
        self._content = response.content
        self._sink = sink
        self._idle_timeout_s = idle_timeout_s
        self._last_data = self._loop.time()  # when data last arrived that resets the idle timeout
        self._is_event_stream = response.content_type == "text/event-stream"
        self._has_last = False  # whether the last piece has been forwarded
        self._done: asyncio.Future[Awaitable[None] | None] = self._loop.create_future()

    async def run(self) -> bool:
        """Forward pieces until the last one, an error, or a sink that does not finish at once. Await that sink.

        Returns whether the last piece has been forwarded.
        """
        self._transport.set_protocol(self)
        self._timer = self._loop.call_later(self._idle_timeout_s, self._check_idle)
        try:
            unfinished = await self._done
        finally:
            self._timer.cancel()
            self._restore_protocol()
        if unfinished is not None:
            await unfinished
        return self._has_last

    def data_received(self, data: bytes) -> None:
        self._inner.data_received(data)
        content = self._content
        if content.exception() is not None:
            self._finish()
            return
        piece, self._has_last = read_buffered(content), content.is_eof()
        if not piece and not self._has_last:
            return
        if not self._is_event_stream or b"data" in piece:
            self._last_data = self._loop.time()
        try:
            unfinished = start_eagerly(self._sink(piece, self._has_last))
        except Exception as error:
            self._finish(error)
        else:
            if self._has_last or unfinished is not None:
                self._finish(unfinished)

    def eof_received(self) -> bool | None:
        keeps_open: bool | None = self._inner.eof_received()
        return keeps_open

    def connection_lost(self, exc: Exception | None) -> None:
        self._inner.connection_lost(exc)
        self._finish()

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()

    def _check_idle(self) -> None:
        """End with TimeoutError if the idle timeout has passed. Otherwise check again when it would."""
        due = self._last_data + self._idle_timeout_s
        if due > self._loop.time():
            self._timer = self._loop.call_at(due, self._check_idle)
        else:
            self._finish(TimeoutError())

    def _finish(self, outcome: Awaitable[None] | Exception | None = None) -> None:
        """End the tap. The connection may serve another request from now on."""
        self._restore_protocol()
        if self._done.done():
            return
        if isinstance(outcome, Exception):
            self._done.set_exception(outcome)
        else:
            self._done.set_result(outcome)

    def _restore_protocol(self) -> None:
        if self._transport.get_protocol() is self:
            self._transport.set_protocol(self._inner)


def start_eagerly(work: Awaitable[None]) -> Awaitable[None] | None:
    """Run `work` until it first waits. Return the rest as an awaitable, or None if `work` is done.

    A new task would begin at the next turn of the event loop, which under load is milliseconds later.
    """
    if isinstance(work, asyncio.Future) and work.done():
        work.result()
        return None
    steps = work.__await__()
    try:
        awaited = next(steps)
    except StopIteration:
        return None
    return _rest(awaited, steps)


@coroutine
def _rest(awaited: Any, steps: Generator[Any, Any, None]) -> Generator[Any, Any, None]:
    try:
        while True:
            try:
                yield awaited
            except GeneratorExit:
                steps.close()
                raise
            except BaseException as error:
                awaited = steps.throw(error)
            else:
                awaited = next(steps)
    except StopIteration:
        return
