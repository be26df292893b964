"""Replies without text, as a token limit leaves them, have the form of vLLM's own: null, "" or no item."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from openai import AsyncOpenAI
from pydantic import BaseModel

from deploy.embedded.task import held_back
from proxy.server import running
from proxy.settings import EMBEDDED, load
from tests.proxy.conftest import Proxy

MODEL = "autotts-tiny"
QUESTION = held_back(1)[0].question
SETTINGS: list[dict[str, Any]] = [{"beta": 0}, {"beta": 0.25}, {"beta": 0.5, "controller": "self_consistency@2"}]
SCHEMA: dict[str, Any] = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "weather", "description": "w", "parameters": SCHEMA}}
NAMED: dict[str, Any] = {"type": "function", "function": {"name": "weather"}}
FORMAT: dict[str, Any] = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA}}


class City(BaseModel):
    """A city."""

    name: str


async def test_a_thought_cut_by_the_limit_has_null_content_and_no_message_item(proxy: Proxy) -> None:
    tts = {"controller": "self_consistency"}
    _, _, reply = await proxy.ask("0.5", max_tokens=20, tts=tts)
    message = reply["choices"][0]["message"]
    assert (message["content"], reply["choices"][0]["finish_reason"]) == (None, "length")
    assert message["reasoning"]
    body = {"model": "fake-model@0.5", "input": "hi", "max_output_tokens": 20, "tts": tts}
    async with proxy.http.post(f"{proxy.url}/v1/responses", json=body) as response:
        reply = await response.json()
    assert ([item["type"] for item in reply["output"]], reply["status"]) == (["reasoning"], "incomplete")
    async with proxy.http.post(f"{proxy.url}/v1/responses", json={**body, "stream": True}) as response:
        assert '"type":"message"' not in (await response.text()).replace(" ", "")


@pytest_asyncio.fixture
async def openai(vllm: str) -> AsyncIterator[AsyncOpenAI]:
    async with (
        running(load(upstream=vllm, **EMBEDDED)) as url,
        AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client,
    ):
        yield client


@pytest.mark.vllm
@pytest.mark.parametrize("limit", [1, 2, 40])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"response_format": FORMAT},
        {"tools": [TOOL]},
        {"tools": [TOOL], "tool_choice": "none"},
        {"tools": [TOOL], "tool_choice": "required"},
        {"tools": [TOOL], "tool_choice": NAMED},
        {"include_reasoning": False},
    ],
)
async def test_the_content_of_a_cut_chat_completion_is_vllms(
    openai: AsyncOpenAI, fields: dict[str, Any], limit: int
) -> None:
    fields = dict(fields)
    hidden = {"include_reasoning": fields.pop("include_reasoning")} if "include_reasoning" in fields else {}
    messages: list[Any] = [{"role": "user", "content": QUESTION}]

    async def form(**extra: Any) -> tuple[str | None, bool]:
        reply = await openai.chat.completions.create(
            model=MODEL, messages=messages, max_tokens=limit, extra_body={**hidden, **extra}, **fields
        )
        (choice,) = reply.choices
        assert choice.finish_reason == "length"
        return choice.message.content, bool(choice.message.tool_calls)

    own = await form()
    for tts in SETTINGS:
        assert await form(tts=tts) == own, tts


@pytest.mark.vllm
@pytest.mark.parametrize("limit", [1, 40])
async def test_the_items_of_a_cut_response_are_vllms(openai: AsyncOpenAI, limit: int) -> None:
    async def items(**extra: Any) -> list[str]:
        reply = await openai.responses.create(model=MODEL, input=QUESTION, max_output_tokens=limit, extra_body=extra)
        return [item.type for item in reply.output]

    async def parsed(**extra: Any) -> City | None:
        reply = await openai.responses.parse(
            model=MODEL, input=QUESTION, text_format=City, max_output_tokens=limit, extra_body=extra
        )
        return reply.output_parsed

    own = await items()
    assert await parsed() is None
    for tts in SETTINGS:
        assert await items(tts=tts) == own, tts
        assert await parsed(tts=tts) is None
