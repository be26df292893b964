"""Request whose head is read once. starlette searches all headers for each that is asked for."""

from __future__ import annotations

from typing import Any

from starlette.datastructures import Headers, State
from starlette.requests import Request
from starlette.types import Receive, Scope, Send


class IndexedHeaders(Headers):
    """Headers in which a single value is found by an index. Of repeated headers the first counts, as in starlette."""

    def __init__(self, raw: list[tuple[bytes, bytes]]) -> None:
        super().__init__(raw=raw)
        self._first = dict(reversed(raw))

    def get(self, key: str, default: Any = None) -> Any:
        """Return the first value of a header, or `default`."""
        value = self._first.get(key.lower().encode("latin-1"))
        return default if value is None else value.decode("latin-1")


class IndexedRequest(Request):
    """Request with indexed headers. They and its state are plain attributes here, which are faster than properties."""

    headers = IndexedHeaders([])  # these two hide properties; each request has its own
    state = State()

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        super().__init__(scope, receive, send)
        self.headers = IndexedHeaders(scope["headers"])
        self.state = State(scope.setdefault("state", {}))
