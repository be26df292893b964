"""Log-probabilities in vLLM's streamed completions: one for each token, or unknown."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from proxy.errors import UpstreamProtocolError
from proxy.types import Call
from proxy.upstream.completion_stream import (
    OptionalFields,
    add_chunk,
    completion_body,
    completion_request,
    parse_chunk,
    without_refused,
)
from proxy.upstream.response_body import parse_object

ALL = OptionalFields()


def received(*logprobs: object, ids: tuple[int, ...] = (5, 6), texts: bool = True) -> Call:
    """Return a call that has received one chunk of `ids` for each of `logprobs`."""
    call = Call([[1]], 100, {}, needs_log_probabilities=True, needs_token_texts=texts)
    for value in logprobs:
        choice: dict[str, Any] = {"index": 0, "token_ids": list(ids), "text": "", "finish_reason": None}
        add_chunk(call, {"choices": [choice | {"logprobs": value}]}, UpstreamProtocolError)
    return call


def sent(values: object, tokens: object = ("a", "b")) -> dict[str, Any]:
    return {"token_logprobs": values, "tokens": list(tokens) if isinstance(tokens, tuple) else tokens}


def test_chunks_add_one_log_probability_and_text_per_token() -> None:
    (output,) = received(sent([-0.5, -1]), sent([-2.5, 0.0], ("c", ""))).outputs
    assert list(output.log_probabilities) == [-0.5, -1, -2.5, 0]
    assert output.token_texts == ["a", "b", "c", ""]


def test_values_are_bounded_as_vllm_does_it() -> None:
    (output,) = received(sent([-1e300, 1e-7])).outputs
    assert list(output.log_probabilities) == [-9999.0, 0.0]


@pytest.mark.parametrize(
    "logprobs",
    [
        None,
        {},
        [],
        "none",
        sent(None),
        sent([-0.5]),
        sent([-0.5, -0.5, -0.5]),
        sent([None, None]),
        sent(["-0.5", "-0.5"]),
        sent([True, False]),
        sent([0.5, 9]),
        sent({"0": -0.5, "1": -0.5}),
    ],
)
def test_other_values_are_unknown_and_keep_their_place(logprobs: object) -> None:
    call = received(logprobs, sent([-0.5, -0.5]))
    (output,) = call.outputs
    assert [math.isnan(value) for value in output.log_probabilities] == [True, True, False, False]
    assert len(output.token_texts) == len(output.ids) == 4
    assert not call.lacks_log_probabilities
    assert received(logprobs).lacks_log_probabilities


@pytest.mark.parametrize("tokens", [None, ("a",), [1, 2], "ab"])
def test_texts_that_are_missing_are_empty(tokens: object) -> None:
    (output,) = received(sent([-0.5, -0.5], tokens)).outputs
    assert output.token_texts == ["", ""]
    assert list(output.log_probabilities) == [-0.5, -0.5]


def test_an_ending_chunk_without_tokens_adds_nothing() -> None:
    call = received({"token_logprobs": [], "tokens": []}, ids=())
    assert (list(call.outputs[0].log_probabilities), call.lacks_log_probabilities) == ([], False)


def test_log_probabilities_that_were_not_asked_for_are_ignored() -> None:
    call = Call([[1]], 100, {})
    choice = {"index": 0, "token_ids": [5], "text": "", "finish_reason": None, "logprobs": sent([-0.5], ("a",))}
    add_chunk(call, {"choices": [choice]}, UpstreamProtocolError)
    assert (list(call.outputs[0].log_probabilities), call.outputs[0].token_texts) == ([], [])


def test_log_probabilities_are_asked_for_without_alternatives() -> None:
    call = Call([[1]], 100, {}, needs_log_probabilities=True)
    assert completion_request("m", call, ALL)["logprobs"] == 0
    assert completion_request("m", call, ALL)["return_tokens_as_token_ids"] is True
    call.needs_token_texts = True
    assert completion_request("m", call, ALL)["return_tokens_as_token_ids"] is False
    assert "logprobs" not in completion_request("m", call, ALL._replace(log_probabilities=False))
    assert "logprobs" not in completion_request("m", Call([[1]], 100, {}), ALL)


def test_only_a_field_that_was_sent_can_be_the_refused_one() -> None:
    message = "Priority scheduling and logprobs are not supported"
    both = Call([[1]], 100, {}, priority=3, needs_log_probabilities=True)
    without_priority = without_refused(both, ALL, message)
    assert without_priority == OptionalFields(priority=False)
    assert without_refused(both, OptionalFields(priority=False), message) == OptionalFields(False, False)
    assert without_refused(both, OptionalFields(False, False), message) is None
    assert without_refused(Call([[1]], 100, {}), ALL, message) is None
    assert without_refused(both, ALL, "no such model") is None
    both.outputs[0].ids.append(1)
    assert without_refused(both, ALL, message) is None  # tokens were spent, so it is not sent again


@pytest.mark.parametrize(("prompts", "sent_prompt"), [([[1, 2]], [1, 2]), ([[1], [2, 3]], [[1], [2, 3]])])
def test_a_body_has_the_prompts_beside_the_other_fields(prompts: list[list[int]], sent_prompt: object) -> None:
    call = Call(prompts, 100, {"temperature": 0.5, "stop": ["é"]})
    assert json.loads(completion_body("m", call, ALL)) == {"prompt": sent_prompt, **completion_request("m", call, ALL)}


CHOICE: dict[str, Any] = {
    "index": 0,
    "text": "é\U0001f600",
    "token_ids": [5],
    "finish_reason": None,
    "stop_reason": None,
    "logprobs": None,
}


@pytest.mark.parametrize("ids", [None, [], [1], list(range(5000))])
@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
def test_a_chunk_is_read_without_the_ids_of_its_prompt(ids: object, separators: tuple[str, str]) -> None:
    chunk = {"id": "x", "choices": [{**CHOICE, "prompt_token_ids": ids}], "usage": {"a": 1}, "error": "x"}

    def fail(payload: bytes) -> dict[str, Any]:
        raise AssertionError(payload)

    payload = json.dumps(chunk, separators=separators).encode()
    assert parse_chunk(payload, fail) == {"choices": [CHOICE], "usage": {"a": 1}, "error": "x"}


@pytest.mark.parametrize(
    "payload",
    [
        b'{"choices": [1]}',
        b'{"choices": {}}',
        b'{"choices": [{"index": 0, "text": "\\ud800"}]}',
        b'{"choices":[{"index":0,"prompt_token_ids":["]","text","x"]}]}',
        b'{"choices":[{"index":0,"prompt_token_ids":[[1],2]}]}',
        b'{"choices":[{"text":"\\"prompt_token_ids\\":[1","token_ids":[2]}]}',
    ],
)
def test_an_unusual_chunk_is_read_like_any_json(payload: bytes) -> None:
    read, expected = parse_chunk(payload, parse_object), parse_object(payload)
    assert set(read) == set(expected)
    for mine, whole in zip(read["choices"], expected["choices"], strict=True):
        assert mine == whole or mine == {name: whole[name] for name in mine}


@pytest.mark.parametrize("payload", [b"", b"[]", b'{"choices": [NaN]}', b'{"choices":[{"prompt_token_ids":[1', b"\xff"])
def test_a_chunk_that_is_no_json_object_raises_protocol_error(payload: bytes) -> None:
    with pytest.raises(UpstreamProtocolError):
        parse_chunk(payload, parse_object)
