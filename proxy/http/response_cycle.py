"""Cycle of one request and its response on a connection: the ASGI callables and the bytes of the response.

It takes the place of uvicorn's `RequestResponseCycle` and has the attributes that uvicorn's protocol reads. A head is
checked and written as a whole rather than line by line, and sending waits only for a client that does not read.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus
from typing import Final
from uuid import uuid4

from starlette.types import ASGIApp, Message, Scope
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from proxy import errors
from proxy.errors import ApiError

Header = tuple[bytes, bytes]

SEND_PIECE: Final = "autotts.send_piece"
"""ASGI extension: `ResponseCycle.send_piece`, which skips what middleware does for each message."""

FAULTS: Final = logging.getLogger("uvicorn.error.edge")
"""Logger for uvicorn's own messages and failures of the app. Only errors: the protocol logs why it refuses requests."""
FAULTS.setLevel(logging.ERROR)

_LINES: Final = re.compile(rb"(?:[!#$%&'*+.^_`|~0-9a-z-]+: [^\x00-\x08\x0a-\x1f\x7f]*\r\n)*")
"""Lines of a head. ASGI has names in lower case."""
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
_WITHOUT_BODY: Final = (int(HTTPStatus.NO_CONTENT), int(HTTPStatus.NOT_MODIFIED))
_FAILURE: Final = b"Internal Server Error"


def error_response(error: ApiError) -> bytes:
    """Return the bytes of an error response to a request that did not reach the app. It closes the connection."""
    content = json.dumps(errors.body(error)).encode()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(content)),
        "x-request-id": f"req-{uuid4().hex}",
        **error.headers,
        "connection": "close",
    }
    lines = [f"HTTP/1.1 {error.status.value} {error.status.phrase}", *(f"{k}: {v}" for k, v in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode() + content


class ResponseCycle:
    """One request and its response."""

    __slots__ = (
        "_close",
        "_default_headers",
        "_head",
        "_is_chunked",
        "_is_head_request",
        "_is_sent",
        "_left",
        "_transport",
        "body",
        "disconnected",
        "flow",
        "keep_alive",
        "message_event",
        "more_body",
        "on_response",
        "response_complete",
        "response_started",
        "scope",
        "waiting_for_100_continue",
    )

    def __init__(
        self,
        scope: Scope,
        transport: asyncio.Transport,
        flow: FlowControl,
        *,
        default_headers: Sequence[Header],
        expects_continue: bool,
        keep_alive: bool,
        is_sent: Awaitable[None],
        on_response: Callable[[], None],
        close: Callable[[], None],
    ) -> None:
        """`close` closes the connection once the client has had time to read the response.

        `is_sent` is awaited instead of a message that has been written already. Any number of callers may await it.
        """
        self.scope = scope
        self.flow = flow
        self.message_event = asyncio.Event()  # set when the app has something to receive
        self.on_response = on_response
        self.disconnected = False
        self.keep_alive = keep_alive
        self.waiting_for_100_continue = expects_continue
        self.body = bytearray()
        self.more_body = True
        self.response_started = False
        self.response_complete = False
        self._transport = transport
        self._default_headers = default_headers
        self._is_sent = is_sent
        self._close = close
        self._head = b""  # not written yet: it is written together with the first part of the body
        self._is_head_request = scope["method"] == "HEAD"
        self._is_chunked = False
        self._left: int | None = 0  # bytes of the body that are announced and not yet sent; None: until the close

    async def run_asgi(self, app: ASGIApp) -> None:
        """Run the app on the request, and answer for it if it fails."""
        self.scope["extensions"] = {SEND_PIECE: self.send_piece}
        try:
            await app(self.scope, self.receive, self.send)
        except BaseException as error:
            FAULTS.error("Exception in ASGI application\n", exc_info=error)
            await self._end_failed()
        else:
            if not self.response_complete and not self.disconnected:
                FAULTS.error("ASGI callable returned without completing response.")
                await self._end_failed()
        finally:
            self.on_response = _do_nothing  # it refers to this object, and so do the extensions
            self.scope["extensions"] = {}

    async def receive(self) -> Message:
        """Return the next part of the request, or its disconnect, which also follows a complete response."""
        if self.waiting_for_100_continue and not self._transport.is_closing():
            self._transport.write(_CONTINUE)
            self.waiting_for_100_continue = False
        if not self.disconnected and not self.response_complete:
            self.flow.resume_reading()
            await self.message_event.wait()
            self.message_event.clear()
        if self.disconnected or self.response_complete:
            return {"type": "http.disconnect"}
        body, self.body = self.body, bytearray()
        return {"type": "http.request", "body": bytes(body), "more_body": self.more_body}

    def send(self, message: Message) -> Awaitable[None]:
        """Send a part of the response. Await the result before the next part."""
        if self.flow.write_paused and not self.disconnected:
            return self._send_when_read(message)
        self._write(message)
        return self._is_sent

    def send_piece(self, piece: bytes) -> Awaitable[None]:
        """Send a piece of the body that is neither its first nor its last. Await the result before the next piece."""
        if self.flow.write_paused or self.disconnected or self.response_complete or not self.response_started:
            return self.send({"type": "http.response.body", "body": piece, "more_body": True})
        if piece and self._is_chunked and not self._head and not self._is_head_request:  # the most frequent case
            self._transport.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        else:
            self._write_body(piece, is_last=False)
        return self._is_sent

    async def _send_when_read(self, message: Message) -> None:
        await self.flow.drain()
        self._write(message)

    def _write(self, message: Message) -> None:
        kind = message["type"]
        if self.disconnected:
            return
        if not self.response_started:
            if kind != "http.response.start":
                raise RuntimeError(f"expected ASGI message 'http.response.start', not {kind!r}")
            self.response_started = True
            self.waiting_for_100_continue = False
            self._write_head(message["status"], message.get("headers", ()))
        elif not self.response_complete:
            if kind != "http.response.body":
                raise RuntimeError(f"expected ASGI message 'http.response.body', not {kind!r}")
            self._write_body(message.get("body", b""), is_last=not message.get("more_body", False))
        else:
            raise RuntimeError(f"unexpected ASGI message {kind!r}: the response is complete")

    def _write_head(self, status: int, headers: Sequence[Header]) -> None:
        lines = [b"%b: %b\r\n" % header for header in (*self._default_headers, *headers)]
        length: bytes | None = None
        says_close = False
        for name, value in headers:
            if name == b"content-length":
                length = value
            elif name == b"transfer-encoding":
                self._is_chunked = value.lower() == b"chunked"
            elif name == b"connection":
                says_close = b"close" in [token.strip() for token in value.lower().split(b",")]
        if says_close:
            self.keep_alive = False
        elif not self.keep_alive:
            lines.append(b"connection: close\r\n")
        scope = self.scope
        if scope["http_version"] == "1.0":
            self._left = None if length is None else int(length)
        elif length is not None:
            self._left = int(length)
        elif not self._is_chunked and not self._is_head_request and status not in _WITHOUT_BODY:
            self._is_chunked = True
            lines.append(b"transfer-encoding: chunked\r\n")
        block = b"".join(lines)
        if block.count(b"\n") != len(lines) or not _LINES.fullmatch(block):
            raise RuntimeError("invalid name or value of a response header")
        head = b"%b%b\r\n" % (STATUS_LINE[status], block)
        if self._is_head_request or not (self._left or self._is_chunked):
            self._transport.write(head)
            return
        self._head = head
        if self._is_chunked:  # the body of a stream may begin much later
            asyncio.get_running_loop().call_soon(self._write_pending_head)

    def _write_pending_head(self) -> None:
        head, self._head = self._head, b""
        if head and not self.disconnected:
            self._transport.write(head)

    def _write_body(self, body: bytes, *, is_last: bool) -> None:
        if self._is_head_request:
            self._left = 0
        elif self._is_chunked:
            chunk = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
            if is_last:
                chunk += b"0\r\n\r\n"
            if self._head and chunk:
                head, self._head = self._head, b""
                chunk = head + chunk
            if chunk:
                self._transport.write(chunk)
        else:
            if self._left is not None:
                self._left -= len(body)
                if self._left < 0:
                    raise RuntimeError("the response is longer than its content-length")
            head, self._head = self._head, b""
            self._transport.write(head + body)
        if is_last:
            if self._left:
                raise RuntimeError("the response is shorter than its content-length")
            self.response_complete = True
            self.message_event.set()
            if not self.keep_alive:
                self._close()
            self.on_response()

    async def _end_failed(self) -> None:
        """Answer with 500 if the app has not begun to answer. Otherwise close the connection."""
        if self.response_started:
            self._write_pending_head()
            self._close()
            return
        length = str(len(_FAILURE)).encode()
        headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", length)]
        await self.send(
            {"type": "http.response.start", "status": 500, "headers": [*headers, (b"connection", b"close")]}
        )
        await self.send({"type": "http.response.body", "body": _FAILURE})


def _do_nothing() -> None:
    pass
