"""Request bodies are decoded within their size limit and reach the upstream as plain UTF-8 JSON."""

from __future__ import annotations

import asyncio
import codecs
import gzip
import io
import json
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any, cast

import aiohttp
import pytest
import pytest_asyncio
import zstandard
from starlette.requests import Request
from starlette.types import Message

from proxy.admission.auth import Caller
from proxy.errors import TooMany
from proxy.http import request_body
from proxy.server import running
from proxy.settings import load
from tests.fakes import MODEL, RawUpstream
from tests.proxy.conftest import SMALL

BODY = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "é"}]}).encode()
MOST = 4096


def gzipped(raw: bytes) -> bytes:
    """Compress to the same bytes at any time, because they are part of test ids."""
    return gzip.compress(raw, mtime=0)


def zstd(raw: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(raw)


def zstd_of_unknown_size(raw: bytes) -> bytes:
    made = zstandard.ZstdCompressor().compressobj()
    return made.compress(raw) + made.flush()


@pytest_asyncio.fixture
async def upstream() -> AsyncIterator[RawUpstream]:
    async with RawUpstream([b'{"id": 1}'], content_type="application/json").serve() as made:
        yield made


@pytest_asyncio.fixture
async def url(upstream: RawUpstream) -> AsyncIterator[str]:
    async with running(load(upstream=upstream.url, max_body_bytes=MOST, **SMALL)) as url:
        yield url


async def send(url: str, raw: bytes, encoding: str | None, path: str = "chat/completions") -> tuple[int, Any]:
    headers = {"content-type": "application/json"} | ({} if encoding is None else {"content-encoding": encoding})
    async with (
        aiohttp.ClientSession() as http,
        http.post(f"{url}/v1/{path}", data=io.BytesIO(raw), headers=headers) as response,
    ):
        return response.status, await response.json(content_type=None)


@pytest.mark.parametrize("path", ["chat/completions", "embeddings"])
@pytest.mark.parametrize(
    ("encoding", "raw"),
    [
        (None, BODY),
        ("identity", BODY),
        ("gzip", gzipped(BODY)),
        ("GZIP", gzipped(BODY[:9]) + gzipped(BODY[9:])),
        ("x-gzip", gzipped(BODY)),
        ("zstd", zstd(BODY)),
        ("zstd", zstd_of_unknown_size(BODY)),
        ("zstd", zstd(BODY[:9]) + zstd(BODY[9:])),
        (None, codecs.BOM_UTF8 + BODY),
        ("gzip", gzipped(codecs.BOM_UTF8 + BODY)),
        ("zstd", zstd(codecs.BOM_UTF8 + BODY)),
    ],
)
async def test_a_compressed_body_is_forwarded_decoded(
    url: str, upstream: RawUpstream, path: str, encoding: str | None, raw: bytes
) -> None:
    status, reply = await send(url, raw, encoding, path)
    assert status == 200, reply
    (seen,) = upstream.seen
    assert seen.body == BODY
    assert "content-encoding" not in seen.headers


@pytest.mark.parametrize("encoding", ["br", "deflate", "gzip, zstd", "compress", "x" * 500])
async def test_an_unsupported_content_encoding_gets_415_and_is_named(
    url: str, upstream: RawUpstream, encoding: str
) -> None:
    status, reply = await send(url, BODY, encoding)
    assert (status, reply["error"]["code"]) == (415, "unsupported_encoding")
    assert reply["error"]["param"] == "content-encoding"
    assert reply["error"]["message"].endswith("; use gzip, zstd or none")
    assert repr(encoding[:50]) in reply["error"]["message"]
    assert not upstream.seen


@pytest.mark.parametrize("encode", [gzipped, zstd, zstd_of_unknown_size])
async def test_a_body_over_the_limit_after_decoding_gets_413(
    url: str, upstream: RawUpstream, encode: Callable[[bytes], bytes]
) -> None:
    encoding = "gzip" if encode is gzipped else "zstd"
    for size in (MOST + 1, 10**7):
        raw = encode(b" " * size)
        status, reply = await send(url, raw if len(raw) < MOST else raw[: MOST - 1], encoding)
        assert (status, reply["error"]["code"]) == (413, "body_too_large")
    status, reply = await send(url, encode(b" " * MOST), encoding)
    assert (status, reply["error"]["code"]) == (400, "bad_json")
    assert not upstream.seen


@pytest.mark.parametrize(
    ("encoding", "raw"),
    [
        ("gzip", BODY),
        ("gzip", b""),
        ("gzip", gzipped(BODY)[:-3]),
        ("gzip", gzipped(BODY) + b"xx"),
        ("gzip", gzipped(b"") * (request_body.MOST_MEMBERS + 1)),
        ("zstd", BODY),
        ("zstd", b""),
        ("zstd", zstd(BODY)[:-3]),
        ("zstd", zstd(BODY) + b"xx"),
        ("zstd", zstd(b"") * (request_body.MOST_MEMBERS + 1)),
    ],
)
async def test_a_body_that_does_not_match_its_content_encoding_gets_400(
    url: str, upstream: RawUpstream, encoding: str, raw: bytes
) -> None:
    status, reply = await send(url, raw, encoding)
    assert (status, reply["error"]["code"]) == (400, "bad_encoding")
    assert reply["error"]["message"] == f"the body is not valid {encoding}, which its content-encoding announces"
    assert not upstream.seen


def test_a_zstd_frame_with_a_large_window_is_refused() -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=27)
    made = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    with pytest.raises(zstandard.ZstdError, match="too much memory"):
        request_body._unzstd(made.compress(b"a") + made.flush(), MOST)


# Bodies held in memory

LARGE = 300_000


class Sending:
    """Request whose body comes in two pieces, the second once `go` is set."""

    def __init__(self, key: str, size: int) -> None:
        self.headers: dict[str, str] = {}
        self.held = ExitStack()
        self.state = SimpleNamespace(caller=Caller(key, False, key), leases=self.held)
        self.go = asyncio.Event()
        self._pieces = [b" " * size, b" "]

    async def receive(self) -> Message:
        piece = self._pieces.pop(0)
        if not self._pieces:
            await self.go.wait()
        return {"type": "http.request", "body": piece, "more_body": bool(self._pieces)}


async def test_large_bodies_share_a_memory_limit_and_small_ones_are_exempt() -> None:
    refusals: list[None] = []
    reader = request_body.BodyReader(2**20, 4 * LARGE, lambda: refusals.append(None))

    async def begin(key: str, size: int) -> tuple[Sending, asyncio.Task[bytes]]:
        sending = Sending(key, size)
        reading = asyncio.create_task(reader.read(cast(Request, sending)))
        await asyncio.sleep(0)
        return sending, reading

    async def refused(key: str) -> bool:
        sending, reading = await begin(key, LARGE)
        with sending.held, pytest.raises(TooMany) as caught:
            await reading
        return caught.value.code == "bodies_full"

    first, reading = await begin("a", LARGE)
    second = await begin("a", LARGE - 1)
    assert reader.held == 2 * LARGE - 1
    assert await refused("a")  # a key may hold half of the limit
    small, reading_small = await begin("a", request_body.SMALL - 1)
    small.go.set()
    assert len(await reading_small) == request_body.SMALL
    others = [await begin(key, LARGE) for key in ("b", "c")]
    assert await refused("d")  # all keys together hold all of it
    first.go.set()
    assert len(await reading) == LARGE + 1
    assert await refused("d")  # a body is held until its request is over
    first.held.close()
    others.append(await begin("d", LARGE))
    for sending, task in (second, *others):
        sending.go.set()
        await task
        sending.held.close()
    assert reader.held == 0
    assert not reader._by_holder
    assert len(refusals) == 3


async def test_a_single_body_is_read_even_over_the_shared_limit() -> None:
    reader = request_body.BodyReader(2**20, LARGE, pytest.fail)
    for _ in range(2):
        sending = Sending("a", LARGE)
        sending.go.set()
        with sending.held:
            assert len(await reader.read(cast(Request, sending))) == LARGE + 1
    assert reader.held == 0
