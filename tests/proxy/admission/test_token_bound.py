"""Forwarded requests cost at most what their caller may spend, and are charged at least what they cost."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from proxy.admission.token_bound import DEFAULT_MAX_TOKENS, UNBOUNDED, TokenBound, bound_request
from proxy.admission.token_budget import SHARE, Caps
from proxy.admission.usage_meter import (
    MAX_HELD_BYTES,
    TAIL_BYTES,
    UNSEEN_TOKENS,
    BoundedReplyMeter,
    last_reported_tokens,
)
from proxy.errors import BadRequest
from proxy.requests.chat_request import ChatRequest
from proxy.requests.completion_request import CompletionRequest
from proxy.requests.generation_request import GenerationRequest
from proxy.requests.parsing import parse_request
from proxy.requests.responses_request import ResponsesRequest
from proxy.server import running
from proxy.settings import EMBEDDED, Settings, load
from proxy.upstream.connections.pooled_request import PooledRequests
from proxy.upstream.transport import UpstreamTransport
from tests.fakes import MAX_LENGTH, MODEL, Chain, FakeVLLM, RawUpstream
from tests.proxy.admission.test_api_keys import ALICE, BOB, BOSS, ask, bearer
from tests.proxy.admission.test_token_budget import keyed
from tests.proxy.conftest import SMALL, Proxy

CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
LONGEST = 4096


def chat(**fields: Any) -> GenerationRequest:
    return parse_request(ChatRequest, json.dumps({**CHAT, **fields}).encode())


def text(**fields: Any) -> GenerationRequest:
    return parse_request(CompletionRequest, json.dumps({"prompt": "hi", **fields}).encode())


def response(**fields: Any) -> GenerationRequest:
    return parse_request(ResponsesRequest, json.dumps({"input": "hi", **fields}).encode())


# The bound


def test_a_request_without_token_caps_is_unbounded() -> None:
    assert bound_request(chat(n=20, max_tokens=10**6), Caps(branches=3, episodes=4), LONGEST) is UNBOUNDED


@pytest.mark.parametrize(
    ("request_", "most"),
    [
        (chat(max_tokens=700), 700),
        (chat(max_tokens=300, max_completion_tokens=700), 700),
        (chat(n=2, max_completion_tokens=350), 700),
        (chat(n=None, max_tokens=7), 7),
        (chat(n=2, best_of=5, max_tokens=10), 50),
        (text(max_tokens=0, echo=True), 1),
        (text(), DEFAULT_MAX_TOKENS),
        (text(prompt=["a"] * 3, n=2, max_tokens=10), 60),
        (text(prompt=[[1, 2], [3]], max_tokens=10), 20),
        (text(prompt=[1, 2, 3], max_tokens=10), 10),
        (text(prompt=[]), DEFAULT_MAX_TOKENS),
        (text(prompt=None, prompt_embeds=["x", "y"]), 2 * DEFAULT_MAX_TOKENS),
        (text(prompt=["a"], prompt_embeds="x"), 2 * DEFAULT_MAX_TOKENS),
        (response(max_output_tokens=500, tools=[{"type": "function", "name": "f"}]), 500),
    ],
)
def test_the_token_bound_is_completions_times_max_tokens(request_: GenerationRequest, most: int) -> None:
    assert bound_request(request_, Caps(tokens=700), LONGEST).max_tokens == most


@pytest.mark.parametrize(
    ("request_", "caps", "param", "expected_text"),
    [
        (
            chat(n=20, max_tokens=1400),
            Caps(tokens=700),
            "max_tokens",
            "28000 tokens in all; .*TOTAL_TOKENS is 700",
        ),
        (
            chat(max_completion_tokens=701),
            Caps(tokens=700),
            "max_completion_tokens",
            "701; the server's limit AUTOTTS_MAX_TOTAL_TOKENS is 700",
        ),
        (
            chat(max_tokens=2000),
            Caps(None, 5000, 1000),
            "max_tokens",
            "TOKENS_PER_MINUTE is 1000 tokens a minute",
        ),
        (chat(n=800), Caps(tokens=700), "n", "800 completions"),
        (text(prompt=["a"] * 100, max_tokens=16), Caps(tokens_per_minute=1000), "max_tokens", "100 completions"),
        (text(prompt=["a"] * 2000), Caps(tokens_per_minute=1000), "prompt", "2000 completions"),
        (response(max_output_tokens=701), Caps(tokens=700), "max_output_tokens", "701"),
        (response(tools=[{"type": "mcp"}]), Caps(tokens=700), "tools", "function or custom"),
        (response(tools=["x"]), Caps(tokens=700), "tools", "function or custom"),
        *((chat(n=n), Caps(tokens=700), "n", "whole") for n in (0, -1, "20", 2.0, True, [1])),
        (text(best_of="3"), Caps(tokens=700), "best_of", "whole"),
    ],
)
def test_a_request_over_a_cap_is_refused_and_the_field_is_named(
    request_: GenerationRequest, caps: Caps, param: str, expected_text: str
) -> None:
    with pytest.raises(BadRequest, match=expected_text) as refused:
        bound_request(request_, caps, LONGEST)
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("request_", "caps", "longest", "most", "put"),
    [
        (chat(), Caps(tokens=700), LONGEST, 700, {"max_completion_tokens": 700}),
        (chat(n=3), Caps(tokens=700), LONGEST, 699, {"max_completion_tokens": 233}),
        (chat(), Caps(tokens_per_minute=4000), LONGEST, 4000 // SHARE, {"max_completion_tokens": 4000 // SHARE}),
        (chat(n=900), Caps(tokens_per_minute=1000), LONGEST, 900, {"max_completion_tokens": 1}),
        (chat(n=2), Caps(tokens=10_000), LONGEST, 2 * LONGEST, {}),
        (chat(n=2), Caps(tokens=10_000), 0, 10_000, {"max_completion_tokens": 5000}),
        (text(prompt=["a"] * 3), Caps(tokens=30), LONGEST, 30, {"max_tokens": 10}),
        (text(), Caps(tokens=30), LONGEST, DEFAULT_MAX_TOKENS, {"max_tokens": DEFAULT_MAX_TOKENS}),
        (text(prompt=["a"] * 100), Caps(tokens_per_minute=1000), LONGEST, 1000, {"max_tokens": 10}),
        (response(), Caps(tokens=700), LONGEST, 700, {"max_output_tokens": 700}),
    ],
)
def test_a_request_without_max_tokens_gets_a_limit_within_its_caps(
    request_: GenerationRequest, caps: Caps, longest: int, most: int, put: dict[str, int]
) -> None:
    bound = bound_request(request_, caps, longest)
    assert (bound.max_tokens, dict(bound.put)) == (most, put)


def test_usage_is_added_to_a_stream_unless_the_client_asks_for_it() -> None:
    caps = Caps(tokens=700)
    bound = bound_request(chat(max_tokens=5, stream=True), caps, LONGEST)
    assert (bound.adds_usage, bound.put) == (True, {"stream_options": {"include_usage": True}})
    options = {"include_usage": False, "continuous_usage_stats": True, "x": 1}
    bound = bound_request(text(max_tokens=5, stream=True, stream_options=options), caps, LONGEST)
    assert (bound.adds_usage, bound.put) == (True, {"stream_options": {"x": 1, "include_usage": True}})
    for request in (chat(max_tokens=5, stream=True, stream_options={"include_usage": True}), chat(max_tokens=5)):
        assert bound_request(request, caps, LONGEST)[2:4] == ({}, False)
    assert not bound_request(response(stream=True), caps, LONGEST).adds_usage


def test_fields_that_hide_tokens_mark_the_stream_as_not_countable() -> None:
    caps = Caps(tokens=700)
    assert bound_request(chat(stream=True, temperature=0.5), caps, LONGEST).shows_tokens
    for name, value in (("stop", "x"), ("ignore_eos", True), ("include_reasoning", False), ("stream_interval", 99)):
        assert not bound_request(chat(stream=True, **{name: value}), caps, LONGEST).shows_tokens
    assert not bound_request(response(stream=True), caps, LONGEST).shows_tokens
    assert not bound_request(text(use_beam_search=True), caps, LONGEST).is_usage_complete


# The meter


def sse(*events: Any) -> bytes:
    payloads = (b"[DONE]" if event is None else json.dumps(event).encode() for event in events)
    return b"".join(b"data: " + payload + b"\n\n" for payload in payloads)


def delta(content: str, **extra: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": content}, "finish_reason": None}], **extra}


USAGE = {"choices": [], "usage": {"prompt_tokens": 3, "total_tokens": 45, "completion_tokens": 42}}
PLAIN = TokenBound(max_tokens=500, adds_usage=True, shows_tokens=True)


def read(meter: BoundedReplyMeter, pieces: Sequence[bytes], *, finish: bool = True) -> bytes:
    output = b"".join(meter.feed(piece) for piece in pieces)
    return output + (meter.finish() if finish else b"")


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    at = sorted({0, len(data), *(place % len(data) for place in places)})
    return [data[start:end] for start, end in pairwise(at)]


@given(
    st.lists(st.integers(0, 10**6), max_size=30),
    st.sampled_from([b"\n", b"\r\n"]),
    st.booleans(),
)
def test_only_a_usage_event_the_proxy_asked_for_is_removed_from_a_stream(
    places: list[int], line: bytes, has_asked: bool
) -> None:
    first = b": ping\n\n" + sse(delta("a"), delta("é\n\ndata: "), {"choices": [], "usage": None})
    after = b"event: x\nid: 7\ndata: {not json\n\n\n" + sse(None) + b"data: tail"
    stream = (first + sse(USAGE) + after).replace(b"\n", line)
    meter = BoundedReplyMeter(PLAIN._replace(adds_usage=has_asked), is_stream=True)
    assert read(meter, cut(stream, places)) == (stream if not has_asked else (first + after).replace(b"\n", line))
    assert meter.cost == 42


def test_a_usage_event_without_a_final_blank_line_is_read() -> None:
    meter = BoundedReplyMeter(PLAIN, is_stream=True)
    assert read(meter, [sse(delta("a")), sse(USAGE).rstrip()]) == sse(delta("a"))
    assert meter.cost == 42


def test_the_usage_of_a_responses_stream_is_read_from_its_completed_event() -> None:
    last = {"type": "response.completed", "response": {"usage": {"output_tokens": 9}, "metadata": {}}}
    stream = sse({"type": "response.created", "response": {"usage": None}}, last)
    meter = BoundedReplyMeter(TokenBound(max_tokens=500, adds_usage=True), is_stream=True)
    assert (read(meter, [stream]), meter.cost) == (stream, 9)


@given(st.lists(st.integers(0, 10**6), max_size=9), st.booleans())
def test_the_usage_of_a_plain_reply_is_read_at_any_position(places: list[int], behind: bool) -> None:
    usage = {"usage": {"completion_tokens": 42}}
    rest = {"choices": [{"text": '"completion_tokens": 1'}], "tools": [{"usage": {"output_tokens": 1}}]}
    more = {"prompt_token_ids": list(range(2000)), "completion_tokens": 2}
    reply = json.dumps({**more, **rest, **usage} if behind else {**usage, **rest, **more}).encode()
    meter = BoundedReplyMeter(PLAIN, is_stream=False)
    assert read(meter, cut(reply, places)) == reply
    assert meter.cost == 42


def test_a_reply_without_usage_costs_its_shown_text_or_its_bound() -> None:
    shown = sse(delta("ab"), delta("é"), {"choices": [{"index": 0, "text": "abc"}, {"index": 1, "text": ""}, "x"]})
    for bound, is_stream, cost in (
        (PLAIN, True, UNSEEN_TOKENS + 2 + 2 + 3 + 1),
        (PLAIN._replace(completions=3), True, 3 * UNSEEN_TOKENS + 8),
        (PLAIN._replace(max_tokens=20), True, 20),
        (PLAIN._replace(shows_tokens=False), True, 500),
        (PLAIN, False, 500),
    ):
        meter = BoundedReplyMeter(bound, is_stream=is_stream)
        read(meter, [shown], finish=False)
        assert meter.cost == cost


@pytest.mark.parametrize("tokens", [None, -1, "9", 1.5, True, [], 10**30])
@pytest.mark.parametrize("usage", [None, 7, [], {}, {"completion_tokens": ...}, {"output_tokens": ...}])
def test_an_invalid_usage_costs_the_bound(usage: Any, tokens: Any) -> None:
    if isinstance(usage, dict):
        usage = dict.fromkeys(usage, tokens)
    for is_stream in (False, True):
        chunk = {"choices": [], "usage": usage}
        meter = BoundedReplyMeter(PLAIN._replace(shows_tokens=False), is_stream=is_stream)
        read(meter, [sse(chunk) if is_stream else json.dumps(chunk).encode()])
        assert meter.cost == 500


def test_beam_search_costs_its_bound() -> None:
    meter = BoundedReplyMeter(PLAIN._replace(is_usage_complete=False), is_stream=False)
    read(meter, [json.dumps(USAGE).encode()])
    assert meter.cost == 500


def test_a_usage_on_a_choice_event_is_not_taken_as_the_total() -> None:
    meter = BoundedReplyMeter(PLAIN._replace(shows_tokens=False), is_stream=True)
    assert read(meter, [both := sse(delta("a", usage={"completion_tokens": 1}))]) == both
    assert meter.cost == 500


def test_an_event_too_long_to_hold_is_forwarded_and_costs_the_bound() -> None:
    for is_stream in (False, True):
        meter = BoundedReplyMeter(PLAIN, is_stream=is_stream)
        long = [b"data: " + b"x" * (MAX_HELD_BYTES // 2)] * 3
        assert read(meter, [*long, sse(USAGE)]) == b"".join(long) + sse(USAGE)
        assert (meter.cost, meter._held) == (500, bytearray())


def test_the_last_reported_tokens_are_read_from_the_end_of_a_reply() -> None:
    assert last_reported_tokens(json.dumps(USAGE).encode()) == 42
    assert last_reported_tokens(b'{"output_tokens":1}, {"completion_tokens" : 7}') == 7
    assert last_reported_tokens(b'"completion_tokens":1234567890') is None
    assert last_reported_tokens(b"{}") is None


# Over HTTP


async def spent(http: aiohttp.ClientSession, url: str) -> tuple[Any, Any]:
    """Wait until no request of alice runs, then return (tokens charged to her, forwarded tokens in metrics)."""
    is_idle = False
    async with asyncio.timeout(10):
        while not is_idle:
            async with http.get(f"{url}/v1/tts/keys", headers=bearer(BOSS)) as response:
                budget = (await response.json())["keys"]["alice"]
            is_idle = not budget["reserved"] and not budget["passed"]
    async with http.get(f"{url}/metrics", headers=bearer(BOSS)) as response:
        lines = (await response.text()).splitlines()
    mark = f'autotts_tokens_total{{beta="",controller="",kind="passed_through",model="{MODEL}"}} '
    return budget["spent"], sum(int(float(line.removeprefix(mark))) for line in lines if line.startswith(mark))


def before(upstream: RawUpstream | FakeVLLM, tmp_path: Path, **limits: int) -> Settings:
    """Return settings of a proxy with API keys and `limits` for alice."""
    return load(upstream=upstream.url, keys=keyed(tmp_path / "keys.toml", **limits), admin_key=BOSS, **SMALL)


async def test_a_request_over_the_key_limit_gets_400_and_is_not_forwarded(backend: FakeVLLM, tmp_path: Path) -> None:
    settings = before(backend, tmp_path, tokens=700)
    async with running(settings) as url, aiohttp.ClientSession() as http:
        status, _, reply = await ask(http, url, ALICE, None, n=20, max_tokens=1400)
        assert (status, reply["error"]["param"], reply["error"]["code"]) == (400, "max_tokens", "cap_too_small")
        assert "the limit `tokens` of key alice is 700 tokens a request" in reply["error"]["message"]
        assert not backend.requests
        status, headers, reply = await ask(http, url, ALICE, None, n=2)
        assert (status, headers["x-tts-reason"]) == (200, "no_beta")
        assert reply["echo"]["max_completion_tokens"] == 350
        status, _, reply = await ask(http, url, BOB, None, n=20, max_tokens=1400)
        assert (status, reply["echo"]["max_tokens"]) == (200, 1400)
        assert await spent(http, url) == (None, 700)  # no usage was reported, and no limit per minute to charge


async def test_each_prompt_of_a_batch_is_charged(backend: FakeVLLM, tmp_path: Path) -> None:
    backend.chains = [Chain("t" * 300)]
    settings = before(backend, tmp_path, tokens_per_minute=1000)
    async with running(settings) as url, aiohttp.ClientSession() as http:
        for prompts, status in ((100, 400), (60, 200), (60, 429)):
            body = {"model": MODEL, "prompt": [[ord("t")]] * prompts, "max_tokens": 16, "stream": True}
            async with http.post(f"{url}/v1/completions", json=body, headers=bearer(ALICE)) as response:
                assert response.status == status
                reply = await response.read()
            assert b'"usage"' not in reply
        assert await spent(http, url) == (960, 960) == (backend.generated, backend.generated)
        assert backend.requests[-1]["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize("asks", [False, True])
async def test_a_stream_is_charged_by_its_usage_whether_client_or_proxy_asked_for_it(
    tmp_path: Path, asks: bool
) -> None:
    shown = sse(delta("a"), delta("b"))
    pieces = [shown[:30], shown[30:] + sse(USAGE)[:20], sse(USAGE)[20:] + sse(None)]
    async with RawUpstream(pieces, content_type="text/event-stream").serve() as upstream:
        settings = before(upstream, tmp_path, tokens_per_minute=4000)
        async with running(settings) as url, aiohttp.ClientSession() as http:
            options = {"stream_options": {"include_usage": True}} if asks else {}
            body = {**CHAT, "stream": True, **options}
            async with http.post(f"{url}/v1/chat/completions", json=body, headers=bearer(ALICE)) as response:
                assert await response.read() == (b"".join(pieces) if asks else shown + sse(None))
            assert await spent(http, url) == (42, 42)
        sent = json.loads(upstream.seen[-1].body)
        assert sent["stream_options"] == {"include_usage": True}
        assert sent["max_completion_tokens"] == 4000 // SHARE


async def test_a_usage_far_from_the_end_of_a_reply_is_charged(tmp_path: Path) -> None:
    reply = json.dumps(
        {"choices": [], "usage": {"completion_tokens": 42}, "prompt_token_ids": [7] * TAIL_BYTES}
    ).encode()
    async with RawUpstream([reply], content_type="application/json").serve() as upstream:
        settings = before(upstream, tmp_path, tokens_per_minute=4000)
        async with running(settings) as url, aiohttp.ClientSession() as http:
            body = {**CHAT, "max_tokens": 100, "return_token_ids": True}
            async with http.post(f"{url}/v1/chat/completions", json=body, headers=bearer(ALICE)) as response:
                assert await response.read() == reply
            assert await spent(http, url) == (42, 42)


@pytest.mark.parametrize(
    ("status", "booked"), [(400, 0), (429, 0), (502, 0), (503, 0), (500, 100), (504, 100), (302, 0), (200, 100)]
)
async def test_a_reply_without_usage_is_charged_by_its_status(tmp_path: Path, status: int, booked: int) -> None:
    async with RawUpstream([b'{"error": {"message": "no"}}'], status).serve() as upstream:
        settings = before(upstream, tmp_path, tokens_per_minute=4000)
        async with running(settings) as url, aiohttp.ClientSession() as http:
            body = {**CHAT, "max_tokens": 100}
            async with http.post(
                f"{url}/v1/chat/completions", json=body, headers=bearer(ALICE), allow_redirects=False
            ) as response:
                assert response.status == status
            assert await spent(http, url) == (booked, booked)
    assert len(upstream.seen) == (2 if status in (502, 503) else 1)  # only an unprocessed request is sent again


@pytest.mark.parametrize("stream", [False, True])
async def test_a_disconnected_client_is_charged_for_tokens_that_may_have_been_generated(
    tmp_path: Path, stream: bool
) -> None:
    pieces = [sse(delta("ab")), sse(delta("c"))] if stream else []
    kind = "text/event-stream" if stream else "application/json"
    async with RawUpstream(pieces or [b"{"], content_type=kind).serve() as upstream:
        upstream.go.clear()
        settings = before(upstream, tmp_path, tokens_per_minute=4000)
        async with running(settings) as url, aiohttp.ClientSession() as http:
            body = {**CHAT, "max_tokens": 100, "stream": stream}
            async with http.post(f"{url}/v1/chat/completions", json=body, headers=bearer(ALICE)) as response:
                assert await response.content.readany()
            booked = UNSEEN_TOKENS + 2 if stream else 100
            assert await spent(http, url) == (booked, booked)


@pytest.mark.parametrize("is_pooled", [True, False])
async def test_a_request_to_an_unreachable_upstream_is_not_charged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_pooled: bool
) -> None:
    monkeypatch.setattr("proxy.upstream.transport.has_tested_internals", lambda _: is_pooled)
    async with RawUpstream([b"{}"]).serve() as upstream:
        settings = before(upstream, tmp_path, tokens_per_minute=4000)
        async with running(settings) as url, aiohttp.ClientSession() as http:
            body = {**CHAT, "max_tokens": 100}
            async with http.post(f"{url}/v1/chat/completions", json=body, headers=bearer(ALICE)) as response:
                await response.read()
            assert await spent(http, url) == (100, 100)
            await upstream.close()
            async with http.post(f"{url}/v1/chat/completions", json=body, headers=bearer(ALICE)) as response:
                assert response.status == 502
            assert await spent(http, url) == (100, 100)


@pytest.mark.parametrize(
    ("owner", "step"), [(PooledRequests, "_open"), (UpstreamTransport, "_wait_for_breaker")], ids=["connect", "breaker"]
)
async def test_a_client_that_leaves_before_its_request_is_sent_is_not_charged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: type, step: str
) -> None:
    left = asyncio.Event()

    async def hang(*_: object) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            left.set()

    async with RawUpstream([b"{}"]).serve() as upstream:
        settings = before(upstream, tmp_path, tokens_per_minute=4000)
        async with running(settings) as url, aiohttp.ClientSession() as http:
            body = {**CHAT, "max_tokens": 100}
            async with http.post(f"{url}/v1/chat/completions", json=body, headers=bearer(ALICE)) as response:
                assert response.status == 200
            monkeypatch.setattr(PooledRequests, "_take", lambda _: None)
            monkeypatch.setattr(owner, step, hang)
            timeout = aiohttp.ClientTimeout(total=0.2)
            with pytest.raises(TimeoutError):
                await http.post(f"{url}/v1/chat/completions", json=body, headers=bearer(ALICE), timeout=timeout)
            await left.wait()
            assert await spent(http, url) == (100, 100)  # of the first request
    assert len(upstream.seen) == 1


@pytest.mark.parametrize("then", ["upstream_unreachable", "busy"])
async def test_a_request_that_was_lost_and_cannot_be_repeated_is_charged(tmp_path: Path, then: str) -> None:
    lost: list[web.Request] = []

    async def close(request: web.Request) -> web.StreamResponse:
        if lost:
            return web.json_response({"error": {"code": "busy"}}, status=429)
        lost.append(request)
        if then != "busy":
            await site.stop()  # further connections are refused
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": MODEL, "max_model_len": LONGEST}], "object": "list"})

    upstream = web.Application()
    upstream.router.add_get("/v1/models", models)
    upstream.router.add_post("/v1/chat/completions", close)
    runner = web.AppRunner(upstream)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    keys = keyed(tmp_path / "keys.toml", tokens_per_minute=4000)
    settings = load(upstream=f"http://127.0.0.1:{runner.addresses[0][1]}", keys=keys, admin_key=BOSS, **SMALL)
    async with running(settings) as url, aiohttp.ClientSession() as http:
        body = {**CHAT, "max_tokens": 100}
        async with http.post(f"{url}/v1/chat/completions", json=body, headers=bearer(ALICE)) as response:
            assert (await response.json())["error"]["code"] == then
        assert await spent(http, url) == (100, 100)
    await runner.cleanup()


async def test_a_detokenize_request_is_neither_bounded_nor_charged(backend: FakeVLLM, tmp_path: Path) -> None:
    settings = before(backend, tmp_path, tokens=5, tokens_per_minute=10)
    async with running(settings) as url, aiohttp.ClientSession() as http:
        for _ in range(3):
            async with http.post(f"{url}/detokenize", json={"tokens": [104]}, headers=bearer(ALICE)) as response:
                assert await response.json() == {"prompt": "h"}
        assert await spent(http, url) == (0, 0)


async def test_the_server_cap_applies_without_keys(backend: FakeVLLM) -> None:
    settings = load(upstream=backend.url, max_total_tokens=3000, **SMALL)
    async with running(settings) as url, aiohttp.ClientSession() as http:
        assert (await ask(http, url, None, None, max_tokens=3001))[0] == 400
        status, _, reply = await ask(http, url, None, None)
        assert (status, "max_completion_tokens" in reply["echo"]) == (200, False)  # the model generates no more anyway
        assert MAX_LENGTH < 3000


@pytest.mark.parametrize("tokens", [None, 3000])
async def test_the_cap_of_a_request_applies_if_it_is_forwarded(backend: FakeVLLM, tokens: int | None) -> None:
    settings = load(upstream=backend.url, max_total_tokens=tokens, **SMALL)
    async with running(settings) as url, aiohttp.ClientSession() as http:
        cap = {"max_total_tokens": 100}
        status, headers, reply = await ask(http, url, None, None, tts=cap)
        assert (status, headers["x-tts-reason"]) == (200, "no_beta")
        assert reply["echo"]["max_completion_tokens"] == 100
        assert "tts" not in reply["echo"]
        _, headers, reply = await ask(http, url, None, "0.5", n=4, tts=cap)
        assert (headers["x-tts-reason"], reply["echo"]["max_completion_tokens"]) == ("n", 25)
        status, _, reply = await ask(http, url, None, None, max_tokens=101, tts=cap)
        assert (status, reply["error"]["param"]) == (400, "max_tokens")
        assert reply["error"]["message"] == "max_tokens is 101; tts.max_total_tokens is 100 tokens a request"


async def test_without_caps_tokens_are_counted_by_reported_usage(proxy: Proxy) -> None:
    proxy.backend.chains = [Chain("t" * 300)]
    by = {"kind": "passed_through", "model": MODEL, "controller": "", "beta": ""}
    await proxy.ask(None)
    assert await proxy.metric("autotts_tokens_total") == 0
    body = {"model": MODEL, "prompt": [ord("t")], "max_tokens": 40, "n": 2, "stream": True}
    async with proxy.http.post(f"{proxy.url}/v1/completions", json=body) as response:
        assert b'"usage"' in await response.read()
    assert await proxy.metric("autotts_tokens_total", **by) == proxy.backend.generated == 80
    assert "stream_options" not in proxy.backend.requests[-1]
    raw = RawUpstream([json.dumps(USAGE).encode()])
    async with raw.serve() as upstream, running(load(upstream=upstream.url)) as url:
        upstream.headers["content-length"] = str(len(upstream.pieces[0]))
        async with proxy.http.post(f"{url}/v1/chat/completions", json=CHAT) as response:
            assert await response.json(content_type=None) == USAGE
        assert await proxy._replace(url=url).metric("autotts_tokens_total", **by) == 42


@pytest.mark.parametrize("is_whole", [True, False])
async def test_streams_without_usage_are_counted_by_their_events(proxy: Proxy, is_whole: bool) -> None:
    """They are counted even if the client disconnects."""
    events = [f'data: {{"choices": [{{"delta": {{"content": "{at}"}}}}]}}\n\n'.encode() for at in range(13)]
    raw = RawUpstream([b"".join(events), b"data: [DONE]\n\n"], content_type="text/event-stream")
    async with raw.serve() as upstream, running(load(upstream=upstream.url)) as url:
        if not is_whole:
            raw.go.clear()
        async with proxy.http.post(f"{url}/v1/chat/completions", json={**CHAT, "stream": True}) as response:
            assert await response.content.readexactly(len(raw.pieces[0])) == raw.pieces[0]
            if is_whole:
                assert await response.read() == raw.pieces[1]
            else:
                response.close()
        other = proxy._replace(url=url)
        async with asyncio.timeout(5):
            while not (counted := await other.metric("autotts_tokens_total")):
                pass  # each request yields to the server
        kind = "passed_through_estimated"
        assert counted == await other.metric("autotts_tokens_total", kind=kind) == (12 if is_whole else 11)


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("path", "fields", "is_exact"),
    [
        ("chat/completions", {"n": 3}, True),
        ("chat/completions", {"n": 3, "stream": True, "stop": "zz", "return_token_ids": True}, True),
        ("chat/completions", {"max_tokens": 60, "prompt_logprobs": 1, "logprobs": True}, True),
        ("chat/completions", {"n": 3, "use_beam_search": True, "max_tokens": 20}, False),
        ("completions", {"prompt": ["1+1=", "2+2="], "n": 2}, True),
        ("completions", {"prompt": [[5, 6], [7]], "max_tokens": 90, "stream": True, "ignore_eos": True}, True),
        ("completions", {"prompt": "1+1=", "max_tokens": 0, "echo": True}, True),
        ("responses", {"input": "1+1="}, True),
        ("responses", {"input": "1+1=", "stream": True}, True),
    ],
)
async def test_a_real_vllm_stays_within_the_bound_and_is_charged_in_full(
    vllm: str, tmp_path: Path, path: str, fields: dict[str, Any], is_exact: bool
) -> None:
    file = keyed(tmp_path / "keys.toml", tokens=300, tokens_per_minute=9000)
    settings = load(upstream=vllm, keys=file, admin_key=BOSS, **EMBEDDED)
    async with running(settings) as url, aiohttp.ClientSession() as http:
        before = await generated(http, vllm)
        body = {"messages": CHAT["messages"], **fields} if path == "chat/completions" else fields
        async with http.post(f"{url}/v1/{path}", json={**body, "temperature": 1.0}, headers=bearer(ALICE)) as response:
            text = await response.text()
            assert response.status == 200, text
        assert path == "responses" or ('"completion_tokens"' in text) is not fields.get("stream", False)
        cost, booked = await generated(http, vllm) - before, (await spent(http, url))[0]
        assert 0 < cost <= booked <= 300
        assert cost == booked or not is_exact


@pytest.mark.vllm
async def test_a_client_that_disconnects_from_a_real_vllm_is_charged_for_its_tokens(vllm: str, tmp_path: Path) -> None:
    file = keyed(tmp_path / "keys.toml", tokens_per_minute=9000)
    settings = load(upstream=vllm, keys=file, admin_key=BOSS, **EMBEDDED)
    async with running(settings) as url, aiohttp.ClientSession() as http:
        for left, stream in ((40, True), (0, False)):
            before, booked = await generated(http, vllm), (await spent(http, url))[0]
            body = {"prompt": "1+1=", "max_tokens": 400, "n": 2, "stream": stream, "temperature": 1.0}
            request = asyncio.create_task(leave(http, f"{url}/v1/completions", body, left))
            await asyncio.wait([request], timeout=5 if stream else 0.05)
            request.cancel()
            await asyncio.gather(request, return_exceptions=True)
            booked = (await spent(http, url))[0] - booked
            async with asyncio.timeout(10):
                while await counter(http, vllm, "vllm:num_requests_running"):
                    pass
            assert 0 <= await generated(http, vllm) - before <= booked <= 800


async def leave(http: aiohttp.ClientSession, url: str, body: dict[str, Any], after: int) -> None:
    """Send a request and disconnect after `after` pieces of the reply."""
    async with http.post(url, json=body, headers=bearer(ALICE)) as response:
        for _ in range(after):
            await response.content.readany()


async def generated(http: aiohttp.ClientSession, vllm: str) -> int:
    """Return the tokens vLLM reports to have generated since its start."""
    return await counter(http, vllm, "vllm:generation_tokens_total")


async def counter(http: aiohttp.ClientSession, vllm: str, name: str) -> int:
    """Return the sum of one of vLLM's own metrics."""
    async with http.get(f"{vllm}/metrics") as response:
        lines = (await response.text()).splitlines()
    return sum(int(float(line.split()[-1])) for line in lines if line.startswith(name))
