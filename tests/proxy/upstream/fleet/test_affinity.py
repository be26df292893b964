"""Keys of requests: equal for prompts that begin alike."""

from __future__ import annotations

from typing import Any

import pytest

from proxy.requests.chat_request import ChatRequest
from proxy.requests.completion_request import CompletionRequest
from proxy.requests.responses_request import ResponsesRequest
from proxy.upstream.fleet.affinity import HEAD_CHARS, HEAD_TOKENS, affinity_key, body_key

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "2 + 2?"}


def chat(*messages: dict[str, Any]) -> bytes:
    return affinity_key(ChatRequest(messages=messages))


def test_later_turns_of_a_conversation_have_the_key_of_its_first() -> None:
    later = [{"role": "assistant", "content": "4"}, {"role": "user", "content": "3 + 3?"}]
    assert chat(SYSTEM, USER) == chat(SYSTEM, USER, *later)
    assert chat(SYSTEM, USER) != chat(SYSTEM, {**USER, "content": "3 + 3?"}) != chat(USER)


def test_a_conversation_has_the_same_key_as_responses_input() -> None:
    assert affinity_key(ResponsesRequest(instructions="Be brief.", input="2 + 2?")) == chat(SYSTEM, USER)


@pytest.mark.parametrize(("head", "unit"), [("a" * HEAD_CHARS, "b"), ([7] * HEAD_TOKENS, [8])])
def test_prompts_with_the_same_long_beginning_have_the_same_key(head: Any, unit: Any) -> None:
    keys = [affinity_key(CompletionRequest(prompt=prompt)) for prompt in (head, head + unit, unit + head)]
    assert keys[0] == keys[1] != keys[2]


def test_a_batch_of_prompts_has_the_key_of_its_first() -> None:
    assert affinity_key(CompletionRequest(prompt=["a", "b"])) == affinity_key(CompletionRequest(prompt="a"))


def test_a_request_without_a_prompt_counts_by_its_body() -> None:
    empty = ChatRequest(messages=[])
    assert affinity_key(empty, b"one") == body_key(b"one") != affinity_key(empty, b"two")
