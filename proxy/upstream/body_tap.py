"""Forward the body of an upstream response piece by piece, without waking a task for each piece.

Waking a task that waits for a reader costs more than the rest of the work on a piece. While there is nothing to read, a
tap therefore listens to the connection, and forwards a piece within the step of the event loop in which it arrives. The
connection stops reading if the client is slower than the upstream. With an untested version of aiohttp the body is read
through aiohttp's public reader.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator
from types import coroutine
from typing import Any

from proxy.upstream.connections.content import ResponseContent
from proxy.upstream.connections.pooled_request import UpstreamResponse

BodySink = Callable[[bytes, bool], Awaitable[None]]
"""Function that takes a piece of a body and whether it is the last. Await its result before the next piece."""
BodySource = Callable[[BodySink], Awaitable[None]]
"""Function that sends a body to a sink. When it returns it has sent the last piece, which may be empty."""


async def stream_body(response: UpstreamResponse, sink: BodySink, idle_timeout_s: float) -> None:
    """Send the body of `response`, of which nothing has been read yet, to `sink`.

    Raises what aiohttp and `sink` raise, and TimeoutError if nothing arrives for `idle_timeout_s` seconds. In a stream
    of server-sent events only data resets that timeout: comments could keep the stream alive for ever.
    """
    content = response.content
    if not isinstance(content, ResponseContent):
        await _stream_plainly(response, sink, idle_timeout_s)
        return
    is_event_stream = response.content_type == "text/event-stream"
    is_over = False
    while not is_over:
        piece, is_over = content.read_nowait(), content.is_eof()
        if piece or is_over:
            await sink(piece, is_over)
        else:
            is_over = await _BodyTap(content, sink, idle_timeout_s, is_event_stream=is_event_stream).run()


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
            return sink(ready, is_last) if ready or is_last else nothing()

        await source(take)

    return converted


async def nothing() -> None:
    """Return at once: the result of a sink that has nothing to send."""


class _BodyTap:
    """Listener that forwards each piece of a body as it arrives."""

    def __init__(
        self, content: ResponseContent, sink: BodySink, idle_timeout_s: float, *, is_event_stream: bool
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._content = content
        self._sink = sink
        self._idle_timeout_s = idle_timeout_s
        self._last_data = self._loop.time()  # when data last arrived that resets the idle timeout
        self._is_event_stream = is_event_stream
        self._has_last = False  # whether the last piece has been forwarded
        self._sent: Awaitable[None] | None = None  # a finished result of the sink, which mostly returns the same object
        self._done: asyncio.Future[Awaitable[None] | None] = self._loop.create_future()

    async def run(self) -> bool:
        """Forward pieces until the last one, an error, or a sink that does not finish at once. Await that sink.

        Returns whether the last piece has been forwarded.
        """
        self._content.listen(self)
        self._timer = self._loop.call_later(self._idle_timeout_s, self._check_idle)
        try:
            unfinished = await self._done
        finally:
            self._timer.cancel()
            self._content.listen(None)
        if unfinished is not None:
            await unfinished
        return self._has_last

    def take(self, piece: bytes, is_last: bool) -> None:
        """Forward a piece."""
        self._has_last = is_last
        if not self._is_event_stream or b"data" in piece:
            self._last_data = self._loop.time()
        try:
            sent = self._sink(piece, is_last)
            unfinished = None
            if sent is not self._sent:
                unfinished = start_eagerly(sent)
                self._sent = sent if isinstance(sent, asyncio.Future) and unfinished is None else None
        except Exception as error:
            self._finish(error)
        else:
            if is_last or unfinished is not None:
                self._finish(unfinished)

    def fail(self) -> None:
        """End the tap: reading the content raises its error."""
        self._finish()

    def _check_idle(self) -> None:
        """End with TimeoutError if the idle timeout has passed. Otherwise check again when it would."""
        due = self._last_data + self._idle_timeout_s
        if due > self._loop.time():
            self._timer = self._loop.call_at(due, self._check_idle)
        else:
            self._finish(TimeoutError())

    def _finish(self, outcome: Awaitable[None] | Exception | None = None) -> None:
        """End the tap. Pieces that arrive from now on are kept."""
        self._content.listen(None)
        if self._done.done():
            return
        if isinstance(outcome, Exception):
            self._done.set_exception(outcome)
        else:
            self._done.set_result(outcome)


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
