"""The table of features in docs/replies.md says how the code serves each of them on each endpoint."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

from proxy.errors import BadRequest
from proxy.requests.chat_request import ChatRequest
from proxy.requests.completion_request import CompletionRequest
from proxy.requests.field_table import ADMINS, CHAT, RESPONSES, RESPONSES_WHOLE_REPLY, TEXT, WHOLE_REPLY
from proxy.requests.generation_request import GenerationRequest
from proxy.requests.reply_fields import read_reply_fields
from proxy.requests.responses_request import ResponsesRequest

DOCUMENT: Final = Path(__file__).parents[3] / "docs" / "replies.md"
USER: Final = {"role": "user", "content": "hi"}
ENDPOINTS: Final[Mapping[str, tuple[type[GenerationRequest], Mapping[str, Any]]]] = {
    "chat": (ChatRequest, {"messages": [USER]}),
    "text": (CompletionRequest, {"prompt": "hi"}),
    "responses": (ResponsesRequest, {"input": "hi"}),
}
FUNCTION: Final = {"name": "f", "parameters": {"type": "object"}, "strict": True}
TOOL: Final = {"type": "function", "function": FUNCTION}
FLAT: Final = {"type": "function", **FUNCTION}
CALL: Final = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLED: Final = [
    USER,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "content": "2"},
]
ITEMS: Final = [
    USER,
    {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "1", "output": "2"},
]
JSON: Final = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
URL: Final = "data:image/png;base64,AA"


def content(*parts: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


VALUES: Final[Mapping[str, Any]] = {
    "function_call": {"name": "f"},
    "web_search_options": {"search_context_size": "low"},
    "functions": [{"name": "f"}],
    "structured_outputs": {"regex": "a+"},
    "guided_json": {"type": "object"},
    "guided_choice": ["a"],
    "modalities": ["text", "audio"],
    "audio": {"voice": "x"},
    "logprobs": True,
    "top_logprobs": 2,
    "return_token_ids": True,
    "return_prompt_text": True,
    "logit_bias": {"5": 1},
    "stop": ["zzz"],
    "stop_token_ids": [5],
    "logprob_token_ids": [5],
    "include_stop_str_in_output": True,
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
    "bad_words": ["x"],
    "allowed_token_ids": [5],
    "repetition_detection": {"max_pattern_size": 3, "min_count": 2},
    "use_beam_search": True,
    "echo": True,
    "suffix": "x",
    "documents": [{"text": "x"}],
    "add_generation_prompt": False,
    "continue_final_message": True,
    "prompt_embeds": "eA==",
    "reasoning_effort": "low",
    "reasoning": {"effort": "low"},
    "stream": True,
    "store": True,
    "metadata": {"a": "b"},
    "user": "me",
    "background": True,
    "previous_response_id": "resp_1",
    "conversation": "conv_1",
    "context_management": [{"type": "compaction"}],
    "guided_regex": "a+",
    "guided_grammar": "root ::= 'a'",
    "temperature": 0.5,
    "top_p": 0.5,
    "min_p": 0.5,
}
"""Values with an effect. Fields that are not listed count tokens or alternatives and get 2."""
WITH_TOOLS: Final[Mapping[str, Mapping[str, Any]]] = {
    "chat": {"tools": [TOOL]},
    "responses": {"tools": [FLAT]},
    "text": {},
}
REQUESTS: Final[Mapping[str, Mapping[str, Mapping[str, Any]]]] = {
    "tools: functions, `strict` or not": WITH_TOOLS,
    "which tools are called, and how many": {
        "chat": {**WITH_TOOLS["chat"], "tool_choice": "required", "parallel_tool_calls": False},
        "responses": {**WITH_TOOLS["responses"], "tool_choice": {"type": "function", "name": "f"}},
        "text": {},
    },
    "`tool_choice` without tools": {name: {"tool_choice": "required"} for name in ("chat", "responses")},
    "tools that a server runs": {name: {"tools": [{"type": "web_search"}]} for name in ("chat", "responses")},
    "earlier calls and results of tools": {"chat": {"messages": CALLED}, "responses": {"input": ITEMS}},
    "JSON": {
        "chat": {"response_format": JSON},
        "text": {"response_format": JSON},
        "responses": {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "object"}}}},
    },
    "images by URL": {
        "chat": {"messages": content({"type": "image_url", "image_url": {"url": URL}})},
        "responses": {"input": content({"type": "input_image", "image_url": URL})},
    },
    "audio in the prompt": {
        "chat": {"messages": content({"type": "input_audio", "input_audio": {"data": "AA", "format": "wav"}})},
        "responses": {"input": content({"type": "input_audio", "input_audio": {"data": "AA", "format": "wav"}})},
    },
    "several prompts": {"text": {"prompt": ["hi", "ho"]}},
    "a stored prompt": {"responses": {"prompt": {"id": "p"}}},
    "a prompt that may be shortened": {"responses": {**WITH_TOOLS["responses"], "truncation": "auto"}},
}
"""Requests with a feature, by endpoint, of features that a single field does not make."""


class Feature(NamedTuple):
    """A row of the table."""

    name: str
    fields: tuple[str, ...]
    served: Mapping[str, str]  # by endpoint


def read_features() -> list[Feature]:
    section = DOCUMENT.read_text().partition("## Each feature of a request")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    head, _, *features = rows
    assert head[2:5] == list(ENDPOINTS)
    return [
        Feature(row[0], tuple(re.findall(r"`(\w+)`", row[1])), dict(zip(ENDPOINTS, row[2:5], strict=True)))
        for row in features
    ]


FEATURES: Final = read_features()


def served(endpoint: str, fields: Mapping[str, Any]) -> str:
    """Return how the code serves a request with `fields`, in a word of the table."""
    made, body = ENDPOINTS[endpoint]
    request = made.model_validate({**body, **fields})
    if request.pass_through_reason() is not None:
        return "passes"
    if request.whole_reply_reason() is None:
        return "ids"
    try:
        read_reply_fields(request.chat_body({**body, **fields}), request.reply_field_names)
    except BadRequest:
        return "refused"
    return "whole"


@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.name)
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_a_feature_is_served_as_the_table_says(feature: Feature, endpoint: str) -> None:
    stated = feature.served[endpoint]
    if feature.name in REQUESTS:
        requests = [REQUESTS[feature.name].get(endpoint, {})]
    else:
        known = {"chat": CHAT.keys() | WHOLE_REPLY.keys(), "text": TEXT.keys(), "responses": RESPONSES.keys()}[endpoint]
        known = known | (RESPONSES_WHOLE_REPLY.keys() if endpoint == "responses" else set())
        fields = [field for field in feature.fields if stated in ("ids", "—") or field in known]
        assert fields, "no field of the row is known to the endpoint"
        requests = [{field: VALUES.get(field, 2)} for field in fields]
    if stated == "—":
        assert feature.name not in REQUESTS or requests == [{}]
    for request in requests:
        assert served(endpoint, request) == ("ids" if stated == "—" else stated), request


def test_each_feature_has_one_row() -> None:
    names = [feature.name for feature in FEATURES]
    assert len(names) == len(set(names))
    assert REQUESTS.keys() <= set(names)


def test_each_field_that_keeps_a_request_from_token_ids_is_in_the_table() -> None:
    tables = (CHAT, TEXT, RESPONSES, WHOLE_REPLY, RESPONSES_WHOLE_REPLY)
    listed = {field for feature in FEATURES for field in feature.fields}
    assert {field for table in tables for field in table} - ADMINS.keys() - listed == set()


def test_only_the_first_error_of_a_schema_is_looked_for() -> None:
    """A megabyte of errors would hold up other requests for seconds."""
    schema = {"allOf": [{"anyOf": [{"type": 5}] * 300}] * 300}
    started = time.process_time()
    with pytest.raises(BadRequest, match="is not a JSON schema: at allOf/0/anyOf/0/type, 5 is not valid"):
        read_reply_fields({"tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}]})
    assert time.process_time() - started < 1
