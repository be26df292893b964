"""The main path on a real vLLM: bills compared with its own counters, aborts, caps, and clients."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from openai import AsyncOpenAI, InternalServerError, OpenAI
from prometheus_client.parser import text_string_to_metric_families

from deploy.embedded.task import held_back
from discovery.answers import boxed
from proxy.server import running
from proxy.settings import EMBEDDED, load
from tests.proxy.conftest import SERVED

pytestmark = pytest.mark.vllm

MODEL = "autotts-tiny"
PROBLEMS = held_back(8)
HALF = {"x-tts-beta": "0.5"}


class VllmProxy:
    """A proxy over the real vLLM."""

    def __init__(self, vllm: str, url: str, http: aiohttp.ClientSession, openai: AsyncOpenAI) -> None:
        self.vllm = vllm
        self.url = url
        self.http = http
        self.openai = openai

    async def counter(self, name: str) -> float:
        """Return the sum over all series of one of vLLM's own metrics."""
        async with self.http.get(f"{self.vllm}/metrics") as response:
            families = text_string_to_metric_families(await response.text())
        return sum(sample.value for family in families for sample in family.samples if sample.name == name)

    async def ask(self, beta: float, problem: int = 0, **fields: Any) -> Any:
        tts = {"beta": beta, **fields.pop("tts", {})}
        reply = await self.openai.chat.completions.create(
            model=MODEL, messages=messages(problem), extra_body={"tts": tts}, **fields
        )
        return reply


def messages(problem: int = 0) -> Any:
    return [{"role": "user", "content": PROBLEMS[problem].question}]


@pytest_asyncio.fixture
async def served(vllm: str) -> AsyncIterator[VllmProxy]:
    async with (
        running(load(upstream=vllm, **EMBEDDED)) as url,
        aiohttp.ClientSession() as http,
        AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as openai,
    ):
        yield VllmProxy(vllm, url, http, openai)


@pytest.mark.parametrize("controller", SERVED)
async def test_billed_tokens_equal_the_tokens_vllm_generated(served: VllmProxy, controller: str) -> None:
    before = await served.counter("vllm:generation_tokens_total")
    reply = await served.ask(0.5, tts={"controller": controller})
    after = await served.counter("vllm:generation_tokens_total")
    assert reply.usage.completion_tokens == after - before
    assert reply.tts["tokens"]["total"] == sum(v for k, v in reply.tts["tokens"].items() if k != "total")
    assert reply.tts["tokens"]["aborted"] == 0
    assert reply.tts["stop"] == "answered"
    assert f"\\boxed{{{reply.tts['answer']}}}" in reply.choices[0].message.content


async def test_vllm_stops_generating_when_the_client_disconnects(served: VllmProxy) -> None:
    body = {"messages": messages(), "tts": {"beta": 1, "controller": "self_consistency"}}
    session = aiohttp.ClientSession()
    request = asyncio.create_task(session.post(f"{served.url}/v1/chat/completions", json=body))
    async with asyncio.timeout(10):
        while await served.counter("vllm:num_requests_running") < 8:
            assert not request.done()
    request.cancel()
    await session.close()
    async with asyncio.timeout(1):
        while await served.counter("vllm:num_requests_running"):
            pass


async def test_vllm_generates_nothing_beyond_max_total_tokens(served: VllmProxy) -> None:
    for cap in (200, 500, 1500):
        before = await served.counter("vllm:generation_tokens_total")
        reply = await served.ask(1, tts={"max_total_tokens": cap})
        generated = await served.counter("vllm:generation_tokens_total") - before
        assert generated == reply.usage.completion_tokens <= reply.tts["tokens"]["total"] <= cap
        assert reply.choices[0].message.content


async def test_a_deadline_holds_and_the_reply_has_an_answer(served: VllmProxy) -> None:
    reply, codes = None, set()
    for deadline in (0.15, 0.3, 0.6, 1.2):
        try:
            reply = await served.ask(1, tts={"deadline_s": deadline, "controller": "self_consistency"})
            break
        except InternalServerError as error:  # a busy machine generates no token by then
            codes.add(error.code)
    assert codes <= {"deadline_passed"}
    assert reply is not None
    assert reply.tts["stop"] == "deadline"
    assert "\\boxed{" in reply.choices[0].message.content
    async with asyncio.timeout(10):
        while await served.counter("vllm:num_requests_running"):
            pass


async def test_a_stream_contains_the_answer_and_the_usage(served: VllmProxy) -> None:
    stream = await served.ask(0.5, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    content = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert f"\\boxed{{{chunks[-1].tts['answer']}}}" in content
    assert chunks[-1].usage.completion_tokens + chunks[-1].usage.prompt_tokens == chunks[-1].usage.total_tokens


async def test_the_synchronous_openai_client_works_on_vllm(served: VllmProxy) -> None:
    def ask() -> tuple[str | None, list[str]]:
        with OpenAI(base_url=f"{served.url}/v1", api_key="unused", max_retries=0) as client:
            plain = client.chat.completions.create(model=f"{MODEL}@0.5", messages=messages())
            stream = client.chat.completions.create(model=f"{MODEL}@0.5", messages=messages(), stream=True)
            return plain.choices[0].message.content, [c.choices[0].delta.content or "" for c in stream]

    plain, streamed = await asyncio.to_thread(ask)
    assert threading.current_thread() is threading.main_thread()
    assert "\\boxed{" in (plain or "")
    assert "\\boxed{" in "".join(streamed)


async def test_every_votable_reply_contains_its_answer(served: VllmProxy) -> None:
    requests = [
        served.ask(beta, problem, tts={"controller": controller})
        for problem in range(2)
        for beta in (0, 0.3)
        for controller in SERVED
    ]
    replies = await asyncio.gather(*requests)
    assert {reply.tts["stop"] for reply in replies} == {"answered"}
    answered = [reply for reply in replies if reply.tts["answer"] is not None]
    assert len(answered) > 0.9 * len(replies)  # at β = 0 one chain decides, and the model may end it without an answer
    assert all(f"\\boxed{{{reply.tts['answer']}}}" in reply.choices[0].message.content for reply in answered)
    unanswered = [reply for reply in replies if reply.tts["answer"] is None]
    assert not any(boxed(reply.choices[0].message.content) for reply in unanswered)


async def test_a_fixed_seed_gives_equal_replies_alone_and_under_load(served: VllmProxy) -> None:
    async def ask(problem: int) -> tuple[str, int]:
        reply = await served.ask(0.25, problem, seed=7, tts={"controller": "self_consistency"})
        return reply.choices[0].message.content, reply.usage.completion_tokens

    alone = [await ask(i) for i in range(3)]
    again = [await ask(i) for i in range(3)]
    together = await asyncio.gather(*(ask(i) for i in range(3)))
    assert again == alone
    assert together == alone


async def test_a_request_without_beta_gets_vllms_own_reply(served: VllmProxy) -> None:
    raw = await served.openai.chat.completions.with_raw_response.create(
        model=MODEL, messages=messages(), temperature=0, max_tokens=300
    )
    assert raw.headers["x-tts-applied"] == "false"
    direct = AsyncOpenAI(base_url=f"{served.vllm}/v1", api_key="unused")
    async with direct:
        own = await direct.chat.completions.create(model=MODEL, messages=messages(), temperature=0, max_tokens=300)
    assert raw.parse().choices[0].message.content == own.choices[0].message.content


THREE: dict[str, Any] = {"tts": {"beta": 0.5, "controller": "self_consistency@3"}}
CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}},
    "required": ["city"],
}


@pytest.mark.parametrize("choice", ["auto", "required", "none"])
async def test_requests_with_tools_are_served_by_whole_replies(served: VllmProxy, choice: Any) -> None:
    tool: Any = {"type": "function", "function": {"name": "get_weather", "description": "w", "parameters": CITY}}
    before = await served.counter("vllm:generation_tokens_total")
    raw = await served.openai.chat.completions.with_raw_response.create(
        model=MODEL, messages=messages(), tools=[tool], tool_choice=choice, max_tokens=50, extra_body=THREE
    )
    after = await served.counter("vllm:generation_tokens_total")
    assert (raw.headers["x-tts-applied"], raw.headers["x-tts-branches"]) == ("true", "3")
    reply = raw.parse()
    assert reply.choices[0].finish_reason in ("stop", "length", "tool_calls")
    assert reply.usage is not None
    assert reply.usage.completion_tokens == after - before
    assert reply.usage.prompt_tokens > 0


async def test_structured_output_is_served_by_whole_replies(served: VllmProxy) -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}
    before = await served.counter("vllm:generation_tokens_total")
    reply = await served.openai.chat.completions.create(
        model=MODEL,
        messages=messages(),
        response_format=wanted,
        max_tokens=60,
        extra_body=THREE,
    )
    after = await served.counter("vllm:generation_tokens_total")
    assert reply.usage is not None
    assert reply.usage.completion_tokens == after - before
    if reply.choices[0].finish_reason == "stop":
        assert "city" in json.loads(reply.choices[0].message.content or "")
        assert set(reply.tts["fields"]) >= {"/city"}  # type: ignore[attr-defined]


@pytest.mark.parametrize("answer", ["select", "synthesise"])
async def test_replies_are_compared_by_a_call_that_is_billed(served: VllmProxy, answer: str) -> None:
    tts = {**THREE["tts"], "answer": answer}
    before = await served.counter("vllm:generation_tokens_total")
    reply = await served.openai.chat.completions.create(
        model=MODEL, messages=messages(), max_tokens=40, temperature=1.5, extra_body={"tts": tts}
    )
    after = await served.counter("vllm:generation_tokens_total")
    assert reply.usage is not None
    assert reply.usage.completion_tokens == after - before
    shown: Any = reply.tts  # type: ignore[attr-defined]
    assert shown.get("judge", "none") in ("chosen", "unreadable", "no_room", "none")
    assert shown["tokens"]["total"] == sum(tokens for kind, tokens in shown["tokens"].items() if kind != "total")


async def test_messages_with_a_system_prompt_and_parts(served: VllmProxy) -> None:
    parts = [{"type": "text", "text": PROBLEMS[0].question}]
    conversations: list[Any] = [
        [{"role": "system", "content": "Be brief."}, *messages()],
        [{"role": "user", "content": parts}],
    ]
    for conversation in conversations:
        reply = await served.openai.chat.completions.create(
            model=MODEL, messages=conversation, extra_body={"tts": {"beta": 0.25}}
        )
        assert reply.choices[0].finish_reason in ("stop", "length")
