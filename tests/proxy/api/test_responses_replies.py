"""Responses requests with tools, their results, JSON and images, served by whole replies of the upstream's chat."""

from __future__ import annotations

import json
from typing import Any, Final

import pytest
from pydantic import BaseModel

from tests.chat_fake import PROMPT_TOKENS, SEED, ScriptedReply
from tests.fakes import MODEL
from tests.proxy.conftest import Proxy
from tests.proxy.episode.test_whole_replies import PARAMETERS, call, fake, served, text

WEATHER: Final = {"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": True}
TIME: Final = {"type": "function", "name": "time", "parameters": None, "strict": None}
SEEDED: Final[dict[str, Any]] = {"extra_body": {"seed": SEED, "tts": {"controller": "self_consistency@3"}}}
DOCUMENTS: Final = ['{"name":"Rome","people":3}', '{"name":"Rome","people":2}', '{"name":"Oslo","people":2}']
DATA: Final = "data:image/png;base64,AA"
TURNS: Final[list[dict[str, Any]]] = [
    {"role": "user", "content": [{"type": "input_text", "text": "And?"}, {"type": "input_image", "image_url": DATA}]},
    {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "I ask."}]},
    {"role": "assistant", "content": [{"type": "output_text", "text": "Let me see."}]},
    {
        "type": "function_call",
        "id": "fc_1",
        "call_id": "a",
        "name": "weather",
        "arguments": "{}",
        "status": "completed",
    },
    {"type": "function_call", "call_id": "b", "name": "time", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "a", "output": "21 degrees"},
    {"type": "function_call_output", "call_id": "b", "output": [{"type": "input_text", "text": "noon"}]},
]


class City(BaseModel):
    """A city."""

    name: str
    people: int


async def post(proxy: Proxy, **fields: Any) -> tuple[int, Any, Any]:
    body = {"model": f"{MODEL}@0.5", "input": "hi", "seed": SEED, **fields}
    async with proxy.http.post(f"{proxy.url}/v1/responses", json=body) as response:
        return response.status, response.headers, await response.json()


async def test_calls_are_items_of_the_response_and_the_request_is_sent_as_chat() -> None:
    replies = [call(0, '{"city":"Oslo"}'), call(1, '{"city": "Rome"}'), call(2, '{"unit":"C","city":"Rome"}')]
    async with served(replies) as proxy:
        fields: dict[str, Any] = {
            "instructions": "Be brief.",
            "tools": [WEATHER, TIME],
            "tool_choice": {"type": "function", "name": "weather"},
            "parallel_tool_calls": False,
            "max_output_tokens": 60,
            "reasoning": {"effort": "high"},
            "text": {"verbosity": "low"},
            "presence_penalty": 0.5,
            "top_p": 0.5,
            "store": True,
            "user": "me",
        }
        status, headers, reply = await post(proxy, **fields, tts={"controller": "self_consistency@3"})
        assert (status, headers["x-tts-applied"]) == (200, "true"), reply
        (item,) = reply["output"]
        assert item == {
            "id": f"fc_{reply['id'].removeprefix('resp_')}_0",
            "type": "function_call",
            "call_id": "chatcmpl-tool-1",
            "name": "weather",
            "arguments": '{"city": "Rome"}',
            "status": "completed",
        }
        assert reply["status"] == "completed"
        for name in ("tools", "tool_choice", "parallel_tool_calls", "instructions", "max_output_tokens"):
            assert reply[name] == fields[name]
        assert reply["text"] == {"format": {"type": "text"}, "verbosity": "low"}
        assert reply["usage"]["input_tokens"] == PROMPT_TOKENS
        assert reply["usage"]["output_tokens"] == proxy.backend.generated == reply["tts"]["tokens"]["total"]
        assert len(proxy.backend.requests) == 3
        for body in proxy.backend.requests:
            expected = {
                "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}],
                "tools": [
                    {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS, "strict": True}},
                    {"type": "function", "function": {"name": "time", "parameters": None, "strict": None}},
                ],
                "tool_choice": {"type": "function", "function": {"name": "weather"}},
                "parallel_tool_calls": False,
                "max_completion_tokens": 60,
                "reasoning_effort": "high",
                "presence_penalty": 0.5,
                "top_p": 0.5,
            }
            assert {name: body[name] for name in expected} == expected
            assert not {"input", "instructions", "max_output_tokens", "reasoning", "text", "store"} & body.keys()


async def test_fields_of_chat_completions_have_no_effect_on_a_response() -> None:
    """They have none at vLLM's `/v1/responses`, so that they must not reach its `/v1/chat/completions`."""
    fields: dict[str, Any] = {
        **{"max_tokens": 3, "max_completion_tokens": 3, "min_tokens": 2, "thinking_token_budget": 1},
        **{"logprobs": True, "prompt_logprobs": 1, "echo": True, "use_beam_search": True, "documents": [{"text": "x"}]},
        **{"continue_final_message": True, "truncate_prompt_tokens": 1, "reasoning_effort": "high", "messages": []},
    }
    async with served([call(1, '{"city": "Rome"}')]) as proxy:
        status, headers, reply = await post(proxy, **fields, tools=[WEATHER], tts={"controller": "self_consistency@3"})
        assert (status, headers["x-tts-applied"], reply["status"]) == (200, "true", "completed"), reply
        assert all(body["messages"] == [{"role": "user", "content": "hi"}] for body in proxy.backend.requests)
        assert [fields.keys() & body.keys() for body in proxy.backend.requests] == [{"messages"}] * 3


async def test_results_of_tools_and_images_are_messages_of_the_chat() -> None:
    async with served([text("At noon it is \\boxed{21}.")]) as proxy:
        status, _, reply = await post(proxy, input=TURNS, tools=[WEATHER])
        assert (status, reply["tts"]["answer_kind"]) == (200, "tools"), reply
        assert reply["output"][-1]["content"][0]["text"] == "At noon it is \\boxed{21}."
        calls = [
            {"id": "a", "type": "function", "function": {"name": "weather", "arguments": "{}"}},
            {"id": "b", "type": "function", "function": {"name": "time", "arguments": "{}"}},
        ]
        image = {"type": "image_url", "image_url": {"url": DATA}}
        assert proxy.backend.requests[0]["messages"] == [
            {"role": "user", "content": [{"type": "text", "text": "And?"}, image]},
            {"role": "assistant", "reasoning": "I ask.", "content": "Let me see.", "tool_calls": calls},
            {"role": "tool", "tool_call_id": "a", "content": "21 degrees"},
            {"role": "tool", "tool_call_id": "b", "content": [{"type": "text", "text": "noon"}]},
        ]
        status, _, reply = await post(proxy, input=TURNS)  # without tools, the texts vote
        assert (status, reply["tts"]["answer_kind"]) == (200, "auto"), reply


async def test_the_sdk_parses_json_by_the_vote_on_fields_and_a_stream_of_it() -> None:
    async with served([*map(text, DOCUMENTS)]) as proxy:
        parsed = await proxy.openai.responses.parse(model=f"{MODEL}@0.5", input="hi", text_format=City, **SEEDED)
        assert parsed.output_parsed == City(name="Rome", people=2)
        sent = proxy.backend.requests[0]["response_format"]
        assert (sent["type"], sent["json_schema"]["name"], sent["json_schema"]["strict"]) == (
            "json_schema",
            "City",
            True,
        )
        assert sent["json_schema"]["schema"]["properties"].keys() == {"name", "people"}
        assert parsed.text is not None
        assert parsed.text.format is not None
        assert parsed.text.format.type == "json_schema"
        async with proxy.openai.responses.stream(
            model=f"{MODEL}@0.5", input="hi", text_format=City, **SEEDED
        ) as stream:
            final = await stream.get_final_response()
        assert final.output_parsed == City(name="Rome", people=2)
        status, _, reply = await post(proxy, text={"format": {"type": "json_object"}})
        assert (status, reply["tts"]["answer_kind"]) == (200, "json")
        assert proxy.backend.requests[-1]["response_format"] == {"type": "json_object"}


async def test_the_sdk_assembles_streamed_calls() -> None:
    long = json.dumps({"city": "x" * 1000, "note": '"\\é'})
    two = ScriptedReply("On it.", [("id-1", "weather", long), ("id-2", "time", "{}")], thought="Hm.")
    async with served([two]) as proxy:
        async with proxy.openai.responses.stream(
            model=f"{MODEL}@0.5",
            input="hi",
            tools=[WEATHER, TIME],  # type: ignore[list-item]
            **SEEDED,
        ) as stream:
            events: list[Any] = [event async for event in stream]
            final: Any = await stream.get_final_response()
        assert [item.type for item in final.output] == ["reasoning", "message", "function_call", "function_call"]
        assert final.output_text == "On it."
        assert [(item.call_id, item.name, item.arguments) for item in final.output[2:]] == [
            ("id-1", "weather", long),
            ("id-2", "time", "{}"),
        ]
        assert [event.sequence_number for event in events] == list(range(len(events)))
        of_calls = [event for event in events if getattr(event, "output_index", 0) >= 2]
        kinds = [event.type.removeprefix("response.") for event in of_calls if event.output_index == 2]
        assert kinds == [
            "output_item.added",
            *["function_call_arguments.delta"] * 3,
            "function_call_arguments.done",
            "output_item.done",
        ]
        added, *deltas, done, whole = [event for event in of_calls if event.output_index == 2]
        assert (added.item.status, added.item.arguments, added.item.name) == ("in_progress", "", "weather")
        assert "".join(event.delta for event in deltas) == done.arguments == whole.item.arguments == long
        assert {event.item_id for event in [*deltas, done]} == {added.item.id} == {whole.item.id}
        assert done.name == "weather"
        assert final.usage.output_tokens == proxy.backend.generated


async def test_a_call_that_the_limit_cuts_is_incomplete() -> None:
    async with served([call(1, '{"city":"Rome"}')]) as proxy:
        for stream in (False, True):
            made: Any = await proxy.openai.responses.create(
                model=f"{MODEL}@0.5",
                input="hi",
                tools=[WEATHER],  # type: ignore[list-item]
                max_output_tokens=8,
                stream=stream,
                **SEEDED,
            )
            reply = [event async for event in made][-1].response if stream else made
            assert (reply.status, reply.incomplete_details.reason) == ("incomplete", "max_output_tokens")
            (item,) = reply.output
            assert (item.status, item.arguments) == ("incomplete", '{"city')


async def test_a_thought_is_left_out_if_the_request_says_so() -> None:
    async with served([ScriptedReply("", [("id-1", "weather", "{}")], thought="Hm.")]) as proxy:
        _, _, reply = await post(proxy, tools=[WEATHER], include_reasoning=False)
        assert [item["type"] for item in reply["output"]] == ["function_call"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": 5}, "tools"),
        ({"tools": [5]}, "tools.0"),
        ({"tools": [{"type": "function"}]}, "tools.0.name"),
        ({"tools": [WEATHER, {"name": "f", "parameters": {"type": "objekt"}}]}, "tools.1.parameters"),
        (
            {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"properties": 5}}}},
            "text.format.schema",
        ),
        ({"tts": {"answer": "tools"}}, "tts.answer"),
    ],
)
async def test_bad_input_names_its_field(fields: dict[str, Any], param: str) -> None:
    async with served([call(1, "{}")]) as proxy:
        status, _, reply = await post(proxy, **fields)
        assert (status, reply["error"]["param"]) == (400, param), reply
        assert proxy.backend.requests == []


async def test_the_model_compares_replies_of_text() -> None:
    async with served([text("A red fox."), text("A red fox ran."), text("Rain.")]) as proxy:
        status, headers, reply = await post(proxy, tts={"controller": "self_consistency@3", "answer": "select"})
        assert (status, headers["x-tts-applied"], reply["tts"]["branches"]) == (200, "true", 3)
        assert reply["output"][0]["content"][0]["text"] in ("A red fox.", "A red fox ran.", "Rain.")
        assert reply["tts"]["selected_by"] in ("judge", "overlap")


async def test_the_bill_stays_within_the_cap() -> None:
    async with served([call(i, '{"city":"Rome"}') for i in range(8)]) as proxy:
        status, _, reply = await post(proxy, tools=[WEATHER], tts={"max_total_tokens": 40})
        assert (status, reply["output"][0]["arguments"]) == (200, '{"city":"Rome"}')
        assert reply["usage"]["output_tokens"] == fake(proxy).generated <= 40
