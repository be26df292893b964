"""Hostile upstreams: whatever they send gives a clear error within limits of memory, time and calls."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing, suppress
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from proxy.admission.token_bound import TokenBound
from proxy.admission.usage_meter import BoundedReplyMeter
from proxy.errors import UpstreamError, UpstreamProtocolError, UpstreamTimeout
from proxy.server import running
from proxy.settings import load
from proxy.types import Call
from proxy.upstream import retry, transport
from proxy.upstream.circuit_breaker import FAILURES
from proxy.upstream.client import MAX_MODELS, UpstreamClient
from proxy.upstream.relayed_body import RelayedBody
from proxy.upstream.response_body import MAX_PAGE_BYTES, MIN_BODY_BYTES, LineSplitter, parse_object
from tests.fakes import MODEL, FakeVLLM, chain
from tests.proxy.conftest import SMALL, Proxy, backend, proxy

__all__ = ["backend", "proxy"]  # fixtures

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n\r\n"
STREAM = HEAD.replace(b"application/json", b"text/event-stream")
PIECE_BYTES = 2**16
"""Size of one piece of an endless body."""


class Liar:
    """Upstream that answers with `head` and then repeats `piece` until the connection is closed."""

    def __init__(self, head: bytes, piece: bytes = b"", pause_s: float = 0.0) -> None:
        self.head = head
        self.piece = piece
        self.pause_s = pause_s
        self.sent = 0
        self.asked = 0
        self.url = ""
        self._answering: list[asyncio.Task[None]] = []

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[Liar]:
        server = await asyncio.start_server(self._begin, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server:
            yield self
            for task in self._answering:
                task.cancel()
            await asyncio.gather(*self._answering, return_exceptions=True)

    def _begin(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._answering.append(asyncio.create_task(self._answer(reader, writer)))

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError), closing(writer):
            head = await reader.readuntil(b"\r\n\r\n")
            self.asked += 1
            for line in head.lower().split(b"\r\n"):
                if line.startswith(b"content-length:"):
                    await reader.readexactly(int(line[15:]))
            writer.write(self.head)
            while self.piece:
                writer.write(self.piece)
                await writer.drain()
                self.sent += len(self.piece)
                await asyncio.sleep(self.pause_s)


Ask = Callable[[UpstreamClient], Awaitable[object]]


async def generate(engine: UpstreamClient) -> None:
    await engine.generate(MODEL, Call([[1, 2, 3]], 20, {}))


ASKS: dict[str, Ask] = {
    "generate": generate,
    "tokenise": lambda engine: engine.tokenise_prompt(MODEL, "hi"),
    "tokenise with a bound": lambda engine: engine.tokenise_prompt(MODEL, "hi", 1000),
    "tokenise a chat": lambda engine: engine.tokenise_chat({"model": MODEL, "messages": []}),
    "tokenise a suffix": lambda engine: engine.tokenise_suffix(MODEL, "hi"),
    "detokenise": lambda engine: engine.detokenise(MODEL, [1, 2, 3]),
    "models": lambda engine: engine.models(),
}


@asynccontextmanager
async def client_of(liar: Liar, **settings: Any) -> AsyncIterator[UpstreamClient]:
    """Serve `liar` and yield a client of it."""
    async with liar.serve(), aiohttp.ClientSession(auto_decompress=False) as http:
        engine = UpstreamClient(liar.url, http, **settings)
        yield engine
        await engine.close()


@pytest.mark.parametrize("asked", ASKS)
@pytest.mark.parametrize(
    ("status", "beginning", "piece"),
    [
        (b"200 OK", b'{"tokens": [1', b", 1" * PIECE_BYTES),
        (b"200 OK", b'{"prompt": "', b"x" * PIECE_BYTES),
        (b"200 OK", b'{"data": [{"id": "m"}', b', {"id": "m"}' * PIECE_BYTES),
        (b"200 OK", b"[" * 100_000, b"[" * PIECE_BYTES),
        (b"500 Internal Server Error", b'{"error": {"message": "', b"x" * PIECE_BYTES),
        (b"400 Bad Request", b'{"error": {"message": "', b"x" * PIECE_BYTES),
    ],
)
async def test_an_endless_body_raises_protocol_error_within_the_size_limit(
    asked: str, status: bytes, beginning: bytes, piece: bytes
) -> None:
    liar = Liar(HEAD.replace(b"200 OK", status) + beginning, piece)
    async with client_of(liar) as engine:
        with pytest.raises(UpstreamProtocolError, match="bytes"):
            await ASKS[asked](engine)
    assert liar.sent < 2 * MAX_PAGE_BYTES


@pytest.mark.parametrize("asked", ASKS)
async def test_a_too_large_content_length_is_refused_before_the_body_is_read(asked: str) -> None:
    liar = Liar(HEAD.replace(b"\r\n\r\n", b"\r\ncontent-length: 314572800\r\n\r\n"), b"x" * PIECE_BYTES)
    async with client_of(liar) as engine:
        with pytest.raises(UpstreamProtocolError, match="announced 314572800 bytes"):
            await ASKS[asked](engine)


CHUNK = b'data: {"choices": [{"index": 0, "token_ids": [], "text": "", "finish_reason": null}]}\n\n'


@pytest.mark.parametrize(
    "piece",
    [
        b"x" * PIECE_BYTES,  # a line without an end
        b": ping\n\n" * 1000,
        b"\n" * PIECE_BYTES,
        CHUNK * 100,
        CHUNK.replace(b'"text": ""', b'"text": "' + b"x" * PIECE_BYTES + b'"'),
        b'data: {"choices": []}\n\n' * 100,
        b'data: {"choices": [' + b",".join([b"{}"] * 1000) + b"]}\n\n",
        b"event: x\nid: y\nretry: 5\n\n" * 100,
    ],
)
async def test_an_endless_stream_without_tokens_raises_protocol_error(piece: bytes) -> None:
    liar = Liar(STREAM, piece)
    async with client_of(liar) as engine:
        with pytest.raises(UpstreamProtocolError):
            await generate(engine)
    assert liar.sent < 8 * MIN_BODY_BYTES


@pytest.mark.parametrize("piece", [b": ping\n\n", CHUNK, b"x", b"\n"])
async def test_a_stream_of_keep_alive_events_only_times_out(piece: bytes) -> None:
    liar = Liar(STREAM, piece, pause_s=0.01)
    async with client_of(liar, read_timeout_s=0.2) as engine:
        with pytest.raises(UpstreamTimeout):
            await generate(engine)


async def test_tokens_with_too_much_text_raise_protocol_error() -> None:
    text = "x" * MIN_BODY_BYTES
    chunks = [{"choices": [{"index": 0, "token_ids": [5], "text": text, "finish_reason": None}]}] * 20
    liar = Liar(STREAM, b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks))
    call = Call([[1, 2, 3]], 20, {})
    async with client_of(liar) as engine:
        with pytest.raises(UpstreamProtocolError, match="too many bytes"):
            await engine.generate(MODEL, call)
    assert len(call.outputs[0].text) < 4 * MIN_BODY_BYTES


CHUNKED = b"\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize("asked", ASKS)
@pytest.mark.parametrize("head", [HEAD, STREAM])
@pytest.mark.parametrize(
    ("beginning", "piece"),
    [
        (b"5;", b"x" * 1000),  # a chunk extension
        (b"", b"0" * 1000),  # a chunk size
        (b"2\r\n{}\r\n0\r\n", b"a: b\r\n" * 100),  # trailers
        (b"2\r\n{}\r\n0\r\na: ", b"b" * 1000),
        (b"FFFFFFFFFFFFFFFFFFFF\r\n", b"x" * 1000),
    ],
)
async def test_an_endless_chunk_header_or_trailer_raises_an_error(
    asked: str, head: bytes, beginning: bytes, piece: bytes
) -> None:
    liar = Liar(head.replace(b"\r\n\r\n", CHUNKED) + beginning, piece, pause_s=0.001)
    async with client_of(liar, read_timeout_s=0.3) as engine:
        with pytest.raises(UpstreamError):
            await ASKS[asked](engine)


@pytest.mark.parametrize("asked", ["tokenise", "detokenise", "models"])
async def test_a_body_that_arrives_too_slowly_times_out(asked: str) -> None:
    liar = Liar(HEAD + b'{"tokens": [', b"1,", pause_s=0.01)
    async with client_of(liar, read_timeout_s=0.2) as engine:
        with pytest.raises(UpstreamTimeout):
            await ASKS[asked](engine)


@pytest.mark.parametrize(
    "piece",
    [
        b"a: b\r\n",
        b"a: " + b"b" * PIECE_BYTES + b"\r\n",
        b"HTTP/1.1 102 Processing\r\n\r\n",
        b"x",
    ],
)
@pytest.mark.parametrize("pause_s", [0, 0.01])
async def test_an_endless_response_head_raises_an_error(
    piece: bytes, pause_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "CHECK_S", 0.1)
    is_informational = piece.startswith(b"HTTP")
    liar = Liar(b"" if is_informational else b"HTTP/1.1 200 OK\r\n", piece, pause_s)
    async with client_of(liar, read_timeout_s=0.3) as engine:
        with pytest.raises(UpstreamError):
            await ASKS["tokenise"](engine)
        assert liar.asked <= 1 + len(retry.RETRY_PAUSES_S)


@pytest.mark.parametrize("asked", ASKS)
@pytest.mark.parametrize(
    "header", [b"content-encoding: gzip", b"content-encoding: br", b"content-encoding: identity, x"]
)
async def test_a_content_encoding_is_refused_before_the_body_is_read(asked: str, header: bytes) -> None:
    liar = Liar(HEAD.replace(b"\r\n\r\n", b"\r\n" + header + b"\r\n\r\n"), b"\x1f\x8b" * PIECE_BYTES)
    async with client_of(liar) as engine:
        with pytest.raises(UpstreamProtocolError, match="content-encoding"):
            await ASKS[asked](engine)


@pytest.mark.parametrize("status", [b"101 Switching Protocols", b"600 What", b"999 No"])
async def test_an_invalid_http_status_raises_an_error(status: bytes) -> None:
    async with client_of(Liar(HEAD.replace(b"200 OK", status))) as engine:
        with pytest.raises(UpstreamError):
            await ASKS["models"](engine)
        with pytest.raises(UpstreamError):
            async with engine.relay("POST", "/v1/embeddings", RelayedBody(b"{}"), {}):
                raise AssertionError


IDS: list[Any] = [[-1], [2**31], [2**40], [10**30], [True], [1.0], ["1"], [None], [[1]], "1", 5, {"1": 1}, None]


@pytest.mark.parametrize("ids", IDS)
async def test_invalid_token_ids_raise_protocol_error(ids: Any) -> None:
    async with client_of(Liar(HEAD + json.dumps({"tokens": ids}).encode())) as engine:
        with pytest.raises(UpstreamProtocolError):
            await ASKS["tokenise"](engine)
    chunk = {"choices": [{"index": 0, "token_ids": ids, "text": "x", "finish_reason": "length"}]}
    async with client_of(Liar(STREAM + b"data: " + json.dumps(chunk).encode() + b"\n\n")) as engine:
        with pytest.raises(UpstreamProtocolError):
            await generate(engine)


LENGTHS = ["NaN", "Infinity", "1e999", "-1", "1e30", '"x"', str(2**31), str(10**30)]


@pytest.mark.parametrize("length", LENGTHS)
async def test_an_invalid_max_model_len_raises_protocol_error(length: str) -> None:
    async with client_of(Liar(HEAD + b'{"data": [{"id": "m", "max_model_len": %s}]}' % length.encode())) as engine:
        with pytest.raises(UpstreamProtocolError):
            await engine.models()


async def test_too_many_models_raise_protocol_error() -> None:
    cards = [{"id": str(i)} for i in range(MAX_MODELS + 1)]
    async with client_of(Liar(HEAD + json.dumps({"data": cards}).encode())) as engine:
        with pytest.raises(UpstreamProtocolError, match="models"):
            await engine.models()


@pytest.mark.parametrize(
    "page",
    [b"vllm:num_requests_waiting 1e308\n" * 3, b"vllm:num_requests_waiting NaN\n", b"\xff\xfe" * 100, b"vllm:num_req"],
)
async def test_an_unreadable_metrics_page_gives_no_load(page: bytes) -> None:
    for kind in (b"text/plain", b"text/plain; charset=unicode_escape", b"text/plain; charset=nonsense"):
        async with client_of(Liar(HEAD.replace(b"application/json", kind) + page)) as engine:
            assert (await engine.read_load()).waiting is None


async def test_an_endless_metrics_page_gives_no_load() -> None:
    liar = Liar(HEAD, b"vllm:num_requests_waiting 1\n" * 1000)
    async with client_of(liar) as engine:
        assert (await engine.read_load()).waiting is None
    assert liar.sent < 2 * MAX_PAGE_BYTES


@pytest.mark.parametrize("payload", [b'{"a": NaN}', b'{"a": -Infinity}', b"[" * 10**5, b'{"a": %s}' % (b"9" * 10**5)])
def test_invalid_or_deep_json_raises_protocol_error(payload: bytes) -> None:
    with pytest.raises(UpstreamProtocolError):
        parse_object(payload)


def test_line_splitter_returns_the_same_lines_however_the_data_is_cut() -> None:
    rng = random.Random(1)
    for _ in range(300):
        data = bytes(rng.choice(b"ab\n") for _ in range(rng.randrange(200)))
        lines, taken, at = LineSplitter(1000), list[bytes](), 0
        while at < len(data):
            size = rng.randrange(1, 20)
            taken += lines.take(data[at : at + size])
            at += size
        assert taken == data.split(b"\n")[:-1]


def test_a_line_over_the_limit_raises_protocol_error() -> None:
    lines = LineSplitter(10)
    assert lines.take(b"x" * 10) == []
    assert lines.take(b"\n" + b"y" * 10) == [b"x" * 10]
    with pytest.raises(UpstreamProtocolError):
        lines.take(b"y")


def test_the_reply_meter_extends_its_buffer_in_place() -> None:
    for is_stream in (False, True):
        meter = BoundedReplyMeter(TokenBound(max_tokens=100, completions=1), is_stream=is_stream)
        held = meter._held
        for _ in range(1000):
            meter.feed(b"x")
        assert meter._held is held
        assert len(held) == 1000


# Through the proxy


async def relay(liar: Liar, **settings: Any) -> tuple[int, bytes]:
    """Forward a request to `liar` and return the status and the part of the body that arrives."""
    async with (
        liar.serve(),
        running(load(upstream=liar.url, **{**SMALL, **settings})) as url,
        aiohttp.ClientSession() as http,
        http.post(f"{url}/v1/embeddings", json={"model": MODEL, "input": "x"}) as response,
    ):
        content = b""
        with suppress(aiohttp.ClientError):
            async for piece in response.content.iter_any():
                content += piece
        return response.status, content


async def test_a_forwarded_response_with_an_endless_chunk_header_is_cut_off() -> None:
    for head in (HEAD, STREAM):
        liar = Liar(head.replace(b"\r\n\r\n", CHUNKED) + b"8\r\ndata: 1\n\r\n5;", b"x", pause_s=0.01)
        assert await relay(liar, read_timeout_s=0.3) == (200, b"data: 1\n")


@pytest.mark.parametrize("piece", [b": ping\n\n", b"\n", b"event: x\n\n"])
async def test_a_forwarded_stream_of_keep_alive_events_only_is_cut_off(piece: bytes) -> None:
    status, content = await relay(Liar(STREAM + b"data: 1\n\n", piece, pause_s=0.01), read_timeout_s=0.3)
    assert status == 200
    assert content.startswith(b"data: 1\n\n" + piece)  # and the stream ends


async def test_a_forwarded_stream_with_data_may_last_longer_than_the_read_timeout() -> None:
    liar = Liar(STREAM, b"data: 1\n\n", pause_s=0.02)
    status, content = 0, b""
    async with (
        liar.serve(),
        running(load(upstream=liar.url, **{**SMALL, "read_timeout_s": 0.3})) as url,
        aiohttp.ClientSession() as http,
        http.post(f"{url}/v1/embeddings", json={"model": MODEL, "input": "x"}) as response,
    ):
        begun = asyncio.get_running_loop().time()
        while asyncio.get_running_loop().time() < begun + 1:
            content += await response.content.readany()
        status = response.status
    assert status == 200
    assert content.count(b"data: 1\n\n") > 10


async def test_a_forwarded_short_body_that_arrives_too_slowly_gets_504() -> None:
    head = HEAD.replace(b"\r\n\r\n", b"\r\ncontent-length: 60000\r\n\r\n")
    status, content = await relay(Liar(head, b"x", pause_s=0.01), read_timeout_s=0.3)
    assert status == 504
    assert b"sent no data in time" in content


@pytest.mark.parametrize("lie", [b"content-encoding: gzip", b"transfer-encoding: gzip, chunked"])
async def test_a_forwarded_response_with_a_content_encoding_gets_502(lie: bytes) -> None:
    status, content = await relay(Liar(HEAD.replace(b"\r\n\r\n", b"\r\n" + lie + b"\r\n\r\n") + b"\x1f\x8b"))
    assert status == 502
    assert json.loads(content)["error"]["type"] == "upstream_error"


@pytest.mark.parametrize("fault", ["short", "shorter", "aborted", "odd"])
@pytest.mark.parametrize("controller", ["self_consistency", "parallel_probe", "cmc", "single"])
async def test_completions_that_end_wrongly_end_the_episode_with_502(proxy: Proxy, fault: str, controller: str) -> None:
    proxy.backend.fault = fault
    status, _, reply = await proxy.ask("1", tts={"controller": controller, "answer": "boxed"})
    assert (status, reply["error"]["type"]) == (502, "upstream_error")
    assert len(proxy.backend.requests) <= 70 + FAILURES


@pytest.mark.parametrize("text", ["x" * 300_000, "é" * 100_000])
async def test_a_prompt_far_beyond_the_context_gets_400(proxy: Proxy, text: str) -> None:
    status, _, reply = await proxy.ask("0.5", messages=[{"role": "user", "content": text}])
    assert (status, reply["error"]["code"]) == (400, "context_length_exceeded")
    assert "2000" in reply["error"]["message"]


class Commenting(FakeVLLM):
    """Fake vLLM that answers completions with an endless stream of comments."""

    pause_s = 0.0

    async def _generate(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if isinstance(body["prompt"], str):  # the proxy's own health check
            return await super()._generate(request, body)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        while True:
            await response.write(b": ping\n\n" * (1 if self.pause_s else 100))
            await asyncio.sleep(self.pause_s)


@pytest.mark.parametrize("controller", ["self_consistency", "single"])
@pytest.mark.parametrize(
    ("pause_s", "status", "problem"),
    [(0.02, 504, "sent no data in time"), (0, 502, "sent too many bytes for 0 tokens")],
)
@pytest.mark.parametrize("streamed", [False, True])
async def test_an_episode_that_receives_only_comments_ends_with_an_error(
    controller: str, pause_s: float, status: int, problem: str, streamed: bool
) -> None:
    commenting = Commenting([chain("7", 100)])
    commenting.pause_s = pause_s
    timeout_s = 0.4 if pause_s else 60  # a stream without pauses is cut by its size
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "hi"}],
        "stream": streamed,
        "tts": {"beta": 1, "controller": controller},
    }
    async with (
        commenting.serve() as upstream,
        running(load(upstream=upstream.url, **{**SMALL, "read_timeout_s": timeout_s})) as url,
        aiohttp.ClientSession() as http,
        http.post(f"{url}/v1/chat/completions", json=body) as response,
    ):
        content = await response.read()
        await commenting.idle.wait()  # no request is left at the upstream
    *_, last = (line for line in content.decode().splitlines() if line.startswith("data: {" if streamed else "{"))
    error = json.loads(last.removeprefix("data: "))["error"]
    assert (response.status, error["type"]) == (200 if streamed else status, "upstream_error")
    assert problem in error["message"]
    assert len(commenting.requests) == 1
