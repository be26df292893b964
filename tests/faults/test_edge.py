"""The HTTP protocol over raw sockets: each request gets one answer, and none reaches another route."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import resource
import shutil
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from operator import itemgetter
from types import SimpleNamespace
from typing import Any, NamedTuple, cast
from urllib.parse import urlsplit

import aiohttp
import pytest
import uvicorn
from openai import AsyncOpenAI
from uvicorn.server import ServerState

from proxy.api.routes import ROUTES
from proxy.errors import ApiError
from proxy.http import protocol as edge
from proxy.http.connections import SPARE_DESCRIPTORS, Connections, client_key, connection_capacity
from proxy.http.protocol import ConnectionLimits, HttpProtocol, ProtocolContext
from proxy.http.request_head import (
    KNOWN_SEGMENTS,
    MOST_HEADERS,
    MOST_SHOWN,
    check_head,
    check_target,
    redacted_path,
    without_upgrade,
)
from proxy.server import running
from proxy.settings import load
from tests.fakes import MODEL, FakeVLLM
from tests.proxy.conftest import SMALL, Proxy, backend, proxy
from tests.proxy.recording.test_episode_log import until

__all__ = ["backend", "proxy"]  # fixtures

BODY = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}).encode()
HOST = b"Host: localhost\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"


def in_chunks(body: bytes, size: int) -> bytes:
    """Return a chunked body whose chunks have `size` bytes each."""
    pieces = [body[begin : begin + size] for begin in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in [*pieces, b""])


JSON = b"Content-Type: application/json\r\n"
SMUGGLED = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}"


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


def post(
    *headers: bytes, body: bytes = BODY, target: bytes = b"/v1/chat/completions", version: bytes = b"1.1"
) -> bytes:
    return b"POST " + target + b" HTTP/" + version + b"\r\n" + HOST + JSON + b"".join(headers) + b"\r\n" + body


def sized(body: bytes = BODY, **given: Any) -> bytes:
    return post(b"Content-Length: %d\r\n" % len(body), body=body, **given)


def get(target: bytes = b"/health", *headers: bytes, host: bytes = HOST) -> bytes:
    return b"GET " + target + b" HTTP/1.1\r\n" + host + b"".join(headers) + b"\r\n"


async def speak(url: str, *pieces: bytes, seconds: float = 20) -> list[Answer]:
    """Send `pieces` on one connection and return all answers. The server must close the connection."""
    where = urlsplit(url)
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    try:
        async with asyncio.timeout(seconds):
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
            answers = [answer async for answer in read_answers(reader)]
    finally:
        writer.close()
    return answers


async def read_answers(reader: asyncio.StreamReader) -> Any:
    while line := await reader.readline():
        assert line.startswith(b"HTTP/1.1 "), line
        headers = {}
        while (header := await reader.readline()) != b"\r\n":
            assert header, "the head of an answer was cut"
            name, _, value = header.decode().partition(":")
            headers[name.lower()] = value.strip()
        if "content-length" in headers:
            body = await reader.readexactly(int(headers["content-length"]))
        else:
            body = b""
            while size := int(await reader.readline(), 16):
                body += await reader.readexactly(size)
                await reader.readline()
            await reader.readline()
        yield Answer(int(line.split()[1]), headers, body)


BAD_HTTP = (400, "bad_http")

REFUSED: dict[str, tuple[bytes, tuple[int, str | None]]] = {
    "CL.TE": (post(b"Content-Length: 6\r\n", CHUNKED, body=b"0\r\n\r\n" + SMUGGLED), BAD_HTTP),
    "TE.CL": (post(CHUNKED, b"Content-Length: 4\r\n", body=b"5c\r\n" + SMUGGLED + b"\r\n0\r\n\r\n"), BAD_HTTP),
    "TE.TE, the second is invalid": (
        post(CHUNKED, b"Transfer-Encoding: x\r\n", body=b"0\r\n\r\n" + SMUGGLED),
        BAD_HTTP,
    ),
    "TE.TE, twice": (post(CHUNKED, CHUNKED, body=b"0\r\n\r\n" + SMUGGLED), BAD_HTTP),
    "TE with a blank before its colon": (post(b"Transfer-Encoding : chunked\r\n", body=b"0\r\n\r\n"), BAD_HTTP),
    "TE after a vertical tab": (post(b"Transfer-Encoding:\x0bchunked\r\n", body=b"0\r\n\r\n"), BAD_HTTP),
    "TE of an unknown kind": (post(b"Transfer-Encoding: xchunked\r\n", body=b"0\r\n\r\n" + SMUGGLED), BAD_HTTP),
    "TE in HTTP/1.0": (post(CHUNKED, body=b"0\r\n\r\n" + SMUGGLED, version=b"1.0"), (400, "bad_header")),
    "two lengths": (post(b"Content-Length: 0\r\nContent-Length: 60\r\n", body=SMUGGLED), BAD_HTTP),
    "one length twice": (post(b"Content-Length: 0\r\nContent-Length: 0\r\n", body=SMUGGLED), BAD_HTTP),
    "a list of lengths": (post(b"Content-Length: 0, 60\r\n", body=SMUGGLED), BAD_HTTP),
    "a length with a sign": (post(b"Content-Length: +2\r\n", body=b"{}"), BAD_HTTP),
    "a length beyond 64 bits": (post(b"Content-Length: 18446744073709551617\r\n", body=SMUGGLED), BAD_HTTP),
    "an invalid chunk size": (post(CHUNKED, body=b"zz\r\n{}\r\n0\r\n\r\n"), BAD_HTTP),
    "a chunk longer than its size": (post(CHUNKED, body=b"1\r\n{}\r\n0\r\n\r\n"), BAD_HTTP),
    "a chunk size beyond 64 bits": (post(CHUNKED, body=b"fffffffffffffffff\r\n{}\r\n0\r\n\r\n"), BAD_HTTP),
    "5,000 chunks of one byte": (post(CHUNKED, body=in_chunks(b"{" + b" " * 5000 + b"}", 1)), BAD_HTTP),
    "a chunk extension of 1 MB": (post(CHUNKED, body=b"2;" + b"a" * 2**20 + b"\r\n{}\r\n"), (431, None)),
    "a folded header": (get(b"/health", b"X-A: b\r\n c\r\n"), BAD_HTTP),
    "bare line feeds": (get().replace(b"\r\n", b"\n"), BAD_HTTP),
    "a bare carriage return": (get(b"/health", b"X-A: b\rX-B: c\r\n"), BAD_HTTP),
    "NUL in the path": (get(b"/v1/models\x00/health"), BAD_HTTP),
    "NUL in a header": (get(b"/health", b"X-A: b\x00c\r\n"), BAD_HTTP),
    "a header without a name": (get(b"/health", b": x\r\n"), BAD_HTTP),
    "non-ASCII bytes in the path": (get("/health/é".encode()), BAD_HTTP),
    "lower-case methods": (sized().replace(b"POST", b"post"), BAD_HTTP),
    "an unknown method": (sized().replace(b"POST", b"EVIL"), BAD_HTTP),
    "HTTP/0.9": (b"GET /health\r\n\r\n", (400, "bad_version")),
    "HTTP/2.0": (get().replace(b"HTTP/1.1", b"HTTP/2.0"), (400, "bad_version")),
    "HTTP/2's preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", BAD_HTTP),
    "no Host": (get(host=b""), (400, "bad_host")),
    "two Hosts": (get(host=HOST + b"Host: evil\r\n"), (400, "bad_host")),
    "an empty Host": (get(host=b"Host:\r\n"), (400, "bad_host")),
    "a Host with a path": (get(host=b"Host: proxy/v1/models\r\n"), (400, "bad_host")),
    "an absolute target": (sized(target=b"http://evil/tokenize"), (400, "bad_target")),
    "CONNECT": (b"CONNECT evil:80 HTTP/1.1\r\n" + HOST + b"\r\n", (400, "bad_target")),
    "CONNECT to a path": (b"CONNECT /v1/models HTTP/1.1\r\n" + HOST + b"\r\n", (400, "bad_target")),
    "CONNECT with an upgrade": (
        b"CONNECT /x HTTP/1.1\r\n" + HOST + b"Connection: upgrade\r\nUpgrade: x\r\n\r\n",
        (400, "bad_target"),
    ),
    "a target of a star": (b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n", (400, "bad_target")),
    "a fragment": (get(b"/health#/v1/models"), (400, "bad_target")),
    "a path that begins with two slashes": (get(b"//evil/v1/models"), (400, "bad_path")),
    "a path with parent folders": (sized(target=b"/v1/chat/../../tokenize"), (400, "bad_path")),
    "an encoded path with parent folders": (sized(target=b"/v1/chat/%2e%2e/%2E%2E/tokenize"), (400, "bad_path")),
    "an encoded slash": (sized(target=b"/v1%2fchat%2fcompletions"), (400, "bad_path")),
    "an encoded letter": (sized(target=b"/%74okenize"), (400, "bad_path")),
    "an encoded name with parent folders": (get(b"/v1/tts/requests/%2e%2e/%2e%2e/%2e%2e/metrics"), (400, "bad_path")),
    "a name with an encoded line feed": (get(b"/v1/tts/requests/a%0ab"), (400, "bad_path")),
    "a backslash": (get(b"/v1\\models"), (400, "bad_path")),
    "5,000 headers": (get(b"/health", *(b"X-%d: y\r\n" % i for i in range(5000))), (431, "head_too_large")),
    "a header of 1 MB": (get(b"/health", b"X-A: " + b"y" * 2**20 + b"\r\n"), (431, "head_too_large")),
    "a header of 1 MB that does not end": (get(b"/health", b"X-A: " + b"y" * 2**20)[:-2], (431, "head_too_large")),
    "a path of 1 MB": (get(b"/" + b"y" * 2**20), (431, "head_too_large")),
    "two keys": (sized().replace(JSON, JSON + b"Authorization: Bearer a\r\nAuthorization: Bearer b\r\n"), (400, None)),
}


async def test_an_invalid_request_gets_one_error_and_never_reaches_the_upstream(proxy: Proxy) -> None:
    assert len(REFUSED) >= 32
    for case, (raw_request, (status, code)) in REFUSED.items():
        answers = await speak(proxy.url, raw_request)
        assert [answer.status for answer in answers] == [status], case
        (answer,) = answers
        error = json.loads(answer.body)["error"]
        assert error["type"] == "invalid_request_error", case
        assert code is None or error["code"] == code, case
        assert set(error) == {"message", "type", "param", "code"}
        assert answer.headers["connection"] == "close"
        assert "x-request-id" in answer.headers
        assert proxy.backend.requests == [], case


@pytest.mark.parametrize(
    ("case", "shown"),
    [
        ("no Host", "GET /health"),
        ("CL.TE", "POST /v1/chat/completions"),
        ("a path with parent folders", "POST /v1/chat/../../tokenize"),
        ("an encoded letter", "POST /…"),
        ("5,000 headers", "GET /health"),
        ("an unknown method", "a request"),
    ],
)
async def test_a_refused_request_is_logged_with_its_reason_and_without_client_text(
    proxy: Proxy, caplog: pytest.LogCaptureFixture, case: str, shown: str
) -> None:
    caplog.set_level(logging.INFO)
    raw_request, _ = REFUSED[case]
    (answer,) = await speak(proxy.url, raw_request)
    code = json.loads(answer.body)["error"]["code"]
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    (line,) = warnings
    assert re.fullmatch(rf"refused {re.escape(shown)} from 127\.0\.0\.1:\d+: .+ \({code}\)", line)


@pytest.mark.parametrize(
    ("target", "expected_text"),
    [
        (b"/v1/models/", "the path ends in a slash; remove it"),
        (b"/v1/chat/completions/", "the path ends in a slash; remove it"),
        (b"//v1/models", "two slashes in a row"),
        (b"/v1/../v1/models", "a part that is `.` or `..`"),
        (b"/v1/%6dodels", "encoded or unusual characters"),
    ],
)
async def test_an_invalid_path_is_explained_in_the_error(proxy: Proxy, target: bytes, expected_text: str) -> None:
    (answer,) = await speak(proxy.url, get(target))
    assert answer.status == 400
    assert expected_text in json.loads(answer.body)["error"]["message"]


def test_logged_paths_show_known_parts_and_hide_all_others() -> None:
    assert {part for route in ROUTES for part in route.path.split("/") if "{" not in part} <= KNOWN_SEGMENTS
    assert redacted_path(b"/v1/tts/requests/secret/metrics?secret=1") == "/v1/tts/requests/…/metrics"
    assert len(redacted_path(b"/a" * 10_000)) <= MOST_SHOWN


async def test_an_invalid_request_is_refused_however_it_is_cut_into_pieces(proxy: Proxy) -> None:
    for case in ("CL.TE", "two Hosts", "a path with parent folders", "5,000 headers", "bare line feeds"):
        raw_request, (status, _) = REFUSED[case]
        answers = await speak(
            proxy.url, *(raw_request[at : at + 97] for at in range(0, min(len(raw_request), 6000), 97))
        )
        assert [answer.status for answer in answers] == [status], case
        assert proxy.backend.requests == []


CLOSE = b"Connection: close\r\n"


async def test_pipelined_requests_are_answered_in_order(proxy: Proxy) -> None:
    last = get(b"/v1/models", CLOSE)
    answers = await speak(proxy.url, sized() + get() + get(b"/v1/nothing") + last)
    assert [answer.status for answer in answers] == [200, 200, 404, 200]
    assert json.loads(answers[1].body) == {"status": "ok"}
    assert len(proxy.backend.requests) == 1


@pytest.mark.parametrize("bad", ["CL.TE", "bare line feeds", "no Host", "5,000 headers", "HTTP/0.9"])
async def test_an_invalid_request_behind_a_served_one_does_not_replace_its_answer(proxy: Proxy, bad: str) -> None:
    proxy.backend.gate.clear()
    served = json.dumps({**json.loads(BODY), "tts": {"beta": 0}}).encode()

    async def runs() -> bool:
        return proxy.backend.running > 0

    speaking = asyncio.create_task(speak(proxy.url, sized(served) + REFUSED[bad][0]))
    await until(runs)
    proxy.backend.gate.set()
    answers = await speaking
    assert [answer.status for answer in answers] == [200]
    assert json.loads(answers[0].body)["object"] == "chat.completion"


async def test_nothing_is_read_after_a_request_with_connection_close(proxy: Proxy) -> None:
    answers = await speak(proxy.url, get(b"/health", CLOSE) + SMUGGLED)
    assert [answer.status for answer in answers] == [200]


@pytest.mark.parametrize("size", [1, 64])
async def test_a_chunked_body_with_few_or_not_too_small_chunks_is_read(proxy: Proxy, size: int) -> None:
    padded = BODY + b" " * (4096 * size - len(BODY) + (size > 1) * 102_400)
    (answer,) = await speak(proxy.url, post(CHUNKED, CLOSE, body=in_chunks(padded, size)))
    assert answer.status == 200


async def test_trailers_of_a_chunked_body_are_not_used_as_headers(proxy: Proxy) -> None:
    chunk = b"%x\r\n%b\r\n0\r\n" % (len(BODY), BODY)
    trailers = b"X-Tts-Beta: 0.5\r\nAuthorization: Bearer b\r\nHost: evil\r\n\r\n"
    (answer,) = await speak(proxy.url, post(CHUNKED, CLOSE, body=chunk + trailers))
    assert (answer.status, answer.headers["x-tts-reason"]) == (200, "no_beta")


OFFERS = [
    (b"Connection: Upgrade, HTTP2-Settings\r\n", b"Upgrade: h2c\r\n", b"HTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n"),
    (b"Connection: Upgrade\r\n", b"Upgrade: websocket\r\n", b"Sec-WebSocket-Key: x\r\n"),
    (b"Upgrade: h2c\r\n", b"Connection: keep-alive, Upgrade\r\n"),
]


@pytest.mark.parametrize("offer", OFFERS)
@pytest.mark.parametrize("pieces", [1, 7, 10**6])
async def test_an_upgrade_to_another_protocol_is_ignored(proxy: Proxy, offer: tuple[bytes, ...], pieces: int) -> None:
    chunked = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
    raw_request = (
        post(b"Content-Length: %d\r\n" % len(BODY), *offer)
        + get(b"/health", *offer)
        + post(*offer, CHUNKED, body=chunked)
        + get(b"/health", CLOSE)
    )
    answers = await speak(proxy.url, *(raw_request[at : at + pieces] for at in range(0, len(raw_request), pieces)))
    assert [answer.status for answer in answers] == [200] * 4
    echoes = [json.loads(answers[number].body)["echo"] for number in (0, 2)]
    assert echoes == [json.loads(BODY)] * 2
    assert "upgrade" not in answers[0].headers


@pytest.mark.parametrize("case", ["CL.TE", "two lengths", "two keys", "a path with parent folders"])
async def test_an_upgrade_header_does_not_hide_an_invalid_request(proxy: Proxy, case: str) -> None:
    raw_request, (status, _) = REFUSED[case]
    line, _, rest = raw_request.partition(b"\r\n")
    answers = await speak(proxy.url, line + b"\r\n" + b"".join(OFFERS[0]) + rest)
    assert [answer.status for answer in answers] == [status]
    assert proxy.backend.requests == []


def test_without_upgrade_removes_only_the_upgrade_headers() -> None:
    headers = [(b"host", b"a"), (b"connection", b"Upgrade, Close"), (b"upgrade", b"h2c"), (b"x-upgrade", b"")]
    assert without_upgrade(headers) == [(b"host", b"a"), (b"connection", b"Close"), (b"x-upgrade", b"")]


@pytest.mark.process
async def test_curl_with_http2_upgrade_is_answered(proxy: Proxy) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("curl is not installed")
    url = f"{proxy.url}/v1/chat/completions"
    given = ["--http2", "--silent", "--max-time", "10", "-H", "content-type: application/json", "--data-binary", "@-"]
    process = await asyncio.create_subprocess_exec(curl, *given, url, stdin=PIPE, stdout=PIPE)
    out, _ = await process.communicate(BODY)
    assert json.loads(out)["echo"] == json.loads(BODY)


async def test_an_http_1_0_client_gets_a_stream_without_chunked_encoding(proxy: Proxy) -> None:
    where = urlsplit(proxy.url)
    body = json.dumps({**json.loads(BODY), "stream": True, "tts": {"beta": 0.5}}).encode()
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    writer.write(sized(body, version=b"1.0"))
    async with asyncio.timeout(10):
        head, _, rest = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    assert head.startswith(b"HTTP/1.1 200")
    assert b"transfer-encoding" not in head
    assert b"connection: close" in head
    assert rest.startswith(b"data: {")
    assert rest.endswith(b"data: [DONE]\n\n")
    (answer,) = await speak(proxy.url, sized(version=b"1.0"))
    assert json.loads(answer.body)["echo"] == json.loads(BODY)


async def test_a_disconnect_with_a_pipelined_request_cancels_the_upstream_calls(proxy: Proxy) -> None:
    proxy.backend.fault = "hang"
    body = json.dumps({**json.loads(BODY), "tts": {"beta": 0.5}}).encode()
    where = urlsplit(proxy.url)
    _, writer = await asyncio.open_connection(where.hostname, where.port)
    writer.write(sized(body))
    await proxy.backend.hanging.wait()
    writer.write(get())
    await writer.drain()
    writer.close()
    async with asyncio.timeout(1):
        await proxy.backend.idle.wait()


async def test_a_connection_accepts_a_limited_number_of_pipelined_requests(proxy: Proxy) -> None:
    answers = await speak(proxy.url, get() * (edge.MOST_WAITING + 9))
    assert {answer.status for answer in answers} == {200}
    assert edge.MOST_WAITING <= len(answers) < edge.MOST_WAITING + 9


# Timeouts and connection limits


@asynccontextmanager
async def serving(backend: FakeVLLM, **settings: Any) -> AsyncIterator[Proxy]:
    """Run a proxy with other settings."""
    given: dict[str, Any] = {**SMALL, **settings}
    async with (
        running(load(upstream=backend.url, **given)) as url,
        aiohttp.ClientSession() as http,
        AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as openai,
    ):
        yield Proxy(backend, url, http, openai)


@pytest.mark.parametrize(
    ("raw_request", "statuses", "message"),
    [
        (b"", [], ""),
        (b"\r\n\r\n", [], ""),
        (b"GET /health HTTP/1.1\r\nHost: pro", [408], "the request head took longer than 0.1 s"),
        (sized()[:-5], [408], "the body took longer than 0.1 s"),
        (post(CHUNKED, body=b"ff\r\n{"), [408], "the body took longer than 0.1 s"),
    ],
)
async def test_an_unfinished_head_or_body_gets_408(
    backend: FakeVLLM, raw_request: bytes, statuses: list[int], message: str
) -> None:
    async with serving(backend, head_s=0.1, body_s=0.1) as proxy:
        answers = await speak(proxy.url, raw_request)
        assert [answer.status for answer in answers] == statuses
        assert all(json.loads(answer.body)["error"]["message"] == message for answer in answers)
        assert backend.requests == []
        assert await proxy.metric("autotts_connections_cut_total", reason="slow") == len(statuses)


class Clock:
    """Fake event loop whose time moves and whose timers run when `turn` is called."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[tuple[float, Any]] = []

    def time(self) -> float:
        return self.now

    def call_later(self, seconds: float, then: Any) -> Any:
        timer = (self.now + seconds, then)
        self.timers.append(timer)
        return SimpleNamespace(cancel=lambda: self.timers.remove(timer) if timer in self.timers else None)

    def turn(self, until: float) -> None:
        """Run the timers due until then, in order, and move the time."""
        while self.timers and min(self.timers, key=itemgetter(0))[0] <= until:
            timer = min(self.timers, key=itemgetter(0))
            self.timers.remove(timer)
            self.now = timer[0]
            timer[1]()
        self.now = until

    def create_task(self, work: Any) -> Any:
        work.close()
        task: asyncio.Future[None] = asyncio.Future(loop=cast(asyncio.AbstractEventLoop, self))
        return task

    def get_debug(self) -> bool:
        return False


class Wire:
    """Transport that keeps what is written to it."""

    def __init__(self) -> None:
        self.written = b""
        self.closed = False

    def write(self, data: bytes) -> None:
        self.written += data

    def close(self) -> None:
        self.closed = True

    abort = close

    def is_closing(self) -> bool:
        return self.closed

    def can_write_eof(self) -> bool:
        return False

    def get_extra_info(self, name: str) -> Any:
        return {"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)}.get(name)

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


def connect(clock: Clock, limits: ConnectionLimits) -> tuple[HttpProtocol, Wire]:
    """Return a connection in a fake event loop."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("the app must not be called")

    config = uvicorn.Config(app, log_config=None)
    config.load()
    shared = ProtocolContext(limits, Connections(9, 9), lambda _: None)
    protocol = HttpProtocol(config, ServerState(), {}, _loop=clock, context=shared)
    wire = Wire()
    protocol.connection_made(wire)  # type: ignore[arg-type]
    return protocol, wire


@pytest.mark.parametrize(
    ("rate", "every_s", "piece", "refused_after_s", "message"),
    [
        (1024, 1.0, 1, 20, "bytes in 20 s; at least 1024 bytes/s"),
        (1024, 50.0, 1, 20, "0 bytes in 20 s"),
        (1024, 1.0, 512, 39, "at least 1024 bytes/s"),
        (1024, 1.0, 2000, 300, "the body took longer than 300 s"),
        (0, 50.0, 1, 300, "the body took longer than 300 s"),
        (0, 400.0, 1, 300, "the body took longer than 300 s"),
    ],
)
def test_a_body_below_the_minimum_rate_or_over_the_time_limit_gets_408(
    rate: int, every_s: float, piece: int, refused_after_s: float, message: str
) -> None:
    clock = Clock()
    protocol, wire = connect(clock, ConnectionLimits(body_rate=rate))
    protocol.data_received(post(b"Content-Length: 8000000\r\n", body=b""))
    while not wire.written:
        protocol.flow.resume_reading()  # the app reads at once
        clock.turn(clock.now + every_s)
        if not wire.written:
            protocol.data_received(b" " * piece)
    assert wire.written.startswith(b"HTTP/1.1 408 ")
    assert message in json.loads(wire.written.partition(b"\r\n\r\n")[2])["error"]["message"]
    assert refused_after_s <= clock.now < refused_after_s + every_s + 1
    clock.turn(clock.now + edge.LINGER_S)
    assert wire.closed


def test_the_body_timeout_is_paused_while_the_app_does_not_read() -> None:
    clock = Clock()
    protocol, wire = connect(clock, ConnectionLimits())
    protocol.data_received(post(b"Content-Length: 8000000\r\n", body=b" " * 70_000))
    assert protocol.flow.read_paused
    clock.turn(1000)
    assert not wire.written
    protocol.flow.resume_reading()
    clock.turn(1030)
    assert wire.written.startswith(b"HTTP/1.1 408 ")


def test_a_head_that_keeps_growing_gets_408_at_the_time_limit() -> None:
    clock = Clock()
    protocol, wire = connect(clock, ConnectionLimits())
    protocol.data_received(b"GET /health HTTP/1.1\r\n")
    for number in range(20):
        clock.turn(clock.now + 1)
        if not wire.written:
            protocol.data_received(b"X-%d: a\r\n" % number)
    assert wire.written.startswith(b"HTTP/1.1 408 ")


async def test_a_client_without_a_key_gets_401_and_is_disconnected_at_once(backend: FakeVLLM) -> None:
    async with serving(backend, client_keys=f"a={'0' * 64}") as proxy:
        for raw_request in (post(b"Content-Length: 8000000\r\n", body=b"{"), sized(), get(b"/v1/models")):
            async with asyncio.timeout(edge.LINGER_S * 5):
                (answer,) = await speak(proxy.url, raw_request)
            assert (answer.status, answer.headers["connection"]) == (401, "close")


async def test_an_answer_before_the_body_arrives_keeps_the_connection_open(proxy: Proxy) -> None:
    where = urlsplit(proxy.url)
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    answers = read_answers(reader)
    try:
        async with asyncio.timeout(20):
            head = post(b"Content-Length: 2\r\n", body=b"").replace(JSON, b"Content-Type: text/plain\r\n")
            writer.write(head)
            first = await anext(answers)
            assert (first.status, "connection" in first.headers) == (415, False)
            writer.write(b"{}" + get(b"/health", CLOSE))
            assert [answer.status async for answer in answers] == [200]
    finally:
        writer.close()


async def test_a_full_connection_table_evicts_the_longest_waiting_connections(backend: FakeVLLM) -> None:
    async with serving(backend, max_connections=4) as proxy:
        where = urlsplit(proxy.url)
        opened = []

        async def opening(raw_request: bytes) -> asyncio.StreamReader:
            reader, writer = await asyncio.open_connection(where.hostname, where.port)
            opened.append(writer)
            writer.write(raw_request)
            await writer.drain()
            return reader

        waiting = [await opening(raw_request) for raw_request in (b"", b"GET /", sized()[:-5], get())]
        assert (await waiting[3].readline()).startswith(b"HTTP/1.1 200")
        for reader in waiting:
            newcomer = await opening(get())
            assert (await newcomer.readline()).startswith(b"HTTP/1.1 200")
            async with asyncio.timeout(5):
                ended = await reader.read()
            assert not ended or b"retry-after: 1" in ended or b'{"status":"ok"}' in ended
        for writer in opened:
            writer.close()
        assert await proxy.metric("autotts_connections_cut_total", reason="evicted") >= len(waiting)
        assert backend.requests == []


async def test_a_connection_with_a_running_request_is_not_evicted(backend: FakeVLLM) -> None:
    backend.gate.clear()
    async with serving(backend, max_connections=2) as proxy:
        body = json.dumps({**json.loads(BODY), "tts": {"beta": 0}}).encode()

        async def runs() -> bool:
            return backend.running == 2

        asking = [asyncio.create_task(speak(proxy.url, sized(body))) for _ in range(2)]
        await until(runs)
        (answer,) = await speak(proxy.url, get())
        assert (answer.status, json.loads(answer.body)["error"]["code"]) == (503, "too_many_connections")
        backend.gate.set()
        for task in asking:
            task.cancel()


class Seat:
    """Connection that records whether it was evicted."""

    def __init__(self) -> None:
        self.is_evicted = False

    def evict(self) -> None:
        self.is_evicted = True


def test_an_address_over_its_limit_evicts_only_its_own_connections() -> None:
    events: list[str] = []
    table = Connections(5, 2, events.append)
    mine, theirs = [Seat() for _ in range(3)], [Seat() for _ in range(4)]
    assert table.admit(theirs[0], "::1")
    assert all(table.admit(seat, "10.0.0.1") for seat in mine)
    assert [seat.is_evicted for seat in mine] == [True, False, False]
    table.serve(mine[1])
    table.serve(mine[2])
    assert not table.admit(Seat(), "10.0.0.1")
    assert table.admit(theirs[1], "10.0.0.2")
    table.wait(mine[2])  # after all others
    for seat in theirs[2:]:
        assert table.admit(seat, f"10.0.1.{theirs.index(seat)}")
    assert (len(table), theirs[0].is_evicted, mine[2].is_evicted) == (5, True, False)
    assert events == ["evicted", "refused", "evicted"]
    for seat in [*mine, *theirs]:
        table.leave(seat)
        table.leave(seat)
    assert len(table) == 0
    assert not table._by_address
    assert not table._waiting_at


def test_addresses_of_the_same_network_count_as_one_client() -> None:
    assert client_key("2001:db8:1:2:3:4:5:6") == client_key("2001:db8:1:2::1") != client_key("2001:db8:1:3::1")
    assert client_key("::ffff:10.0.0.1") == client_key("10.0.0.1") != client_key("10.0.0.2")
    assert client_key("fe80::1%eth0") == client_key("fe80::2")
    assert client_key("") == ""


def test_room_for_raises_the_soft_limit_of_open_files_up_to_the_hard_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [256, 20_000]
    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(now))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: now.__setitem__(slice(None), limits))
    assert connection_capacity(8192, 2048) == 8192
    assert now == [8192 + 2048 + SPARE_DESCRIPTORS, 20_000]
    assert connection_capacity(100, 100) == 100
    assert now[0] == 8192 + 2048 + SPARE_DESCRIPTORS
    now[:] = [1024, 4096]
    assert connection_capacity(8192, 2048) == 2048
    assert now == [4096, 4096]


DUPLICATES = [
    b'{"messages": [{"role": "user", "content": "hi"}], "messages": [{"role": "user", "content": "ho"}]}',
    b'{"messages": [{"role": "user", "content": "hi"}], "tts": {"beta": 0, "b\\u0065ta": 1}}',
    b'{"messages": [{"role": "user", "role": "system", "content": "hi"}]}',
]


@pytest.mark.parametrize("body", [*DUPLICATES, b'{"messages": ' + b'[{"a":' * 5000 + b"1" + b"}]" * 5000 + b"}"])
@pytest.mark.parametrize("path", [b"/v1/chat/completions", b"/v1/completions"])
async def test_a_body_with_duplicate_keys_or_deep_nesting_gets_400(proxy: Proxy, body: bytes, path: bytes) -> None:
    (answer,) = await speak(proxy.url, post(b"Content-Length: %d\r\n" % len(body), CLOSE, body=body, target=path))
    assert (answer.status, json.loads(answer.body)["error"]["code"]) == (400, "bad_json")
    assert proxy.backend.requests == []


FINE = [
    b"/",
    b"/ui/",
    b"/ui/?range=day",
    b"/v1/models",
    b"/v1/models/org%2Fname",
    b"/v1/models/org/name@0.5",
    b"/metrics?a=%2e%2e/../b&c=http://d",
]


@pytest.mark.parametrize("target", FINE)
def test_valid_targets_are_accepted(target: bytes) -> None:
    check_target(target)


def test_valid_heads_are_accepted_up_to_the_header_limit() -> None:
    for host in (b"proxy", b"proxy:8400", b"127.0.0.1:1", b"[::1]:8400"):
        check_head("1.1", b"GET", b"/", [(b"host", host), *[(b"x", b"y")] * (MOST_HEADERS - 1)])
    with pytest.raises(ApiError):
        check_head("1.1", b"GET", b"/", [(b"host", b"proxy"), *[(b"x", b"y")] * MOST_HEADERS])
