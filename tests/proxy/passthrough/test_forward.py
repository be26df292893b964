"""Requests that no controller serves are forwarded, and every reply says so."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import pytest
from starlette.responses import Response

from proxy.passthrough.forward import BufferedResponse
from proxy.server import running
from proxy.settings import load
from tests.fakes import MODEL, FakeVLLM
from tests.proxy.conftest import SMALL, Proxy


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"tool_choice": "required"}, "tools"),
        ({"n": 2}, "n"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"guided_regex": "a+"}, "structured_output"),
        ({"functions": [{"name": "f"}]}, "tools"),
        ({"reasoning_effort": "weird"}, "reasoning_effort"),
        ({"modalities": ["text", "audio"]}, "multimodal"),
        ({"messages": []}, "messages"),
        ({"n": True}, "n"),
        ({"echo": True}, "echo"),
    ],
)
async def test_a_request_no_controller_serves_is_forwarded_with_the_reason(
    proxy: Proxy, fields: dict[str, Any], reason: str
) -> None:
    status, headers, reply = await proxy.ask("0.5", **fields, tts={"answer": "number"})
    assert status == 200
    assert (headers["x-tts-applied"], headers["x-tts-reason"]) == ("false", reason)
    assert reply["echo"]["model"] == MODEL
    assert "tts" not in reply["echo"]
    assert reply["echo"].items() >= fields.items()
    status, _, reply = await proxy.ask("0.5", **fields, tts={"required": True})
    assert (status, reply["error"]["param"]) == (400, next(iter(fields)))
    assert reason in reply["error"]["message"]
    assert await proxy.metric("autotts_requests_total", outcome="passed_through") == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 1, "logprobs": False, "response_format": {"type": "text"}, "tools": [], "presence_penalty": 0},
        {"user": "me", "metadata": {"a": "b"}, "tool_choice": "none", "frequency_penalty": 0.0},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
        {"usage": {"include": True}, "provider": {"order": ["x"]}, "cache_prompt": True, "min_tokens": "0", "n": "1"},
    ],
)
async def test_fields_with_neutral_values_keep_beta_applied(proxy: Proxy, fields: dict[str, Any]) -> None:
    _, headers, _ = await proxy.ask("0", **fields)
    assert headers["x-tts-applied"] == "true"


LENIENT: list[dict[str, Any]] = [
    {"stream_options": {"include_usage": None}},
    {"repetition_penalty": 2.5},
    {"logit_bias": {" 5": 1000, "-1": -1e6, "12345678901": 0}},
    {"max_tokens": "5"},
    {"max_tokens": 5.0},
    {"max_completion_tokens": 2**40},
    {"top_k": -1},
    {"seed": "3", "temperature": "0.5", "stream": "false"},
    {"model": ""},
    {"messages": []},
    {"stop": ""},
    {"tts": None},
]
"""Unusual fields that vLLM 0.32 accepts."""


@pytest.mark.parametrize("fields", LENIENT)
async def test_lenient_fields_that_vllm_accepts_are_forwarded_unchanged(proxy: Proxy, fields: dict[str, Any]) -> None:
    status, headers, reply = await proxy.ask(None, **fields)
    assert status == 200, reply
    assert headers["x-tts-applied"] == "false"
    expected = {name: value for name, value in fields.items() if name not in ("tts", "model")}
    assert reply["echo"].items() >= expected.items()
    assert "tts" not in reply["echo"]


@pytest.mark.parametrize("fields", [fields for fields in LENIENT if "messages" not in fields])
async def test_lenient_fields_that_vllm_accepts_are_served_by_a_controller(
    proxy: Proxy, fields: dict[str, Any]
) -> None:
    status, headers, reply = await proxy.ask("0", **fields)
    assert (status, headers["x-tts-applied"]) == (200, "true"), reply
    first = proxy.backend.requests[0]
    assert first.get("repetition_penalty") == fields.get("repetition_penalty")
    if "logit_bias" in fields:
        assert first["logit_bias"] == {"5": 1000, "-1": -1e6, "12345678901": 0}


async def test_a_request_without_beta_is_forwarded_or_refused_if_required(proxy: Proxy) -> None:
    _, headers, reply = await proxy.ask(None)
    assert (headers["x-tts-applied"], headers["x-tts-reason"]) == ("false", "no_beta")
    assert reply["id"] == "upstream"
    status, _, reply = await proxy.ask(None, tts={"required": True})
    assert (status, reply["error"]["code"]) == (400, "tts_not_applicable")


async def test_a_model_alias_is_resolved_before_forwarding(proxy: Proxy) -> None:
    _, headers, reply = await proxy.ask(None, model=f"{MODEL}@0.5", n=2)
    assert (headers["x-tts-reason"], reply["echo"]["model"]) == ("n", MODEL)


async def test_only_allowed_headers_and_paths_are_forwarded(proxy: Proxy) -> None:
    secret = {"authorization": "Bearer client-secret", "cookie": "a=b", "x-custom": "1"}
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
    async with proxy.http.post(f"{proxy.url}/v1/chat/completions", json=body, headers=secret) as response:
        assert response.status == 200
    assert not {"authorization", "cookie", "x-custom"} & {name.lower() for name in proxy.backend.headers[-1]}
    async with proxy.http.post(f"{proxy.url}/detokenize", json={"tokens": [104, 105]}) as response:
        assert await response.json() == {"prompt": "hi"}
        assert response.headers["x-tts-applied"] == "false"
    for path in ("/v1/load_lora_adapter", "/sleep", "/v1/../health", "//health"):
        async with proxy.http.post(f"{proxy.url}{path}", json={}) as response:
            assert response.status in (400, 404, 405)


async def test_models_health_and_ready_follow_the_state_of_the_upstream(proxy: Proxy) -> None:
    assert MODEL in [model.id async for model in proxy.openai.models.list()]
    for path in ("/health", "/ready"):
        async with proxy.http.get(proxy.url + path) as response:
            assert response.status == 200
    proxy.backend.fault = "no_models"
    async with asyncio.timeout(10):
        status = 200
        while status == 200:  # until the last health check is too old
            async with proxy.http.get(f"{proxy.url}/ready") as response:
                status = response.status
    assert status == 503
    assert await proxy.metric("autotts_upstream_up") == 0


async def test_a_default_beta_is_not_applied_to_greedy_requests() -> None:
    async with FakeVLLM().serve() as backend:
        settings = load(upstream=f"{backend.url}/v1/", beta=0.5, upstream_api_key="k", **SMALL)
        async with running(settings) as url, aiohttp.ClientSession() as http:
            body = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0}
            async with http.post(f"{url}/v1/chat/completions", json=body) as response:
                assert response.headers["x-tts-reason"] == "temperature"
        sent = {name.lower(): value for name, value in backend.headers[-1].items()}
        assert (sent["authorization"], sent["accept-encoding"]) == ("Bearer k", "identity")


@pytest.mark.parametrize("status", [200, 204, 304, 404])
def test_a_short_response_has_the_head_that_starlette_would_give_it(status: int) -> None:
    headers = {"cache-control": "no-cache", "content-type": "text/plain"}
    ours, theirs = BufferedResponse(b"", status, headers), Response(b"", status, headers)
    assert (ours.status_code, ours.raw_headers) == (theirs.status_code, theirs.raw_headers)
    assert ours.headers == theirs.headers
