"""Forward requests to the upstream and its responses to the client, both unchanged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from http import HTTPStatus
from types import MappingProxyType
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from proxy import errors
from proxy.http.sse import StreamedResponse
from proxy.upstream.body_tap import BodySink, stream_body
from proxy.upstream.fleet.interface import Upstream
from proxy.upstream.relayed_body import RelayedBody
from proxy.upstream.response_body import read_short_body

POST_PATHS: Final = (
    "/v1/embeddings",
    "/v1/score",
    "/v1/rerank",
    "/tokenize",
    "/detokenize",
    "/v1/messages/count_tokens",
)
"""Paths to which a client may POST through the proxy. No other path of the upstream can be reached."""
GET_PATHS: Final = ("/version", "/tokenizer_info", "/ping")
"""Paths that a client may GET through the proxy."""
UNSERVED_PATHS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "/": "the dashboard is at /ui and the API's documentation at /docs; a client's base URL ends in /v1",
        "/v1": "a client's base URL ends in /v1, and the client appends paths such as /chat/completions",
        "/v1/tts/requests": "append a request's id; `autotts requests list` and the dashboard list them",
        "/v1/chat/completions/batch": "send the requests one by one to /v1/chat/completions",
        "/v1/audio/transcriptions": "the proxy serves text; send the request to the upstream directly",
        "/v1/audio/translations": "the proxy serves text; send the request to the upstream directly",
        "/v1/realtime": "the proxy serves text; send the request to the upstream directly",
        "/pooling": "use /v1/embeddings or /v1/score, or send the request to the upstream directly",
        "/classify": "use /v1/embeddings or /v1/score, or send the request to the upstream directly",
        "/score": "use /v1/score",
        "/rerank": "use /v1/rerank",
        "/v2/rerank": "use /v1/rerank",
        "/invocations": "use the endpoint itself, such as /v1/chat/completions",
        "/load": "use /metrics, or send the request to the upstream directly",
        "/server_info": "send the request to the upstream directly",
    }
)
"""Paths of vLLM that the proxy does not serve, and what clients can do instead."""

_REQUEST_HEADERS: Final = ("content-type", "accept")
_RESPONSE_HEADERS: Final = ("content-type", "retry-after")
_ERROR: Final = int(HTTPStatus.BAD_REQUEST)
_WITHOUT_BODY: Final = frozenset({int(HTTPStatus.NO_CONTENT), int(HTTPStatus.NOT_MODIFIED)})


MAX_BUFFERED_BYTES: Final = 64 * 2**10
"""Maximum bytes of a response body that is read completely and sent in one piece."""


async def forward(
    engine: Upstream,
    request: Request,
    body: RelayedBody,
    headers: Mapping[str, str],
    content_type: str | None = None,
    *,
    in_pieces: bool = False,
    model: str = "",
) -> Response:
    """Return the upstream's response to `body` at the request's path, with `headers` added. Raises UpstreamError.

    `content_type` replaces the request's, if the proxy wrote the body itself. With `in_pieces` even a short response is
    returned as a StreamedResponse, unless it is an error. `model` is that of a generation; empty for others.
    """
    sent = {name: value for name in _REQUEST_HEADERS if (value := request.headers.get(name))}
    if content_type is not None:
        sent["content-type"] = content_type
    if own_id := headers.get("x-request-id"):  # vLLM derives its own id from it and logs it
        sent["x-request-id"] = own_id
    scope = request.scope
    relayed = engine.relay(scope["method"], scope["path"], body, sent, model)
    upstream = await relayed.__aenter__()
    exchange = _Entered(relayed)
    kept = {name: value for name in _RESPONSE_HEADERS if (value := upstream.headers.get(name))}
    length = upstream.content_length
    is_error = upstream.status >= _ERROR
    if (is_error or not in_pieces) and length is not None and length <= MAX_BUFFERED_BYTES:
        async with exchange:
            content = await read_short_body(upstream, engine.read_timeout_s)
        if is_error:
            content = _as_openai_error(upstream.status, content, scope["path"])
        return BufferedResponse(content, upstream.status, {"cache-control": "no-cache", **kept, **headers})

    async def source(sink: BodySink) -> None:
        await stream_body(upstream, sink, engine.read_timeout_s)

    return StreamedResponse(source, exchange, status_code=upstream.status, headers={**kept, **headers}, media_type=None)


class BufferedResponse(Response):
    """Response with a whole body. The names of its headers are in lower case, so starlette need not look for them."""

    def __init__(self, content: bytes, status_code: int, headers: Mapping[str, str]) -> None:
        self.body = content
        self.status_code = status_code
        self.background = None
        length = {} if status_code in _WITHOUT_BODY else {"content-length": str(len(content))}
        sent = {**headers, **length}
        self.raw_headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in sent.items()]


class _Entered(AbstractAsyncContextManager[None]):
    """Context that has been entered, to be exited elsewhere."""

    def __init__(self, context: AbstractAsyncContextManager[object]) -> None:
        self._context = context

    async def __aenter__(self) -> None:
        """Do nothing."""

    async def __aexit__(self, *error: Any) -> bool | None:
        return await self._context.__aexit__(*error)


def _as_openai_error(status: int, content: bytes, path: str) -> bytes:
    """Convert an error body from FastAPI's format (`{"detail": …}`) to OpenAI's. Return other bodies unchanged."""
    try:
        error = json.loads(content)
    except (ValueError, RecursionError):
        return content
    if not isinstance(error, dict) or "detail" not in error or "error" in error:
        return content
    kind = "invalid_request_error" if status < HTTPStatus.INTERNAL_SERVER_ERROR else "upstream_error"
    code = "not_found" if status == HTTPStatus.NOT_FOUND else "upstream_refused"
    message = f"the upstream says: {errors.detail(error['detail'])}"
    if status == HTTPStatus.NOT_FOUND:
        message = f"the upstream, or the model that it serves, has no {path}: {errors.detail(error['detail'])}"
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}}).encode()
