"""The gate in front of the app: what runs is counted, once it is shut nothing new runs, and what fails is logged."""

from __future__ import annotations

import asyncio
import json
import logging
import traceback
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

logger = logging.getLogger(__name__)

STILL_SERVED: Final = ("/health", "/metrics")
"""What is answered to the end."""
READY: Final = "/ready"
CUT_S: Final = 5.0
"""Seconds that requests which were cut are given to end in order."""


class _Passage:
    """One request on its way through a gate."""

    __slots__ = ("is_cut",)

    def __init__(self) -> None:
        self.is_cut = False  # the gate cancels it


_passage: ContextVar[_Passage | None] = ContextVar("passage", default=None)


def is_cut_by_shutdown() -> bool:
    """Whether the request that is served here is cancelled because the proxy ends, not because its client has left."""
    passage = _passage.get()
    return passage is not None and passage.is_cut


def shutting_down_error() -> ShuttingDownError:
    """What a client is told that asks too late, or whose request was cut."""
    return ShuttingDownError("the proxy is about to end; ask again, it or another will answer", code="draining")


class ShutdownMiddleware:
    """An ASGI app around another."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.is_shut = False
        self._running: dict[asyncio.Task[Any], _Passage] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    def shut(self) -> None:
        """Refuse all that comes from now on."""
        self.is_shut = True

    async def drain(self, seconds: float) -> int:
        """Wait `seconds` at most until nothing runs any more. Cut what runs then; returns how many requests that is."""
        try:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), seconds)
        finally:  # whoever does not wait for it has the server cut them
            for passage in self._running.values():
                passage.is_cut = True
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
        passage = self._running[task] = _Passage()
        _passage.set(passage)
        self._idle.clear()
        try:
            await self.app(scope, receive, sending)
        except asyncio.CancelledError:
            if has_begun or not self.is_shut:
                raise
            await _refusal(scope)(scope, receive, send)
        except Exception as error:  # the client has been told; uvicorn would log its words, which may be a client's
            frames = "".join(traceback.format_tb(error.__traceback__))
            logger.error("a fault of the proxy's own: %s\n%s", type(error).__name__, frames)
        finally:
            del self._running[task]
            if not self._running:
                self._idle.set()


def _refusal(scope: Scope) -> Response:
    error: ApiError = shutting_down_error()
    told = {"ready": False, "draining": True} if scope["path"] == READY else errors.body(error)
    headers = {**error.headers, "x-request-id": f"req-{uuid4().hex}"}
    if named := client_id(scope.get("headers", ())):
        headers[ECHO.decode()] = named.decode()
    return Response(json.dumps(told), HTTPStatus.SERVICE_UNAVAILABLE, headers, "application/json")
