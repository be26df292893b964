"""The body of an upstream's response, given on the moment a piece of it comes, with no task that wakes for each.

A task that waits for aiohttp's reader costs more for each piece than all else that is done with it. So, while there is
nothing to read, a tap stands between the connection and aiohttp: what the reader has made of a piece is given on within
the same step of the loop. What aiohttp does stays as it is: frames, limits, the pool of connections and, when a client
is slower than the upstream, holding the upstream back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp

from proxy.upstream.eager_task import start_eagerly

BodySink = Callable[[bytes, bool], Awaitable[None]]
"""Is given a piece of a body, and whether it is the last. What it returns is over once the next piece may come."""
BodySource = Callable[[BodySink], Awaitable[None]]
"""Gives a BodySink a body. If it returns, it has given the last piece, which may be empty."""


async def pour(response: aiohttp.ClientResponse, hand: BodySink, silence_s: float) -> None:
    """Give `hand` the body of `response`, of which nothing has been read.

    Raises what aiohttp and `hand` do, and TimeoutError once nothing has come for `silence_s` seconds. Of a stream of
    events only data counts: comments may keep it alive for ever.
    """
    content = response.content
    is_over = False
    while not is_over:
        piece, is_over = content.read_nowait(), content.is_eof()
        if piece or is_over:
            await hand(piece, is_over)
        else:
            is_over = await _Tap(response, hand, silence_s).run()


class _Tap(asyncio.Protocol):
    """The protocol of a connection, with another one around it that gives on what comes."""

    def __init__(self, response: aiohttp.ClientResponse, hand: BodySink, silence_s: float) -> None:
        connection = response.connection
        if connection is None or connection.transport is None or connection.protocol is None:
            raise aiohttp.ServerDisconnectedError  # though neither an end nor an error has come
        connection.protocol.read_timeout = None  # a timer a piece, which would cost as much as to read it
        self._loop = asyncio.get_running_loop()
        self._transport = connection.transport
        self._inner: Any = connection.transport.get_protocol()
        self._content = response.content
        self._hand = hand
        self._silence_s = silence_s
        self._heard = self._loop.time()  # when anything last came that counts
        self._is_stream = response.content_type == "text/event-stream"
        self._has_last = False  # the last piece has been given
        self._over: asyncio.Future[Awaitable[None] | None] = self._loop.create_future()

    async def run(self) -> bool:
        """Until the last piece has been given, or the body fails, or `hand` has to be waited for, and has been. Whether
        it was the last piece."""
        self._transport.set_protocol(self)
        self._timer = self._loop.call_later(self._silence_s, self._look)
        try:
            slow = await self._over
        finally:
            self._timer.cancel()
            self._leave()
        if slow is not None:
            await slow
        return self._has_last

    def data_received(self, data: bytes) -> None:
        self._inner.data_received(data)
        content = self._content
        if content.exception() is not None:
            self._end()
            return
        piece, self._has_last = content.read_nowait(), content.is_eof()
        if not piece and not self._has_last:
            return
        if not self._is_stream or b"data" in piece:
            self._heard = self._loop.time()
        try:
            slow = start_eagerly(self._hand(piece, self._has_last))
        except Exception as error:
            self._end(error)
        else:
            if self._has_last or slow is not None:
                self._end(slow)

    def eof_received(self) -> bool | None:
        kept: bool | None = self._inner.eof_received()
        return kept

    def connection_lost(self, exc: Exception | None) -> None:
        self._inner.connection_lost(exc)
        self._end()

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()

    def _look(self) -> None:
        """Whether anything has come of late."""
        due = self._heard + self._silence_s
        if due > self._loop.time():
            self._timer = self._loop.call_at(due, self._look)
        else:
            self._end(TimeoutError())

    def _end(self, how: Awaitable[None] | Exception | None = None) -> None:
        """Nothing comes here any more: the connection may be another request's from now on."""
        self._leave()
        if self._over.done():
            return
        if isinstance(how, Exception):
            self._over.set_exception(how)
        else:
            self._over.set_result(how)

    def _leave(self) -> None:
        if self._transport.get_protocol() is self:
            self._transport.set_protocol(self._inner)
