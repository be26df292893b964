"""Requests handed to the upstream as they are, and its answers handed back as they are."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from proxy.engine import Engine
from proxy.pour import Hand, pour
from proxy.stream import Stream

PATHS: Final = (
    "/v1/embeddings",
    "/v1/score",
    "/v1/rerank",
    "/tokenize",
    "/detokenize",
)
"""What may be reached through the proxy untouched. All else of the upstream is out of reach."""

_REQUEST_HEADERS: Final = ("content-type", "accept")
_RESPONSE_HEADERS: Final = ("content-type", "retry-after")


WHOLE: Final = 64 * 2**10
"""Bytes of a body that is sent in one piece, if its length is known."""


async def forward(
    engine: Engine,
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
    even a short response handed back as a Stream.
    """
    sent = {name: value for name in _REQUEST_HEADERS if (value := request.headers.get(name))}
    if content_type is not None:
        sent["content-type"] = content_type
    opened = AsyncExitStack()
    asked = engine.relay(request.method, request.scope["path"], body, sent, is_urgent=is_stream)
    upstream = await opened.enter_async_context(asked)
    kept = {name: value for name in _RESPONSE_HEADERS if (value := upstream.headers.get(name))}
    length = upstream.content_length
    if not in_pieces and length is not None and length <= WHOLE:
        async with opened:
            content = await upstream.read()
        return Response(content, upstream.status, {"cache-control": "no-cache", **kept, **headers})

    async def poured(hand: Hand) -> None:
        await pour(upstream, hand, engine.silence_s)

    return Stream(poured, opened, status_code=upstream.status, headers={**kept, **headers}, media_type=None)
