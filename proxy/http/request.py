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

    def getlist(self, key: str) -> list[str]:
        """Return all values of a header."""
        return super().getlist(key) if key.lower().encode("latin-1") in self._first else []


class PlainState(State):
    """State whose values are plain attributes. starlette's finds each by a failed search for an attribute."""

    __setattr__ = object.__setattr__  # type: ignore[assignment]
    __delattr__ = object.__delattr__

    def __init__(self, values: dict[str, Any]) -> None:
        """Create a state over `values`, which other states may share."""
        object.__setattr__(self, "__dict__", values)

    @property
    def _state(self) -> dict[str, Any]:  # type: ignore[override]
        return self.__dict__


class IndexedRequest(Request):
    """Request with indexed headers. They and its state are plain attributes here, which are faster than properties."""

    headers = IndexedHeaders([])  # these two hide properties; each request has its own
    state = PlainState({})

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        super().__init__(scope, receive, send)
        self.headers = IndexedHeaders(scope["headers"])
        self.state = PlainState(scope.setdefault("state", {}))
