"""Graceful shutdown: ASGI middleware that counts running requests and refuses new ones during a shutdown.

It also logs unhandled errors, but not their messages, because those may quote a client's data.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable
from contextlib import suppress
from contextvars import ContextVar
from http import HTTPStatus
from typing import Any, Final
from uuid import uuid4

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from proxy import errors
from proxy.errors import ApiError, ShuttingDownError
from proxy.http.access_log import ECHO, client_id
from proxy.telemetry.logs import log_fault

logger = logging.getLogger(__name__)

STILL_SERVED: Final = ("/health", "/metrics")
"""Paths that are served even during a shutdown."""
READY: Final = "/ready"
CUT_S: Final = 5.0
"""Seconds that cancelled requests have to clean up."""


class _RunningRequest:
    """A request that the app is serving."""

    __slots__ = ("is_cut",)

    def __init__(self) -> None:
        self.is_cut = False  # cancelled by the shutdown


_running_request: ContextVar[_RunningRequest | None] = ContextVar("running_request", default=None)


def is_cut_by_shutdown() -> bool:
    """Return whether the current request was cancelled by a shutdown rather than by its client disconnecting."""
    request = _running_request.get()
    return request is not None and request.is_cut


def shutting_down_error() -> ShuttingDownError:
    """Return the error for a request that arrives during a shutdown or is cancelled by it."""
    return ShuttingDownError("the server is shutting down; retry", code="draining")


class ShutdownMiddleware:
    """Wraps an ASGI app. `shut` begins a shutdown, and `drain` waits for the running requests."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.is_shut = False
        self._running: dict[asyncio.Task[Any], _RunningRequest] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    def shut(self) -> None:
        """Refuse new requests from now on."""
        self.is_shut = True

    async def drain(self, seconds: float) -> int:
        """Wait up to `seconds` for running requests, then cancel the rest. Returns how many were cancelled."""
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._idle.wait()
        finally:  # also if the drain itself is cancelled: the server then cancels the requests
            for request in self._running.values():
                request.is_cut = True
        cut = tuple(self._running)
        for task in cut:
            task.cancel()
        if cut:
            await asyncio.wait(cut, timeout=CUT_S)
        return len(cut)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in STILL_SERVED:
            await self.app(scope, receive, send)
        elif self.is_shut:
            await _refusal(scope)(scope, receive, send)
        else:
            await self._run(scope, receive, send)

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False

        def sending(message: Message) -> Awaitable[None]:
            nonlocal has_begun
            has_begun = True
            return send(message)

        task: asyncio.Task[Any] = asyncio.current_task()  # type: ignore[assignment]
        request = self._running[task] = _RunningRequest()
        _running_request.set(request)
        self._idle.clear()
        try:
            await self.app(scope, receive, sending)
        except asyncio.CancelledError:
            if has_begun or not self.is_shut:
                raise
            await _refusal(scope)(scope, receive, send)
        except Exception as error:  # the client got its response; uvicorn would log the message
            log_fault(logger, error)
        finally:
            del self._running[task]
            if not self._running:
                self._idle.set()


def _refusal(scope: Scope) -> Response:
    error: ApiError = shutting_down_error()
    content = {"ready": False, "draining": True} if scope["path"] == READY else errors.body(error)
    headers = {**error.headers, "x-request-id": f"req-{uuid4().hex}"}
    if sent_id := client_id(scope.get("headers", ())):
        headers[ECHO.decode()] = sent_id.decode()
    return Response(json.dumps(content), HTTPStatus.SERVICE_UNAVAILABLE, headers, "application/json")
