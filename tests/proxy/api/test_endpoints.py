"""Completions and responses under a controller, the list of models, and requests forwarded byte for byte."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import pytest
import pytest_asyncio
from openai import APIError, NotFoundError

from discovery.data.recordings import question_id
from discovery.store import Store
from proxy.errors import SettingsError
from proxy.http.json_edit import edit_members
from proxy.requests.responses_request import ResponsesRequest
from proxy.server import running
from proxy.settings import load
from tests.fakes import ASSISTANT, MODEL, FakeVLLM, RawUpstream
from tests.proxy.conftest import SMALL, Proxy

PROMPT = f"hi{ASSISTANT}"
FILE = [{"role": "user", "content": [{"type": "input_image", "file_id": "file-1"}]}]


async def post(proxy: Proxy, path: str, body: dict[str, Any], **headers: str) -> tuple[int, Any, Any]:
    async with proxy.http.post(proxy.url + path, json=body, headers=headers) as response:
        return response.status, response.headers, await response.json(content_type=None)


def events(page: str) -> list[Any]:
    """Return the data of server-sent events without comments."""
    lines = [line.removeprefix("data: ") for line in page.splitlines() if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


# Completions


@pytest.mark.parametrize("prompt", [PROMPT, [PROMPT], [ord(c) for c in PROMPT], [[ord(c) for c in PROMPT]]])
async def test_a_completion_continues_the_prompt_and_bills_all_tokens(proxy: Proxy, prompt: Any) -> None:
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 500, "tts": {"beta": 0.5}}
    status, headers, reply = await post(proxy, "/v1/completions", body)
    assert status == 200, reply
    assert (headers["x-tts-applied"], reply["object"], reply["id"][:5]) == ("true", "text_completion", "cmpl-")
    assert reply["id"] == headers["x-request-id"]
    choice = reply["choices"][0]
    assert choice["text"].startswith("<think>bbb")
    assert choice["text"].endswith("</think>\n\nIt is \\boxed{7}")
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "stop", None)
    assert reply["usage"]["completion_tokens"] == proxy.backend.generated
    assert reply["tts"]["answer"] == "7"
    assert proxy.backend.requests[0]["prompt"] == [ord(c) for c in PROMPT]


async def test_a_completion_that_hits_its_cap_ends_with_a_final_answer(proxy: Proxy) -> None:
    body = {"prompt": PROMPT, "tts": {"beta": 0, "max_total_tokens": 260, "controller": "parallel_probe"}}
    _, headers, reply = await post(proxy, "/v1/completions", body)
    assert headers["x-tts-stop"] == "max_tokens"
    assert "\n</think>\n\nSo \\boxed{7}" in reply["choices"][0]["text"]
    chat = await proxy.openai.completions.create(model=f"{MODEL}@0", prompt=PROMPT)
    assert chat.choices[0].text.startswith("<think>")


async def test_the_openai_client_streams_a_completion_with_usage(proxy: Proxy) -> None:
    stream = await proxy.openai.completions.create(
        model=MODEL,
        prompt=PROMPT,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"tts": {"beta": 0.5, "progress": True}},
    )
    chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    assert text.endswith("It is \\boxed{7}")
    assert "round" not in text
    assert {(c.object, c.model) for c in chunks} == {("text_completion", MODEL)}
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == proxy.backend.generated


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"n": 2}, "n"),
        ({"best_of": 2}, "best_of"),
        ({"logprobs": 0}, "logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"echo": True}, "echo"),
        ({"suffix": "end"}, "suffix"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": ["a", [1]], "n": 2}, "n"),
        ({"prompt": [[1], []]}, "prompt"),
        ({"prompt": [[1], [True]]}, "prompt"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt": [True]}, "prompt"),
    ],
)
async def test_completions_a_controller_cannot_serve_are_forwarded_with_a_reason(
    raw: Raw, fields: dict[str, Any], reason: str
) -> None:
    await passes(raw, "/v1/completions", {"model": MODEL, "prompt": "hi", **fields}, reason)


async def passes(raw: Raw, path: str, body: dict[str, Any], reason: str, param: str | None = None) -> None:
    """Assert that the body is forwarded for `reason` despite β, and refused if a controller is required."""
    sent = json.dumps(body).encode()
    headers = {"x-tts-beta": "0.5", "content-type": "application/json"}
    async with raw.http.post(raw.url + path, data=sent, headers=headers) as response:
        assert (response.headers["x-tts-applied"], response.headers["x-tts-reason"]) == ("false", reason)
    assert raw.upstream.seen[-1][::3] == ("POST", sent)
    assert raw.upstream.seen[-1].path == path
    required = {**body, "tts": {"required": True}}
    async with raw.http.post(raw.url + path, json=required, headers=headers) as response:
        reply = await response.json()
    assert (response.status, reply["error"]["code"], reply["error"]["param"]) == (
        400,
        "tts_not_applicable",
        param or reason,
    )
    assert len(raw.upstream.seen) == 1


# Responses


async def test_a_response_has_the_output_items_and_usage_of_the_openai_client(proxy: Proxy) -> None:
    reply = await proxy.openai.responses.create(
        model=MODEL, instructions="Be brief.", input="hi", reasoning={"effort": "medium"}, max_output_tokens=500
    )
    assert reply.output_text == "It is \\boxed{7}"
    assert [item.type for item in reply.output] == ["reasoning", "message"]
    assert (reply.status, reply.error, reply.instructions) == ("completed", None, "Be brief.")
    assert reply.usage is not None
    assert reply.usage.output_tokens == proxy.backend.generated
    assert reply.usage.total_tokens == reply.usage.input_tokens + reply.usage.output_tokens
    assert 0 < reply.usage.output_tokens_details.reasoning_tokens < reply.usage.output_tokens
    tts = reply.tts  # type: ignore[attr-defined]
    assert (tts["beta_source"], tts["beta"]) == ("reasoning_effort", 0.5)
    prompt = "".join(map(chr, proxy.backend.requests[0]["prompt"]))
    assert prompt == f"<system>Be brief.<user>hi{ASSISTANT}"


async def test_a_streamed_response_sends_its_events_in_openais_order(proxy: Proxy) -> None:
    async with proxy.openai.responses.stream(
        model=MODEL, input="hi", extra_body={"tts": {"beta": 0.5, "progress": True}}
    ) as stream:
        seen = [event async for event in stream]
        final = await stream.get_final_response()
    kinds = [event.type for event in seen]
    assert kinds[:3] == ["response.created", "response.in_progress", "response.output_item.added"]
    assert kinds[-5:] == [
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in seen] == list(range(len(seen)))
    assert final.output_text == "It is \\boxed{7}"
    assert final.output[0].type == "reasoning"
    assert final.output[0].summary[0].text.startswith("round 1: ")
    assert final.usage is not None
    assert final.usage.output_tokens == proxy.backend.generated


async def test_a_streamed_response_without_progress_has_a_reasoning_and_a_message_item(proxy: Proxy) -> None:
    stream = await proxy.openai.responses.create(model=f"{MODEL}@0.5", input="hi", stream=True)
    seen = [event async for event in stream]
    added = [event.item.type for event in seen if event.type == "response.output_item.added"]
    assert added == ["reasoning", "message"]
    assert seen[-1].type == "response.completed"
    assert [item.type for item in seen[-1].response.output] == added


async def test_a_response_cut_by_max_output_tokens_is_incomplete(proxy: Proxy) -> None:
    body = {"input": "hi", "max_output_tokens": 30, "tts": {"beta": 0, "controller": "single"}}
    _, _, reply = await post(proxy, "/v1/responses", body)
    assert (reply["status"], reply["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    stream = await proxy.openai.responses.create(
        model=MODEL, input="hi", max_output_tokens=30, stream=True, extra_body={"tts": body["tts"]}
    )
    assert [event.type async for event in stream][-1] == "response.incomplete"


@pytest.mark.parametrize(
    ("fields", "reason", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools", "tools"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "previous_response_id"),
        ({"background": True}, "background", "background"),
        ({"include": ["message.output_text.logprobs"]}, "include", "include"),
        ({"text": {"format": {"type": "grammar"}}}, "structured_output", "text"),
        ({"tools": [{"type": "function", "name": "f"}], "tool_choice": {"type": "mcp"}}, "tools", "tool_choice"),
        ({"tools": [{"type": "function", "name": "f"}], "truncation": "auto"}, "truncation", "truncation"),
        ({"tool_choice": "required"}, "tools", "tool_choice"),
        ({"reasoning": {"effort": "weird"}}, "reasoning", "reasoning"),
        ({"truncation": "middle"}, "truncation", "truncation"),
        ({"input": FILE}, "multimodal", "input"),
        ({"input": [{"type": "function_call_output", "call_id": "1", "output": FILE}]}, "tools", "input"),
        ({"input": [{"type": "function_call", "call_id": "1", "name": "f"}]}, "tools", "input"),
        ({"input": [{"type": "web_search_call", "id": "1"}]}, "tools", "input"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input", "input"),
        ({"input": [{"type": "reasoning", "summary": [], "encrypted_content": "x"}]}, "input", "input"),
        ({"input": [{"role": "assistant", "content": "So", "status": "incomplete"}]}, "input", "input"),
        ({"input": []}, "input", "input"),
        ({"input": None, "prompt": {"id": "p"}}, "prompt", "prompt"),
    ],
)
async def test_responses_a_controller_cannot_serve_are_forwarded_with_a_reason(
    raw: Raw, fields: dict[str, Any], reason: str, param: str
) -> None:
    await passes(raw, "/v1/responses", {"model": MODEL, "input": "hi", **fields}, reason, param)


def test_input_items_of_a_response_are_converted_to_messages() -> None:
    items = [
        {"role": "developer", "content": "Be kind."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "one"}]},
        {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "x"}], "content": []},
        {
            "role": "assistant",
            "content": [{"type": "output_text", "text": "two"}, {"type": "output_text", "text": "3"}],
        },
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "y"}]},
    ]
    request = ResponsesRequest(input=items, text={"format": {"type": "text"}}, tools=[], store=True)
    assert request.pass_through_reason() is None
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert request.conversation == [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": "one"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "two", "reasoning": "x"},
        {"role": "assistant", "reasoning": "y"},
    ]


# Behaviour shared with chat


async def test_every_endpoint_records_an_episode_as_chat_does(backend: FakeVLLM, tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    settings = load(upstream=backend.url, store=path, store_text="full", record_fraction=1.0, **SMALL)
    tts = {"beta": 0.5, "controller": "asc"}
    bodies: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
        "/v1/responses": {"input": "hi", "max_output_tokens": 300},
        "/v1/completions": {"prompt": PROMPT},
    }
    async with running(settings) as url, aiohttp.ClientSession() as http:
        proxy = Proxy(backend, url, http, None)  # type: ignore[arg-type]
        replies = [(await post(proxy, at, {**body, "tts": tts}))[2] for at, body in bodies.items()]
        for reply in replies:
            async with http.get(f"{url}/v1/tts/requests/{reply['id']}") as response:
                assert response.status == 200
            status, _, reply_to_feedback = await post(
                proxy, "/v1/tts/feedback", {"request_id": reply["id"], "correct": True}
            )
            assert status in (200, 202), reply_to_feedback
    async with Store.open(path) as store:
        kept = await store.episodes()
    assert [record.request_id for record in kept] == [reply["id"] for reply in replies]
    assert [record.question for record in kept] == [question_id("hi"), question_id("hi"), question_id(PROMPT)]
    assert [record.ledger["winner"] for record in kept] == [reply["tts"]["tokens"]["winner"] for reply in replies]
    chat, answered, text = (record.about for record in kept)
    assert chat["chat_template"] == answered["chat_template"] == text["chat_template"] != ""
    assert (answered["sampling"]["max_tokens"], text["sampling"]["prompt"]) == (300, "raw")


@pytest.mark.parametrize(
    ("path", "param"), [("/v1/chat/completions", "messages"), ("/v1/completions", "prompt"), ("/v1/responses", "input")]
)
async def test_every_endpoint_refuses_bad_requests_as_chat_does(proxy: Proxy, path: str, param: str) -> None:
    def prompt(text: str) -> Any:
        return [{"role": "user", "content": text}] if param == "messages" else text

    async def refused(fields: dict[str, Any], **headers: str) -> tuple[int, str | None, str | None]:
        status, _, reply = await post(proxy, path, {param: prompt("hi"), **fields}, **headers)
        return status, reply["error"]["code"], reply["error"]["param"]

    assert await refused({"tts": {"beta": 2}}) == (400, "bad_beta", "tts.beta")
    assert await refused({}, **{"x-tts-beta": "much"}) == (400, "bad_beta", "x-tts-beta")
    assert await refused({"tts": {"speed": 1}}) == (400, "unknown_field", "tts.speed")
    assert await refused({"model": "other"}) == (404, "model_not_found", "model")
    assert await refused({"tts": {"beta": 1, "max_total_tokens": 5}}) == (400, "cap_too_small", "tts.max_total_tokens")
    assert await refused({"tts": {"beta": 1, "controller": "x"}}) == (400, "unknown_controller", "tts.controller")
    assert (await refused({"tts": {"beta": 1, "controller": "everything"}}))[:2] == (403, "admin_only")
    assert await refused({"tts": {"required": True}}) == (400, "tts_not_applicable", None)
    long = {param: prompt("x" * 2000), "tts": {"beta": 1}}
    assert await refused(long) == (400, "context_length_exceeded", param)
    assert proxy.backend.generated == 0
    _, _, reply = await post(proxy, path, {param: prompt("x" * 20_000), "tts": {"beta": 1}})
    assert reply["error"]["code"] == "context_length_exceeded"
    assert reply["error"]["message"].startswith("This model's maximum context length is 2000 tokens. However, your ")
    assert reply["error"]["message"].endswith("Shorten the prompt")  # without β it would not fit either
    sent = {"content-type": "application/json"}
    async with proxy.http.post(proxy.url + path, data=b"[1", headers=sent) as response:
        assert (response.status, (await response.json())["error"]["code"]) == (400, "bad_json")


async def test_a_too_long_prompt_that_the_upstream_may_truncate_is_forwarded(raw: Raw) -> None:
    """This holds with `truncation: auto`, for prompts that do not fit."""
    body = {"model": MODEL, "input": "x" * 20_000, "truncation": "auto"}
    raw.upstream.pieces = [b'{"tokens": [' + b"1," * 3000 + b'1], "prompt": "x"}']
    async with raw.http.post(f"{raw.url}/v1/responses", json=body, headers={"x-tts-beta": "0.5"}) as response:
        assert (response.headers["x-tts-applied"], response.headers["x-tts-reason"]) == ("false", "truncation")
    assert json.loads(raw.upstream.seen[-1].body) == body


# Streams


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/completions", {"prompt": PROMPT}),
        ("/v1/completions", {"prompt": [PROMPT, PROMPT]}),
        ("/v1/responses", {"input": "hi"}),
    ],
)
async def test_a_stream_reports_an_internal_error_in_its_last_event(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, path: str, asked: dict[str, Any]
) -> None:
    async def breaks(*_: Any) -> None:
        raise LookupError(str(asked))  # which may quote a client's text

    monkeypatch.setattr("proxy.episode.run._run", breaks)
    body = {"model": MODEL, "stream": True, "tts": {"beta": 0.5}, **asked}
    async with proxy.http.post(proxy.url + path, json=body) as response:
        seen = events(await response.text())
    *_, last = [event["error"] for event in seen if event.get("error")]
    assert (last["code"], last["type"], last["message"][:16]) == ("internal_error", "server_error", "the proxy failed")
    assert seen[-1].get("type", "error") in ("error", "response.failed")
    assert "unhandled error in the proxy: LookupError" in caplog.text
    assert str(asked) not in caplog.text


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
async def test_a_stream_with_progress_sends_one_reasoning_line_per_round(proxy: Proxy, name: str) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": True, "tts": {"beta": 0.5, "progress": True}}
    async with proxy.http.post(f"{proxy.url}/v1/chat/completions", json=body) as response:
        chunks = events(await response.text())
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
    lines = [delta[name] for delta in deltas if delta.get(name, "").startswith("round ")]
    assert deltas[0]["role"] == "assistant"
    assert len(lines) == chunks[-2]["tts"]["rounds"]
    assert any("votes 7: " in line for line in lines), lines
    assert lines[0].endswith(" tokens\n")
    assert "".join(delta.get("content", "") for delta in deltas) == "It is \\boxed{7}"
    assert chunks[-1] == "[DONE]"


async def test_an_error_after_the_first_byte_is_sent_as_an_event(proxy: Proxy) -> None:
    proxy.backend.fault = "garbage"
    tts = {"tts": {"beta": 0.5}}
    stream = await proxy.openai.responses.create(model=MODEL, input="hi", stream=True, extra_body=tts)
    with pytest.raises(APIError, match="JSON"):
        [event async for event in stream]
    async with proxy.http.post(f"{proxy.url}/v1/responses", json={"input": "hi", "stream": True, **tts}) as response:
        last = events(await response.text())[-1]
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    body = {"prompt": PROMPT, "stream": True, **tts}
    async with proxy.http.post(f"{proxy.url}/v1/completions", json=body) as response:
        assert "error" in events(await response.text())[-1]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/responses"])
async def test_a_disconnect_cancels_the_upstream_calls_of_completions_and_responses(proxy: Proxy, path: str) -> None:
    proxy.backend.fault = "hang"
    body = {"prompt": PROMPT, "stream": True} if "completions" in path else {"input": "hi", "stream": True}
    request = asyncio.create_task(post(proxy, path, {**body, "tts": {"beta": 1, "answer": "boxed"}}))
    await proxy.backend.hanging.wait()
    request.cancel()
    async with asyncio.timeout(1):
        await proxy.backend.idle.wait()


def test_a_ping_interval_over_15_seconds_is_refused() -> None:
    with pytest.raises(SettingsError, match="ping_s"):
        load(upstream="http://127.0.0.1:1", ping_s=16)


# Models and paths


async def test_models_are_listed_and_retrieved_with_their_beta_aliases(proxy: Proxy) -> None:
    listed = [model.id async for model in proxy.openai.models.list()]
    assert listed == [MODEL, f"{MODEL}@0.25", f"{MODEL}@0.5", f"{MODEL}@0.75", f"{MODEL}@1"]
    for name in (MODEL, f"{MODEL}@0.5", f"{MODEL}@0.3"):
        assert (await proxy.openai.models.retrieve(name)).id == name
    for name in ("other", "other@0.5", f"{MODEL}@2"):
        with pytest.raises(APIError) as caught:
            await proxy.openai.models.retrieve(name)
        assert isinstance(caught.value, NotFoundError) or name.endswith("@2")


async def test_without_model_aliases_the_models_list_is_the_upstreams() -> None:
    async with (
        RawUpstream().serve() as upstream,
        running(load(upstream=upstream.url, model_aliases=False, **SMALL)) as url,
        aiohttp.ClientSession() as http,
        http.get(f"{url}/v1/models") as ours,
        http.get(f"{upstream.url}/v1/models") as own,
    ):
        assert await ours.read() == await own.read()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/chat/completions", 405),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/responses", 405),
        ("POST", "/v1/models", 405),
        ("PUT", "/v1/embeddings", 405),
        ("POST", "/v1/audio/speech", 404),
        ("GET", "/v1/responses/resp_1", 404),
        ("GET", "/", 404),
        ("POST", "/v1/models/x", 405),
    ],
)
async def test_unknown_paths_and_methods_get_an_openai_error(proxy: Proxy, method: str, path: str, status: int) -> None:
    async with proxy.http.request(method, proxy.url + path) as response:
        reply = await response.json()
    assert response.status == status
    assert set(reply["error"]) == {"message", "type", "param", "code"}
    assert ("allow" in response.headers) == (status == 405)


# Bytes


class Raw(NamedTuple):
    """A proxy over an upstream that records raw requests."""

    upstream: RawUpstream
    url: str
    http: aiohttp.ClientSession


@pytest_asyncio.fixture
async def raw() -> AsyncIterator[Raw]:
    async with (
        RawUpstream([b'{"id": 1}'], content_type="application/json").serve() as upstream,
        running(load(upstream=upstream.url, upstream_api_key="k", **SMALL)) as url,
        aiohttp.ClientSession() as http,
    ):
        yield Raw(upstream, url, http)


ODD = b' {\t"model" :\t"fake-model", "n":2.0e0 ,"messages":[{"role":"user","content":"\\u00e9\xc3\xa9 \\/"}]}\n'


async def test_a_body_is_forwarded_byte_for_byte_with_allowed_headers_only(raw: Raw) -> None:
    headers = {
        "authorization": "Bearer mine",
        "cookie": "a=b",
        "x-api-key": "s",
        "x-tts-beta": "0.5",
        "content-type": "application/json; charset=utf-8",
        "accept": "text/event-stream",
    }
    for path in ("/v1/chat/completions", "/v1/embeddings", "/v1/score", "/v1/rerank", "/tokenize"):
        async with raw.http.post(f"{raw.url}{path}?key=1", data=ODD, headers=headers) as response:
            assert await response.read() == b'{"id": 1}'
        seen = raw.upstream.seen[-1]
        assert (seen.path, seen.body) == (path, ODD)
        assert seen.headers["authorization"] == "Bearer k"
        assert (seen.headers["content-type"], seen.headers["accept"]) == (headers["content-type"], headers["accept"])
        allowed = {"host", "accept-encoding", "user-agent", "content-length", "authorization", "content-type", "accept"}
        allowed.add("x-request-id")
        assert set(seen.headers) <= allowed
        assert "mine" not in str(seen)


async def test_only_the_tts_member_and_the_model_alias_are_removed_from_a_forwarded_body(raw: Raw) -> None:
    body = ODD.replace(b"fake-model", b"fake-model@0.5").replace(b"}\n", b' , "tts": {"answer": "number"} }\n')
    headers = {"content-type": "application/json"}
    async with raw.http.post(f"{raw.url}/v1/chat/completions", data=body, headers=headers) as response:
        assert response.status == 200
    content = b'[{"role":"user","content":"\\u00e9\xc3\xa9 \\/"}]'
    assert raw.upstream.seen[-1].body == b'{"model":"fake-model","n":2.0e0,"messages":' + content + b"}"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'{"tts":1}', b'{"model":"m"}'),
        (b' { "tts" : [{"tts": "}"}] , "a" : 1 } ', b'{"a":1,"model":"m"}'),
        (b'{"model":"m@1", "a":"\\"tts\\": 1"}', b'{"model":"m","a":"\\"tts\\": 1"}'),
        (
            b'{"\\u0074ts":1, "\\u0061" : [ 1.0E+2 , -0 ],"b":"\\u00e9 \\/"}',
            b'{"a":[ 1.0E+2 , -0 ],"b":"\\u00e9 \\/","model":"m"}',
        ),
        (
            b'{"n":1e400,"i":123456789012345678901234567890.10}',
            b'{"n":1e400,"i":123456789012345678901234567890.10,"model":"m"}',
        ),
    ],
)
def test_edit_members_changes_members_and_keeps_the_bytes_of_other_values(before: bytes, after: bytes) -> None:
    assert edit_members(before, drop=("tts",), put={"model": "m"}) == after
    assert edit_members(before, drop=(), put={}) is before
    assert edit_members(after, drop=("tts",), put={}) is after


class Counted(str):
    """String that counts how often any instance is compared."""

    compared = 0

    def __eq__(self, other: object) -> bool:
        Counted.compared += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


@pytest.mark.parametrize("count", [100, 1000])
def test_removing_members_takes_linear_time(count: int) -> None:
    body = json.dumps({f"x{i}": i for i in range(count)} | {"a": 1}).encode()
    Counted.compared = 0
    assert edit_members(body, drop=[Counted(f"x{i}") for i in range(count)], put={}) == b'{"a":1}'
    assert Counted.compared <= 4 * count


async def test_a_forwarded_stream_returns_byte_for_byte_and_unbuffered(raw: Raw) -> None:
    pieces = [b": hello\r\n\r\n", b'event: x\ndata: {"a":\n', b"data: 1}\n\n", b"data: [DONE]\n\n", b"\xff\x00tail"]
    raw.upstream.pieces, raw.upstream.status = pieces, 203
    raw.upstream.headers = {"content-type": "text/event-stream", "set-cookie": "a=b", "x-secret": "1", "server": "v"}
    raw.upstream.go.clear()
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
    async with raw.http.post(f"{raw.url}/v1/chat/completions", json=body) as response:
        assert response.status == 203
        assert await response.content.readexactly(len(pieces[0])) == pieces[0]  # the upstream has not sent the rest yet
        raw.upstream.go.set()
        assert await response.content.read() == b"".join(pieces[1:])
    assert response.headers["content-type"] == "text/event-stream"
    assert response.headers["x-accel-buffering"] == "no"
    assert not {"set-cookie", "x-secret"} & {name.lower() for name in response.headers}


async def test_an_upstream_error_is_returned_unchanged(raw: Raw) -> None:
    raw.upstream.pieces, raw.upstream.status = [b'{"error" : "slow down"}'], 429
    raw.upstream.headers = {"content-type": "application/problem+json", "retry-after": "7"}
    async with raw.http.post(f"{raw.url}/v1/completions", json={"prompt": "hi"}) as response:
        assert (response.status, await response.read()) == (429, b'{"error" : "slow down"}')
        assert (response.headers["retry-after"], response.content_type) == ("7", "application/problem+json")
        assert response.headers["x-tts-reason"] == "no_beta"
