"""Values that vLLM accepts and then fails on are refused by field name; all others are left to vLLM."""

from __future__ import annotations

import io
import json
from typing import Any

import aiohttp
import pytest

from proxy.errors import BadRequest
from proxy.requests import field_values
from proxy.requests.field_values import (
    MAX_ALTERNATIVES,
    MAX_CHOICES,
    MAX_CONSTRAINT,
    MAX_CONSTRAINTS,
    MAX_INT,
    MAX_LIST,
    MAX_STOP,
    MAX_TEXT,
    MAX_WORD,
    check,
)
from proxy.server import running
from proxy.settings import EMBEDDED, load
from proxy.upstream.client import UpstreamClient
from proxy.upstream.relayed_body import RelayedBody
from tests.fakes import MODEL, FakeVLLM
from tests.proxy.conftest import SMALL, Proxy

BIG = 10**20
JSON = {"content-type": "application/json"}
SCHEMAS: list[dict[str, Any]] = [
    {"type": "object", "patternProperties": {"(": {}}},
    {"type": "object", "patternProperties": {"a": {"patternProperties": {"[": {}}}}},
    {"type": "string", "pattern": "("},
    {"type": "string", "pattern": "a)b"},
    {"type": "string", "pattern": "[a-"},
    {"type": "string", "pattern": "[^]"},
    {"type": "string", "pattern": "\\"},
    {"type": "string", "pattern": f"a{{1,{2**31}}}"},
    {"type": "string", "pattern": "a" * (MAX_TEXT + 1)},
    {"type": "string", "minLength": -1},
    {"type": "string", "maxLength": 2**31},
    {"type": "string", "minLength": 2**40},
    {"type": "string", "pattern": "a{%s}" % ("9" * 5000)},
    {"type": "array", "items": {}, "minItems": -5},
    {"type": "array", "items": {"type": "array", "maxItems": 1e30}},
    {"type": "object", "minProperties": 2**40},
    {"type": "object", "properties": {"\0": {}}},
    {"enum": ["a\0b"]},
    {"enum": [str(i) for i in range(MAX_CHOICES + 1)]},
    {"anyOf": [{"const": i} for i in range(MAX_ALTERNATIVES + 1)]},
    {"$defs": {"a": {"oneOf": [{}] * (MAX_ALTERNATIVES + 1)}}},
    {"type": "object", "properties": {f"key{i}": {"type": "string"} for i in range(5000)}},
    {"type": "integer", "minimum": BIG},
]
FIELDS: list[tuple[dict[str, Any], str]] = [
    *(
        ({name: value}, name)
        for name in ("top_k", "thinking_token_budget", "stream_interval")
        for value in (BIG, 2**64)
    ),
    ({"top_k": str(BIG)}, "top_k"),
    ({"top_k": -(2**40)}, "top_k"),
    ({"top_k": "9" * 5000}, "top_k"),
    ({"min_tokens": MAX_INT + 1}, "min_tokens"),
    *(
        ({"repetition_detection": {"max_pattern_size": 5, "min_count": 2, name: BIG}}, f"repetition_detection.{name}")
        for name in ("max_pattern_size", "min_pattern_size", "min_count")
    ),
    ({"chat_template_kwargs": {"enable_thinking": BIG}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"a": [{"b": -BIG}]}}, "chat_template_kwargs"),
    ({"metadata": {"a": 2**64}}, "metadata"),
    ({"stop": "x" * (MAX_STOP + 1)}, "stop"),
    ({"stop": ["a", "x" * 1_900_000]}, "stop"),
    ({"bad_words": ["x" * (MAX_WORD + 1)]}, "bad_words"),
    *(({name: ["1"] * (most + 1)}, name) for name, most in MAX_LIST.items()),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
    ({"structured_outputs": {"regex": f"a{{{2**40}}}"}}, "structured_outputs.regex"),
    ({"structured_outputs": {"grammar": f'root ::= "a"{{1,{2**31}}}'}}, "structured_outputs.grammar"),
    ({"structured_outputs": {"grammar": "a" * (MAX_TEXT + 1)}}, "structured_outputs.grammar"),
    ({"structured_outputs": {"choice": ["x" * 1_000_000]}}, "structured_outputs.choice"),
    ({"structured_outputs": {"choice": [str(i) for i in range(50_000)]}}, "structured_outputs.choice"),
    ({"structured_outputs": {"choice": ["x" * 30_000] * 5}}, "structured_outputs.choice"),
    ({"structured_outputs": {"whitespace_pattern": "("}}, "structured_outputs.whitespace_pattern"),
    ({"structured_outputs": {"structural_tag": json.dumps(SCHEMAS[0])}}, "structured_outputs.structural_tag"),
    ({"guided_regex": "("}, "guided_regex"),
    *(({"structured_outputs": {"json": schema}}, "structured_outputs.json") for schema in SCHEMAS[:-1]),
    ({"structured_outputs": {"json": SCHEMAS[-1]}}, "structured_outputs"),
    ({"structured_outputs": {"json": json.dumps(SCHEMAS[0])}}, "structured_outputs.json"),
    ({"guided_json": SCHEMAS[0]}, "guided_json"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMAS[0]}}},
        "response_format",
    ),
    ({"text": {"format": {"type": "json_schema", "name": "a", "schema": SCHEMAS[0]}}}, "text.format"),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": SCHEMAS[0]}}]},
        "tools.0.function.parameters",
    ),
]


@pytest.mark.parametrize(("body", "field"), FIELDS)
def test_values_vllm_fails_on_are_refused_by_field_name(body: dict[str, Any], field: str) -> None:
    with pytest.raises(BadRequest) as caught:
        check({"model": MODEL, "messages": [], **body})
    assert caught.value.param == field
    assert field in caught.value.message
    assert len(caught.value.message) < 400


FINE: list[dict[str, Any]] = [
    {"top_k": -1, "min_tokens": 0, "thinking_token_budget": -1, "stream_interval": 1},
    {"top_k": "5", "seed": 2**62, "stop": None},
    {"stop": "x" * MAX_STOP, "bad_words": ["x"] * 1000, "stop_token_ids": [1, 2], "logit_bias": {"5": 1}},
    {"messages": [{"role": "user", "content": "( [ \0 " + "x" * 10**6}], "prompt": [BIG]},
    {"chat_template_kwargs": {"a": 2**63, "b": -(2**63), "c": 1e300, "d": None}},
    {"structured_outputs": {"regex": r"(\(|[)(]|[]]|[^]x]|a{1,1000})*"}},
    {"structured_outputs": {"grammar": 'root ::= "(" | "a"{1,1000}'}},
    {"structured_outputs": {"choice": ["(", "", '"\\']}},
    {"structured_outputs": {"json": "no JSON"}},
    {"structured_outputs": {"json": {"type": "object", "properties": {"pattern": {"type": "string"}, "minItems": {}}}}},
    {"structured_outputs": {"json": {"default": {"pattern": "(", "minLength": -1}, "enum": ["(", -5], "const": "["}}},
    {"structured_outputs": {"json": {"type": "object", "properties": {f"k{i}": {} for i in range(1000)}}}},
    {"response_format": {"type": "text"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"maxLength": 10**6}}}},
    {"structured_outputs": [], "tools": {}, "text": "x", "repetition_detection": 5, "stop_token_ids": "x"},
]


@pytest.mark.parametrize("body", FINE)
def test_valid_values_are_accepted(body: dict[str, Any]) -> None:
    check({"model": MODEL, **body})


def test_a_grammar_or_schema_is_bounded_in_size() -> None:
    check({"structured_outputs": {"grammar": "x" * MAX_TEXT}})
    properties = {f"key{i}": {"type": "string"} for i in range(1700)}
    assert len(json.dumps(properties, separators=(",", ":"))) < MAX_CONSTRAINT
    check({"structured_outputs": {"json": {"type": "object", "properties": properties}}})


def test_all_schemas_of_a_request_are_bounded_together() -> None:
    schema = {"enum": ["a" * (MAX_TEXT - 100)]}
    tool = {"type": "function", "function": {"name": "a", "parameters": schema}}
    fits = MAX_CONSTRAINTS // len(json.dumps(schema, separators=(",", ":")))
    check({"tools": [tool] * fits})
    with pytest.raises(BadRequest, match=f"over {MAX_CONSTRAINTS} bytes in total"):
        check({"tools": [tool] * (fits + 1)})


@pytest.mark.parametrize("count", [100, 10_000])
def test_numbers_in_lists_are_not_walked_one_by_one(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    made: list[str] = []
    value_of = field_values._Value
    monkeypatch.setattr(field_values, "_Value", lambda *given: made.append(given[0]) or value_of(*given))  # type: ignore[func-returns-value]
    check({"metadata": {"a": [1] * count}, "documents": [[1.5] * count], "response_format": {"enum": [[2] * 9] * 9}})
    assert len(made) < 100


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/completions", {"prompt": "hi"}),
        ("/v1/responses", {"input": "hi"}),
        ("/tokenize", {"prompt": "hi"}),
        ("/v1/embeddings", {"input": "hi"}),
    ],
)
@pytest.mark.parametrize("beta", [None, "1"])
async def test_every_endpoint_refuses_values_vllm_fails_on(
    proxy: Proxy, path: str, body: dict[str, Any], beta: str | None
) -> None:
    headers = {**JSON, **({} if beta is None else {"x-tts-beta": beta})}
    for field in ({"top_k": BIG}, {"stop": ["x" * 1_000_000]}, {"structured_outputs": {"regex": "("}}):
        raw = json.dumps({"model": MODEL, **body, **field}).encode()
        sent = io.BytesIO(raw)
        async with proxy.http.post(f"{proxy.url}{path}", data=sent, headers=headers) as response:
            reply = await response.json()
            assert (response.status, reply["error"]["type"]) == (400, "invalid_request_error")
            assert reply["error"]["param"].startswith(next(iter(field)))
    assert proxy.backend.requests == []


async def test_the_size_of_each_branch_request_is_bounded(proxy: Proxy) -> None:
    stops = ["s" * MAX_STOP] * 4
    bias = {str(1000 + i): -1.0 for i in range(1024)}
    status, _, reply = await proxy.ask("1", stop=stops, logit_bias=bias, tts={"controller": "self_consistency"})
    assert status == 200
    sent = [len(json.dumps(request)) for request in proxy.backend.requests]
    assert max(sent) < 64 * 1024 + 8 * 4 * MAX_STOP
    assert reply["tts"]["branches"] > 1


async def test_an_episode_over_max_sent_bytes_ends_with_its_best_answer(backend: FakeVLLM) -> None:
    async def ask(most: int) -> tuple[Any, int]:
        before = len(backend.requests)
        async with (
            running(load(upstream=backend.url, max_sent_bytes=most, **SMALL)) as url,
            aiohttp.ClientSession() as http,
        ):
            tts = {"controller": "parallel_probe", "answer": "boxed"}
            body = {"messages": [{"role": "user", "content": "x" * 1000}], "tts": tts}
            async with http.post(f"{url}/v1/chat/completions", json=body, headers={"x-tts-beta": "1"}) as response:
                return await response.json(), len(backend.requests) - before

    free, many = await ask(2**31)
    bounded, few = await ask(20_000)
    assert (free["tts"]["stop"], bounded["tts"]["stop"]) == ("answered", "max_tokens")
    assert few < many
    assert bounded["choices"][0]["message"]["content"]


UNDECIDED: list[dict[str, Any]] = [
    {"structured_outputs": {"json": {"type": "object", "patternProperties": {"(": {}}}}},
    {"structured_outputs": {"json": {"type": "string", "minLength": -1}}},
    {"thinking_token_budget": BIG},
    {"top_k": BIG},
    {"stream_interval": BIG},
    {"repetition_detection": {"max_pattern_size": BIG, "min_pattern_size": 1, "min_count": 2}},
    {"chat_template_kwargs": {"enable_thinking": BIG}},
    {"bad_words": ["\ud800"]},
]


@pytest.mark.vllm
async def test_requests_that_vllm_fails_on_do_not_open_the_breaker(vllm: str) -> None:
    """The values bypass the checks, as a value not known yet would."""
    async with aiohttp.ClientSession() as http:
        events: list[str] = []
        engine = UpstreamClient(vllm, http, on_event=events.append)
        failures = 0
        for _ in range(3):
            for field in UNDECIDED:
                chat = {"model": "autotts-tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
                body = RelayedBody(json.dumps({**chat, **field}).encode())
                async with engine.relay(
                    "POST", "/v1/chat/completions", body, {"content-type": "application/json"}
                ) as response:
                    await response.content.read()
                    failures += response.status == 500
        assert failures >= 15
        await engine._transport.check()
        assert engine.breaker.is_closed
        assert "ejected" not in events
        assert await engine.tokenise_prompt("autotts-tiny", "hi")
        await engine.close()


@pytest.mark.vllm
async def test_no_hostile_value_makes_vllm_fail_through_the_proxy(vllm: str) -> None:
    async with running(load(upstream=vllm, **EMBEDDED)) as url, aiohttp.ClientSession() as http:
        for field, _ in FIELDS:
            body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, **field}
            raw = io.BytesIO(json.dumps(body).encode())
            async with http.post(f"{url}/v1/chat/completions", data=raw, headers=JSON) as response:
                assert response.status == 400, field
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
        async with http.post(f"{url}/v1/chat/completions", json=body) as response:
            assert response.status == 200
