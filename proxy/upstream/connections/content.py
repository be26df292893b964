"""Body of a response, from the connection on which it arrives to its reader."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Final, Protocol

MAX_UNREAD_BYTES: Final = 2**17
"""Bytes of a body that may wait for their reader. With more, nothing further is read from the connection."""


class BodyContent(Protocol):
    """Body of a response: a ResponseContent, or aiohttp's own reader."""

    def iter_any(self) -> AsyncIterator[bytes]:
        """Return an iterator over pieces of the body as they arrive."""

    async def read(self) -> bytes:
        """Return the rest of the body."""

    def read_nowait(self) -> bytes:
        """Return what has arrived."""

    def is_eof(self) -> bool:
        """Return whether the end of the body has arrived."""


class BodyListener(Protocol):
    """Takes the pieces of a body within the step of the event loop in which they arrive."""

    def take(self, piece: bytes, is_last: bool) -> None:
        """Take a piece, which may be empty if it is the last."""

    def fail(self) -> None:
        """Stop listening: the content has an error, which reading it raises."""


class PausableConnection(Protocol):
    """Connection on which a body arrives."""

    def pause_reading(self) -> None:
        """Read nothing until `resume_reading`."""

    def resume_reading(self) -> None:
        """Read again, if it is paused."""


class ResponseContent:
    """Body that arrives on a connection. It has one reader, or one listener."""

    __slots__ = ("_arrived", "_connection", "_error", "_is_complete", "_listener", "_unread", "_waiter")

    def __init__(self, connection: PausableConnection) -> None:
        self._connection: PausableConnection | None = connection  # until the body is complete
        self._unread: list[bytes] = []
        self._arrived = 0  # bytes of them
        self._is_complete = False
        self._error: Exception | None = None
        self._listener: BodyListener | None = None
        self._waiter: asyncio.Future[None] | None = None

    # The connection's side

    def feed(self, piece: bytes, is_last: bool) -> None:
        """Add a piece, which may be empty if it is the last."""
        if is_last:
            self._is_complete = True
            self._connection = None  # it may serve another request from now on
        listener = self._listener
        if listener is not None:
            listener.take(piece, is_last)
            return
        if piece:
            self._unread.append(piece)
            self._arrived += len(piece)
            if self._arrived > MAX_UNREAD_BYTES and self._connection is not None:
                self._connection.pause_reading()
        self._wake()

    def fail(self, error: Exception) -> None:
        """End the body with an error, which every read raises once the pieces that have arrived are read."""
        self._error = error
        self._connection = None
        if self._listener is not None:
            self._listener.fail()
        self._wake()

    # The reader's side

    def listen(self, listener: BodyListener | None) -> None:
        """Give further pieces to `listener`, instead of keeping them for a reader; None ends that."""
        self._listener = listener

    def is_eof(self) -> bool:
        """Return whether the end of the body has arrived."""
        return self._is_complete

    def read_nowait(self) -> bytes:
        """Return what has arrived. If nothing is left, raise the body's error."""
        unread = self._unread
        if not unread:
            if self._error is not None:
                raise self._error
            return b""
        piece = unread[0] if len(unread) == 1 else b"".join(unread)
        unread.clear()
        self._arrived = 0
        if self._connection is not None:
            self._connection.resume_reading()
        return piece

    async def read(self) -> bytes:
        """Return the rest of the body. Raises its error."""
        return b"".join([piece async for piece in self])

    def iter_any(self) -> AsyncIterator[bytes]:
        """Return an iterator over pieces of the body as they arrive. It raises the body's error."""
        return self

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        while not self._unread and not self._is_complete and self._error is None:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        piece = self.read_nowait()
        if not piece:
            raise StopAsyncIteration
        return piece

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
