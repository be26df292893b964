"""Stock clients whose requests are served by whole replies: tools, their results, structured output and streams."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from pydantic import BaseModel

from tests.chat_fake import SEED, ScriptedReply
from tests.fakes import MODEL
from tests.proxy.episode.test_whole_replies import WEATHER, fake, served

pytestmark = pytest.mark.slow  # importing the clients takes seconds

ROME = '{"city": "Rome"}'
VOTES = [
    ScriptedReply("I cannot."),
    ScriptedReply(calls=[("id-1", "weather", '{"city":"Oslo"}')]),
    ScriptedReply(calls=[("id-2", "weather", ROME)]),
    ScriptedReply(calls=[("id-3", "weather", '{"city":"Rome","unit":"C"}')]),
]


class City(BaseModel):
    """A city."""

    name: str
    people: int


async def calls_the_weather(agent: Any) -> Any:
    """Ask an agent of langchain for the weather, plainly and as a stream. Return its message, which calls a tool."""
    message = await agent.ainvoke("What is the weather?")
    chunks = [chunk async for chunk in agent.astream("What is the weather?")]
    streamed = chunks[0]
    for chunk in chunks[1:]:
        streamed += chunk
    for reply in (message, streamed):
        (call,) = reply.tool_calls
        assert (call["name"], call["args"], call["id"]) == ("weather", {"city": "Rome"}, "id-2")
    return message


async def test_langchain_calls_tools_and_continues_with_their_results() -> None:
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_openai import ChatOpenAI

    async with served(VOTES) as proxy, httpx.AsyncClient(timeout=60) as http:
        common: dict[str, Any] = {"base_url": f"{proxy.url}/v1", "api_key": "unused", "max_retries": 0, "seed": SEED}
        chat = ChatOpenAI(model=f"{MODEL}@0.5", http_async_client=http, **common)
        agent = chat.bind_tools([WEATHER])
        message = await calls_the_weather(agent)

        fake(proxy).replies = [ScriptedReply("It is \\boxed{21} degrees."), ScriptedReply("It is \\boxed{21.0}.")]
        turns = [HumanMessage("What is the weather?"), message, ToolMessage("21 degrees", tool_call_id="id-2")]
        answer = await agent.ainvoke(turns)
        assert answer.content == "It is \\boxed{21} degrees."
        sent = proxy.backend.requests[-1]["messages"]
        assert [turn["role"] for turn in sent] == ["user", "assistant", "tool"]
        assert json.loads(sent[1]["tool_calls"][0]["function"]["arguments"]) == {"city": "Rome"}


async def test_langchain_calls_tools_through_responses() -> None:
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_openai import ChatOpenAI

    thinking = [ScriptedReply("", reply.calls, thought="Hm.") if reply.calls else reply for reply in VOTES]
    async with served(thinking) as proxy, httpx.AsyncClient(timeout=60) as http:
        common: dict[str, Any] = {"base_url": f"{proxy.url}/v1", "api_key": "unused", "max_retries": 0}
        chat = ChatOpenAI(
            model=f"{MODEL}@0.5", http_async_client=http, use_responses_api=True, extra_body={"seed": SEED}, **common
        )
        agent = chat.bind_tools([WEATHER])
        message = await calls_the_weather(agent)
        fake(proxy).replies = [ScriptedReply("It is \\boxed{21} degrees.")]
        turns = [HumanMessage("What is the weather?"), message, ToolMessage("21 degrees", tool_call_id="id-2")]
        answer = await agent.ainvoke(turns)
        assert answer.text == "It is \\boxed{21} degrees."
        sent = proxy.backend.requests[-1]["messages"]
        assert [turn["role"] for turn in sent] == ["user", "assistant", "tool"]
        assert sent[1]["reasoning"] == "Hm."
        assert json.loads(sent[1]["tool_calls"][0]["function"]["arguments"]) == {"city": "Rome"}


async def test_langchain_reads_structured_output() -> None:
    from langchain_openai import ChatOpenAI

    documents = ['{"name":"Rome","people":3}', '{"name":"Oslo","people":2}', '{"name":"Rome","people":2}', "oops"]
    async with served([*map(ScriptedReply, documents)]) as proxy, httpx.AsyncClient(timeout=60) as http:
        common: dict[str, Any] = {"base_url": f"{proxy.url}/v1", "api_key": "unused", "max_retries": 0, "seed": SEED}
        chat = ChatOpenAI(model=f"{MODEL}@0.5", http_async_client=http, **common)
        reader = chat.with_structured_output(City, method="json_schema")
        assert await reader.ainvoke("Which city?") == City(name="Rome", people=2)


async def test_litellm_calls_tools() -> None:
    import litellm

    async with served(VOTES) as proxy:
        reply = await litellm.acompletion(
            model=f"hosted_vllm/{MODEL}@0.5",
            api_base=f"{proxy.url}/v1",
            api_key="unused",
            messages=[{"role": "user", "content": "hi"}],
            tools=[WEATHER],
            seed=SEED,
        )
        (call,) = reply.choices[0].message.tool_calls
        assert (call.id, call.function.name, call.function.arguments) == ("id-2", "weather", ROME)
        assert reply.choices[0].finish_reason == "tool_calls"
