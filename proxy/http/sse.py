"""Responses that notice a client leaving: server-sent events, and work that is dropped with its client."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, suppress
from copy import copy
from typing import Any, Final, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from proxy import errors
from proxy.http import graceful_shutdown
from proxy.upstream.body_tap import BodySink, BodySource

T = TypeVar("T")
N = TypeVar("N")

PING: Final = b": ping\n\n"
"""A comment, so that nothing on the way thinks a stream dead."""
DONE: Final = b"data: [DONE]\n\n"

logger = logging.getLogger(__name__)

CONTENT_CHARS = 400
"""Characters of a reply, or of its reasoning, in one chunk."""
UNWATCHED_S: Final = 0.05
"""Work is so short most often that watching its client would cost more than it saves; so long nobody looks."""


class ClientDisconnected(Exception):
    """The client has closed its connection; the work for it has been cancelled and has ended."""


async def cancel_on_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`. If the client leaves, cancel and await `work` and raise ClientDisconnected."""
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    gone: asyncio.Task[None] | None = None
    has_left = False

    def leave(_: asyncio.Task[None]) -> None:
        nonlocal has_left
        has_left = True
        if task is not None:
            task.cancel()

    def watch() -> None:
        nonlocal gone
        gone = loop.create_task(_disconnected(receive))
        gone.add_done_callback(leave)

    timer = loop.call_later(UNWATCHED_S, watch)
    try:
        return await work
    except asyncio.CancelledError:
        if has_left and task is not None and not task.uncancel():  # nobody else has cancelled it
            raise ClientDisconnected from None
        raise
    finally:
        timer.cancel()
        if gone is not None:
            gone.remove_done_callback(leave)
            gone.cancel()
            with suppress(asyncio.CancelledError, Exception):  # its outcome is nobody's
                await gone


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class StreamedResponse(Response):
    """A body sent as it comes. When the client leaves, what it comes of is left at once."""

    def __init__(
        self,
        source: BodySource,
        opened: AbstractAsyncContextManager[object],
        *,
        status_code: int = 200,
        headers: Mapping[str, str] | None = None,
        media_type: str | None = "text/event-stream",
    ) -> None:
        self.source = source
        self.opened = opened  # what the body comes of, which is left when it has come, or will not
        self.status_code = status_code
        self.media_type = media_type
        self.background = None
        sent = {"cache-control": "no-cache", **(headers or {})}
        if (sent.get("content-type") or media_type or "").startswith("text/event-stream"):
            sent["x-accel-buffering"] = "no"  # nginx and its like hand each piece on at once
        self.init_headers(sent)

    @classmethod
    def of(cls, source: AsyncGenerator[bytes], headers: Mapping[str, str]) -> StreamedResponse:
        """The events that `source` yields."""

        async def send_events(sink: BodySink) -> None:
            async for piece in source:
                await sink(piece, False)
            await sink(b"", True)

        return cls(send_events, aclosing(source), headers=headers)

    def with_source(self, source: BodySource) -> StreamedResponse:
        """Return a response with the same head and another body."""
        response = copy(self)
        response.source = source
        return response

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientDisconnected):
            await cancel_on_disconnect(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        def hand(piece: bytes, is_last: bool) -> Awaitable[None]:
            return send({"type": "http.response.body", "body": piece, "more_body": not is_last})

        try:
            async with self.opened:
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                await self.source(hand)
        except errors.UpstreamError as error:  # the status is out: leaving the body unfinished cuts the connection
            logger.warning("a response broke off: %s", error.logged)


def format_event(data: Mapping[str, Any], name: str = "") -> bytes:
    """One server-sent event, with a name where it has one."""
    named = f"event: {name}\n".encode() if name else b""
    return named + b"data: " + json.dumps(data, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"


async def progress_and_result(
    serve: Callable[[], Coroutine[Any, Any, T]], news: asyncio.Queue[N], ping_s: float
) -> AsyncGenerator[N | T | None]:
    """Yield the items of `news` as they come, None after `ping_s` seconds of nothing, and last what `serve` returns.

    Raises ApiError, also if the proxy ends before there is a reply: the stream can still tell. Closing it cancels
    `serve`, and waits for that to end.
    """
    task = asyncio.create_task(serve())
    line: asyncio.Task[N] | None = None
    try:
        while not task.done():
            line = asyncio.create_task(news.get())
            await asyncio.wait({task, line}, timeout=ping_s, return_when=asyncio.FIRST_COMPLETED)
            if line.done():
                yield line.result()
                continue
            line.cancel()
            if not task.done():
                yield None
        while not news.empty():
            yield news.get_nowait()
        yield await task
    except asyncio.CancelledError:
        if not graceful_shutdown.is_cut_by_shutdown():
            raise
        raise graceful_shutdown.shutting_down_error() from None
    finally:
        if line is not None:
            line.cancel()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def split_text(text: str) -> list[str]:
    """A text in parts small enough for a chunk."""
    return [text[at : at + CONTENT_CHARS] for at in range(0, len(text), CONTENT_CHARS)]
