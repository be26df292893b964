"""Read request bodies within a size limit, decode them and remove a byte order mark."""

from __future__ import annotations

import asyncio
import codecs
import io
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import MappingProxyType
from typing import Final, Protocol

import zstandard
from starlette.requests import Request
from starlette.types import Message

from proxy.errors import BadRequest, TooLarge, TooMany, UnsupportedMedia
from proxy.http.sse import ClientDisconnected

SMALL: Final = 64 * 2**10
"""Bytes up to which a body is always read, whatever memory other bodies use."""
MOST_WINDOW: Final = 8 * 2**20
"""Maximum window size of a zstd frame in bytes: the limit of RFC 9659 for HTTP."""
MOST_MEMBERS: Final = 16
"""Maximum number of gzip members or zstd frames in a body. One is usual, and even an empty one costs time."""
_GZIP: Final = 16 + zlib.MAX_WBITS


class _Caller(Protocol):
    """The caller that sends a body."""

    @property
    def key(self) -> str:
        """Name of the API key; empty without API keys."""

    @property
    def holder(self) -> str:
        """Name under which the memory of the caller's bodies is counted."""


class BodyReader:
    """Reads request bodies and limits the memory of all bodies that are held at the same time.

    Small bodies are always read, and so is a body if no other is held. An API key may use half of the limit, so that
    one client cannot lock others out.
    """

    def __init__(self, most: int, most_together: int, on_refusal: Callable[[], object]) -> None:
        self.held = 0  # bytes of bodies that are not small
        self._most = most
        self._most_together = most_together
        self._on_refusal = on_refusal  # called for each body that finds no memory
        self._by_holder: Counter[str] = Counter()

    async def read(self, request: Request) -> bytes:
        """Return the decoded body of a request. It counts as held until the request ends.

        Raises TooLarge, TooMany, UnsupportedMedia, BadRequest or ClientDisconnected.
        """
        first = await request.receive()
        raw: bytes = first.get("body", b"")
        encoding = request.headers.get("content-encoding", "").strip().lower()
        is_complete = first["type"] == "http.request" and not first.get("more_body")
        if encoding or not is_complete or len(raw) > min(SMALL, self._most):
            raw = await self._read_rest(request, first, encoding)
        return raw.removeprefix(codecs.BOM_UTF8)

    async def _read_rest(self, request: Request, message: Message, encoding: str) -> bytes:
        """Return the decoded body that begins with an ASGI message. Its memory is counted while it grows."""
        body = bytearray()
        hold = self._holding(request)
        while True:
            if message["type"] == "http.disconnect":
                raise ClientDisconnected
            body += message.get("body", b"")
            if len(body) > self._most:
                raise TooLarge(f"the body is larger than {self._most} bytes", code="body_too_large")
            if len(body) > SMALL:
                hold(len(body))
            if not message.get("more_body"):
                break
            message = await request.receive()
        raw = bytes(body)
        if encoding:
            raw = await _decoded(raw, encoding, self._most)
            if len(raw) > SMALL:
                hold(len(raw))
        return raw

    def _holding(self, request: Request) -> Callable[[int], None]:
        """Return a function that reserves a number of bytes for a request's body until the request is over."""
        caller: _Caller = request.state.caller
        stack: ExitStack = request.state.leases
        share = self._most_together // (2 if caller.key else 1)
        taken = 0

        def hold(size: int) -> None:
            nonlocal taken
            more = size - taken
            if more <= 0:
                return
            own = self._by_holder[caller.holder]
            is_over = own > taken and own + more > share
            if is_over or (self.held > taken and self.held + more > self._most_together):
                self._on_refusal()
                raise TooMany("too many large request bodies are in memory; retry later", after="1", code="bodies_full")
            if not taken:
                stack.callback(release)
            taken = size
            self.held += more
            self._by_holder[caller.holder] += more

        def release() -> None:
            self.held -= taken
            self._by_holder[caller.holder] -= taken
            if not self._by_holder[caller.holder]:
                del self._by_holder[caller.holder]

        return hold


async def _decoded(raw: bytes, encoding: str, most: int) -> bytes:
    """Decode a body in a thread, because a megabyte takes milliseconds."""
    if encoding == "identity":
        return raw
    decode = _DECODERS.get(encoding)
    if decode is None:
        raise UnsupportedMedia(
            f"unsupported content-encoding {encoding[:50]!r}; use gzip, zstd or none",
            param="content-encoding",
            code="unsupported_encoding",
        )
    try:
        decoded = await asyncio.to_thread(decode, raw, most)
    except (zlib.error, zstandard.ZstdError, EOFError):
        raise BadRequest(
            f"the body is not valid {encoding}, which its content-encoding announces",
            param="content-encoding",
            code="bad_encoding",
        ) from None
    if len(decoded) > most:
        raise TooLarge(f"the decoded body is larger than {most} bytes", code="body_too_large")
    return decoded


def _gunzipped(raw: bytes, most: int) -> bytes:
    """Return at most `most` + 1 decoded bytes of a gzip body. Raises zlib.error or EOFError."""
    decoded = b""
    for _ in range(MOST_MEMBERS):
        member = zlib.decompressobj(_GZIP)
        decoded += member.decompress(raw, most + 1 - len(decoded))
        if len(decoded) > most or (member.eof and not member.unused_data):
            return decoded
        if not member.eof:
            raise EOFError
        raw = member.unused_data
    raise EOFError


def _unzstd(raw: bytes, most: int) -> bytes:
    """Return at most `most` + 1 decoded bytes of zstd frames. Raises ZstdError or EOFError.

    `stream_reader` limits the decoded bytes but does not report whether the frame was complete. A frame within the
    limit is therefore decoded a second time to find out.
    """
    decompressor = zstandard.ZstdDecompressor(max_window_size=MOST_WINDOW)
    decoded = b""
    for _ in range(MOST_MEMBERS):
        decoded += decompressor.stream_reader(io.BytesIO(raw)).read(most + 1 - len(decoded))
        if len(decoded) > most:
            return decoded
        frame = decompressor.decompressobj()
        frame.decompress(raw)
        if not frame.eof:
            raise EOFError
        raw = frame.unused_data
        if not raw:
            return decoded
    raise EOFError


_DECODERS: Final[Mapping[str, Callable[[bytes, int], bytes]]] = MappingProxyType(
    {"gzip": _gunzipped, "x-gzip": _gunzipped, "zstd": _unzstd}
)
