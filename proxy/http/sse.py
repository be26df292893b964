"""Streamed responses, server-sent events, and cancellation of work whose client disconnects."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, suppress
from typing import Any, Final, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from proxy import errors
from proxy.http import graceful_shutdown
from proxy.http.response_cycle import SEND_PIECE
from proxy.telemetry.logs import log_fault
from proxy.upstream.body_tap import BodySink, BodySource

T = TypeVar("T")
N = TypeVar("N")

PING: Final = b": ping\n\n"
"""Server-sent comment. It keeps intermediaries from closing a silent stream."""
DONE: Final = b"data: [DONE]\n\n"

BodyPieces = Callable[[bytes], Awaitable[None]]

logger = logging.getLogger(__name__)

MAX_CHUNK_CHARS: Final = 400
"""Maximum characters of a reply, or of its reasoning, per chunk."""
WATCH_AFTER_S: Final = 0.05
"""Seconds after which the proxy begins to watch for a disconnect. Most work is shorter, and watching costs time."""


class ClientDisconnected(Exception):
    """The client has disconnected, and the work for it has been cancelled and awaited."""


async def cancel_on_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`. If the client disconnects, cancel `work`, await it and raise ClientDisconnected."""
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    watcher: asyncio.Task[None] | None = None
    has_disconnected = has_ended = False

    def on_disconnect(_: asyncio.Task[None]) -> None:
        nonlocal has_disconnected
        has_disconnected = True
        if task is not None and not has_ended:
            task.cancel()

    def watch() -> None:
        nonlocal watcher
        watcher = loop.create_task(_disconnected(receive))
        watcher.add_done_callback(on_disconnect)

    timer = loop.call_later(WATCH_AFTER_S, watch)
    try:
        return await work
    except asyncio.CancelledError:
        if has_disconnected and task is not None and not task.uncancel():  # nothing else has cancelled it
            raise ClientDisconnected from None
        raise
    finally:
        has_ended = True  # `on_disconnect` may be scheduled already, and then it cannot be removed
        timer.cancel()
        if watcher is not None:
            watcher.remove_done_callback(on_disconnect)
            watcher.cancel()
            with suppress(asyncio.CancelledError, Exception):  # its result is not needed
                await watcher


async def _disconnected(receive: Receive) -> None:
    """Return once the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass


class StreamedResponse(Response):
    """Response whose body is sent as it arrives. When the client disconnects, its context is exited at once."""

    def __init__(
        self,
        source: BodySource,
        context: AbstractAsyncContextManager[object],
        *,
        status_code: int = 200,
        headers: Mapping[str, str] | None = None,
        media_type: str | None = "text/event-stream",
    ) -> None:
        self.source = source  # may be replaced until the response is sent
        self.context = context  # of the source; exited when the body is complete or cannot be sent
        self.on_first_piece: Callable[[bytes], object] | None = None  # called with it, before it is sent
        self.status_code = status_code
        self.media_type = media_type
        self.background = None
        sent = {"cache-control": "no-cache", **(headers or {})}
        if (sent.get("content-type") or media_type or "").startswith("text/event-stream"):
            sent["x-accel-buffering"] = "no"  # nginx then forwards each piece at once
        self.init_headers(sent)

    @classmethod
    def of(cls, source: AsyncGenerator[bytes], headers: Mapping[str, str]) -> StreamedResponse:
        """Return a response that streams the events of `source`."""

        async def send_events(sink: BodySink) -> None:
            async for piece in source:
                await sink(piece, False)
            await sink(b"", True)

        return cls(send_events, aclosing(source), headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientDisconnected):
            await cancel_on_disconnect(receive, self._send(scope, send))

    async def _send(self, scope: Scope, send: Send) -> None:
        send_piece: BodyPieces | None = scope.get("extensions", {}).get(SEND_PIECE)
        has_begun = False

        def sink(piece: bytes, is_last: bool) -> Awaitable[None]:
            nonlocal has_begun
            if has_begun and not is_last and send_piece is not None:
                return send_piece(piece)
            if not has_begun and piece and self.on_first_piece is not None:
                self.on_first_piece(piece)
            has_begun = True
            return send({"type": "http.response.body", "body": piece, "more_body": not is_last})

        try:
            async with self.context:
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                await self.source(sink)
        except errors.UpstreamError as error:  # the status is sent; an unfinished body closes the connection
            logger.warning("response ended early: %s", error.logged)


def format_event(data: Mapping[str, Any], name: str = "") -> bytes:
    """Return a server-sent event with the JSON `data` and, if given, a name."""
    first_line = f"event: {name}\n".encode() if name else b""
    return first_line + b"data: " + json.dumps(data, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"


async def progress_and_result(
    serve: Callable[[], Coroutine[Any, Any, T]], news: asyncio.Queue[N], ping_s: float
) -> AsyncGenerator[N | T | None]:
    """Yield the items of `news` as they arrive, and finally the result of `serve`.

    Yields None after each `ping_s` seconds without an item. Raises ApiError, also if `serve` fails with another error,
    or the server shuts down before there is a result, so that the stream can report it. Closing the generator cancels
    `serve` and waits for it.
    """
    task = asyncio.create_task(serve())
    item: asyncio.Task[N] | None = None
    try:
        while not task.done():
            item = asyncio.create_task(news.get())
            await asyncio.wait({task, item}, timeout=ping_s, return_when=asyncio.FIRST_COMPLETED)
            if item.done():
                yield item.result()
                continue
            item.cancel()
            if not task.done():
                yield None
        while not news.empty():
            yield news.get_nowait()
        try:
            result = await task
        except errors.ApiError:
            raise
        except Exception as error:  # the status has been sent, so nothing else could tell the client
            log_fault(logger, error)
            raise errors.internal_error() from error
        yield result
    except asyncio.CancelledError:
        if not graceful_shutdown.is_cut_by_shutdown():
            raise
        raise graceful_shutdown.shutting_down_error() from None
    finally:
        if item is not None:
            item.cancel()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def split_text(text: str) -> list[str]:
    """Split a text into parts of at most MAX_CHUNK_CHARS."""
    return [text[at : at + MAX_CHUNK_CHARS] for at in range(0, len(text), MAX_CHUNK_CHARS)]
