"""Requests handed to the upstream as they are, and its answers handed back as they are."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AsyncExitStack
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from proxy.engine import Engine
from proxy.stream import Stream
from proxy.usage import TAIL

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
LAST: Final = 64
"""Pieces of a stream in which its end is, as a rule."""


async def forward(
    engine: Engine,
    request: Request,
    body: bytes,
    headers: Mapping[str, str],
    content_type: str | None = None,
    *,
    in_pieces: bool = False,
    hear: Callable[[bytes], object] | None = None,
) -> Response:
    """The upstream's response to `body` at the request's path, with `headers` added. Raises UpstreamError.

    `content_type` is for a body the proxy wrote itself. `in_pieces` has even a short one handed back as a Stream.
    `hear` is told the last bytes of a response that has come to its end.
    """
    sent = {name: value for name in _REQUEST_HEADERS if (value := request.headers.get(name))}
    if content_type is not None:
        sent["content-type"] = content_type
    async with AsyncExitStack() as stack:
        upstream = await stack.enter_async_context(engine.relay(request.method, request.scope["path"], body, sent))
        kept = {name: value for name in _RESPONSE_HEADERS if (value := upstream.headers.get(name))}
        length = upstream.content_length
        if not in_pieces and length is not None and length <= WHOLE:
            content = await upstream.read()
            if hear is not None:
                hear(content[-TAIL:])
            return Response(content, upstream.status, {"cache-control": "no-cache", **kept, **headers})
        opened = stack.pop_all()

    async def pieces() -> AsyncGenerator[bytes]:
        last: deque[bytes] = deque(maxlen=LAST)
        read = upstream.content.readany
        async with opened:
            while data := await read():
                last.append(data[-TAIL:])
                yield data
        if hear is not None:
            hear(b"".join(last)[-TAIL:])

    return Stream(pieces(), status_code=upstream.status, headers={**kept, **headers}, media_type=None)
