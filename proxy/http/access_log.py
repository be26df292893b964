"""Access log and response times: an id for every request, one log line and the latency metrics."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from collections.abc import Awaitable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from proxy.telemetry.logs import ACCESS_LOGGER, client_request_id, request_id

logger = logging.getLogger(ACCESS_LOGGER)

OTHER = "other"
"""Metric label for all unknown paths, so that clients cannot create labels at will."""
CLIENT_IDS: Final = (b"x-request-id", b"x-client-request-id")
"""Headers in which a client may send its own request id. The first one present counts."""
ECHO: Final = b"x-client-request-id"
"""Header that returns the client's id. The proxy's own id is in x-request-id."""
_CLIENT_ID: Final = re.compile(rb"[!-~]{1,128}")
_KEY: Final = re.compile(rb"(?<![0-9A-Za-z])sk-[\w-]{4}")
"""Beginning of an API key as OpenAI, LiteLLM and `autotts keys new` make them."""
LEAST_KEY_BYTES: Final = 8
"""Length from which a token may be a key. Shorter ones are placeholders, such as `-`, which ids hold by chance."""
_KEY_HEADERS: Final = frozenset({b"authorization", b"x-api-key"})
UNLOGGED_PATHS = frozenset({"/health", "/ready", "/metrics"})
"""Paths that monitoring systems poll. Requests to them are not logged."""


def _holds_key(sent_id: bytes, headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Return whether a client's id looks like a key or holds the request's own, so that it must not be kept."""
    if _KEY.search(sent_id):
        return True
    tokens = (value.rpartition(b" ")[2] for name, value in headers if name in _KEY_HEADERS)
    return bool(sent_id) and any(
        token == sent_id or (len(token) >= LEAST_KEY_BYTES and token in sent_id) for token in tokens
    )


@dataclass
class LoggedEpisodes:
    """Episodes of a request, for its log line. The headers of streams and of aborted requests lack what they cost."""

    controller: str
    beta: float
    tokens: int = 0
    stops: set[str] = field(default_factory=set)

    def add(self, tokens: int, stop: str) -> None:
        """Add an ended episode."""
        self.tokens += tokens
        self.stops.add(stop)

    def facts(self) -> dict[str, Any]:
        """Return what the log line says of them."""
        stop = ",".join(sorted(self.stops))
        return {
            "applied": "true",
            "controller": self.controller,
            "beta": self.beta,
            "stop": stop,
            "tokens": self.tokens,
        }


class AccessLogMiddleware:
    """ASGI middleware that times and logs each request.

    `paths` lists the paths that get metric labels of their own. The service is read from the app's state.
    """

    def __init__(self, app: ASGIApp, paths: Collection[str]) -> None:
        self._app = app
        self._paths = frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id.set(f"req-{os.urandom(16).hex()}")  # the context variable of this request's task
        sent_id = client_id(scope["headers"])
        client_request_id.set("" if _holds_key(sent_id, scope["headers"]) else sent_id.decode())
        service = scope["app"].state.service
        service.tracer.continue_trace(scope["headers"])
        timing = _ResponseTiming(scope["path"] if scope["path"] in self._paths else OTHER, scope["method"])

        def sending(message: Message) -> Awaitable[None]:
            if sent_id and message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (ECHO, sent_id)]}
            timing.observe(message)
            return send(message)

        try:
            await self._app(scope, receive, sending)
        except asyncio.CancelledError:  # by a shutdown, which sends its own response unless one has begun
            if not timing.headers:
                timing.status = int(HTTPStatus.SERVICE_UNAVAILABLE)
                scope.setdefault("state", {})["error_code"] = "draining"
            raise
        finally:
            timing.finish(service.metrics, scope.get("state", {}))


def client_id(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return the request id that the client sent, or an empty value if it sent no valid one.

    Valid ids are printable ASCII of at most 128 bytes.
    """
    first_values: dict[bytes, bytes] = {}
    for name, value in headers:
        if name in CLIENT_IDS:
            first_values.setdefault(name, value)
    for name in CLIENT_IDS:
        if _CLIENT_ID.fullmatch(first_values.get(name, b"")):
            return first_values[name]
    return b""


class _ResponseTiming:
    """Status, headers and times of one response."""

    def __init__(self, path: str, method: str) -> None:
        self.path = path
        self.method = method
        self.status = int(HTTPStatus.INTERNAL_SERVER_ERROR)  # unless a response begins
        self.headers: dict[bytes, bytes] = {}
        self.started = time.perf_counter()
        self.first: float | None = None  # seconds until the first byte of the body
        self.last: float | None = None  # seconds until its last byte

    def observe(self, message: Message) -> None:
        """Record an ASGI message of the response."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = dict(message["headers"])
        elif message["type"] == "http.response.body":
            is_last = not message.get("more_body")
            if self.first is None or is_last:
                now = time.perf_counter() - self.started
                self.first = now if self.first is None else self.first
                self.last = now if is_last else None

    def finish(self, metrics: Any, state: Mapping[str, Any]) -> None:
        """Update the metrics and write the log line, with the key and the error's code in the request's `state`."""
        applied = self._header(b"x-tts-applied") or "false"
        is_streamed = self.headers.get(b"content-type", b"").startswith(b"text/event-stream")
        streamed = "true" if is_streamed else "false"
        labels = self.path, applied, streamed
        if self.first is not None:
            metrics.child(metrics.first_byte_seconds, *labels).observe(self.first)
        if self.last is not None:
            metrics.child(metrics.response_seconds, *labels).observe(self.last)
        if self.path in UNLOGGED_PATHS or not logger.isEnabledFor(logging.INFO):
            return
        fields = {
            "method": self.method,
            "path": self.path,
            "key": getattr(state.get("caller"), "key", "") or None,
            "status": self.status,
            "code": state.get("error_code"),
            "seconds": round(time.perf_counter() - self.started, 6),
            "first_byte_s": None if self.first is None else round(self.first, 6),
            "complete": self.last is not None,
            "applied": applied,
            "reason": self._header(b"x-tts-reason"),
            "controller": self._header(b"x-tts-controller"),
            "beta": _number(self._header(b"x-tts-beta")),
            "stop": self._header(b"x-tts-stop"),
            "tokens": state.get("passed_tokens", _number(self._header(b"x-tts-tokens"))),
        }
        episodes: LoggedEpisodes | None = state.get("episodes")
        if episodes is not None:
            fields |= episodes.facts()
        facts = {name: value for name, value in fields.items() if value is not None}
        logger.info("%s %s %s", self.method, self.path, self.status, extra={"facts": facts})

    def _header(self, name: bytes) -> str | None:
        value = self.headers.get(name)
        return None if value is None else value.decode("latin-1")


def _number(text: str | None) -> float | None:
    """Return a header's number, so that logs can be summed."""
    return None if text is None else float(text) if "." in text or "e" in text else int(text)
