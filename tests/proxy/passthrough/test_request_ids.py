"""A request is found by each of its ids: the proxy's, its client's, and the one in an upstream's body."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from rich.console import Console

from discovery.store import Store
from proxy.admission import api_keys
from proxy.http.access_log import client_id
from proxy.http.graceful_shutdown import ShutdownMiddleware
from proxy.passthrough.request_ids import RecentRequests
from proxy.server import running
from proxy.settings import load
from proxy.telemetry import logs
from tests.fakes import MODEL, FakeVLLM, RawUpstream
from tests.proxy.conftest import SMALL, Proxy
from tests.proxy.recording.test_episode_log import call, serving
from tests.proxy.test_cli import autotts

MINE = "trace/7c9e-[42]"


async def ask(proxy: Proxy, beta: str | None, names: dict[str, str], key: str = "", **fields: Any) -> tuple[Any, bytes]:
    headers = dict(names) | ({} if beta is None else {"x-tts-beta": beta})
    if key:
        headers["authorization"] = f"Bearer {key}"
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "tts": {"answer": "boxed"}, **fields}
    async with proxy.http.post(f"{proxy.url}/v1/chat/completions", json=body, headers=headers) as response:
        return response.headers, await response.read()


@pytest.mark.parametrize("header", ["x-request-id", "X-Request-ID", "x-client-request-id"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("beta", ["0.5", None])
async def test_a_client_request_id_is_returned_next_to_the_proxys_own(
    proxy: Proxy, header: str, stream: bool, beta: str | None
) -> None:
    headers, _ = await ask(proxy, beta, {header: MINE}, stream=stream)
    assert headers["x-client-request-id"] == MINE
    assert headers["x-request-id"] != MINE
    headers, _ = await ask(proxy, beta, {}, stream=stream)
    assert "x-client-request-id" not in headers


async def test_a_client_request_id_is_returned_with_errors(proxy: Proxy) -> None:
    headers, _ = await ask(proxy, "2", {"x-request-id": MINE})
    assert headers["x-client-request-id"] == MINE
    async with proxy.http.get(f"{proxy.url}/nothing", headers={"x-request-id": MINE}) as response:
        assert (response.status, response.headers["x-client-request-id"]) == (404, MINE)


async def test_a_client_request_id_is_returned_during_shutdown() -> None:
    async def nothing(*_: Any) -> Any:
        raise AssertionError("called after shutdown")

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    gate = ShutdownMiddleware(nothing)
    gate.shut()
    await gate({"type": "http", "path": "/v1/models", "headers": [(b"x-request-id", MINE.encode())]}, nothing, send)
    assert sent[0]["status"] == 503
    assert (b"x-client-request-id", MINE.encode()) in sent[0]["headers"]


@pytest.mark.parametrize("value", [b"", b"a" * 129, b"a b", "é".encode(), b"a\tb"])
def test_a_client_request_id_too_long_or_not_printable_is_ignored(value: bytes) -> None:
    assert client_id([(b"x-request-id", value)]) == b""


def test_the_first_x_request_id_header_is_used() -> None:
    sent = [(b"x-client-request-id", b"b"), (b"x-request-id", b"a"), (b"x-request-id", b"c")]
    assert client_id(sent) == b"a"
    assert client_id([(b"x-request-id", b"a" * 128)]) == b"a" * 128


@pytest.mark.parametrize("unfit", [b"", b"a" * 129, b"a b"])
def test_an_invalid_x_request_id_falls_back_to_x_client_request_id(unfit: bytes) -> None:
    assert client_id([(b"x-request-id", unfit), (b"x-client-request-id", b"b")]) == b"b"


@pytest.mark.parametrize("sent", ["sk-autotts-0123456789abcdef", "trace/sk-1234", "my-secret", "id:my-secret"])
async def test_a_client_request_id_that_holds_a_key_is_returned_but_not_kept(
    backend: FakeVLLM, caplog: pytest.LogCaptureFixture, sent: str
) -> None:
    kept: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            kept.append(logs.JsonFormatter().format(record))

    listener, root = Listener(), logging.getLogger()
    caplog.set_level(logging.INFO)
    root.addHandler(listener)
    try:
        async with running(load(upstream=backend.url, **SMALL)) as url, aiohttp.ClientSession() as http:
            headers = {"x-request-id": sent, "authorization": "Bearer my-secret"}
            body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
            async with http.post(f"{url}/v1/chat/completions", json=body, headers=headers) as response:
                assert response.headers["x-client-request-id"] == sent
            async with http.get(f"{url}/v1/tts/requests/{sent.replace('/', '%2F')}", headers=headers) as response:
                assert response.status == 404
    finally:
        root.removeHandler(listener)
    assert any("POST /v1/chat/completions" in line for line in kept)
    assert not any(sent in line for line in kept)


@pytest.mark.parametrize(("token", "is_kept"), [("-", True), ("x-token", True), ("a-x-token-c", False)])
async def test_a_client_request_id_that_holds_a_short_placeholder_key_is_kept(
    backend: FakeVLLM, tmp_path: Path, token: str, is_kept: bool
) -> None:
    sent = "a-x-token-c"
    async with serving(backend, tmp_path / "s.db") as proxy:
        await ask(proxy, "0.5", {"x-request-id": sent, "authorization": f"Bearer {token}"})
        status, record = await call(proxy, "GET", f"/v1/tts/requests/{sent}", token)
    assert (status, record.get("client_request_id")) == ((200, sent) if is_kept else (404, None))


@pytest.mark.process
async def test_a_served_request_is_found_by_its_client_request_id(backend: FakeVLLM, tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    async with serving(backend, path) as proxy:
        headers, body = await ask(proxy, "0.5", {"x-request-id": MINE})
        own = headers["x-request-id"]
        status, record = await call(proxy, "GET", f"/v1/tts/requests/{MINE.replace('/', '%2F')}")
        assert (status, record["request"], record["client_request_id"]) == (200, own, MINE)
        assert json.loads(body)["id"] == own
        status, _ = await call(proxy, "POST", "/v1/tts/feedback", body={"request_id": MINE, "correct": True})
        assert status in (200, 202)
    async with Store.open(path) as store:
        assert [feedback.request_id for feedback in await store.feedback()] == [own]
    rows = json.loads(autotts("requests", "list", "--store", str(path), "--client-id", MINE, "--json").stdout)
    assert [(row["request"], row["client_request_id"]) for row in rows] == [(own, MINE)]
    assert autotts("requests", "list", "--store", str(path), "--client-id", "trace/%", "--json").stdout.strip() == "[]"
    assert json.loads(autotts("trace", "show", MINE, "--store", str(path), "--json").stdout)["request"] == own


async def test_a_proxy_request_id_reused_by_a_client_still_names_its_first_request(
    backend: FakeVLLM, tmp_path: Path
) -> None:
    async with serving(backend, tmp_path / "s.db") as proxy:
        for beta in ("0.5", None):
            first, _ = await ask(proxy, beta, {})
            again, _ = await ask(proxy, beta, {"x-request-id": first["x-request-id"]})
            assert again["x-client-request-id"] == first["x-request-id"]
            _, record = await call(proxy, "GET", f"/v1/tts/requests/{first['x-request-id']}")
            assert record["request"] == first["x-request-id"]


PIECES = [b'data: {"id":"chatcmpl-of-vllm","choices":[]}\n\n', b'data: {"id":"no"}\n\n', b"data: [DONE]\n\n"]


@pytest.mark.parametrize(
    ("pieces", "kind"),
    [
        ([b'{"id": "chatcmpl-of-vllm", "choices": [{"id": "no"}]}'], "application/json"),
        (PIECES, "text/event-stream"),
        ([b'event: response.created\ndata: {"response":{"id":"chatcmpl-of-vllm"}}\n\n'], "text/event-stream"),
    ],
)
@pytest.mark.parametrize("limits", [{}, {"max_total_tokens": 500}])
async def test_a_forwarded_request_is_found_by_own_client_and_upstream_id(
    pieces: list[bytes], kind: str, limits: dict[str, int]
) -> None:
    async with (
        RawUpstream(pieces, content_type=kind).serve() as upstream,
        running(load(upstream=upstream.url, **limits, **SMALL)) as url,
        aiohttp.ClientSession() as http,
    ):
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "stream": "event" in kind}
        sent = {"x-request-id": MINE}
        async with http.post(f"{url}/v1/chat/completions", json=body, headers=sent) as response:
            await response.read()
            own = response.headers["x-request-id"]
        assert upstream.seen[0].headers["x-request-id"] == own
        records = []
        for name in (own, "chatcmpl-of-vllm", MINE.replace("/", "%2F")):
            async with http.get(f"{url}/v1/tts/requests/{name}") as response:
                assert response.status == 200, name
                records.append(await response.json())
    assert records[0] == records[1] == records[2]
    assert {**records[0], "created": ""} == {
        "request": own,
        "tenant": "",
        "created": "",
        "endpoint": "/v1/chat/completions",
        "model": MODEL,
        "reason": "no_beta",
        "status": 200,
        "client_request_id": MINE,
        "applied": False,
        "upstream_id": "chatcmpl-of-vllm",
    }


async def test_no_id_finds_a_request_of_another_tenant(backend: FakeVLLM, tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    lines = [
        api_keys.key_file_entry("alice", "a-key"),
        api_keys.key_file_entry("bob", "b-key"),
        api_keys.key_file_entry("root", "r-key", admin=True),
    ]
    file.write_text("\n".join(lines))
    async with serving(backend, tmp_path / "s.db", keys=file) as proxy:
        for beta in ("0.5", None):
            headers, body = await ask(proxy, beta, {"x-request-id": "the-same"}, "a-key")
            names = (headers["x-request-id"], "the-same", json.loads(body)["id"])
            for key, status in (("a-key", 200), ("b-key", 404), ("r-key", 200)):
                replies = [(await call(proxy, "GET", f"/v1/tts/requests/{name}", key)) for name in names]
                assert [reply[0] for reply in replies] == [status] * 3, (key, beta, replies)
        mine, _ = await ask(proxy, "0.5", {"x-request-id": "the-same"}, "b-key")
        _, record = await call(proxy, "GET", "/v1/tts/requests/the-same", "b-key")
        assert record["request"] == mine["x-request-id"]
        _, record = await call(proxy, "GET", "/v1/tts/requests/the-same", "a-key")
        assert record["request"] == headers["x-request-id"]


async def test_every_log_line_of_a_request_has_its_client_request_id(backend: FakeVLLM) -> None:
    written = io.StringIO()
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    settings = load(upstream=backend.url, log="json", **SMALL)
    logs.configure_logging(settings, Console(file=written))
    try:
        backend.fault = "echo"
        async with running(settings) as url, aiohttp.ClientSession() as http:
            await ask(Proxy(backend, url, http, None), "0.5", {"x-request-id": MINE})  # type: ignore[arg-type]
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    lines = [json.loads(line) for line in written.getvalue().splitlines()]
    about = [line for line in lines if line.get("request_id")]
    assert len(about) >= 2
    assert {line.get("client_request_id") for line in about} == {MINE}


def test_recent_requests_keeps_only_the_latest_ids() -> None:
    recent = RecentRequests(3)
    for number in range(10):
        recent.add_alias("t", f"name-{number}", f"req-{number}")
        recent.note_upstream_id("t", f"req-{number}", b'{"id": "up-%d"}' % number)
    assert [recent.resolve("t", f"name-{number}") for number in (0, 9)] == ["name-0", "req-9"]
    assert recent.resolve("t", "up-9") == "req-9"
    assert len(recent._aliases) == len(recent._upstream_ids) == 3


@pytest.mark.vllm
async def test_the_id_in_a_real_vllm_reply_finds_the_forwarded_request(vllm: str) -> None:
    async with running(load(upstream=vllm, **SMALL)) as url, aiohttp.ClientSession() as http:
        for path, fields in (
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}),
            ("/v1/completions", {"prompt": "hi", "max_tokens": 4}),
            ("/v1/responses", {"input": "hi", "max_output_tokens": 4}),
        ):
            for stream in (False, True):
                body = {"model": "autotts-tiny", "stream": stream, **fields}
                async with http.post(url + path, json=body) as response:
                    own, content = response.headers["x-request-id"], await response.text()
                identity = json.loads(content)["id"] if not stream else content.partition('"id":"')[2].partition('"')[0]
                async with http.get(f"{url}/v1/tts/requests/{identity}") as response:
                    record = await response.json()
                assert (record.get("request"), record.get("upstream_id")) == (own, identity), (path, stream)
                assert own in identity or path == "/v1/responses"
