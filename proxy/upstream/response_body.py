"""Read upstream responses within limits of memory and time, whatever the upstream sends."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any, Final, NoReturn

from proxy.errors import UpstreamProtocolError
from proxy.upstream.connections.pooled_request import UpstreamResponse

MIN_BODY_BYTES: Final = 2**20
"""Bytes of a response that are always accepted, whatever was requested."""
MAX_PAGE_BYTES: Final = 8 * 2**20
"""Maximum bytes of a list of models, a metrics page or an error."""
BYTES_PER_ID: Final = 16
"""Maximum bytes of a token id in JSON."""

_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")
"""An escaped UTF-16 surrogate in JSON. Valid text has surrogates in pairs only."""


class BodyTooLong(UpstreamProtocolError):
    """A response body exceeds its size limit."""


async def read_body(response: UpstreamResponse, max_bytes: int, seconds: float | None = None) -> bytes:
    """Return the body of `response`. Raises BodyTooLong, TimeoutError or ClientError.

    A body of more than `max_bytes` is not read to its end.
    """
    if (response.content_length or 0) > max_bytes:
        raise BodyTooLong(f"the upstream announced {response.content_length} bytes; at most {max_bytes} are read")
    body = bytearray()
    async with asyncio.timeout(seconds):
        async for piece in response.content.iter_any():
            body += piece
            if len(body) > max_bytes:
                raise BodyTooLong(f"the upstream sent more than {max_bytes} bytes")
    return bytes(body)


async def read_short_body(response: UpstreamResponse, seconds: float) -> bytes:
    """Return the body of a response that announced a short one. Raises TimeoutError or ClientError."""
    if response.content.is_eof():  # it came together with the head
        return response.content.read_nowait()
    async with asyncio.timeout(seconds):
        return await response.content.read()


def parse_object(payload: bytes) -> dict[str, Any]:
    """Parse a JSON object. Raises UpstreamProtocolError, also for NaN and for a payload that is nested too deeply."""
    try:
        parsed = json.loads(payload.decode(), parse_constant=_refuse)
        if _SURROGATE.search(payload):  # join pairs of surrogates and replace single ones by U+FFFD
            text = json.dumps(parsed, ensure_ascii=False).encode("utf-16-le", "surrogatepass")
            parsed = json.loads(text.decode("utf-16-le", "replace"))
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise UpstreamProtocolError(f"the upstream sent {len(payload)} bytes that are not a JSON object")
    return parsed


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not valid JSON")


class LineSplitter:
    """Splits a stream into lines of at most `max_bytes`. Takes linear time, however small the pieces are."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._held = bytearray()
        self._searched = 0  # bytes of `_held` that contain no line end

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
        if self._searched > self._max_bytes:
            raise UpstreamProtocolError(f"the upstream sent a line of more than {self._max_bytes} bytes")
        return lines


class ByteAllowance:
    """Limits the bytes of a stream in proportion to the tokens and finished completions that it delivers."""

    def __init__(self, min_bytes: int, per_token: int) -> None:
        self._left = min_bytes
        self._per_token = per_token
        self._delivered = 0

    def spend(self, received: int) -> None:
        """Count received bytes. Raises UpstreamProtocolError if the allowance is exceeded."""
        self._left -= received
        if self._left < 0:
            raise UpstreamProtocolError(f"the upstream sent too many bytes for {self._delivered} tokens")

    def earn(self, delivered: int) -> None:
        """Raise the allowance. `delivered` is the total of tokens and finished completions so far."""
        self._left += (delivered - self._delivered) * self._per_token
        self._delivered = delivered
