"""Requests handed to the upstream as they are, and its answers handed back as they are."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from proxy.engine import Engine
from proxy.pour import Hand, pour
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
EVENT: Final = b"\n\n"
"""What ends an event."""
LAST: Final = 64
"""Pieces of a stream in which its end is, as a rule."""


async def forward(
    engine: Engine,
    request: Request,
    body: bytes,
    headers: Mapping[str, str],
    content_type: str | None = None,
    *,
    is_stream: bool = False,
    in_pieces: bool = False,
    hear: Callable[[bytes, int], object] | None = None,
) -> Response:
    """The upstream's response to `body` at the request's path, with `headers` added. Raises UpstreamError.

    `content_type` is for a body the proxy wrote itself. `is_stream` tells that it asks for a stream. `in_pieces` has
    even a short response handed back as a Stream. `hear` is told, maybe twice, the last bytes of a response that is
    over and how many events it had, if it was a stream of them.
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
        if hear is not None:
            hear(content[-TAIL:], 0)
        return Response(content, upstream.status, {"cache-control": "no-cache", **kept, **headers})

    has_events = kept.get("content-type", "").startswith("text/event-stream")

    async def poured(hand: Hand) -> None:
        last: deque[bytes] = deque(maxlen=LAST)
        events = 0

        def tell() -> None:
            if hear is not None:
                hear(b"".join(last)[-TAIL:], events if has_events else 0)

        def heard(piece: bytes, is_last: bool) -> Awaitable[None]:
            nonlocal events
            events += piece.count(EVENT)
            last.append(piece[-TAIL:])
            if is_last:
                tell()
            return hand(piece, is_last)

        try:
            await pour(upstream, heard, engine.silence_s)
        finally:
            tell()

    return Stream(poured, opened, status_code=upstream.status, headers={**kept, **headers}, media_type=None)
