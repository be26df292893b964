"""Write responses: a timeout for clients that do not read, bodies of unknown length, and lingering closes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle


class WriteTimeoutFlow(FlowControl):
    """Flow control that aborts a connection whose client does not read for too long."""

    def __init__(self, transport: asyncio.Transport, seconds: float, give_up: Callable[[], None]) -> None:
        super().__init__(transport)
        self._seconds = seconds
        self._give_up = give_up
        self._timer: asyncio.TimerHandle | None = None

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._seconds, self._give_up)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class UnboundedLength(int):
    """Infinite content length, for an HTTP/1.0 response that ends when the connection closes.

    Without a length uvicorn would use chunked encoding, which HTTP/1.0 does not have.
    """

    def __sub__(self, _: int) -> UnboundedLength:
        return self

    def __lt__(self, _: int) -> bool:
        return False

    def __ne__(self, _: object) -> bool:
        return False


class ResponseTransport:
    """Transport that one response writes to. Its `close` gives the client time to read the response.

    The head of a response of known length waits for the body, because two writes cost more than one.
    """

    def __init__(self, transport: asyncio.Transport, cycle: RequestResponseCycle, close: Callable[[], None]) -> None:
        self.is_closing = transport.is_closing
        self._transport = transport
        self._cycle = cycle
        self._close = close
        self._has_head = False  # whether the head has been written, or waits
        self._waiting = b""  # the head that waits

    def write(self, data: bytes) -> None:
        """Write a head or a piece of a body. uvicorn writes a head in one piece."""
        if self._waiting:
            head, self._waiting = self._waiting, b""
            self._transport.writelines((head, data))
        elif self._cycle.response_started and not self._has_head:
            self._has_head = True
            if self._is_followed_by_body():
                self._waiting = data
            else:
                self._transport.write(data)
        else:
            self._transport.write(data)

    def close(self) -> None:
        """Close the connection, after what waits has been sent."""
        if self._waiting:
            self.write(b"")
        self._close()

    def _is_followed_by_body(self) -> bool:
        cycle = self._cycle
        length = cycle.expected_content_length
        is_known = cycle.chunked_encoding is False and not isinstance(length, UnboundedLength)
        return is_known and length > 0 and cycle.scope["method"] != "HEAD"
