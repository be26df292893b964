"""Read what an upstream sends within bounds of memory and time, whatever it sends."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any, Final, NoReturn

import aiohttp

from proxy.errors import UpstreamProtocolError

_HALF: Final = re.compile(rb"\\u[dD][89a-fA-F]")
"""A surrogate as JSON escapes it; text must have them in pairs."""


class BodyTooLong(UpstreamProtocolError):
    """A body has more bytes than were allowed for."""


async def read_body(response: aiohttp.ClientResponse, most: int, seconds: float | None = None) -> bytes:
    """Return the body of `response`. Raises BodyTooLong for more than `most` bytes, TimeoutError, or ClientError.

    What is too long is not read to its end.
    """
    if (response.content_length or 0) > most:
        raise BodyTooLong(f"the upstream announced {response.content_length} bytes where {most} are the most")
    body = bytearray()
    async with asyncio.timeout(seconds):
        async for piece in response.content.iter_any():
            body += piece
            if len(body) > most:
                raise BodyTooLong(f"the upstream sent more than {most} bytes")
    return bytes(body)


def parse_object(payload: bytes) -> dict[str, Any]:
    """Parse a JSON object. Raises UpstreamProtocolError, also for NaN and for a payload that is nested too deeply."""
    try:
        parsed = json.loads(payload.decode(), parse_constant=_refuse)
        if _HALF.search(payload):  # pair the surrogates that form a character; U+FFFD stands for the others
            text = json.dumps(parsed, ensure_ascii=False).encode("utf-16-le", "surrogatepass")
            parsed = json.loads(text.decode("utf-16-le", "replace"))
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise UpstreamProtocolError(f"the upstream sent {len(payload)} bytes that are no JSON object")
    return parsed


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


class LineSplitter:
    """Splits a stream into lines of at most `most` bytes. Takes linear time, however small the pieces are."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._held = bytearray()
        self._searched = 0  # bytes of `_held` that hold no line end

    def take(self, piece: bytes) -> list[bytes]:
        """Return the lines that `piece` completes, without line ends. Raises UpstreamProtocolError for a long line."""
        self._held += piece
        lines: list[bytes] = []
        begin = 0
        while (end := self._held.find(b"\n", max(begin, self._searched))) >= 0:
            lines.append(bytes(self._held[begin:end]))
            begin = end + 1
        del self._held[:begin]
        self._searched = len(self._held)
        if self._searched > self._most:
            raise UpstreamProtocolError(f"the upstream sent a line of more than {self._most} bytes")
        return lines


class ByteAllowance:
    """Bounds the bytes of a stream by what it brings: tokens, and the ends of completions."""

    def __init__(self, least: int, per_token: int) -> None:
        self._left = least
        self._per_token = per_token
        self._brought = 0

    def spend(self, received: int) -> None:
        """Take in bytes that have come. Raises UpstreamProtocolError for too many."""
        self._left -= received
        if self._left < 0:
            raise UpstreamProtocolError(f"the upstream sent too many bytes for {self._brought} tokens")

    def earn(self, brought: int) -> None:
        """Take in how many tokens and ends have come in all."""
        self._left += (brought - self._brought) * self._per_token
        self._brought = brought
