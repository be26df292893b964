"""Chat completions through a running proxy over the fake vLLM: what clients see, and that the bill adds up."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from openai import OpenAI

from proxy.probing import LEAD
from tests.fakes import MODEL, Chain, chain
from tests.proxy.conftest import INTERVAL, SERVED, Proxy

HEADERS = (
    "x-request-id",
    "x-tts-beta",
    "x-tts-controller",
    "x-tts-branches",
    "x-tts-rounds",
    "x-tts-tokens",
    "x-tts-stop",
)
KINDS = {"total", "winner", "agreeing", "losing", "pruned", "probe", "finalise", "aborted"}


@pytest.mark.parametrize("controller", SERVED)
@pytest.mark.parametrize("beta", ["0", "0.5", "1"])
async def test_a_controller_answers_and_the_bill_adds_up(proxy: Proxy, controller: str, beta: str) -> None:
    status, headers, reply = await proxy.ask(beta, tts={"controller": controller})
    assert status == 200, reply
    assert all(name in headers for name in HEADERS)
    assert headers["x-tts-applied"] == "true"
    assert (headers["x-tts-beta"], headers["x-tts-controller"]) == (beta, controller)
    usage, tts = reply["usage"], reply["tts"]
    assert usage["completion_tokens"] == proxy.backend.generated
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert set(tts["tokens"]) == KINDS
    assert tts["tokens"]["total"] == sum(v for k, v in tts["tokens"].items() if k != "total")
    assert tts["tokens"]["total"] == int(headers["x-tts-tokens"])
    assert tts["tokens"]["aborted"] == 0
    assert tts["branches"] == proxy.backend.opened == int(headers["x-tts-branches"])
    assert tts["stop"] == headers["x-tts-stop"] == "answered"
    message = reply["choices"][0]["message"]
    assert f"\\boxed{{{tts['answer']}}}" in message["content"]
    assert tts["agreed"]
    assert "think" not in message["content"]
    assert message["reasoning"] == message["reasoning_content"]
    visible = usage["completion_tokens"] - usage["completion_tokens_details"]["reasoning_tokens"]
    assert 0 < visible <= len(message["content"]) + 4
    assert await proxy.metric("autotts_tokens_total", controller=controller) == tts["tokens"]["total"]
    assert await proxy.metric("autotts_requests_total", controller=controller, outcome="answered") == 1
    assert await proxy.metric("autotts_stops_total", reason="answered") == 1
    assert await proxy.metric("autotts_rounds_total") == int(headers["x-tts-rounds"])
    assert await proxy.metric("autotts_episodes_in_flight") == 0


async def test_the_openai_client_needs_nothing_special(proxy: Proxy) -> None:
    reply = await proxy.openai.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "hi"}], extra_body={"tts": {"beta": 0.5}}
    )
    assert reply.choices[0].message.content == "It is \\boxed{7}"
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None
    assert reply.usage.completion_tokens == proxy.backend.generated


async def test_streams_are_what_the_openai_client_expects(proxy: Proxy) -> None:
    stream = await proxy.openai.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "hi"}],
        extra_headers={"x-tts-beta": "0.5"},
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({(c.id, c.object, c.created, c.model) for c in chunks}) == 1
    content = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert content == "It is \\boxed{7}"
    assert "".join(getattr(c.choices[0].delta, "reasoning", "") for c in chunks if c.choices).startswith("bbb")
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == proxy.backend.generated
    assert chunks[-1].tts["stop"] == "answered"  # type: ignore[attr-defined]


async def test_the_synchronous_client_works_too(proxy: Proxy) -> None:
    def ask() -> str | None:
        with OpenAI(base_url=f"{proxy.url}/v1", api_key="unused", max_retries=0) as client:
            reply = client.chat.completions.create(model=f"{MODEL}@0.25", messages=[{"role": "user", "content": "hi"}])
            return reply.choices[0].message.content

    assert await asyncio.to_thread(ask) == "It is \\boxed{7}"


async def test_a_stream_starts_at_once_and_pings_while_it_thinks(proxy: Proxy) -> None:
    proxy.backend.fault = "hang"
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": True, "tts": {"beta": 1}}
    async with proxy.http.post(f"{proxy.url}/v1/chat/completions", json=body) as response:
        assert response.headers["x-tts-applied"] == "true"
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line async for line in _some(response.content, 4)]
    assert json.loads(lines[0].removeprefix(b"data: "))["choices"][0]["delta"]["role"] == "assistant"
    assert lines[2] == b": ping\n"


async def _some(lines: Any, count: int) -> Any:
    async for line in lines:
        yield line
        count -= 1
        if not count:
            return


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_stops_everything(proxy: Proxy, stream: bool) -> None:
    proxy.backend.fault = "hang"
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": stream, "tts": {"beta": 1, "answer": "boxed"}}
    request = asyncio.create_task(_post(proxy, body))
    await proxy.backend.hanging.wait()
    request.cancel()
    await asyncio.wait_for(proxy.backend.idle.wait(), 1)
    assert proxy.backend.running == 0
    await _until_metric(proxy, "autotts_requests_total", outcome="disconnected")
    assert await proxy.metric("autotts_tokens_total", kind="aborted") == 8  # one seen of each of the eight branches


async def _post(proxy: Proxy, body: dict[str, Any]) -> None:
    async with proxy.http.post(f"{proxy.url}/v1/chat/completions", json=body) as response:
        await response.read()


async def _until_metric(proxy: Proxy, name: str, **labels: str) -> None:
    async with asyncio.timeout(5):
        while not await proxy.metric(name, **labels):
            pass  # asking is what gives way to the server


async def test_a_hard_cap_is_never_passed(proxy: Proxy) -> None:
    for cap in (260, 400, 1000):
        proxy.backend.generated = 0
        _, _, reply = await proxy.ask("1", tts={"max_total_tokens": cap, "controller": "parallel_probe"})
        tts = reply["tts"]
        assert tts["tokens"]["total"] <= cap
        assert proxy.backend.generated <= tts["tokens"]["total"]
        assert tts["stop"] == "max_tokens"
        assert "\\boxed{" in reply["choices"][0]["message"]["content"]


async def test_a_cap_too_small_for_any_answer_is_refused(proxy: Proxy) -> None:
    status, _, reply = await proxy.ask("1", tts={"max_total_tokens": 50})
    assert status == 400
    assert reply["error"]["code"] == "cap_too_small"
    assert reply["error"]["param"] == "tts.max_total_tokens"
    assert proxy.backend.generated == 0


@pytest.mark.parametrize(
    ("controller", "after", "content"),
    [
        pytest.param("parallel_probe", 2, f"{LEAD}7}}", id="an answer leads and is led into"),
        pytest.param("cmc", 4, "It is \\boxed{7}", id="nothing was asked yet, so the thought is closed and answers"),
    ],
)
async def test_at_the_deadline_the_best_so_far_goes_out(
    proxy: Proxy, controller: str, after: int, content: str
) -> None:
    proxy.backend.fault, proxy.backend.fault_after = "hang", after
    request = asyncio.create_task(
        proxy.ask("0.5", tts={"deadline_s": 1.0, "controller": controller, "answer": "boxed"})
    )
    await proxy.backend.hanging.wait()
    proxy.backend.fault = ""
    status, headers, reply = await request
    assert status == 200, reply
    assert headers["x-tts-stop"] == "deadline"
    assert reply["choices"][0]["message"]["content"] == content
    assert reply["tts"]["tokens"]["aborted"] > 0
    assert proxy.backend.running == 0


async def test_greedy_requests_branch_at_the_servers_temperature(proxy: Proxy) -> None:
    _, _, reply = await proxy.ask("0.5", temperature=0, top_k=5)
    assert reply["tts"]["temperature"] == 1.0
    first = proxy.backend.requests[0]
    assert (first["temperature"], first["top_k"]) == (1.0, 5)
    _, _, reply = await proxy.ask("0.5", temperature=0.7)
    assert reply["tts"]["temperature"] == 0.7


async def test_a_round_goes_out_in_as_few_requests_as_can_be(proxy: Proxy) -> None:
    await proxy.ask("1", tts={"controller": "self_consistency", "answer": "boxed"})
    assert [r["n"] for r in proxy.backend.requests] == [64]
    proxy.backend.requests.clear()
    _, _, reply = await proxy.ask("0.5", tts={"controller": "cmc"})
    assert reply["tts"]["upstream"]["requests"] == len(proxy.backend.requests)
    assert len(proxy.backend.requests) <= 3 * int(reply["tts"]["rounds"])
    assert all("seed" not in r for r in proxy.backend.requests)


async def test_a_seed_gives_every_request_of_every_branch_one_of_its_own(proxy: Proxy) -> None:
    await proxy.ask("0.5", seed=11)
    seeds = [r["seed"] for r in proxy.backend.requests if r.get("temperature") != 0]
    assert len(seeds) == len(set(seeds)) > 5
    proxy.backend.requests.clear()
    proxy.backend.opened = 0
    await proxy.ask("0.5", seed=11)
    assert [r["seed"] for r in proxy.backend.requests if r.get("temperature") != 0] == seeds


async def test_max_tokens_bounds_each_branch(proxy: Proxy) -> None:
    _, _, reply = await proxy.ask(
        "0.5", max_tokens=INTERVAL + 5, tts={"controller": "self_consistency", "answer": "boxed"}
    )
    assert {r["max_tokens"] for r in proxy.backend.requests} == {INTERVAL + 5}
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["tts"]["answer"] is None
    assert reply["choices"][0]["message"]["reasoning"]


async def test_a_stop_string_across_two_requests_still_stops(proxy: Proxy) -> None:
    text = "<think>" + "a" * (INTERVAL - 7 - 2) + "STOP and more" + "b" * 200
    proxy.backend.chains = [Chain(text, ("7",))]
    _, _, reply = await proxy.ask("0", stop="STOP", tts={"controller": "cmc"})
    assert "STOP" not in json.dumps(reply["choices"])
    assert proxy.backend.generated < 6 * INTERVAL


async def test_an_unfinished_winner_is_made_to_close_and_answer(proxy: Proxy) -> None:
    proxy.backend.chains = [chain("7", 1500, ["7"], mark=chr(97 + i)) for i in range(26)]
    _, headers, reply = await proxy.ask("0", tts={"controller": "parallel_probe"})
    assert headers["x-tts-stop"] == "answered"
    assert reply["choices"][0]["message"]["content"] == "So \\boxed{7}"
    assert reply["tts"]["tokens"]["finalise"] > 0
    assert reply["tts"]["agreed"]
    assert reply["usage"]["completion_tokens"] == proxy.backend.generated


async def test_text_without_an_answer_is_still_a_reply(proxy: Proxy) -> None:
    proxy.backend.chains = [Chain("Roses are red.")]
    status, _, reply = await proxy.ask("0")
    assert status == 200
    assert reply["choices"][0]["message"]["content"] == "Roses are red."
    assert reply["tts"]["answer"] is None
    assert "reasoning" not in reply["choices"][0]["message"]


async def test_text_cut_inside_a_character_comes_back_whole(proxy: Proxy) -> None:
    proxy.backend.chains = [Chain("<think>" + "é" * 90 + "</think>\n\nça: \\boxed{7}", ("7",))]
    _, _, reply = await proxy.ask("0")
    assert reply["choices"][0]["message"]["content"] == "ça: \\boxed{7}"
    assert reply["choices"][0]["message"]["reasoning"] == "é" * 90


async def test_the_model_may_be_left_out(proxy: Proxy) -> None:
    status, _, reply = await proxy.ask("0", model=None)
    assert (status, reply["model"]) == (200, MODEL)
