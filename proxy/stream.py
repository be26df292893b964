"""Responses that notice a client leaving: server-sent events, and work that is dropped with its client."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from proxy import errors
from proxy.reply import Reply

T = TypeVar("T")

logger = logging.getLogger(__name__)

CONTENT_CHARS = 400
"""Characters of a reply in one chunk."""


class ClientGone(Exception):
    """The client has closed its connection; the work for it has been cancelled and has ended."""


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled, and awaited, as soon as the client leaves: ClientGone is raised."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for pending in (task, gone):
            pending.cancel()
            with suppress(asyncio.CancelledError, Exception):  # its outcome was taken above, or is nobody's
                await pending


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Stream(Response):
    """A body sent as it comes. When the client leaves, its source is closed at once."""

    def __init__(
        self,
        source: AsyncGenerator[bytes],
        *,
        status_code: int = 200,
        headers: Mapping[str, str] | None = None,
        media_type: str | None = "text/event-stream",
    ) -> None:
        self.source = source
        self.status_code = status_code
        self.media_type = media_type
        self.background = None
        self.init_headers({"cache-control": "no-cache", **(headers or {})})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientGone):
            await unless_gone(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async with aclosing(self.source) as source:
                async for data in source:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
        except errors.UpstreamError as error:  # the status is out: leaving the body unfinished cuts the connection
            logger.warning("a response broke off: %s", error.logged)
            return
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def event(data: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(data, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"


async def pings(work: asyncio.Task[T], every_s: float) -> AsyncIterator[bytes]:
    """A comment every so often until `work` is done, so that nothing on the way thinks the stream dead."""
    while not (await asyncio.wait({work}, timeout=every_s))[0]:
        yield b": ping\n\n"


async def chat_events(
    head: Mapping[str, Any], serve: Callable[[], Coroutine[Any, Any, Reply]], *, usage: bool, ping_s: float
) -> AsyncGenerator[bytes]:
    """What `serve` replies, as chunks. `head` holds the id, object, created and model that each of them repeats."""

    def chunk(delta: Mapping[str, Any], finish: str | None = None, **extra: Any) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return event({**head, "choices": [choice], **extra})

    yield chunk({"role": "assistant", "content": ""})
    task = asyncio.create_task(serve())
    try:
        async for ping in pings(task, ping_s):
            yield ping
        reply = await task
    except errors.ApiError as error:  # the status is out: an error can only be an event now
        yield event(errors.body(error))
        return
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    message = reply.message
    if message.reasoning:
        yield chunk({"reasoning": message.reasoning, "reasoning_content": message.reasoning})
    for at in range(0, len(message.content), CONTENT_CHARS):
        yield chunk({"content": message.content[at : at + CONTENT_CHARS]})
    yield chunk({}, message.finish_reason, tts=reply.tts)
    if usage:
        yield event({**head, "choices": [], "usage": reply.usage, "tts": reply.tts})
    yield b"data: [DONE]\n\n"
