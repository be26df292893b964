"""Reading streamed chat completions: pieces are joined unchanged, and invalid chunks are errors."""

from __future__ import annotations

from typing import Any

import pytest

from proxy.errors import UpstreamProtocolError
from proxy.types import Call
from proxy.upstream.chat_stream import (
    MAX_TOOL_CALLS,
    ChatOutput,
    add_chat_chunk,
    chat_output,
    chat_request,
    finish_chat,
)

USAGE = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}


def new_call(max_tokens: int = 10) -> Call:
    call = Call([()], max_tokens, {}, stream_interval=1)
    call.outputs = [ChatOutput()]
    return call


def add(call: Call, delta: Any, ids: Any = (1,), **choice: Any) -> ChatOutput:
    chunk = {"choices": [{"index": 0, "delta": delta, "token_ids": list(ids), "finish_reason": None, **choice}]}
    add_chat_chunk(call, chunk, UpstreamProtocolError)
    return chat_output(call)


def test_pieces_of_texts_and_tool_calls_are_joined_unchanged() -> None:
    call = new_call()
    add(call, {"role": "assistant", "content": ""}, ids=())
    add(call, {"reasoning": "a"}, ids=(1, 2))
    add(call, {"reasoning_content": "b"})
    add(call, {"content": " c"})
    first = {"id": "x", "type": "function", "function": {"name": "f", "arguments": ""}}
    add(call, {"tool_calls": [{"index": 1, **first, "id": "y"}, {"index": 0, **first}]})
    add(call, {"tool_calls": [{"index": 0, "function": {"arguments": '{"a"'}}]})
    output = add(call, {"tool_calls": [{"index": 0, "function": {"arguments": ": 1}"}}]}, finish_reason="tool_calls")
    assert (output.content, "".join(output.thoughts), len(output.ids)) == (" c", "ab", 7)
    assert output.tool_call_objects == [
        {"id": "x", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}},
        {"id": "y", "type": "function", "function": {"name": "f", "arguments": ""}},
    ]
    assert (output.finish, output.finish_reason) == ("stop", "tool_calls")
    assert output.grown.is_set()


@pytest.mark.parametrize(
    "chunk",
    [
        {},
        {"choices": None},
        {"choices": [5]},
        {"choices": [{"index": 0}]},
        {"choices": [{"index": 1, "delta": {}}]},
        {"choices": [{"index": 0, "delta": None}]},
        {"choices": [{"index": 0, "delta": {"content": 5}}]},
        {"choices": [{"index": 0, "delta": {}, "token_ids": [1.5]}]},
        {"choices": [{"index": 0, "delta": {}, "token_ids": [-1]}]},
        {"choices": [{"index": 0, "delta": {"tool_calls": [{}]}}]},
        {"choices": [{"index": 0, "delta": {"tool_calls": [{"index": -1}]}}]},
        {"choices": [{"index": 0, "delta": {"tool_calls": [{"index": True}]}}]},
        {"choices": [{"index": 0, "delta": {"tool_calls": [{"index": MAX_TOOL_CALLS}]}}]},
        {"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0, "function": {"arguments": {"a": 1}}}]}}]},
        {"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0, "function": "f"}]}}]},
        {"choices": [{"index": 0, "delta": {}, "logprobs": 5}]},
        {"choices": [{"index": 0, "delta": {}, "logprobs": {"content": "x"}}]},
        {"choices": [{"index": 0, "delta": {}, "finish_reason": {"a": 1}}]},
        {"choices": [], "usage": 5},
        {"choices": [], "usage": {}},
    ],
    ids=str,
)
def test_a_chunk_in_another_format_is_a_protocol_error(chunk: dict[str, Any]) -> None:
    with pytest.raises(UpstreamProtocolError, match="not in vLLM's format"):
        add_chat_chunk(new_call(), chunk, UpstreamProtocolError)


def test_tokens_beyond_the_limit_are_an_error_and_are_counted() -> None:
    call = new_call(max_tokens=2)
    add(call, {"content": "ab"}, ids=(1, 2))
    with pytest.raises(UpstreamProtocolError, match="3 tokens of a reply with max_tokens 2"):
        add(call, {"content": "c"})
    assert (call.generated, call.max_unseen_tokens) == (3, 0)


@pytest.mark.parametrize(
    ("finish", "usage", "message"),
    [
        ("stop", None, "before the reply had finished"),
        (None, USAGE, "before the reply had finished"),
        ("abort", USAGE, "finish_reason 'abort'"),
        ("stop", {**USAGE, "completion_tokens": 4}, "reported completion_tokens 4 but sent the ids of 3 tokens"),
        ("stop", {**USAGE, "completion_tokens": "3"}, "usage object without token counts"),
        ("stop", {"completion_tokens": 3}, "usage object without token counts"),
        ("stop", {**USAGE, "prompt_tokens_details": {"cached_tokens": 9}}, "reported cached_tokens 9"),
    ],
)
def test_a_reply_that_did_not_end_properly_is_a_protocol_error(finish: Any, usage: Any, message: str) -> None:
    call = new_call()
    add(call, {"content": "abc"}, ids=(1, 2, 3), finish_reason=finish)
    with pytest.raises(UpstreamProtocolError, match=message):
        finish_chat(call, usage, UpstreamProtocolError)


@pytest.mark.parametrize(("finish", "ends"), [("stop", "stop"), ("tool_calls", "stop"), ("length", "length")])
def test_a_reply_that_ended_properly_has_its_tokens_checked(finish: str, ends: str) -> None:
    call = new_call()
    output = add(call, {"content": "abc"}, ids=(1, 2, 3), finish_reason=finish)
    finish_chat(call, {**USAGE, "prompt_tokens_details": {"cached_tokens": 4}}, UpstreamProtocolError)
    assert (output.finish, call.prompt_tokens, call.cached_tokens) == (ends, 5, 4)


def test_a_request_asks_for_token_ids_and_usage_and_keeps_the_clients_fields() -> None:
    call = new_call()
    call.salt = "s"
    body = chat_request({"stream": False, "return_token_ids": False, "top_p": 0.5, "cache_salt": "mine"}, call)
    assert (body["stream"], body["return_token_ids"], body["top_p"], body["cache_salt"]) == (True, True, 0.5, "s")
