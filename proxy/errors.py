"""Errors of the proxy, and their format for clients.

ProxyError
├── SettingsError              settings are invalid
├── StartError                 the machine: a port is in use, or the embedded model does not start
└── ApiError                   sent to the client: status, type, code, param
    ├── BadRequest             400, invalid request; also HeadTooLarge, TooSlow, TooLarge, UnsupportedMedia
    ├── Unauthorised           401, the API key is missing or unknown
    ├── Forbidden              403, the caller lacks permission
    ├── NotFound               404, unknown model, path or request id
    ├── TooMany                429, a limit is exceeded
    ├── RecordsAway            503, the store is unavailable
    ├── LimitsAway             503, the shared limits are unavailable
    ├── TooManyConnections     503, too many connections are open
    ├── ShuttingDownError      503, the server is shutting down
    └── UpstreamError          502 by default, the upstream failed
        ├── UpstreamUnreachable    502, no connection to the upstream
        ├── UpstreamTimeout        504, no data in time
        │   └── DeadlinePassed     504, the request's own deadline
        ├── UpstreamCircuitOpen    503, the circuit breaker is open
        ├── UpstreamProtocolError  502, an invalid response
        │   └── UpstreamDisconnected   the connection broke
        └── UpstreamRefused        the upstream returned an error; 4xx keep their status
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus
from math import ceil
from typing import Any, Final

MOST_MESSAGE: Final = 2000
"""Maximum characters of an error message. Messages quote requests, which may be megabytes long."""
MOST_PARAM: Final = 200
"""Maximum characters of a field name in an error. It may be any key that a client sends."""


class ProxyError(Exception):
    """Base of every error raised in this package."""


class SettingsError(ProxyError):
    """Settings are invalid; the message names them."""

    def __init__(self, *problems: str) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class StartError(ProxyError):
    """The proxy cannot start; the message is one line."""


class ApiError(ProxyError):
    """An error that is sent to the client in OpenAI's format."""

    status = HTTPStatus.INTERNAL_SERVER_ERROR
    type = "server_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        self.message = clipped(message, MOST_MESSAGE)
        super().__init__(self.message)
        self.param = None if param is None else clipped(param, MOST_PARAM)
        self.code = code
        self.is_counted = False  # whether the request is already counted in the metrics
        self.spent = 0  # tokens that the request had cost; if not 0, clients are asked not to retry

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers of the response, by name."""
        return {}


class BadRequest(ApiError):
    """The request is invalid; `param` names the field or header, whose value is wrong unless `code` says otherwise."""

    status = HTTPStatus.BAD_REQUEST
    type = "invalid_request_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        default_code = "invalid_request" if param is None else "invalid_value"
        super().__init__(message, param=param, code=code or default_code)


class Unauthorised(ApiError):
    """The API key is missing or unknown."""

    status = HTTPStatus.UNAUTHORIZED
    type = "invalid_request_error"

    @property
    def headers(self) -> Mapping[str, str]:
        return {"www-authenticate": "Bearer", "connection": "close"}


class TooMany(ApiError):
    """A limit is exceeded; `after` is the number of seconds until a retry makes sense."""

    status = HTTPStatus.TOO_MANY_REQUESTS
    type = "rate_limit_error"

    def __init__(self, message: str, *, after: str, code: str) -> None:
        super().__init__(message, code=code)
        self.after = after

    @property
    def headers(self) -> Mapping[str, str]:
        return {"retry-after": self.after}


class Forbidden(ApiError):
    """The caller lacks permission for the request."""

    status = HTTPStatus.FORBIDDEN
    type = "permission_error"


class NotFound(ApiError):
    """The model, path or request id is unknown."""

    status = HTTPStatus.NOT_FOUND
    type = "invalid_request_error"


class RecordsAway(ApiError):
    """The store cannot be read or written now."""

    status = HTTPStatus.SERVICE_UNAVAILABLE


class LimitsAway(ApiError):
    """The shared limits cannot be reached now, and nothing is served without them."""

    status = HTTPStatus.SERVICE_UNAVAILABLE

    @property
    def headers(self) -> Mapping[str, str]:
        return {"retry-after": "2"}


class ShuttingDownError(ApiError):
    """The server is shutting down and accepts no new requests."""

    status = HTTPStatus.SERVICE_UNAVAILABLE

    @property
    def headers(self) -> Mapping[str, str]:
        return {"retry-after": "1", "connection": "close"}


class TooManyConnections(ApiError):
    """Too many connections are open."""

    status = HTTPStatus.SERVICE_UNAVAILABLE

    @property
    def headers(self) -> Mapping[str, str]:
        return {"retry-after": "1"}


class HeadTooLarge(BadRequest):
    """There are too many headers, or they are too long."""

    status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE


class TooSlow(BadRequest):
    """The request did not arrive in time."""

    status = HTTPStatus.REQUEST_TIMEOUT


class TooLarge(BadRequest):
    """The body exceeds its size limit."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE

    @property
    def headers(self) -> Mapping[str, str]:
        return {"connection": "close"}


class UnsupportedMedia(BadRequest):
    """The body has a content type or encoding that is not accepted."""

    status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE


_NOT_ABOUT_REQUESTS: Final = (401, 403, 408, 429)
"""4xx statuses that do not mean an invalid request: missing rights of the proxy, and too much load."""


class UpstreamError(ApiError):
    """The upstream failed."""

    status = HTTPStatus.BAD_GATEWAY
    type = "upstream_error"
    default_code: str | None = None  # of errors that are made without one
    is_unanswered = False  # whether the upstream had not begun a response, so that another may get the request
    is_request_at_fault = False  # whether the request itself is invalid, so that the upstream has not failed
    is_upstream_counted = False  # whether autotts_upstream_requests_total has it

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param=param, code=code or self.default_code)

    @property
    def logged(self) -> str:
        """The message for logs, without text that a client or a model wrote."""
        return self.message


class UpstreamUnreachable(UpstreamError):
    """No connection to the upstream can be made."""

    default_code = "upstream_unreachable"
    is_unanswered = True


class UpstreamTimeout(UpstreamError):
    """The upstream sent no data in time."""

    status = HTTPStatus.GATEWAY_TIMEOUT
    default_code = "upstream_timeout"


class DeadlinePassed(UpstreamTimeout):
    """The request's own deadline passed before the first token."""

    @property
    def headers(self) -> Mapping[str, str]:
        return {"x-should-retry": "false"}  # a retry by the client would wait as long again


class UpstreamCircuitOpen(UpstreamError):
    """The circuit breaker is open after too many failures; `after` is the number of seconds until a retry."""

    status = HTTPStatus.SERVICE_UNAVAILABLE
    is_unanswered = True

    def __init__(self, message: str, *, after: float) -> None:
        super().__init__(message, code="upstream_ejected")
        self.after = after

    @property
    def headers(self) -> Mapping[str, str]:
        return {"retry-after": str(max(1, ceil(self.after)))}


class UpstreamProtocolError(UpstreamError):
    """The upstream's response is invalid: a cut stream, invalid JSON, or usage that does not add up."""

    default_code = "upstream_invalid"


class UpstreamDisconnected(UpstreamProtocolError):
    """The upstream broke the connection before its response had ended."""

    default_code = "upstream_disconnected"


class UpstreamRefused(UpstreamError):
    """The upstream returned an error. A 4xx status is kept, because the request caused it; 401 and 403 are not."""

    def __init__(self, status: int, message: str, *, param: str | None = None) -> None:
        super().__init__(message, param=param, code="upstream_refused")
        self.upstream_status = status
        self.is_request_at_fault = is_request_at_fault(status)
        if 400 <= status < 500 and status not in (401, 403):
            is_standard = status in {standard.value for standard in HTTPStatus}
            self.status = HTTPStatus(status) if is_standard else HTTPStatus.BAD_REQUEST
            self.type = "invalid_request_error"

    @property
    def logged(self) -> str:
        return f"the upstream refused a request with status {self.upstream_status}"  # its message may quote the request


def is_request_at_fault(status: int) -> bool:
    """Return whether a status of the upstream says that the request itself is invalid."""
    return 400 <= status < 500 and status not in _NOT_ABOUT_REQUESTS


def clipped(text: str, most: int) -> str:
    """Return `text`, or its beginning and end around an ellipsis if it has more than `most` characters."""
    if len(text) <= most:
        return text
    head = most // 2
    return f"{text[:head]}…{text[len(text) - (most - head - 1) :]}"


def internal_error() -> ApiError:
    """Return the error for a fault of the proxy. The log, never the client, gets what failed."""
    return ApiError("the proxy failed; its log has the details", code="internal_error")


def body(error: ApiError) -> Mapping[str, Any]:
    """Return the error as a JSON object in OpenAI's format."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def detail(value: object) -> str:
    """Return the text of FastAPI's `detail`, which is a string or a list of problems by field."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(item, dict) and "msg" in item for item in value):
        return json.dumps(value, ensure_ascii=False)
    problems = []
    for item in value:
        place = ".".join(map(str, item["loc"])) if isinstance(item.get("loc"), list) else ""
        problems.append(f"{place}: {item['msg']}" if place else str(item["msg"]))
    return "; ".join(problems)
