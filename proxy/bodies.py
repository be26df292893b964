"""Read request bodies: within a size bound, decoded, and without a byte order mark."""

from __future__ import annotations

import asyncio
import codecs
import io
import zlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import zstandard
from starlette.requests import ClientDisconnect, Request

from proxy.errors import BadRequest, TooLarge, UnsupportedMedia
from proxy.stream import ClientGone

MOST_WINDOW: Final = 8 * 2**20
"""Bytes of memory that a zstd frame may ask for, as RFC 9659 has it for HTTP."""
MOST_MEMBERS: Final = 16
"""Members of a gzip file, and frames of zstd. One is usual, and each costs time even if it is empty."""
_GZIP: Final = 16 + zlib.MAX_WBITS


async def read(request: Request, most: int) -> bytes:
    """Return the body of a request, decoded. Raises TooLarge, UnsupportedMedia, BadRequest or ClientGone."""
    body = bytearray()
    try:
        async for data in request.stream():
            body += data
            if len(body) > most:
                raise TooLarge(f"the body is larger than {most} bytes", code="body_too_large")
    except ClientDisconnect:
        raise ClientGone from None
    raw = bytes(body)
    if encoding := request.headers.get("content-encoding", "").strip().lower():
        raw = await _decoded(raw, encoding, most)
    return raw.removeprefix(codecs.BOM_UTF8)


async def _decoded(raw: bytes, encoding: str, most: int) -> bytes:
    """Return a body without its encoding, which is done in a thread: a megabyte takes milliseconds."""
    if encoding == "identity":
        return raw
    decode = _DECODERS.get(encoding)
    if decode is None:
        raise UnsupportedMedia(
            f"the content encoding is {encoding[:50]!r}; send the body plain, or encoded as gzip or zstd",
            param="content-encoding",
            code="unsupported_encoding",
        )
    try:
        decoded = await asyncio.to_thread(decode, raw, most)
    except (zlib.error, zstandard.ZstdError, EOFError):
        raise BadRequest(
            f"the body is not encoded as {encoding}, as its content-encoding says",
            param="content-encoding",
            code="bad_encoding",
        ) from None
    if len(decoded) > most:
        raise TooLarge(f"the body is larger than {most} bytes when it is decoded", code="body_too_large")
    return decoded


def _gunzipped(raw: bytes, most: int) -> bytes:
    """Return at most `most` + 1 bytes of a gzip file. Raises zlib.error or EOFError."""
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
    """Return at most `most` + 1 bytes of zstd frames. Raises ZstdError or EOFError.

    A reader bounds what is decoded but does not tell whether the frame was whole, so a small one is decoded again.
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
