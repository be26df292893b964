"""Every request on its way in and out: the name it has in the logs, how long its answer took, and a line about it."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Awaitable, Collection, Iterable
from http import HTTPStatus
from typing import Any, Final
from uuid import uuid4

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from proxy.telemetry.logs import ACCESS_LOGGER, client_request_id, request_id

logger = logging.getLogger(ACCESS_LOGGER)

OTHER = "other"
"""The path of requests to what there is not: clients may make up any number."""
CLIENT_IDS: Final = (b"x-request-id", b"x-client-request-id")
"""Headers in which a client may name its request; the first it sends counts."""
ECHO: Final = b"x-client-request-id"
"""The header in which that name comes back. The proxy's own id is in x-request-id."""
_CLIENT_ID: Final = re.compile(rb"[!-~]{1,128}")
UNTOLD = frozenset({"/health", "/ready", "/metrics"})
"""Asked by machines, all the time: no line tells of them."""


class AccessLogMiddleware:
    """An ASGI app around another, whose state holds the service. `paths` are those that are told apart."""

    def __init__(self, app: ASGIApp, paths: Collection[str]) -> None:
        self._app = app
        self._paths = frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id.set(f"req-{uuid4().hex}")  # of this task alone: every request has one
        named = client_id(scope["headers"])
        client_request_id.set(named.decode())
        service = scope["app"].state.service
        service.tracer.continue_trace(scope["headers"])
        passage = _Passage(scope["path"] if scope["path"] in self._paths else OTHER, scope["method"])

        def sending(message: Message) -> Awaitable[None]:
            if named and message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (ECHO, named)]}
            passage.see(message)
            return send(message)

        try:
            await self._app(scope, receive, sending)
        finally:
            passage.end(service.metrics)


def client_id(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return the client's id of its request, from the first header that has a fit value. Empty if none has.

    Printable ASCII of 128 bytes at most is fit.
    """
    given = dict(reversed([*headers]))
    named = (given[name] for name in CLIENT_IDS if name in given)
    return next((value for value in named if _CLIENT_ID.fullmatch(value)), b"")


class _Passage:
    """One request's."""

    def __init__(self, path: str, method: str) -> None:
        self.path = path
        self.method = method
        self.status = int(HTTPStatus.INTERNAL_SERVER_ERROR)  # if it ends before it has begun
        self.headers: dict[bytes, bytes] = {}
        self.started = time.perf_counter()
        self.first: float | None = None  # seconds to the body's first byte
        self.last: float | None = None

    def see(self, message: Message) -> None:
        """Take notice of a part of the response."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = dict(message["headers"])
        elif message["type"] == "http.response.body":
            now = time.perf_counter() - self.started
            if self.first is None:
                self.first = now
            if not message.get("more_body"):
                self.last = now

    def end(self, metrics: Any) -> None:
        """Tell of it: to the metrics, if it came to its end, and the log."""
        applied = self._header(b"x-tts-applied") or "false"
        streamed = str((self._header(b"content-type") or "").startswith("text/event-stream")).lower()
        labels = self.path, applied, streamed
        if self.first is not None:
            metrics.first_byte_seconds.labels(*labels).observe(self.first)
        if self.last is not None:
            metrics.response_seconds.labels(*labels).observe(self.last)
        if self.path in UNTOLD or not logger.isEnabledFor(logging.INFO):
            return
        known = {
            "method": self.method,
            "path": self.path,
            "status": self.status,
            "seconds": round(time.perf_counter() - self.started, 6),
            "first_byte_s": None if self.first is None else round(self.first, 6),
            "complete": self.last is not None,
            "applied": applied,
            "reason": self._header(b"x-tts-reason"),
            "controller": self._header(b"x-tts-controller"),
            "beta": self._header(b"x-tts-beta"),
            "stop": self._header(b"x-tts-stop"),
            "tokens": self._header(b"x-tts-tokens"),
        }
        facts = {name: value for name, value in known.items() if value is not None}
        logger.info("%s %s %s", self.method, self.path, self.status, extra={"facts": facts})

    def _header(self, name: bytes) -> str | None:
        value = self.headers.get(name)
        return None if value is None else value.decode("latin-1")
