"""The HTTP edge, spoken to by raw sockets: one answer a request, and nothing reaches another route."""

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
from proxy.http.connections import SPARE_DESCRIPTORS, Connections, client_of, room_for
from proxy.http.protocol import ConnectionLimits, HttpProtocol, ProtocolContext
from proxy.http.request_head import (
    MOST_HEADERS,
    MOST_SHOWN,
    PARTS,
    check_head,
    check_target,
    shown_path,
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


async def speak(url: str, *said: bytes, seconds: float = 20) -> list[Answer]:
    """All answers to what is said on one connection, which then says no more; it must end by itself."""
    where = urlsplit(url)
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    try:
        async with asyncio.timeout(seconds):
            for one in said:
                writer.write(one)
                await writer.drain()
            answers = [found async for found in read_answers(reader)]
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
    "TE.TE, the second is none": (post(CHUNKED, b"Transfer-Encoding: x\r\n", body=b"0\r\n\r\n" + SMUGGLED), BAD_HTTP),
    "TE.TE, twice": (post(CHUNKED, CHUNKED, body=b"0\r\n\r\n" + SMUGGLED), BAD_HTTP),
    "TE with a blank before its colon": (post(b"Transfer-Encoding : chunked\r\n", body=b"0\r\n\r\n"), BAD_HTTP),
    "TE after a vertical tab": (post(b"Transfer-Encoding:\x0bchunked\r\n", body=b"0\r\n\r\n"), BAD_HTTP),
    "TE of a kind there is not": (post(b"Transfer-Encoding: xchunked\r\n", body=b"0\r\n\r\n" + SMUGGLED), BAD_HTTP),
    "TE in HTTP/1.0": (post(CHUNKED, body=b"0\r\n\r\n" + SMUGGLED, version=b"1.0"), (400, "bad_header")),
    "two lengths": (post(b"Content-Length: 0\r\nContent-Length: 60\r\n", body=SMUGGLED), BAD_HTTP),
    "one length twice": (post(b"Content-Length: 0\r\nContent-Length: 0\r\n", body=SMUGGLED), BAD_HTTP),
    "a list of lengths": (post(b"Content-Length: 0, 60\r\n", body=SMUGGLED), BAD_HTTP),
    "a length with a sign": (post(b"Content-Length: +2\r\n", body=b"{}"), BAD_HTTP),
    "a length beyond 64 bits": (post(b"Content-Length: 18446744073709551617\r\n", body=SMUGGLED), BAD_HTTP),
    "a chunk size that is none": (post(CHUNKED, body=b"zz\r\n{}\r\n0\r\n\r\n"), BAD_HTTP),
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
    "bytes that are no ASCII in the path": (get("/health/é".encode()), BAD_HTTP),
    "lower-case methods": (sized().replace(b"POST", b"post"), BAD_HTTP),
    "a method there is not": (sized().replace(b"POST", b"EVIL"), BAD_HTTP),
    "HTTP/0.9": (b"GET /health\r\n\r\n", (400, "bad_version")),
    "HTTP/2.0": (get().replace(b"HTTP/1.1", b"HTTP/2.0"), (400, "bad_version")),
    "HTTP/2's preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", BAD_HTTP),
    "no Host": (get(host=b""), (400, "bad_host")),
    "two Hosts": (get(host=HOST + b"Host: evil\r\n"), (400, "bad_host")),
    "an empty Host": (get(host=b"Host:\r\n"), (400, "bad_host")),
    "a Host with a path": (get(host=b"Host: proxy/v1/models\r\n"), (400, "bad_host")),
    "an absolute target": (sized(target=b"http://evil/tokenize"), (400, "bad_target")),
    "CONNECT": (b"CONNECT evil:80 HTTP/1.1\r\n" + HOST + b"\r\n", (400, "bad_target")),
    "a target of a star": (b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n", (400, "bad_target")),
    "a fragment": (get(b"/health#/v1/models"), (400, "bad_target")),
    "a path that begins with two slashes": (get(b"//evil/v1/models"), (400, "bad_path")),
    "a path that climbs": (sized(target=b"/v1/chat/../../tokenize"), (400, "bad_path")),
    "a path that climbs in code": (sized(target=b"/v1/chat/%2e%2e/%2E%2E/tokenize"), (400, "bad_path")),
    "a slash in code": (sized(target=b"/v1%2fchat%2fcompletions"), (400, "bad_path")),
    "a letter in code": (sized(target=b"/%74okenize"), (400, "bad_path")),
    "a name that climbs in code": (get(b"/v1/tts/requests/%2e%2e/%2e%2e/%2e%2e/metrics"), (400, "bad_path")),
    "a name with a line feed in code": (get(b"/v1/tts/requests/a%0ab"), (400, "bad_path")),
    "a backslash": (get(b"/v1\\models"), (400, "bad_path")),
    "5,000 headers": (get(b"/health", *(b"X-%d: y\r\n" % i for i in range(5000))), (431, "head_too_large")),
    "a header of 1 MB": (get(b"/health", b"X-A: " + b"y" * 2**20 + b"\r\n"), (431, "head_too_large")),
    "a header of 1 MB that does not end": (get(b"/health", b"X-A: " + b"y" * 2**20)[:-2], (431, "head_too_large")),
    "a path of 1 MB": (get(b"/" + b"y" * 2**20), (431, "head_too_large")),
    "two keys": (sized().replace(JSON, JSON + b"Authorization: Bearer a\r\nAuthorization: Bearer b\r\n"), (400, None)),
}


async def test_what_is_refused_is_answered_once_and_reaches_nothing(proxy: Proxy) -> None:
    assert len(REFUSED) >= 32
    for case, (said, (status, code)) in REFUSED.items():
        answers = await speak(proxy.url, said)
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
        ("a path that climbs", "POST /v1/chat/../../tokenize"),
        ("a letter in code", "POST /…"),
        ("5,000 headers", "GET /health"),
        ("a method there is not", "a request"),
    ],
)
async def test_what_was_refused_and_why_is_logged_and_nothing_that_was_written(
    proxy: Proxy, caplog: pytest.LogCaptureFixture, case: str, shown: str
) -> None:
    caplog.set_level(logging.INFO)
    said, _ = REFUSED[case]
    (answer,) = await speak(proxy.url, said)
    code = json.loads(answer.body)["error"]["code"]
    warned = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    (line,) = warned
    assert re.fullmatch(rf"refused {re.escape(shown)} from 127\.0\.0\.1:\d+: .+ \({code}\)", line)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (b"/v1/models/", "the path ends in a slash; remove it"),
        (b"/v1/chat/completions/", "the path ends in a slash; remove it"),
        (b"//v1/models", "two slashes in a row"),
        (b"/v1/../v1/models", "a part that is `.` or `..`"),
        (b"/v1/%6dodels", "encoded or unusual characters"),
    ],
)
async def test_what_is_wrong_with_a_path_is_said(proxy: Proxy, target: bytes, words: str) -> None:
    (answer,) = await speak(proxy.url, get(target))
    assert answer.status == 400
    assert words in json.loads(answer.body)["error"]["message"]


def test_the_log_shows_the_parts_of_all_endpoints() -> None:
    assert {part for route in ROUTES for part in route.path.split("/") if "{" not in part} <= PARTS
    assert shown_path(b"/v1/tts/requests/secret/metrics?secret=1") == "/v1/tts/requests/…/metrics"
    assert len(shown_path(b"/a" * 10_000)) <= MOST_SHOWN


async def test_however_it_is_cut_into_pieces(proxy: Proxy) -> None:
    for case in ("CL.TE", "two Hosts", "a path that climbs", "5,000 headers", "bare line feeds"):
        said, (status, _) = REFUSED[case]
        answers = await speak(proxy.url, *(said[at : at + 97] for at in range(0, min(len(said), 6000), 97)))
        assert [answer.status for answer in answers] == [status], case
        assert proxy.backend.requests == []


CLOSE = b"Connection: close\r\n"


async def test_requests_sent_at_once_are_answered_in_order(proxy: Proxy) -> None:
    last = get(b"/v1/models", CLOSE)
    answers = await speak(proxy.url, sized() + get() + get(b"/v1/nothing") + last)
    assert [answer.status for answer in answers] == [200, 200, 404, 200]
    assert json.loads(answers[1].body) == {"status": "ok"}
    assert len(proxy.backend.requests) == 1


@pytest.mark.parametrize("bad", ["CL.TE", "bare line feeds", "no Host", "5,000 headers", "HTTP/0.9"])
async def test_what_follows_a_request_never_answers_for_it(proxy: Proxy, bad: str) -> None:
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


async def test_after_the_last_request_nothing_is_read(proxy: Proxy) -> None:
    answers = await speak(proxy.url, get(b"/health", CLOSE) + SMUGGLED)
    assert [answer.status for answer in answers] == [200]


@pytest.mark.parametrize("size", [1, 64])
async def test_small_chunks_are_read_if_they_are_few_or_not_too_small(proxy: Proxy, size: int) -> None:
    padded = BODY + b" " * (4096 * size - len(BODY) + (size > 1) * 102_400)
    (answer,) = await speak(proxy.url, post(CHUNKED, CLOSE, body=in_chunks(padded, size)))
    assert answer.status == 200


async def test_trailers_are_no_headers(proxy: Proxy) -> None:
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
async def test_an_offer_of_another_protocol_is_ignored(proxy: Proxy, offer: tuple[bytes, ...], pieces: int) -> None:
    chunked = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
    said = (
        post(b"Content-Length: %d\r\n" % len(BODY), *offer)
        + get(b"/health", *offer)
        + post(*offer, CHUNKED, body=chunked)
        + get(b"/health", CLOSE)
    )
    answers = await speak(proxy.url, *(said[at : at + pieces] for at in range(0, len(said), pieces)))
    assert [answer.status for answer in answers] == [200] * 4
    echoes = [json.loads(answers[number].body)["echo"] for number in (0, 2)]
    assert echoes == [json.loads(BODY)] * 2
    assert "upgrade" not in answers[0].headers


@pytest.mark.parametrize("case", ["CL.TE", "two lengths", "two keys", "a path that climbs"])
async def test_an_offer_hides_nothing(proxy: Proxy, case: str) -> None:
    said, (status, _) = REFUSED[case]
    line, _, rest = said.partition(b"\r\n")
    answers = await speak(proxy.url, line + b"\r\n" + b"".join(OFFERS[0]) + rest)
    assert [answer.status for answer in answers] == [status]
    assert proxy.backend.requests == []


def test_only_the_offer_is_taken_out() -> None:
    headers = [(b"host", b"a"), (b"connection", b"Upgrade, Close"), (b"upgrade", b"h2c"), (b"x-upgrade", b"")]
    assert without_upgrade(headers) == [(b"host", b"a"), (b"connection", b"Close"), (b"x-upgrade", b"")]


@pytest.mark.process
async def test_curl_may_offer_http_2(proxy: Proxy) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("curl is not installed")
    url = f"{proxy.url}/v1/chat/completions"
    given = ["--http2", "--silent", "--max-time", "10", "-H", "content-type: application/json", "--data-binary", "@-"]
    process = await asyncio.create_subprocess_exec(curl, *given, url, stdin=PIPE, stdout=PIPE)
    out, _ = await process.communicate(BODY)
    assert json.loads(out)["echo"] == json.loads(BODY)


async def test_http_1_0_is_answered_without_chunks(proxy: Proxy) -> None:
    where = urlsplit(proxy.url)
    body = json.dumps({**json.loads(BODY), "stream": True, "tts": {"beta": 0.5}}).encode()
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    writer.write(sized(body, version=b"1.0"))
    head, _, rest = (await asyncio.wait_for(reader.read(), 10)).partition(b"\r\n\r\n")
    writer.close()
    assert head.startswith(b"HTTP/1.1 200")
    assert b"transfer-encoding" not in head
    assert b"connection: close" in head
    assert rest.startswith(b"data: {")
    assert rest.endswith(b"data: [DONE]\n\n")
    (answer,) = await speak(proxy.url, sized(version=b"1.0"))
    assert json.loads(answer.body)["echo"] == json.loads(BODY)


async def test_when_a_client_that_asked_twice_leaves_all_is_aborted(proxy: Proxy) -> None:
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


async def test_a_connection_takes_only_so_many_unanswered_requests(proxy: Proxy) -> None:
    answers = await speak(proxy.url, get() * (edge.MOST_WAITING + 9))
    assert {answer.status for answer in answers} == {200}
    assert edge.MOST_WAITING <= len(answers) < edge.MOST_WAITING + 9


# Time and room


@asynccontextmanager
async def serving(backend: FakeVLLM, **settings: Any) -> AsyncIterator[Proxy]:
    """A proxy with other settings."""
    given: dict[str, Any] = {**SMALL, **settings}
    async with (
        running(load(upstream=backend.url, **given)) as url,
        aiohttp.ClientSession() as http,
        AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as openai,
    ):
        yield Proxy(backend, url, http, openai)


@pytest.mark.parametrize(
    ("said", "statuses", "message"),
    [
        (b"", [], ""),
        (b"\r\n\r\n", [], ""),
        (b"GET /health HTTP/1.1\r\nHost: pro", [408], "the request head took longer than 0.1 s"),
        (sized()[:-5], [408], "the body took longer than 0.1 s"),
        (post(CHUNKED, body=b"ff\r\n{"), [408], "the body took longer than 0.1 s"),
    ],
)
async def test_what_does_not_come_to_its_end(backend: FakeVLLM, said: bytes, statuses: list[int], message: str) -> None:
    async with serving(backend, head_s=0.1, body_s=0.1) as proxy:
        answers = await speak(proxy.url, said)
        assert [answer.status for answer in answers] == statuses
        assert all(json.loads(answer.body)["error"]["message"] == message for answer in answers)
        assert backend.requests == []
        assert await proxy.metric("autotts_connections_cut_total", reason="slow") == len(statuses)


class Clock:
    """The time of a fake event loop, whose timers are called by `turn`."""

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
        """Call what is due until then, in order."""
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
    """A transport that keeps what is written."""

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
    """A connection in a loop of its own time."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("the app is never begun")

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
def test_a_body_keeps_a_rate_and_ends_in_time(
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


def test_a_body_is_not_late_while_the_app_does_not_read() -> None:
    clock = Clock()
    protocol, wire = connect(clock, ConnectionLimits())
    protocol.data_received(post(b"Content-Length: 8000000\r\n", body=b" " * 70_000))
    assert protocol.flow.read_paused
    clock.turn(1000)
    assert not wire.written
    protocol.flow.resume_reading()
    clock.turn(1030)
    assert wire.written.startswith(b"HTTP/1.1 408 ")


def test_a_head_has_a_time_whatever_comes_of_it() -> None:
    clock = Clock()
    protocol, wire = connect(clock, ConnectionLimits())
    protocol.data_received(b"GET /health HTTP/1.1\r\n")
    for number in range(20):
        clock.turn(clock.now + 1)
        if not wire.written:
            protocol.data_received(b"X-%d: a\r\n" % number)
    assert wire.written.startswith(b"HTTP/1.1 408 ")


async def test_a_client_without_a_key_is_closed_at_once(backend: FakeVLLM) -> None:
    async with serving(backend, client_keys=f"a={'0' * 64}") as proxy:
        for said in (post(b"Content-Length: 8000000\r\n", body=b"{"), sized(), get(b"/v1/models")):
            async with asyncio.timeout(edge.LINGER_S * 5):
                (answer,) = await speak(proxy.url, said)
            assert (answer.status, answer.headers["connection"]) == (401, "close")


async def test_an_answer_before_the_body_has_come_leaves_the_connection_open(proxy: Proxy) -> None:
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


async def test_full_tables_evict_those_who_wait_the_longest(backend: FakeVLLM) -> None:
    async with serving(backend, max_connections=4) as proxy:
        where = urlsplit(proxy.url)
        opened = []

        async def opening(said: bytes) -> asyncio.StreamReader:
            reader, writer = await asyncio.open_connection(where.hostname, where.port)
            opened.append(writer)
            writer.write(said)
            await writer.drain()
            return reader

        waiting = [await opening(said) for said in (b"", b"GET /", sized()[:-5], get())]
        assert (await waiting[3].readline()).startswith(b"HTTP/1.1 200")
        for reader in waiting:
            newcomer = await opening(get())
            assert (await newcomer.readline()).startswith(b"HTTP/1.1 200")
            ended = await asyncio.wait_for(reader.read(), 5)
            assert not ended or b"retry-after: 1" in ended or b'{"status":"ok"}' in ended
        for writer in opened:
            writer.close()
        assert await proxy.metric("autotts_connections_cut_total", reason="evicted") >= len(waiting)
        assert backend.requests == []


async def test_a_request_that_is_served_is_not_evicted(backend: FakeVLLM) -> None:
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
    """A connection that may be evicted."""

    def __init__(self) -> None:
        self.is_evicted = False

    def evict(self) -> None:
        self.is_evicted = True


def test_an_address_makes_room_for_itself_alone() -> None:
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


def test_addresses_of_one_client_are_counted_as_one() -> None:
    assert client_of("2001:db8:1:2:3:4:5:6") == client_of("2001:db8:1:2::1") != client_of("2001:db8:1:3::1")
    assert client_of("::ffff:10.0.0.1") == client_of("10.0.0.1") != client_of("10.0.0.2")
    assert client_of("fe80::1%eth0") == client_of("fe80::2")
    assert client_of("") == ""


def test_the_limit_of_open_files_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [256, 20_000]
    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(now))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: now.__setitem__(slice(None), limits))
    assert room_for(8192, 2048) == 8192
    assert now == [8192 + 2048 + SPARE_DESCRIPTORS, 20_000]
    assert room_for(100, 100) == 100
    assert now[0] == 8192 + 2048 + SPARE_DESCRIPTORS
    now[:] = [1024, 4096]
    assert room_for(8192, 2048) == 2048
    assert now == [4096, 4096]


DUPLICATES = [
    b'{"messages": [{"role": "user", "content": "hi"}], "messages": [{"role": "user", "content": "ho"}]}',
    b'{"messages": [{"role": "user", "content": "hi"}], "tts": {"beta": 0, "b\\u0065ta": 1}}',
    b'{"messages": [{"role": "user", "role": "system", "content": "hi"}]}',
]


@pytest.mark.parametrize("body", [*DUPLICATES, b'{"messages": ' + b'[{"a":' * 5000 + b"1" + b"}]" * 5000 + b"}"])
@pytest.mark.parametrize("path", [b"/v1/chat/completions", b"/v1/completions"])
async def test_bodies_that_mean_two_things_or_go_deep(proxy: Proxy, body: bytes, path: bytes) -> None:
    (answer,) = await speak(proxy.url, post(b"Content-Length: %d\r\n" % len(body), CLOSE, body=body, target=path))
    assert (answer.status, json.loads(answer.body)["error"]["code"]) == (400, "bad_json")
    assert proxy.backend.requests == []


FINE = [b"/", b"/v1/models", b"/v1/models/org%2Fname", b"/v1/models/org/name@0.5", b"/metrics?a=%2e%2e/../b&c=http://d"]


@pytest.mark.parametrize("target", FINE)
def test_targets_that_are_fine(target: bytes) -> None:
    check_target(target)


def test_heads_that_are_fine() -> None:
    for host in (b"proxy", b"proxy:8400", b"127.0.0.1:1", b"[::1]:8400"):
        check_head("1.1", b"/", [(b"host", host), *[(b"x", b"y")] * (MOST_HEADERS - 1)])
    with pytest.raises(ApiError):
        check_head("1.1", b"/", [(b"host", b"proxy"), *[(b"x", b"y")] * MOST_HEADERS])
