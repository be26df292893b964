"""An upstream that is absent, silent, dying or lying gives a clear error or the best answer so far."""

from __future__ import annotations

import socket

import aiohttp
import pytest

from proxy.server import running
from proxy.settings import load
from proxy.upstream.embedded import free_port
from tests.fakes import ASSISTANT
from tests.proxy.conftest import SMALL, Proxy, backend, proxy

__all__ = ["backend", "proxy"]  # fixtures

FAULTS = {
    "refuse": (400, "no such thing", "invalid_request_error"),
    "garbage": (502, "not a JSON object", "upstream_error"),
    "cut": (502, "ended a stream before", "upstream_error"),
    "lie": (502, "reported completion_tokens", "upstream_error"),
    "foreign": (502, "not in vLLM's format", "upstream_error"),
    "error_event": (502, "engine died", "upstream_error"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
async def test_an_upstream_fault_from_the_start_returns_a_clear_error(proxy: Proxy, fault: str, stream: bool) -> None:
    proxy.backend.fault = fault
    body = {"model": "fake-model", "messages": [{"role": "user", "content": "hi"}], "tts": {"beta": 0.5}}
    expected, message, kind = FAULTS[fault]
    async with proxy.http.post(f"{proxy.url}/v1/chat/completions", json={**body, "stream": stream}) as response:
        text = await response.text()
        if stream and response.status == 200:
            assert "[DONE]" not in text
        else:
            assert response.status == expected
    assert message in text
    assert kind in text
    assert "Traceback" not in text
    assert proxy.backend.running == 0
    assert await proxy.metric("autotts_requests_total", outcome="refused" if fault == "refuse" else "failed") == 1


@pytest.mark.parametrize("fault", ["cut", "lie", "error_event", "garbage"])
async def test_an_upstream_fault_midway_returns_the_best_answer_so_far(proxy: Proxy, fault: str) -> None:
    await proxy.ask("0.5", tts={"answer": "boxed"})
    requests = len(proxy.backend.requests)
    proxy.backend.fault, proxy.backend.fault_after = fault, requests + requests - 2
    status, headers, reply = await proxy.ask("0.5", tts={"answer": "boxed"})
    assert status == 200, reply
    assert headers["x-tts-stop"] == "upstream_error"
    assert reply["choices"][0]["message"]["content"] == "It is \\boxed{7}"
    assert reply["tts"]["tokens"]["total"] == sum(v for k, v in reply["tts"]["tokens"].items() if k != "total")


async def test_a_failure_that_spent_tokens_tells_the_client_not_to_retry(proxy: Proxy) -> None:
    proxy.backend.fault, proxy.backend.fault_after = "cut", 1
    status, headers, _ = await proxy.ask("0.5", tts={"controller": "cmc"})
    assert status == 502
    assert headers["x-should-retry"] == "false"
    assert int(headers["x-tts-tokens"]) > 0


async def test_an_upstream_without_models_returns_502(proxy: Proxy) -> None:
    proxy.backend.fault = "no_models"
    status, _, reply = await proxy.ask("0.5")
    assert (status, reply["error"]["type"]) == (502, "upstream_error")


async def test_an_unreachable_upstream_returns_502_and_is_not_ready() -> None:
    settings = load(upstream=f"http://127.0.0.1:{free_port()}", **SMALL)
    chat = ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]})
    async with running(settings) as url, aiohttp.ClientSession() as http:
        for path, body in (chat, ("/tokenize", {})):
            async with http.post(url + path, json=body, headers={"x-tts-beta": "1"}) as response:
                assert response.status == 502
                assert "cannot connect to upstream" in (await response.json())["error"]["message"]
        async with http.get(f"{url}/ready") as response:
            assert response.status == 503


async def test_an_upstream_that_never_answers_returns_504() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        settings = load(upstream=f"http://127.0.0.1:{mute.getsockname()[1]}", **{**SMALL, "read_timeout_s": 0.2})
        async with running(settings) as url, aiohttp.ClientSession() as http:
            body = {"messages": [{"role": "user", "content": "hi"}]}
            async with http.post(f"{url}/v1/chat/completions", json=body, headers={"x-tts-beta": "1"}) as response:
                assert response.status == 504
                assert "sent no data in time" in (await response.json())["error"]["message"]


async def test_a_forwarded_stream_that_breaks_off_has_no_done_event(proxy: Proxy) -> None:
    proxy.backend.fault = "cut"
    body = {"model": "fake-model", "prompt": [ord(c) for c in ASSISTANT], "max_tokens": 5}
    async with proxy.http.post(f"{proxy.url}/v1/completions", json=body) as response:
        assert response.status == 200
        assert b"[DONE]" not in await response.read()
