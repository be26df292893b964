"""Map every exception to an error response in OpenAI's format."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from difflib import get_close_matches
from http import HTTPStatus
from typing import Final

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from proxy import errors
from proxy.api.response_headers import current_request_id
from proxy.errors import (
    ApiError,
    BadRequest,
    Forbidden,
    LimitsAway,
    NotFound,
    RecordsAway,
    TooMany,
    Unauthorised,
    UpstreamError,
)
from proxy.http.sse import ClientDisconnected
from proxy.passthrough.forward import UNSERVED_PATHS

GENERATION_PATHS: Final = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"})
"""Paths whose requests generate."""
CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that disconnected. It appears in the access log only."""
NEAR = 0.9
"""Similarity of an unknown path to a served one, from 0 to 1, from which that one is suggested."""


class ErrorResponses:
    """Turn exceptions into responses. `paths` lists the served paths, which are suggested for unknown ones."""

    def __init__(self, paths: Collection[str]) -> None:
        self._paths = [path for path in paths if path.startswith("/v1/")]

    async def respond(self, request: Request, error: Exception) -> Response:
        """Return the response to a request that failed with `error`."""
        if isinstance(error, ApiError):
            return self._api_error(request, error)
        if isinstance(error, HTTPException):
            return self._http_error(request, error)
        if isinstance(error, ClientDisconnected):
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        internal = errors.internal_error()
        request.state.error_code = internal.code
        return JSONResponse(errors.body(internal), internal.status, {"x-request-id": current_request_id()})

    def _api_error(self, request: Request, error: ApiError) -> Response:
        if outcome := _outcome(error):
            request.app.state.service.metrics.requests.labels("", "", outcome).inc()
        if isinstance(error, UpstreamError) and request.scope["path"] in GENERATION_PATHS:
            request.app.state.service.metrics.count_early_failure(error)
        request.state.error_code = error.code  # for the access log
        headers = {"x-request-id": current_request_id(), **error.headers}
        if error.spent:  # a retry by the client would pay for every branch again
            headers |= {"x-should-retry": "false", "x-tts-tokens": str(error.spent)}
        return JSONResponse(errors.body(error), error.status, headers)

    def _http_error(self, request: Request, error: HTTPException) -> Response:
        """Return the response to a path or method that is not served."""
        path, is_missing = request.url.path, error.status_code == HTTPStatus.NOT_FOUND
        with suppress(Unauthorised):  # for the access log
            request.state.caller = request.app.state.service.authenticator.identify(request)
        message = f"{request.method} {path}: {error.detail}"
        if is_missing and (instead := UNSERVED_PATHS.get(path)):
            message = f"{request.method} {path} is not served: {instead}"
        elif is_missing and (suggestion := self._suggested_path(path)):
            message = f"{message}; did you mean {suggestion}? A client's base URL ends in /v1"
        elif is_missing:
            message = f"{message}; /docs lists the paths that are served"
        headers = {**(error.headers or {}), "x-request-id": current_request_id()}
        shown: ApiError = NotFound(message, code="not_found") if is_missing else BadRequest(message)
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            allowed = " or ".join(sorted(set((error.headers or {}).get("Allow", "").split(", ")) - {"HEAD"}))
            shown = BadRequest(f"{message}; send {allowed}", code="method_not_allowed")
        request.state.error_code = shown.code
        return JSONResponse(errors.body(shown), error.status_code, headers)

    def _suggested_path(self, path: str) -> str | None:
        """Return the endpoint that a client with a wrong base URL probably means, or None.

        Such paths lack /v1, have it twice, or begin with the path of another server
        (`/openai/deployments/NAME/chat/completions`).
        """
        with_version = f"/v1/{path.strip('/')}"
        while with_version.startswith("/v1/v1/"):
            with_version = with_version.removeprefix("/v1")
        if with_version.startswith("/v1/models/") and with_version != path:
            return with_version
        candidates = [served for served in self._paths if with_version.endswith(served.removeprefix("/v1"))]
        candidates = candidates or get_close_matches(with_version, self._paths, 1, NEAR)
        suggestion = max(candidates, key=len, default=path)
        return None if suggestion == path else suggestion


def _outcome(error: ApiError) -> str:
    """Return the outcome label under which `error` is counted; empty if it is counted elsewhere."""
    if error.is_counted or isinstance(error, TooMany | RecordsAway | LimitsAway):
        return ""
    if isinstance(error, Unauthorised | Forbidden):
        return "denied"
    return "failed" if error.status >= HTTPStatus.INTERNAL_SERVER_ERROR else "refused"
