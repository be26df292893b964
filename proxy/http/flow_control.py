"""Write responses: a timeout for clients that do not read, bodies of unknown length, and lingering closes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from uvicorn.protocols.http.flow_control import FlowControl


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
    """Transport that a response writes to. Its `close` gives the client time to read the response."""

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]) -> None:
        self.write = transport.write
        self.is_closing = transport.is_closing
        self.close = close
