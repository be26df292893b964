"""Connection to an upstream: one request at a time, and the parser of its response.

aiohttp opens and closes the connection, so that names are resolved, TLS is negotiated and errors are raised as by its
session. In between, this protocol takes the place of aiohttp's. llhttp parses, as for aiohttp, and one call of the
parser serves all chunks that arrive together. This uses internals of aiohttp's connections.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final
from weakref import WeakSet

import aiohttp
import httptools
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from proxy.upstream.connections.content import ResponseContent

MAX_HEAD_BYTES: Final = 2**16
"""Maximum bytes of a response's head, of its trailers, and of anything else that is no body."""
MAX_FIELDS: Final = 128
"""Maximum number of header fields of a response."""
MAX_FIELD_BYTES: Final = 8190
"""Maximum bytes of the name and of the value of a header field."""
_INFORMATIONAL: Final = range(100, 200)
_SWITCHING_PROTOCOLS: Final = 101
_TRANSFER_ENCODINGS: Final = ("chunked", "identity")
_CLOSED: Final = "Connection closed"
_HANDED_BACK: Final = WeakSet[ResponseHandler]()
"""aiohttp's protocols of connections that have served a request and were returned to its pool."""


class PooledResponse:
    """Response whose body may still arrive. Its connection is free for another request when the body ends."""

    __slots__ = ("connection", "content", "headers", "status")

    def __init__(self, status: int, headers: dict[str, str], connection: UpstreamConnection) -> None:
        """`headers` have names in lower case."""
        self.status = status
        self.headers = headers
        self.content = ResponseContent(connection)
        self.connection: UpstreamConnection | None = connection  # until the body is complete

    @property
    def ok(self) -> bool:
        """Whether the status is below 400."""
        return self.status < 400

    @property
    def content_length(self) -> int | None:
        """Announced length of the body in bytes, if there is one. The parser accepts digits only."""
        length = self.headers.get("content-length")
        return None if length is None else int(length)

    @property
    def content_type(self) -> str:
        """Media type without parameters, in lower case."""
        return self.headers.get("content-type", "application/octet-stream").partition(";")[0].strip().lower()

    @property
    def is_until_close(self) -> bool:
        """Whether the body ends when the server closes the connection."""
        headers = self.headers
        return "content-length" not in headers and headers.get("transfer-encoding", "").lower() != "chunked"

    def release(self) -> None:
        """Close the connection if the body has not arrived completely. Otherwise it is free already."""
        connection, self.connection = self.connection, None
        if connection is not None:
            self.content.fail(aiohttp.ClientConnectionError(_CLOSED))
            connection.close()


class UpstreamConnection(asyncio.Protocol):
    """Open connection to an upstream."""

    def __init__(self, opened: Connection, give_back: Callable[[UpstreamConnection], None]) -> None:
        """Take over a connection that aiohttp has opened. Raises ServerDisconnectedError if it is not usable.

        `give_back` is called each time the connection is free for another request.
        """
        transport, handler = opened.transport, opened.protocol
        if transport is None or handler is None or transport.is_closing():
            raise aiohttp.ServerDisconnectedError
        self._early, handler._tail = handler._tail, b""  # a busy server may refuse a connection before any request
        if handler.should_close or (self._early and handler in _HANDED_BACK):  # those bytes answer no request
            raise aiohttp.ServerDisconnectedError
        self.free_since = 0.0  # by the loop's clock
        self._transport = transport
        self._opened = opened
        self._handler = handler  # aiohttp's protocol, which waits for the end of the connection
        self._give_back = give_back
        self._loop = asyncio.get_running_loop()
        self._head: asyncio.Future[PooledResponse] | None = None  # while a request awaits its response's head
        self._response: PooledResponse | None = None  # whose body arrives
        self._headers: dict[str, str] = {}
        self._pieces: list[bytes] = []  # of the body, from the data that is being parsed
        self._overhead = 0  # bytes since the request, or since the last piece of the body
        self._is_informational = False
        self._is_complete = True
        self._keeps_alive = True
        self._is_paused = False
        self.on_body = self._pieces.append
        self._parser = httptools.HttpResponseParser(self)
        self._parser.set_dangerous_leniencies(  # those of aiohttp
            lenient_headers=True, lenient_optional_cr_before_lf=True, lenient_spaces_after_chunk_size=True
        )
        transport.set_protocol(self)

    @property
    def is_open(self) -> bool:
        """Whether the connection can be used."""
        return not self._transport.is_closing()

    def send(self, request: bytes) -> asyncio.Future[PooledResponse]:
        """Send a request, and return a future of its response, with its body unread."""
        self._head = head = self._loop.create_future()
        self._headers = {}
        self._overhead = 0
        self._is_complete = False
        self._transport.write(request)
        if self._early:
            early, self._early = self._early, b""
            self.data_received(early)
        return head

    def expire(self, head: asyncio.Future[PooledResponse]) -> None:
        """End the wait for the head of a response, unless it has come, with the error that aiohttp uses for silence."""
        if self._head is head and not head.done():
            self._end(aiohttp.SocketTimeoutError("Timeout on reading data from socket"))

    def close(self) -> None:
        """Close the connection."""
        self._is_complete = True
        self._head = self._response = None
        self._opened.close()

    def hand_back(self) -> None:
        """Return the connection to the pool of aiohttp."""
        _HANDED_BACK.add(self._handler)
        self._transport.set_protocol(self._handler)
        self._opened.release()

    # Protocol

    def data_received(self, data: bytes) -> None:
        if self._is_complete:  # nothing was requested
            self.close()
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._keeps_alive = False  # for bytes that follow a complete response too
            if not self._is_complete:
                self._break(f"invalid HTTP: {error}")
                return
        pieces = self._pieces
        piece = b""
        if pieces:
            piece = pieces[0] if len(pieces) == 1 else b"".join(pieces)
            pieces.clear()
            self._overhead = 0
        response, is_complete, head = self._response, self._is_complete, self._head
        if head is not None and response is not None:
            self._head = None
            if head.done():  # nobody waits for the response, and the connection is about to be closed
                self._keeps_alive = False
            else:
                head.set_result(response)
        if is_complete:
            self._finish()
        elif not piece:
            self._overhead += len(data)
            if self._overhead > MAX_HEAD_BYTES:
                self._break("too many bytes of a head or of trailers")
            return
        if response is not None:
            response.content.feed(piece, is_complete)

    def connection_lost(self, exc: Exception | None) -> None:
        self._handler.connection_lost(exc)
        self._opened.close()
        if self._is_complete:
            return
        response = self._response
        if response is not None and exc is None and response.is_until_close:
            self._response = response.connection = None
            self._is_complete = True
            response.content.feed(b"", True)
        elif isinstance(exc, OSError):
            self._end(aiohttp.ClientOSError(*exc.args))
        else:
            self._end(aiohttp.ServerDisconnectedError())

    def pause_writing(self) -> None:
        self._handler.pause_writing()

    def resume_writing(self) -> None:
        self._handler.resume_writing()

    def pause_reading(self) -> None:
        """Read nothing until `resume_reading`."""
        if not self._is_paused and self.is_open:
            self._is_paused = True
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Read again, if it is paused."""
        if self._is_paused:
            self._is_paused = False
            if self.is_open:
                self._transport.resume_reading()

    # Parser callbacks

    def on_message_begin(self) -> None:
        if self._is_complete:
            raise ValueError("more than one response to a request")

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(name) > MAX_FIELD_BYTES or len(value) > MAX_FIELD_BYTES:
            raise ValueError("too long a header field")
        if self._response is None:  # trailers are ignored
            self._headers.setdefault(name.decode("latin-1").lower(), value.decode("latin-1").strip(" \t"))

    def on_headers_complete(self) -> None:
        headers, self._headers = self._headers, {}
        status = self._parser.get_status_code()
        if status in _INFORMATIONAL and status != _SWITCHING_PROTOCOLS:
            self._is_informational = True
            return
        if len(headers) > MAX_FIELDS:
            raise ValueError("too many header fields")
        encoding = headers.get("transfer-encoding")
        if encoding is not None and encoding.lower() not in _TRANSFER_ENCODINGS:
            raise ValueError(f"unsupported transfer-encoding {encoding[:40]!r}")
        self._keeps_alive = self._parser.should_keep_alive() and status != _SWITCHING_PROTOCOLS
        self._response = PooledResponse(status, headers, self)

    def on_message_complete(self) -> None:
        if self._is_informational:
            self._is_informational = False
        else:
            self._is_complete = True

    # Ends

    def _finish(self) -> None:
        """Free the connection: the response is complete."""
        response, self._response = self._response, None
        if response is not None:
            response.connection = None
        self.resume_reading()
        if not self._keeps_alive or self._transport.get_write_buffer_size():  # it has not read the whole request
            self.close()
        else:
            self._give_back(self)

    def _break(self, problem: str) -> None:
        """End the exchange, because the upstream breaks the protocol."""
        if self._head is None:
            self._end(aiohttp.ClientPayloadError(problem))
        else:
            nowhere = URL()
            request = aiohttp.RequestInfo(nowhere, "", CIMultiDictProxy(CIMultiDict()), nowhere)
            self._end(aiohttp.ClientResponseError(request, (), status=400, message=problem))
        self.close()

    def _end(self, error: Exception) -> None:
        """Raise an error to whoever waits for the response or its body."""
        self._is_complete = True
        head, self._head = self._head, None
        if head is not None:
            if not head.done():
                head.set_exception(error)
            return
        response, self._response = self._response, None
        if response is not None:
            response.connection = None
            if not isinstance(error, aiohttp.ClientPayloadError):
                error = aiohttp.ClientPayloadError(f"Response payload is not completed: {error!r}")
            response.content.fail(error)
