"""The HTTP edge, spoken to by raw sockets: one answer a request, and nothing reaches another route."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest

from proxy import edge
from proxy.edge import MOST_HEADERS, check_head, check_target
from proxy.errors import ApiError
from tests.fakes import MODEL
from tests.proxy.conftest import Proxy, backend, proxy
from tests.proxy.test_records import until

__all__ = ["backend", "proxy"]  # fixtures

BODY = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}).encode()
HOST = b"Host: proxy\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
JSON = b"Content-Type: application/json\r\n"
SMUGGLED = b"POST /tokenize HTTP/1.1\r\nHost: proxy\r\nContent-Length: 2\r\n\r\n{}"


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


@pytest.mark.parametrize("case", ["no Host", "CL.TE", "a path that climbs", "5,000 headers"])
async def test_why_it_was_refused_is_logged_and_nothing_of_what_was_said(
    proxy: Proxy, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    caplog.set_level(logging.INFO)
    said, _ = REFUSED[case]
    (answer,) = await speak(proxy.url, said)
    code = json.loads(answer.body)["error"]["code"]
    warned = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert warned == [f"a request was refused: {code}"]


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


async def test_trailers_are_no_headers(proxy: Proxy) -> None:
    chunk = b"%x\r\n%b\r\n0\r\n" % (len(BODY), BODY)
    trailers = b"X-Tts-Beta: 0.5\r\nAuthorization: Bearer b\r\nHost: evil\r\n\r\n"
    (answer,) = await speak(proxy.url, post(CHUNKED, CLOSE, body=chunk + trailers))
    assert (answer.status, answer.headers["x-tts-reason"]) == (200, "no_beta")


async def test_an_upgrade_is_not_taken(proxy: Proxy) -> None:
    said = get(b"/health", b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: x\r\n")
    answers = await speak(proxy.url, said + SMUGGLED)
    assert [answer.status for answer in answers] == [200]


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


@pytest.mark.parametrize(
    ("said", "statuses"), [(b"", []), (b"GET /health HTTP/1.1\r\nHost: pro", [408]), (sized()[:-5], [408])]
)
async def test_what_does_not_come_to_its_end(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch, said: bytes, statuses: list[int]
) -> None:
    monkeypatch.setattr(edge, "HEAD_S", 0.1)
    monkeypatch.setattr(edge, "BODY_S", 0.1)
    assert [answer.status for answer in await speak(proxy.url, said)] == statuses
    assert proxy.backend.requests == []


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
