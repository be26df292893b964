"""Requests handed to the upstream as they are, and its answers handed back as they are."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from contextlib import AsyncExitStack
from http import HTTPStatus
from types import MappingProxyType
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from proxy import errors
from proxy.http.sse import StreamedResponse
from proxy.upstream.body_tap import BodySink, pour
from proxy.upstream.client import UpstreamClient

POST_PATHS: Final = (
    "/v1/embeddings",
    "/v1/score",
    "/v1/rerank",
    "/tokenize",
    "/detokenize",
    "/v1/messages/count_tokens",
)
"""Paths to which a client may post through the proxy. The rest of the upstream is out of reach."""
GET_PATHS: Final = ("/version", "/tokenizer_info", "/ping")
"""Paths that a client may read through the proxy."""
UNSERVED_PATHS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "/v1/messages": "the proxy does not serve Anthropic's API; use /v1/chat/completions",
        "/v1/chat/completions/batch": "send the requests one by one to /v1/chat/completions",
        "/v1/audio/transcriptions": "the proxy serves text; ask the upstream itself",
        "/v1/audio/translations": "the proxy serves text; ask the upstream itself",
        "/v1/realtime": "the proxy serves text; ask the upstream itself",
        "/pooling": "use /v1/embeddings or /v1/score, or ask the upstream itself",
        "/classify": "use /v1/embeddings or /v1/score, or ask the upstream itself",
        "/score": "use /v1/score",
        "/rerank": "use /v1/rerank",
        "/v2/rerank": "use /v1/rerank",
        "/invocations": "use the endpoint that is meant, such as /v1/chat/completions",
        "/load": "use /metrics, or ask the upstream itself",
        "/server_info": "ask the upstream itself",
    }
)
"""Paths of vLLM that are not served, and what to do instead."""

_REQUEST_HEADERS: Final = ("content-type", "accept")
_RESPONSE_HEADERS: Final = ("content-type", "retry-after")


WHOLE: Final = 64 * 2**10
"""Bytes of a body that is sent in one piece, if its length is known."""


async def forward(
    engine: UpstreamClient,
    request: Request,
    body: bytes,
    headers: Mapping[str, str],
    content_type: str | None = None,
    *,
    is_stream: bool = False,
    in_pieces: bool = False,
) -> Response:
    """The upstream's response to `body` at the request's path, with `headers` added. Raises UpstreamError.

    `content_type` is for a body the proxy wrote itself. `is_stream` tells that it asks for a stream. `in_pieces` has
    even a short response handed back as a StreamedResponse.
    """
    sent = {name: value for name in _REQUEST_HEADERS if (value := request.headers.get(name))}
    if content_type is not None:
        sent["content-type"] = content_type
    if own := headers.get("x-request-id"):  # vLLM makes its own id of it, and logs it
        sent["x-request-id"] = own
    opened = AsyncExitStack()
    asked = engine.relay(request.method, request.scope["path"], body, sent, is_eager=is_stream)
    upstream = await opened.enter_async_context(asked)
    kept = {name: value for name in _RESPONSE_HEADERS if (value := upstream.headers.get(name))}
    length = upstream.content_length
    if upstream.status >= HTTPStatus.BAD_REQUEST and length is not None and length <= WHOLE:
        async with opened, asyncio.timeout(engine.read_timeout_s):
            content = as_openais(upstream.status, await upstream.read())
        return Response(content, upstream.status, {"cache-control": "no-cache", **kept, **headers})
    if not in_pieces and length is not None and length <= WHOLE:
        async with opened, asyncio.timeout(engine.read_timeout_s):
            content = await upstream.read()
        return Response(content, upstream.status, {"cache-control": "no-cache", **kept, **headers})

    async def poured(hand: BodySink) -> None:
        await pour(upstream, hand, engine.read_timeout_s)

    return StreamedResponse(poured, opened, status_code=upstream.status, headers={**kept, **headers}, media_type=None)


def as_openais(status: int, content: bytes) -> bytes:
    """Return an error's body in OpenAI's form if it is in FastAPI's (`{"detail": …}`), else unchanged."""
    try:
        error = json.loads(content)
    except (ValueError, RecursionError):
        return content
    if not isinstance(error, dict) or "detail" not in error or "error" in error:
        return content
    kind = "invalid_request_error" if status < HTTPStatus.INTERNAL_SERVER_ERROR else "upstream_error"
    code = "not_found" if status == HTTPStatus.NOT_FOUND else "upstream_refused"
    message = f"the upstream says: {errors.detail(error['detail'])}"
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}}).encode()
