"""A canary word is put wherever a client or an upstream can put text, and must appear nowhere else."""

from __future__ import annotations

import json
import logging
from base64 import b64encode
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from openai import AsyncOpenAI

from proxy.api.routes import ROUTES
from proxy.api.tts import TtsEndpoints
from proxy.errors import SettingsError
from proxy.server import running
from proxy.settings import load
from tests.fakes import ASSISTANT, MODEL, FakeVLLM
from tests.proxy.conftest import SMALL, Proxy, backend
from tests.proxy.recording.test_episode_log import until

pytestmark = pytest.mark.slow

__all__ = ["backend"]  # a fixture

CANARY = "zx81canary"
"""Letters and digits only, so that no encoding hides it. Never sent to the fake's own logs."""
HEADERS = ("x-custom", "cookie", "user-agent", "referer", "traceparent", "accept", "x-forwarded-for")
QUESTION = [{"role": "user", "content": f"{CANARY} what is 3+4?"}]
BODY: dict[str, Any] = {"model": MODEL, "messages": QUESTION, "tts": {"beta": 0.5, "answer": "boxed"}}

FIELDS: list[dict[str, Any]] = [
    {"model": CANARY},
    {"model": f"{MODEL}@{CANARY}"},
    {"stop": CANARY},
    {"user": CANARY},
    {"metadata": {CANARY: CANARY}},
    {CANARY: CANARY},
    {"messages": CANARY},
    {"messages": [{"role": CANARY, "name": CANARY, "content": CANARY}]},
    {"messages": [{"role": "user", "content": [{"type": CANARY, "text": CANARY}]}]},
    {"reasoning_effort": CANARY},
    {"chat_template_kwargs": {CANARY: CANARY}},
    {"temperature": CANARY},
    {"seed": CANARY},
    {"logit_bias": {CANARY: 1}},
    {"tools": [{"type": "function", "function": {"name": CANARY}}]},
    {"response_format": {"type": CANARY}},
    {"stream_options": {"include_usage": CANARY}},
    {"tts": {"beta": CANARY}},
    {"tts": {"beta": 0.5, "controller": CANARY}},
    {"tts": {"beta": 0.5, "controller": f"{CANARY}.py"}},
    {"tts": {"beta": 0.5, "answer": CANARY}},
    {"tts": {"beta": 0.5, "answer": f"regex:{CANARY}(.)"}},
    {"tts": {"beta": 0.5, "answer": f"regex:({CANARY}"}},
    {"tts": {"beta": 0.5, CANARY: 1}},
    {"tts": {"deadline_s": CANARY}},
]
FAULTS = ("echo", "babble", "refuse", "error_event", "garbage", "cut", "lie", "drop", "error_body")

SPEAKING: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", BODY),
    ("/v1/chat/completions", {**BODY, "stream": True}),
    ("/v1/completions", {"model": MODEL, "prompt": [ord(char) for char in ASSISTANT + CANARY], "max_tokens": 5}),
]


class Asking:
    """Client that puts the canary into everything it sends. Only its own replies may contain the canary."""

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy

    async def send(self, method: str, path: str, **given: Any) -> tuple[int, bytes]:
        headers = dict.fromkeys(HEADERS, CANARY) | {"authorization": f"Bearer {CANARY}"} | given.pop("headers", {})
        async with self.proxy.http.request(method, self.proxy.url + path, headers=headers, **given) as response:
            return response.status, await response.read()

    async def chat(self, **fields: Any) -> tuple[int, bytes]:
        return await self.send("POST", "/v1/chat/completions", json={**BODY, **fields})


async def bystander(proxy: Proxy) -> str:
    """Return headers and bodies of all replies to another client, errors included."""
    replies = []
    for method, path, body in [
        ("GET", "/metrics", None),
        ("GET", "/ready", None),
        ("GET", "/v1/models", None),
        ("GET", "/v1/nothing", None),
        ("GET", "/v1/tts/requests/chatcmpl-0", None),
        ("GET", "/openapi.json", None),
        ("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "tts": {"beta": 0.5}}),
        ("POST", "/v1/chat/completions", {"model": "nope", "messages": [{"role": "user", "content": "hi"}]}),
        ("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "tts": {"controller": "x"}}),
        ("POST", "/v1/tts/feedback", {"request_id": "x", "correct": True}),
    ]:
        async with proxy.http.request(method, proxy.url + path, json=body) as response:
            replies.append(str(response.headers) + await response.text())
    return "\n".join(replies)


@pytest.mark.parametrize("record_fraction", [0.0, 1.0])
async def test_text_sent_by_a_client_reaches_no_log_metric_store_or_other_client(
    backend: FakeVLLM,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    record_fraction: float,
) -> None:
    caplog.set_level(logging.DEBUG)

    async def failing(self: TtsEndpoints, _: Any) -> Any:
        raise RuntimeError(f"{CANARY} failed")

    settings = load(
        upstream=backend.url, store=tmp_path / "s.db", record_fraction=record_fraction, record_branches=3, **SMALL
    )
    async with (
        running(settings) as url,
        aiohttp.ClientSession() as http,
        AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as openai,
    ):
        proxy = Proxy(backend, url, http, openai)
        mine = Asking(proxy)
        status, raw = await mine.chat()
        assert status == 200
        own = {"request_id": json.loads(raw)["id"]}
        assert (await mine.chat(stream=True))[0] == 200
        for answer in (CANARY, f"\\boxed{{{CANARY}}}"):
            assert (await mine.send("POST", "/v1/tts/feedback", json={**own, "answer": answer}))[0] in (200, 202)
        for fields in ({"request_id": CANARY, "correct": True}, {**own, "score": CANARY}, {**own, CANARY: 1}):
            assert (await mine.send("POST", "/v1/tts/feedback", json=fields))[0] in (400, 404)
        for fields in FIELDS:
            assert (await mine.chat(**fields))[0] < 500, fields
        for beta in (CANARY, f"0.5 {CANARY}"):
            assert (await mine.send("POST", "/v1/chat/completions", json=BODY, headers={"x-tts-beta": beta}))[0] == 400
        for route in ROUTES:
            path = route.path.replace("{request_id:path}", CANARY).replace("{model:path}", CANARY)
            await mine.send(route.method, f"{path}?{CANARY}={CANARY}&model={CANARY}", data=f"{{{CANARY}".encode())
        for path in (f"/{CANARY}", f"/v1/{CANARY}/x", f"/%7a{CANARY}", f"/v1/models/{CANARY}%20"):
            assert (await mine.send("GET", path))[0] in (400, 404)
        assert (await mine.send(CANARY.upper(), "/health"))[0] in (400, 405)
        assert (await mine.send("GET", "/health", headers={"host": f"{CANARY}/"}))[0] == 400
        for fault in () if record_fraction else FAULTS:
            for path, body in SPEAKING:
                backend.fault = fault
                await mine.send("POST", path, json=body)
                backend.fault = ""
                assert (await mine.chat())[0] == 200  # so that the circuit breaker stays closed
        monkeypatch.setattr(TtsEndpoints, "curve", failing)
        assert (await mine.send("GET", "/v1/tts/curve"))[0] == 500
        replies = await bystander(proxy)
        if record_fraction:
            await until(lambda: proxy.metric("autotts_recordings_total", outcome="recorded"))
            replies += await bystander(proxy)
    assert CANARY not in replies
    logged = "\n".join(logging.Formatter().format(record) for record in caplog.records)
    assert "RuntimeError" in logged
    leaks = [line for line in logged.splitlines() if CANARY in line]
    assert leaks == []
    kept = b"".join(file.read_bytes() for file in tmp_path.iterdir())  # noqa: ASYNC240
    assert CANARY.encode() not in kept
    assert b"chatcmpl-" in kept


@pytest.mark.parametrize("place", ["key", "password", "user"])
async def test_the_upstream_credentials_are_sent_to_the_upstream_only(
    backend: FakeVLLM, tmp_path: Path, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    caplog.set_level(logging.DEBUG)
    user, password = {"key": ("", ""), "password": ("us%65r", f"{CANARY}%20"), "user": (CANARY, "")}[place]
    named = {"upstream": backend.url.replace("//", f"//{user}:{password}@" if user else "//")}
    keyed = {"upstream_api_key": CANARY} if place == "key" else {}
    plain = f"user:{CANARY} " if place == "password" else f"{CANARY}:"
    sent = f"Bearer {CANARY}" if place == "key" else f"Basic {b64encode(plain.encode()).decode()}"
    settings = load(**named, **keyed, admin_key=f"{CANARY}-admin", store=tmp_path / "s.db", **SMALL)
    assert place != "key" or CANARY not in repr(settings)
    async with running(settings) as url, aiohttp.ClientSession() as http:
        proxy = Proxy(backend, url, http, None)  # type: ignore[arg-type]
        replies = await bystander(proxy)
        for fault in FAULTS:
            backend.fault = fault
            _, headers, body = await proxy.ask("0.5")
            replies += str(headers) + json.dumps(body)
            backend.fault = ""
            await proxy.ask("0.5")
        body = {"model": MODEL, "prompt": [ord(char) for char in ASSISTANT], "max_tokens": 5}
        async with http.post(f"{url}/v1/completions", json=body) as response:
            replies += str(response.headers) + await response.text()
        async with http.get(f"{url}/ready") as response:
            assert (await response.json())["upstream"] == backend.url
        assert {headers.get("Authorization") for headers in backend.headers} == {sent}
        backend.fault = "unavailable"
        for _ in range(6):
            _, headers, reply = await proxy.ask("0.5")
            replies += str(headers) + json.dumps(reply)
        assert "circuit breaker is open" in replies
    assert CANARY not in replies
    assert CANARY not in caplog.text
    assert "circuit breaker stays open" in caplog.text
    for path in tmp_path.iterdir():  # noqa: ASYNC240
        assert CANARY.encode() not in path.read_bytes(), path.name


def test_both_an_upstream_key_and_url_credentials_are_refused_without_showing_them() -> None:
    with pytest.raises(SettingsError, match="upstream_api_key") as caught:
        load(upstream=f"http://user:{CANARY}@127.0.0.1:1", upstream_api_key=CANARY)
    assert CANARY not in str(caught.value)
    with pytest.raises(SettingsError, match="upstream") as caught:
        load(upstream=f"htt://user:{CANARY}@127.0.0.1:1")
    assert CANARY not in str(caught.value)
