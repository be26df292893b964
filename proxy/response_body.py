"""Read what an upstream sends within bounds of memory and time, whatever it sends."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any, Final, NoReturn

import aiohttp

from proxy.errors import UpstreamNonsense

MOST_ERROR_CHARS: Final = 4000
"""Characters of an upstream's error message that are kept."""
_HALF: Final = re.compile(rb"\\u[dD][89a-fA-F]")
"""A surrogate as JSON escapes it; text must have them in pairs."""


async def read_body(response: aiohttp.ClientResponse, most: int, seconds: float | None = None) -> bytes:
    """Return the body of `response`. Raises UpstreamNonsense for more than `most` bytes, TimeoutError, or ClientError.

    What is too long is not read to its end.
    """
    if (response.content_length or 0) > most:
        raise UpstreamNonsense(f"the upstream announced {response.content_length} bytes where {most} are the most")
    body = bytearray()
    async with asyncio.timeout(seconds):
        async for piece in response.content.iter_any():
            body += piece
            if len(body) > most:
                raise UpstreamNonsense(f"the upstream sent more than {most} bytes")
    return bytes(body)


def parse_object(payload: bytes) -> dict[str, Any]:
    """Return the JSON object `payload`. Raises UpstreamNonsense, also for NaN and for what is nested too deeply."""
    try:
        parsed = json.loads(payload.decode(), parse_constant=_refuse)
        if _HALF.search(payload):  # pair the surrogates that form a character; U+FFFD stands for the others
            text = json.dumps(parsed, ensure_ascii=False).encode("utf-16-le", "surrogatepass")
            parsed = json.loads(text.decode("utf-16-le", "replace"))
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise UpstreamNonsense(f"the upstream sent {len(payload)} bytes that are no JSON object")
    return parsed


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


class Lines:
    """Splits a stream into lines. Takes time linear in its length, however small the pieces are."""

    def __init__(self) -> None:
        self._held = bytearray()
        self._searched = 0  # bytes of `_held` that hold no line end

    def take(self, piece: bytes) -> Iterator[bytes]:
        """Yield the lines that `piece` completes, without their ends."""
        self._held += piece
        begin = 0
        while (end := self._held.find(b"\n", max(begin, self._searched))) >= 0:
            yield bytes(self._held[begin:end])
            begin = end + 1
            self._searched = begin
        del self._held[:begin]
        self._searched = len(self._held)
