"""What a connection may send: one well-formed request after the other, within bounds, and each is answered once.

uvicorn's httptools protocol, made stricter. llhttp refuses what smuggles by framing (two lengths, a length beside
chunks, an encoding that does not end in `chunked`, folded headers, bare line feeds), but a target may be absolute or
climb, hosts may be many or none, versions 0.9 and 2.0 pass, heads have no bound, trailers are taken for headers, and
what follows a request may be answered before it. Here none of that reaches the app.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Sequence
from enum import Enum
from typing import Final
from urllib.parse import unquote
from uuid import uuid4

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from proxy import errors
from proxy.errors import ApiError, BadRequest, HeadTooLarge, TooSlow

logger = logging.getLogger(__name__)

Headers = Sequence[tuple[bytes, bytes]]

MOST_HEADERS: Final = 100
MOST_HEAD_BYTES: Final = 32 * 2**10
"""Of a request's first line and headers together."""
MOST_WAITING: Final = 16
"""Requests that may be sent before the first of them is answered; a connection that sends more is closed then."""
HEAD_S: Final = 10.0
"""Seconds a head may take to arrive."""
BODY_S: Final = 60.0
"""Seconds between two pieces of a body."""
MOST_DROPPED: Final = 16 * 2**20
"""Bytes of a body that are read after its request has been answered, so that the client comes to read the answer."""
LINGER_S: Final = 1.0
"""Seconds in which what a refused client still sends is read and dropped: closing at once could cost it the answer."""

ONCE: Final = (b"authorization", b"content-type", b"content-length", b"transfer-encoding", b"expect")
"""Headers that mean something here, so nobody on the way may understand another one of them."""
ENCODED: Final = ("/v1/models/", "/v1/tts/requests/")
"""Below these a path ends in a name, which may be percent-encoded. Nowhere else is there a reason to."""

_TARGET: Final = re.compile(rb"/[!-~]*")
_PATH: Final = re.compile(r"(?:/[A-Za-z0-9._~@:!$&'()*+,;=-]*)+")
_NAME: Final = re.compile(r"(?:[A-Za-z0-9._~@:!$&'()*+,;=/-]|%[0-9A-Fa-f]{2})+")
_HOST: Final = re.compile(rb"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::[0-9]{1,5})?")


def check_head(version: str, target: bytes, headers: Headers) -> None:
    """Raise BadRequest unless a request's head means one thing to everybody."""
    if len(headers) > MOST_HEADERS or len(target) + sum(len(n) + len(v) + 4 for n, v in headers) > MOST_HEAD_BYTES:
        raise _too_large()
    names = [name for name, _ in headers]
    if version not in ("1.0", "1.1"):
        raise BadRequest("this is no HTTP/1.1", code="bad_version")
    if version == "1.0" and b"transfer-encoding" in names:
        raise BadRequest("HTTP/1.0 has no transfer-encoding", param="transfer-encoding", code="bad_header")
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) != 1 or not _HOST.fullmatch(hosts[0]):
        raise BadRequest("a request must have one Host header, a name and a port", param="host", code="bad_host")
    for name in ONCE:
        if names.count(name) > 1:
            raise BadRequest(f"{name.decode()} is given more than once", param=name.decode(), code="bad_header")
    check_target(target)


def check_target(target: bytes) -> None:
    """Raise BadRequest unless `target` is a path, with or without a query, that can be read in one way only."""
    if not _TARGET.fullmatch(target) or b"#" in target:
        raise BadRequest("the target must be a path; this is no forward proxy", code="bad_target")
    if not _is_plain(target.partition(b"?")[0].decode()):
        raise BadRequest("the path has empty, dotted or encoded parts; send it plain", code="bad_path")


def _is_plain(path: str) -> bool:
    below = next((prefix for prefix in ENCODED if path.startswith(prefix)), None)
    if below is None:
        is_spelt_well = _PATH.fullmatch(path) is not None
    else:
        name = path.removeprefix(below)
        path = below + unquote(name, errors="replace")
        is_spelt_well = bool(_NAME.fullmatch(name)) and path.isprintable() and not {"\\", "\ufffd"} & set(path)
    return is_spelt_well and (path == "/" or not {"", ".", ".."} & set(path[1:].split("/")))


def answer(error: ApiError) -> bytes:
    """The whole response to a request that no app sees, after which the connection closes."""
    content = json.dumps(errors.body(error)).encode()
    head = (
        f"HTTP/1.1 {error.status.value} {error.status.phrase}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(content)}\r\nx-request-id: req-{uuid4().hex}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + content


def _too_large() -> HeadTooLarge:
    most = f"{MOST_HEADERS} headers and {MOST_HEAD_BYTES} bytes"
    return HeadTooLarge(f"the head of a request may have {most}", code="head_too_large")


class Stage(Enum):
    """What is being read."""

    IDLE = 0  # nothing has begun
    HEAD = 1
    BODY = 2


_FAULTS: Final = logging.getLogger("uvicorn.error.edge")
"""Hears of faults alone: that a request was refused, which uvicorn says without a reason, is told here with one."""
_FAULTS.setLevel(logging.ERROR)


class EdgeProtocol(HttpToolsProtocol):
    """One connection."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._cycles: list[RequestResponseCycle] = []  # not answered, as far as is known, in order
        self._stage = Stage.IDLE
        self._loose = 0  # bytes that came since anything was made of them
        self._dropped = 0  # bytes of a body that came after its answer
        self._is_deaf = False  # whatever else comes is dropped
        self._wrong: ApiError | None = None  # with what is being read
        self._timer: asyncio.TimerHandle | None = None
        self.logger = _FAULTS
        super().connection_made(transport)
        self._wait(HEAD_S)

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait(None)
        for cycle in self._unanswered():  # uvicorn tells only the last one
            cycle.disconnected = True
            cycle.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_deaf:
            return
        if self._stage is Stage.IDLE and self._timer is None:
            self._wait(HEAD_S)
        self._loose += len(data)
        super().data_received(data)
        if not self._is_deaf and self._loose > MOST_HEAD_BYTES:
            self._refuse(_too_large())

    # What the parser finds

    def on_message_begin(self) -> None:
        self._stage = Stage.HEAD
        self._loose = self._dropped = 0
        self._wait(HEAD_S)
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._stage is not Stage.HEAD:  # a trailer: whatever it says, the head has been judged
            return
        if len(self.headers) == MOST_HEADERS:
            self._wrong = _too_large()
            raise self._wrong
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        try:
            check_head(self.parser.get_http_version(), self.url, self.headers)
        except ApiError as error:
            self._wrong = error
            raise
        self._stage = Stage.BODY
        self._loose = 0
        self._cycles = self._unanswered()
        super().on_headers_complete()
        self._cycles.append(self.cycle)
        if len(self._cycles) > 1:
            self.flow.resume_reading()  # else nobody would notice the client leaving
        if len(self._cycles) > MOST_WAITING:
            self._end()
        self._wait(BODY_S)

    def on_body(self, body: bytes) -> None:
        self._loose = 0
        self._wait(BODY_S)
        super().on_body(body)
        if self.cycle.response_complete:
            self._dropped += len(body)
            if self._dropped > MOST_DROPPED:
                self._close()

    def on_message_complete(self) -> None:
        self._stage = Stage.IDLE
        self._loose = 0
        self._wait(None)
        super().on_message_complete()

    def _unsupported_upgrade_warning(self) -> None:
        """The request is answered in HTTP/1.1; what follows it was meant for another protocol."""
        self._end()

    # Refusals

    def send_400_response(self, msg: str) -> None:
        """The parser, or what it called, refuses what it has read."""
        self._refuse(self._wrong or BadRequest("this is not HTTP/1.1 as it should be", code="bad_http"))

    def _refuse(self, error: ApiError) -> None:
        """Answer what is being read with `error` unless it is answered already, after all that came before it."""
        logger.warning("a request was refused: %s", error.code)
        before = self._unanswered()
        if self._stage is Stage.BODY:
            if self.cycle.response_complete:
                self._close()
                return
            if not self.cycle.response_started:
                before.pop()
                self.cycle.disconnected = True  # as the app is told
                self.cycle.message_event.set()
                if before:
                    self.pipeline.popleft()
        if before:
            self._cycles = before
            self._end()
        else:
            self.transport.write(answer(error))
            self._close()

    def _unanswered(self) -> list[RequestResponseCycle]:
        return [cycle for cycle in self._cycles if not cycle.response_complete]

    def _end(self) -> None:
        """Read no more, and close the connection once everything that was asked is answered."""
        self._is_deaf = True
        self._wait(None)
        if self._cycles:
            self._cycles[-1].keep_alive = False

    def _close(self) -> None:
        self._is_deaf = True
        self._wait(None)
        if not self.transport.is_closing():
            if self.transport.can_write_eof():
                self.transport.write_eof()
            self.loop.call_later(LINGER_S, self.transport.close)

    def _wait(self, seconds: float | None) -> None:
        """Refuse what is being read if nothing comes of it in so many seconds."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, self._late)

    def _late(self) -> None:
        self._timer = None
        if self._stage is Stage.IDLE:
            if not self._unanswered():
                self.transport.close()
        elif self._stage is Stage.BODY and (self.flow.read_paused or self.cycle.waiting_for_100_continue):
            self._wait(BODY_S)  # it is the app that is late
        else:
            self._refuse(TooSlow("the request did not come to its end", code="too_slow"))
