"""Requests with tools, JSON and other fields of the upstream's own, through a running proxy: replies and bills."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from openai import AsyncOpenAI
from pydantic import BaseModel

from proxy.environment.answer_reader import EpisodeGrader
from proxy.episode import run
from proxy.errors import SettingsError
from proxy.server import running
from proxy.settings import load
from tests.chat_fake import PROMPT_TOKENS, SEED, ChatVLLM, Held, ScriptedReply
from tests.fakes import MODEL
from tests.proxy.conftest import Proxy

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "unit": {"enum": ["C", "F"], "default": "C"}, "note": {}},
    "required": ["city"],
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS, "strict": True}}
TIME = {"type": "function", "function": {"name": "time"}}
SETTINGS = {"interval": 10, "ping_s": 0.05, "read_timeout_s": 5, "controller": "cmc"}
FIVE = {"controller": "self_consistency@5"}
IMAGE = [{"type": "text", "text": "how many?"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]


def call(number: int, arguments: str, name: str = "weather") -> ScriptedReply:
    return ScriptedReply(calls=[(f"chatcmpl-tool-{number}", name, arguments)])


def text(content: str, **more: Any) -> ScriptedReply:
    return ScriptedReply(content, **more)


@asynccontextmanager
async def served(replies: Sequence[ScriptedReply], **settings: Any) -> AsyncIterator[Proxy]:
    async with (
        ChatVLLM(replies).serve() as backend,
        running(load(upstream=backend.url, **{**SETTINGS, **settings})) as url,
        aiohttp.ClientSession() as http,
        AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as openai,
    ):
        yield Proxy(backend, url, http, openai)


def fake(proxy: Proxy) -> ChatVLLM:
    """Return the fake behind a proxy that `served` has started."""
    assert isinstance(proxy.backend, ChatVLLM)
    return proxy.backend


async def ask(proxy: Proxy, **fields: Any) -> tuple[int, Any, Any]:
    return await proxy.ask("0.5", **{"tools": [WEATHER, TIME], "seed": SEED, "tts": FIVE, **fields})


ODD = '{"unit": "C",\n "city":"Rome \\u00e9\\ud83d\\ude00", "x": 1.50}'  # kept byte for byte
VOTES = [
    text("I cannot call."),
    call(1, '{"city":"Oslo"}'),
    call(2, ODD),
    call(3, '{"x": 15e-1, "city": "Rome é😀"}'),
    call(4, "{}", "time"),
]


async def test_the_reply_is_the_branch_nearest_to_the_tool_vote_byte_for_byte() -> None:
    async with served(VOTES) as proxy:
        status, headers, reply = await ask(proxy)
        assert status == 200, reply
        assert (headers["x-tts-applied"], headers["x-tts-controller"]) == ("true", "self_consistency@5")
        (choice,) = reply["choices"]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"] == {
            "role": "assistant",
            "content": None,
            "refusal": None,
            "tool_calls": [
                {"id": "chatcmpl-tool-2", "type": "function", "function": {"name": "weather", "arguments": ODD}}
            ],
        }
        tts = reply["tts"]
        assert (tts["answer_kind"], tts["branches"], tts["stop"], tts["unreadable"]) == ("tools", 5, "answered", 0)
        assert sorted(tts["votes"].values()) == [1, 1, 1, 2]
        assert tts["answer"] == f"weather({ODD})"
        assert reply["usage"]["completion_tokens"] == proxy.backend.generated == tts["tokens"]["total"]
        assert reply["usage"]["completion_tokens"] == sum(reply.tokens for reply in VOTES)
        assert reply["usage"]["prompt_tokens"] == PROMPT_TOKENS
        assert tts["tokens"]["total"] == sum(v for k, v in tts["tokens"].items() if k != "total")


async def test_the_request_is_sent_on_with_its_own_fields() -> None:
    fields = {
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "top_p": 0.5,
        "logit_bias": {"5": 1},
        "presence_penalty": 0.5,
        "user": "me",
        "mystery": 1,
        "include_reasoning": False,
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": None, "tool_calls": [{"id": "a", "type": "function", "function": {}}]},
            {"role": "tool", "tool_call_id": "a", "content": "9"},
        ],
    }
    async with served([call(1, "{}")]) as proxy:
        status, _, reply = await ask(proxy, **fields, stream_options={"include_usage": False}, max_tokens=50)
        assert status == 200, reply
        sent = proxy.backend.requests
        assert len(sent) == 5
        for body in sent:
            assert {name: body[name] for name in fields if name not in ("mystery", "include_reasoning")} == {
                name: value for name, value in fields.items() if name not in ("mystery", "include_reasoning")
            }
            assert (body["tools"], body["model"], body["max_tokens"]) == ([WEATHER, TIME], MODEL, 50)
            assert not {"tts", "n", "mystery"} & body.keys()
            assert body["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
        assert len({body["seed"] for body in sent}) == 5


async def test_at_temperature_0_only_the_first_branch_is_greedy() -> None:
    async with served([call(1, "{}")], branch_temperature=0.7) as proxy:
        await ask(proxy, temperature=0)
        assert sorted(body["temperature"] for body in proxy.backend.requests) == [0, 0.7, 0.7, 0.7, 0.7]


@pytest.mark.parametrize("named", ["cmc", "mars", "parallel_probe@4", None])
async def test_a_controller_that_probes_is_replaced_by_the_one_set_for_the_kind(named: str | None) -> None:
    async with served(
        [call(1, "{}")], tools_controller="esc", json_controller="asc", reply_controller="single"
    ) as proxy:
        tts = {} if named is None else {"controller": named}
        for fields, expected in (
            ({}, "esc"),
            ({"tools": None, "response_format": {"type": "json_object"}}, "asc"),
            ({"tools": None, "presence_penalty": 1}, "single"),
        ):
            _, headers, reply = await ask(proxy, tts=tts, **fields)
            assert headers["x-tts-controller"] == expected
            assert reply["tts"]["tokens"]["probe"] == 0


async def test_adaptive_consistency_stops_when_tool_calls_agree() -> None:
    async with served([call(i, '{"city":"Rome"}') for i in range(64)]) as proxy:
        _, headers, reply = await ask(proxy, tts={})
        assert headers["x-tts-controller"] == "adaptive_consistency"
        assert reply["tts"]["branches"] == 4  # its first wave at β = 0.5
        assert reply["tts"]["agreed"] is True


async def test_too_little_agreement_on_calls_is_flagged_or_spends_more() -> None:
    async with served([call(i, json.dumps({"city": str(i // 2)})) for i in range(64)]) as proxy:
        _, headers, reply = await ask(proxy, tts={**FIVE, "min_agreement": 0.9})
        assert (reply["tts"]["agreement"], reply["tts"]["flagged"], headers["x-tts-flagged"]) == (0.4, True, "true")
        before = len(proxy.backend.requests)
        _, _, reply = await ask(proxy, tts={"min_agreement": 0.9, "otherwise": "escalate"})
        assert reply["tts"]["escalated_beta"] == 1
        assert reply["tts"]["branches"] == len(proxy.backend.requests) - before > 4


async def test_excluded_arguments_are_not_compared() -> None:
    replies = [call(0, '{"city":"Oslo"}'), call(1, '{"city":"Rome","note":"a"}'), call(2, '{"city":"Rome","note":"b"}')]
    async with served(replies) as proxy:
        three = {"controller": "self_consistency@3"}
        _, _, reply = await ask(proxy, tts=three)
        assert len(reply["tts"]["votes"]) == 3
        _, _, reply = await ask(proxy, tts={**three, "tools": {"exclude": ["note"]}})
        assert reply["choices"][0]["message"]["tool_calls"][0]["id"] == "chatcmpl-tool-1"
        assert sorted(reply["tts"]["votes"].values()) == [1, 2]


async def test_without_a_call_the_texts_vote_by_their_answers() -> None:
    replies = [
        text("No idea."),
        text("So \\boxed{7}."),
        text("It is 8."),
        text("The answer is \\boxed{7.0}"),
        call(1, "{}"),
    ]
    async with served(replies) as proxy:
        _, _, reply = await ask(proxy)
        assert reply["choices"][0]["message"]["content"] == "So \\boxed{7}."
        assert reply["choices"][0]["finish_reason"] == "stop"
        assert "tool_calls" not in reply["choices"][0]["message"]
        assert reply["tts"]["answer"] == "7"


async def test_arguments_that_are_not_json_never_vote() -> None:
    broken = [call(i, arguments) for i, arguments in enumerate(['{"city":', '{"a":1,"a":2}', "[" * 300, '{"city":'])]
    async with served([*broken, call(9, '{"city":"Rome"}')]) as proxy:
        _, _, reply = await ask(proxy)
        assert reply["choices"][0]["message"]["tool_calls"][0]["id"] == "chatcmpl-tool-9"
        assert (reply["tts"]["unreadable"], list(reply["tts"]["votes"].values())) == (4, [1])
    async with served(broken) as proxy:
        _, _, reply = await ask(proxy)
        assert (reply["tts"]["unreadable"], reply["tts"]["answer"], reply["tts"]["votes"]) == (5, None, {})
        assert reply["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"] == "[" * 300  # the longest


# Structured output


class Person(BaseModel):
    name: str
    age: int
    city: str = "Rome"


PEOPLE = [
    '{"name":"Ann","age":41,"city":"Oslo"}',
    '{"age": 42.0, "name": "Ann"}',
    '{"name":"Bob","age":42,"city":"Rome"}',
    '{"name":"Ann","age":4',
    "not JSON",
]


async def test_json_is_voted_on_field_by_field_and_the_sdk_parses_it() -> None:
    async with served([text(each) for each in PEOPLE]) as proxy:
        reply = await proxy.openai.chat.completions.parse(
            model=MODEL,
            messages=[{"role": "user", "content": "who?"}],
            response_format=Person,
            seed=SEED,
            extra_body={"tts": {"beta": 0.5, **FIVE}},
        )
        assert reply.choices[0].message.content == PEOPLE[1]
        assert reply.choices[0].message.parsed == Person(name="Ann", age=42, city="Rome")
        tts = reply.tts  # type: ignore[attr-defined]
        assert tts["fields"] == {"/name": 0.6667, "/age": 0.6667, "/city": 0.6667}
        assert (tts["answer_kind"], tts["unreadable"], sum(tts["votes"].values())) == ("json", 2, 3)
        assert {body["response_format"]["type"] for body in proxy.backend.requests} == {"json_schema"}


async def test_if_no_reply_is_json_the_reply_says_so() -> None:
    async with served([text("nothing"), text("{")]) as proxy:
        _, _, reply = await ask(proxy, tools=None, response_format={"type": "json_object"})
        assert (reply["tts"]["answer"], reply["tts"]["unreadable"], reply["tts"]["votes"]) == (None, 5, {})
        assert "fields" not in reply["tts"]
        assert reply["choices"][0]["message"]["content"] == "nothing"


async def test_a_reply_that_the_token_limit_cuts_does_not_vote() -> None:
    async with served([text('{"a": 10000000}'), text("{}")]) as proxy:
        _, _, reply = await ask(proxy, tools=None, response_format={"type": "json_object"}, max_tokens=5)
        assert reply["choices"][0]["message"]["content"] == "{}"
        assert (reply["tts"]["unreadable"], list(reply["tts"]["votes"].values())) == (0, [2])
    async with served([text('{"a": 10000000}')]) as proxy:
        _, _, reply = await ask(proxy, tools=None, response_format={"type": "json_object"}, max_tokens=5)
        assert reply["choices"][0]["finish_reason"] == "length"
        assert (reply["tts"]["stop"], reply["tts"]["answer"]) == ("max_tokens", None)


@pytest.mark.parametrize("fields", [{"response_format": {"type": "json_object"}, "tools": None}, {}])
async def test_no_more_replies_are_opened_once_the_token_limit_cut_all_of_the_first(fields: dict[str, Any]) -> None:
    async with served([text('{"a": 10000000}')]) as proxy:
        _, _, reply = await ask(proxy, tts={"controller": "adaptive_consistency"}, max_tokens=5, **fields)
        assert (reply["tts"]["stop"], reply["tts"]["answer"]) == ("max_tokens", None)
        assert reply["tts"]["branches"] == len(proxy.backend.requests) == 4
        assert reply["usage"]["completion_tokens"] == 20


# Texts


async def test_texts_beside_an_image_are_voted_on_by_their_answers() -> None:
    replies = [text("I see \\boxed{3}"), text("\\boxed{4}"), text("There are \\boxed{4}")]
    async with served(replies) as proxy:
        fields = {"tools": None, "messages": [{"role": "user", "content": IMAGE}]}
        _, headers, reply = await ask(proxy, tts={"controller": "self_consistency@3"}, **fields)
        assert headers["x-tts-applied"] == "true"
        assert reply["choices"][0]["message"]["content"] == "\\boxed{4}"
        assert proxy.backend.requests[0]["messages"][0]["content"] == IMAGE


async def test_a_text_without_an_answer_is_the_reply_and_no_other_branch_is_opened() -> None:
    async with served([text("Roses are red."), text("\\boxed{1}")]) as proxy:
        _, _, reply = await ask(proxy, tools=None, presence_penalty=0.5)
        assert reply["choices"][0]["message"]["content"] == "Roses are red."
        assert (reply["tts"]["stop"], reply["tts"]["branches"], len(proxy.backend.requests)) == ("not_votable", 1, 1)
        assert reply["usage"]["completion_tokens"] == proxy.backend.generated


async def test_log_probabilities_and_thoughts_are_those_of_the_selected_branch() -> None:
    replies = [
        text("\\boxed{3}", logprobs=[-0.5] * 9, thought="three?"),
        text("\\boxed{4}", logprobs=[-0.25] * 9, thought="four!"),
        text("\\boxed{4}", logprobs=[-0.75] * 9, thought="four."),
    ]
    async with served(replies) as proxy:
        fields = {"tools": None, "logprobs": True, "top_logprobs": 0, "tts": {"controller": "self_consistency@3"}}
        _, _, reply = await ask(proxy, **fields)
        (choice,) = reply["choices"]
        assert [token["logprob"] for token in choice["logprobs"]["content"]] == [-0.25] * 9
        assert choice["message"]["reasoning"] == "four!"
        assert reply["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
        _, _, reply = await ask(proxy, **fields, include_reasoning=False)
        assert "reasoning" not in reply["choices"][0]["message"]


# Streams


async def test_the_sdk_assembles_streamed_tool_calls() -> None:
    long = json.dumps({"city": "x" * 1000, "note": '"\\é'})
    two = ScriptedReply("On it.", [("id-1", "weather", long), ("id-2", "time", "{}")])
    async with served([two, two, call(1, "{}")]) as proxy:
        async with proxy.openai.chat.completions.stream(
            model=MODEL,
            messages=[{"role": "user", "content": "hi"}],
            tools=[WEATHER, TIME],  # type: ignore[list-item]
            seed=SEED,
            extra_body={"tts": {"beta": 0.5, "controller": "self_consistency@3"}},
            stream_options={"include_usage": True},
        ) as stream:
            events = [event async for event in stream]
            final = await stream.get_final_completion()
        message = final.choices[0].message
        assert message.content == "On it."
        assert [(each.id, each.function.name, each.function.arguments) for each in message.tool_calls or ()] == [
            ("id-1", "weather", long),
            ("id-2", "time", "{}"),
        ]
        assert final.choices[0].finish_reason == "tool_calls"
        assert final.usage is not None
        assert final.usage.completion_tokens == proxy.backend.generated
        deltas = [part for event in events if event.type == "chunk" for part in event.chunk.choices]
        indexes = [part.index for choice in deltas for part in choice.delta.tool_calls or ()]
        assert indexes == sorted(indexes)
        assert set(indexes) == {0, 1}


async def test_a_streamed_reply_has_the_log_probabilities_of_its_content() -> None:
    async with served([text("\\boxed{4}", logprobs=[-0.25] * 9)]) as proxy:
        stream = await proxy.openai.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "hi"}],
            logprobs=True,
            stream=True,
            extra_body={"tts": {"beta": 0.5}},
        )
        choices = [chunk.choices[0] async for chunk in stream if chunk.choices]
        values = [token.logprob for choice in choices if choice.logprobs for token in choice.logprobs.content or ()]
        assert values == [-0.25] * 9


# Bills, caps and disconnects


@pytest.mark.parametrize(
    "controller", ["adaptive_consistency", "self_consistency@8", "asc@8", "esc@8", "short_m_at_k@8"]
)
@pytest.mark.parametrize("cap", [None, 40, 99, 250])
async def test_billed_tokens_equal_the_upstreams_and_stay_within_the_cap(controller: str, cap: int | None) -> None:
    """Also where the controller stops while replies still run: they are short enough to have arrived."""
    replies = [call(i, json.dumps({"city": "x" * (i % 3)})) for i in range(8)]
    async with served(replies) as proxy:
        tts = {"beta": 1, "controller": controller, **({} if cap is None else {"max_total_tokens": cap})}
        status, _, reply = await ask(proxy, tts=tts)
        assert status == 200, reply
        billed = reply["tts"]["tokens"]["total"]
        assert reply["usage"]["completion_tokens"] == billed <= proxy.backend.generated
        if controller != "short_m_at_k@8":
            assert billed == proxy.backend.generated
        if cap is not None:
            assert proxy.backend.generated <= cap
            assert all(body["max_tokens"] <= cap for body in proxy.backend.requests)
        assert proxy.backend.running == 0


async def test_a_cap_below_one_reply_cuts_it() -> None:
    async with served([call(1, '{"city":"Rome"}')]) as proxy:
        _, _, reply = await ask(proxy, tts={**FIVE, "max_total_tokens": 7})
        assert (proxy.backend.generated, reply["tts"]["tokens"]["total"]) == (7, 7)
        assert (reply["choices"][0]["finish_reason"], reply["tts"]["stop"]) == ("length", "max_tokens")


async def test_under_a_cap_alone_more_branches_are_opened_once_one_has_voted() -> None:
    """The first reply may use the whole cap. It needs 18 tokens, so that further ones get at least 46."""
    async with served([call(i, '{"city":"Rome"}') for i in range(8)]) as proxy:
        _, _, reply = await ask(proxy, tts={"controller": "self_consistency@8", "max_total_tokens": 200})
        limits = [body["max_tokens"] for body in proxy.backend.requests]
        assert limits[0] == 200
        assert len(limits) > 3
        assert all(limit >= 2 * 18 + 10 for limit in limits)
        assert reply["tts"]["branches"] == sum(reply["tts"]["votes"].values()) == len(limits)
        assert reply["tts"]["tokens"]["total"] == proxy.backend.generated <= 200


async def check_disconnect_is_billed(proxy: Proxy, request: asyncio.Task[Any], held: Held) -> None:
    """Cancel a request once a reply is held. The upstream must become idle, and all its tokens must be billed."""
    await held.reached.wait()
    request.cancel()
    async with asyncio.timeout(5):
        await proxy.backend.idle.wait()
        assert proxy.backend.running == 0
        while not await proxy.metric("autotts_requests_total", outcome="disconnected"):
            pass
    assert await proxy.metric("autotts_tokens_total", kind="aborted") == proxy.backend.generated


@pytest.mark.parametrize("stream", [False, True])
async def test_a_disconnect_closes_all_streams_and_their_tokens_are_billed(stream: bool) -> None:
    async with served([call(1, '{"city":"Rome"}')]) as proxy:
        fake(proxy).held = held = Held(4)
        await check_disconnect_is_billed(proxy, asyncio.create_task(ask(proxy, stream=stream)), held)


async def test_at_the_deadline_the_text_so_far_is_the_reply_and_nothing_runs_on() -> None:
    async with served([text("Once upon a time")]) as proxy:
        fake(proxy).held = Held(4)
        _, _, reply = await ask(proxy, tools=None, presence_penalty=0.5, tts={"deadline_s": 0.3, "answer": "boxed"})
        assert reply["choices"][0]["message"]["content"] == "Once"
        assert (reply["choices"][0]["finish_reason"], reply["tts"]["stop"]) == ("length", "deadline")
        assert reply["tts"]["tokens"]["total"] == proxy.backend.generated
        async with asyncio.timeout(5):
            await proxy.backend.idle.wait()


async def test_after_the_deadline_answers_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async def read(*_: object) -> None:
        await asyncio.sleep(60)  # as long as comparisons of the tenant's other requests may take

    monkeypatch.setattr(run, "COMPOSE_S", 0.1)
    monkeypatch.setattr(EpisodeGrader, "read", read)
    async with served([text("It is \\boxed{7}.")]) as proxy, asyncio.timeout(20):
        _, _, reply = await ask(proxy, tools=None, presence_penalty=0.5, tts={"deadline_s": 0.3, "answer": "boxed"})
        assert reply["choices"][0]["message"]["content"] == "It is \\boxed{7}."
        assert (reply["tts"]["stop"], reply["tts"]["answer"]) == ("deadline", None)


async def test_replies_that_run_when_the_vote_is_settled_are_cut() -> None:
    """One reply hangs. The controller stops as soon as enough others have finished."""
    async with served([*[call(i, "{}") for i in range(7)], text("x" * 2000)]) as proxy:
        backend = fake(proxy)
        backend.held = Held(1000)
        _, _, reply = await ask(proxy, tts={"controller": "short_m_at_k@8"})
        assert reply["tts"]["stop"] == "answered"
        async with asyncio.timeout(5):
            await backend.idle.wait()
        tokens = reply["tts"]["tokens"]
        assert tokens["total"] == sum(v for k, v in tokens.items() if k != "total") <= backend.generated
        assert tokens["aborted"] > 0  # what had arrived beyond the intervals that the controller asked for


@pytest.mark.parametrize(
    ("fault", "status"),
    [("refuse", 400), ("cut", 502), ("lie", 502), ("blind", 502), ("abort", 502), ("more", 502), ("odd_index", 502)],
)
async def test_a_faulty_upstream_gives_an_error_and_is_never_the_reply(fault: str, status: int) -> None:
    async with served([call(1, "{}")]) as proxy:
        fake(proxy).chat_fault = fault
        got, _, reply = await ask(proxy, tts={"controller": "single"}, max_tokens=10)
        assert got == status, reply
        assert reply["error"]["param"] == ("tools" if fault == "refuse" else None)
        outcome = "refused" if fault == "refuse" else "failed"
        assert await proxy.metric("autotts_requests_total", outcome=outcome) == 1
        assert proxy.backend.running == 0


async def test_if_a_later_reply_fails_the_votes_so_far_decide() -> None:
    async with served([call(1, '{"city":"Rome"}')]) as proxy:
        fake(proxy).chat_fault, fake(proxy).fault_at = "cut", 3
        _, _, reply = await ask(proxy, tts={"controller": "asc@8", "beta": 1})
        assert reply["tts"]["stop"] in ("answered", "upstream_error")
        assert reply["choices"][0]["message"]["tool_calls"][0]["id"] == "chatcmpl-tool-1"


# Routing


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"n": 2}, "n"),
        ({"functions": [{"name": "f"}], "tools": None}, "tools"),
        ({"tool_choice": "required", "tools": None}, "tools"),
        ({"echo": True}, "echo"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"return_token_ids": True}, "return_token_ids"),
    ],
)
async def test_what_cannot_be_served_passes_through_with_its_reason(fields: dict[str, Any], reason: str) -> None:
    async with served([call(1, "{}")]) as proxy:
        body = {"model": MODEL, "messages": [], "tools": [WEATHER], "tts": {"beta": 1}, **fields}
        async with proxy.http.post(f"{proxy.url}/v1/chat/completions", json=body) as response:
            assert (response.headers["x-tts-applied"], response.headers["x-tts-reason"]) == ("false", reason)


async def test_without_beta_a_request_with_tools_passes_through() -> None:
    async with served([call(1, "{}")]) as proxy:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "tools": [WEATHER]}
        async with proxy.http.post(f"{proxy.url}/v1/chat/completions", json=body) as response:
            assert (response.headers["x-tts-applied"], response.headers["x-tts-reason"]) == ("false", "no_beta")


# Bad input


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": {"a": 1}}, "tools"),
        ({"tools": [5]}, "tools.0"),
        ({"tools": [{"type": "function"}]}, "tools.0"),
        ({"tools": [WEATHER, {"type": "function", "function": {}}]}, "tools.1.function.name"),
        ({"tools": [{"type": "function", "function": {"name": " "}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "function", "function": {"name": "f" * 300}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": 5}}]}, "tools.0.function.parameters"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "objekt"}}}]},
            "tools.0.function.parameters",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"properties": 5}}}},
            "response_format.json_schema.schema",
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema",
        ),
        ({"structured_outputs": {"json": {"type": 5}}}, "structured_outputs.json"),
        ({"tts": {"beta": 1, "answer": "tools"}, "tools": None, "presence_penalty": 1}, "tts.answer"),
        ({"tts": {"beta": 1, "answer": "tools"}, "tools": None}, "tts.answer"),
        ({"tts": {"beta": 1, "tools": {"exclude": "x"}}}, "tts.tools.exclude"),
        ({"tts": {"beta": 1, "tools": {"excluded": []}}}, "tts.tools.excluded"),
        ({"tts": {"beta": 1, "controller": "nobody"}}, "tts.controller"),
    ],
)
async def test_bad_input_names_its_field(fields: dict[str, Any], param: str) -> None:
    async with served([call(1, "{}")]) as proxy:
        status, _, reply = await ask(proxy, **fields)
        assert (status, reply["error"]["param"]) == (400, param), reply
        assert proxy.backend.requests == []


async def test_schemas_of_older_drafts_and_references_are_accepted_and_nothing_is_fetched() -> None:
    for schema in (
        {"type": "integer", "minimum": 1, "exclusiveMinimum": True},
        {"$schema": "http://127.0.0.1:9/none", "$ref": "http://127.0.0.1:9/none"},
    ):
        async with served([call(1, "{}")]) as proxy:
            tool = {"type": "function", "function": {"name": "weather", "parameters": schema}}
            status, _, reply = await ask(proxy, tools=[tool])
            assert status == 200, reply


# Settings


@pytest.mark.parametrize("setting", ["tools_controller", "json_controller", "reply_controller"])
def test_the_controller_of_whole_replies_must_not_probe(setting: str) -> None:
    with pytest.raises(SettingsError, match=f"{setting}: cmc probes"):
        load(**{setting: "cmc"})
    with pytest.raises(SettingsError, match=f"{setting}: there is no controller 'nobody'"):
        load(**{setting: "nobody"})
    with pytest.raises(SettingsError, match=f"{setting}: everything is for admins only"):
        load(**{setting: "everything"})


async def test_an_episode_is_stored_with_its_votes_and_the_kind_of_its_branches(tmp_path: Path) -> None:
    async with served(VOTES, store=tmp_path / "store.db", store_text="full") as proxy:
        _, headers, _ = await ask(proxy)
        url = f"{proxy.url}/v1/tts/requests/{headers['x-request-id']}"
        async with proxy.http.get(url) as response:
            stored = await response.json()
        assert response.status == 200, stored
        assert stored["branches"] == 5
        assert stored["answer"] == f"weather({ODD})"
