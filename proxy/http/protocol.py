"""HTTP/1.1 protocol of one connection: uvicorn's httptools protocol, made stricter.

llhttp refuses request smuggling by framing: two lengths, a length beside chunks, an encoding that does not end in
`chunked`, folded headers and bare line feeds. It does not refuse the following, so this module does:

- absolute targets and targets with `..`, no Host header or several, HTTP/0.9 and HTTP/2.0;
- heads of any size, trailers that are treated as headers, bodies that take for ever;
- a response that overtakes the response to an earlier request.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import Any, Final, NamedTuple
from urllib.parse import unquote

import httptools
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from proxy.errors import ApiError, BadRequest, TooManyConnections, TooSlow
from proxy.http.connections import Connections
from proxy.http.flow_control import WriteTimeoutFlow
from proxy.http.request_head import (
    METHODS,
    MOST_HEAD_BYTES,
    MOST_HEADERS,
    check_head,
    head_too_large,
    redacted_path,
    serialise_head,
    without_upgrade,
)
from proxy.http.response_cycle import FAULTS, ResponseCycle, error_response
from proxy.tested_versions import has_tested_internals

logger = logging.getLogger(__name__)

MOST_WAITING: Final = 16
"""Maximum number of pipelined requests that wait for a response. A connection with more is closed after them."""
MOST_PIECES: Final = 4096
"""Pieces in which a body may arrive, whatever their size. Each piece costs time."""
LEAST_PIECE: Final = 32
"""Average bytes per piece that a body of more than MOST_PIECES pieces must have."""
BODY_GRACE_S: Final = 20.0
"""Seconds after the head before the minimum rate applies to a body."""
LINGER_S: Final = 2.0
"""Seconds for which input is read and dropped after an early response, so that the client can read the response."""


class Stage(Enum):
    """Part of a request that is being read."""

    IDLE = 0  # nothing has begun
    HEAD = 1
    BODY = 2


class ConnectionLimits(NamedTuple):
    """Time limits for the parts of an HTTP exchange."""

    head_s: float = 10.0  # for a head to arrive in full
    body_s: float = 300.0  # for a body to arrive in full
    body_rate: int = 1024  # minimum bytes per second of a body on average, after BODY_GRACE_S
    write_s: float = 60.0  # for a client to read pending response bytes


class ProtocolContext(NamedTuple):
    """State that all connections of one server share."""

    limits: ConnectionLimits
    connections: Connections
    on_event: Callable[[str], object]  # called with "slow" or "unread" when a connection is closed for that


class HttpProtocol(HttpToolsProtocol):
    """HTTP/1.1 protocol of one connection."""

    def __init__(self, *args: Any, context: ProtocolContext, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.logger = FAULTS
        self._limits = context.limits
        self._table = context.connections
        self._on_event = context.on_event
        self._cycles: list[ResponseCycle] = []  # possibly unanswered, in order
        self._is_sent = asyncio.Future[None](loop=self.loop)  # of every message of a response that is written at once
        self._is_sent.set_result(None)
        self._stage = Stage.IDLE
        self._bytes_since_progress = 0  # bytes since the parser last completed anything
        self._is_deaf = False  # drop further input
        self._offers_upgrade = False  # the current head offers a protocol upgrade
        self._is_closing = False  # send no further answers
        self._parse_error: ApiError | None = None  # in the message that is being read
        self._timer: asyncio.TimerHandle | None = None
        self._is_parsing = False  # timers start once all input has been parsed: most of them would end at once
        self._next_timer: tuple[float | None, Callable[[], object] | None] | None = None
        self._body_began = 0.0  # by the loop's clock
        self._body_bytes = 0
        self._pieces = 0  # of the body so far

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = WriteTimeoutFlow(transport, self._limits.write_s, self._give_up)
        if self._table.admit(self, self.client[0] if self.client else ""):
            self._wait(self._limits.head_s)
        else:
            transport.write(error_response(_table_full_error()))
            self._close_transport()

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait(None)
        self._table.leave(self)
        for cycle in self._unanswered():  # uvicorn notifies only the last one
            cycle.disconnected = True
            cycle.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_deaf:
            return
        self._bytes_since_progress += len(data)
        self._unset_keepalive_if_required()
        self._is_parsing = True
        if self._stage is Stage.IDLE and self._timer is None:
            self._wait(self._limits.head_s)
        try:
            while data and not self._is_deaf:
                data = self._feed(data)
        except httptools.HttpParserError:
            self._refuse(self._parse_error or BadRequest("the request is not well-formed HTTP/1.1", code="bad_http"))
        finally:
            self._is_parsing = False
        if not self._is_deaf and self._bytes_since_progress > MOST_HEAD_BYTES:
            self._refuse(head_too_large())
        if self._next_timer is not None:
            self._wait(*self._next_timer)

    def evict(self) -> None:
        """Close the connection at once and refuse the request that is being read, if any."""
        if self._stage is Stage.HEAD or self._withdraw_request():
            self.transport.write(error_response(_table_full_error()))
        self._close_transport()

    def _feed(self, data: bytes) -> bytes:
        """Parse `data`. Return the input to parse next: a head with an upgrade offer, without the offer.

        After an offer the parser would treat the upgrade as accepted and not parse the request's body.
        """
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            self._offers_upgrade = False
            version, method = self.parser.get_http_version(), self.parser.get_method()
            head = serialise_head(method, self.url, version, without_upgrade(self.headers))
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            return head + data[offer.args[0] :]
        return b""

    # Parser callbacks

    def on_message_begin(self) -> None:
        self._stage = Stage.HEAD
        self._bytes_since_progress = 0
        self._wait(self._limits.head_s)
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._stage is not Stage.HEAD:  # ignore trailers: the head has been checked already
            return
        if len(self.headers) == MOST_HEADERS:
            self._parse_error = head_too_large()
            raise self._parse_error
        name = name.lower()
        if name == b"expect":
            self.expect_100_continue = value.lower() == b"100-continue"
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        parser = self.parser
        version, method = parser.get_http_version(), parser.get_method()
        try:
            check_head(version, method, self.url, self.headers)
        except ApiError as error:
            self._parse_error = error
            raise
        self._bytes_since_progress = 0
        if parser.should_upgrade():
            self._offers_upgrade = True
            return
        cycle = self._begin_cycle(version, method)
        self._stage = Stage.BODY
        self._body_began, self._body_bytes, self._pieces = self.loop.time(), 0, 0
        self._wait(min(BODY_GRACE_S, self._limits.body_s))
        self._cycles = [*self._unanswered(), cycle]
        if len(self._cycles) == 1:
            self._start_asgi_task(cycle, self.app)  # type: ignore[arg-type]
            return
        self.pipeline.appendleft((cycle, self.app))  # type: ignore[arg-type]
        self.flow.resume_reading()  # otherwise a disconnect would not be noticed
        if len(self._cycles) > MOST_WAITING:
            self._end()

    def _begin_cycle(self, version: str, method: bytes) -> ResponseCycle:
        """Complete the scope of the current request, and return the request with its response."""
        raw_path, _, query = self.url.partition(b"?")
        path = raw_path.decode("ascii")
        scope: dict[str, Any] = self.scope  # type: ignore[assignment]
        scope["method"] = method.decode("ascii")
        scope["http_version"] = version
        scope["path"] = unquote(path) if "%" in path else path
        scope["raw_path"] = raw_path
        scope["query_string"] = query
        cycle = self.cycle = ResponseCycle(  # type: ignore[assignment]
            scope,
            self.transport,
            self.flow,
            default_headers=self.server_state.default_headers,
            expects_continue=self.expect_100_continue,
            keep_alive=version != "1.0" and self.parser.should_keep_alive(),
            is_sent=self._is_sent,
            on_response=self.on_response_complete,
            close=self._finish,
        )
        return cycle

    def on_body(self, body: bytes) -> None:
        self._bytes_since_progress = 0
        self._body_bytes += len(body)
        self._pieces += 1
        if self._pieces > MOST_PIECES and self._body_bytes < LEAST_PIECE * self._pieces:
            problem = f"the body arrives in pieces of less than {LEAST_PIECE} bytes; send larger ones"
            self._parse_error = BadRequest(problem, code="bad_http")
            raise self._parse_error
        cycle = self.cycle
        if not cycle.response_complete:
            cycle.body += body
            if len(cycle.body) > HIGH_WATER_LIMIT:
                self.flow.pause_reading()
            cycle.message_event.set()

    def on_message_complete(self) -> None:
        if self._offers_upgrade:
            return
        self._stage = Stage.IDLE
        self._bytes_since_progress = 0
        self._wait(None)
        cycle = self.cycle
        if not cycle.response_complete:
            cycle.more_body = False
            cycle.message_event.set()
            self._table.serve(self)

    def on_response_complete(self) -> None:
        if self._stage is Stage.BODY and self.cycle.response_complete:  # answered before the body was complete
            self._wait(LINGER_S, self._close)  # a client that sends the rest soon may keep the connection
        if self._is_closing:
            self.server_state.total_requests += 1
            return
        super().on_response_complete()
        if all(cycle.more_body for cycle in self._unanswered()):
            self._table.wait(self)

    def timeout_keep_alive_handler(self) -> None:
        self._close_transport()

    # Refusals

    def _refuse(self, error: ApiError) -> None:
        """Answer the current request with `error`, after all earlier ones, unless it is answered already."""
        logger.warning("refused %s: %s (%s)", self._describe_request(), error.message, error.code)
        if self._stage is Stage.BODY and self.cycle.response_complete:
            self._close()
            return
        self._withdraw_request()
        self._cycles = self._unanswered()
        if self._cycles:
            self._end()
        else:
            self.transport.write(error_response(error))
            self._close()

    def _describe_request(self) -> str:
        """Describe the current request for the log: method and path, as far as they are known, and sender."""
        host, port = self.client or ("unknown", 0)
        sender = f"from {host}:{port}"
        if self._stage is Stage.IDLE or not self.url:
            return f"a request {sender}"
        method = self.parser.get_method().decode("latin-1")
        return f"{method if method in METHODS else '…'} {redacted_path(self.url)} {sender}"

    def _withdraw_request(self) -> bool:
        """Withdraw the request that is being read from the app. Return False if none is or its response has begun."""
        if self._stage is not Stage.BODY or self.cycle.response_started:
            return False
        self.cycle.disconnected = True  # the app sees a disconnect
        self.cycle.message_event.set()
        self._cycles.remove(self.cycle)  # type: ignore[arg-type]
        if self._unanswered():
            self.pipeline.popleft()
        return True

    def _unanswered(self) -> list[ResponseCycle]:
        return [cycle for cycle in self._cycles if not cycle.response_complete]

    def _end(self) -> None:
        """Stop reading, and close the connection once all requests are answered."""
        self._is_deaf = True
        self._wait(None)
        if self._cycles:
            self._cycles[-1].keep_alive = False

    def _finish(self) -> None:
        """Close the connection after its last answer."""
        if self._stage is Stage.BODY:
            self._close()
        else:
            self._close_transport()

    def _close(self) -> None:
        """Close the connection, but leave the client time to read the answer."""
        self._is_deaf = self._is_closing = True
        self.flow.resume_reading()
        self._unset_keepalive_if_required()
        if not self.transport.is_closing():
            if self.transport.can_write_eof():
                self.transport.write_eof()
            self._wait(LINGER_S, self._close_transport)

    def _close_transport(self) -> None:
        """Close the connection once everything is sent, or abort it after `write_s` seconds."""
        self._is_deaf = self._is_closing = True
        self.transport.close()
        self._wait(self._limits.write_s, self.transport.abort)

    def _give_up(self) -> None:
        """Abort a connection whose client does not read its answer. The app sees a disconnect."""
        logger.info("closed a connection: the client has read nothing for %g s", self._limits.write_s)
        self._on_event("unread")
        self.transport.abort()

    # Time

    def _wait(self, seconds: float | None, then: Callable[[], object] | None = None) -> None:
        """Replace the timer: call `then`, or `_on_timeout`, after `seconds`; None only cancels it."""
        if self._is_parsing:
            self._next_timer = (seconds, then)
            return
        self._next_timer = None
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, then or self._on_timeout)

    def _on_timeout(self) -> None:
        self._timer = None
        if self._stage is Stage.IDLE:
            if not self._unanswered():
                self._close_transport()
        elif self._stage is Stage.HEAD:
            self._refuse_slow(f"the request head took longer than {self._limits.head_s:g} s")
        elif self.flow.read_paused or self.cycle.waiting_for_100_continue:  # the app is slow, not the client
            self._body_began, self._body_bytes = self.loop.time(), 0
            self._wait(min(BODY_GRACE_S, self._limits.body_s))
        else:
            self._check_body()

    def _check_body(self) -> None:
        """Refuse a body that takes too long or arrives too slowly, or set a timer for when it would."""
        limits, passed = self._limits, self.loop.time() - self._body_began
        allowed = limits.body_s
        if limits.body_rate:
            allowed = min(allowed, BODY_GRACE_S + self._body_bytes / limits.body_rate)
        if passed < allowed:
            self._wait(allowed - passed)
        elif allowed >= limits.body_s:
            self._refuse_slow(f"the body took longer than {limits.body_s:g} s")
        else:
            slow = f"{self._body_bytes} bytes in {passed:.0f} s"
            self._refuse_slow(f"the body came too slowly: {slow}; at least {limits.body_rate} bytes/s are required")

    def _refuse_slow(self, message: str) -> None:
        self._on_event("slow")
        self._refuse(TooSlow(message, code="too_slow"))


def _table_full_error() -> TooManyConnections:
    return TooManyConnections("too many connections are open; retry", code="too_many_connections")


def protocol_class(context: ProtocolContext) -> Callable[..., asyncio.Protocol]:
    """Return the protocol for `uvicorn.Config`: uvicorn's own if the installed uvicorn was not tested."""
    return partial(HttpProtocol, context=context) if has_tested_internals("uvicorn") else HttpToolsProtocol
