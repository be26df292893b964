"""Several prompts in one text completion: one episode per prompt, one reply and one token bill."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from http import HTTPStatus
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from discovery.store import Store
from proxy.api import generation
from proxy.api.formats.prompt_batch import BEGUN_TOGETHER, together
from proxy.episode import plan
from proxy.errors import UpstreamTimeout
from proxy.requests import completion_request
from proxy.requests.completion_request import CompletionRequest
from proxy.requests.generation_request import PassThroughReason
from proxy.requests.parsing import parse_request
from proxy.server import running
from proxy.settings import load
from tests.fakes import ASSISTANT, MAX_LENGTH, MODEL, FakeVLLM, chain
from tests.proxy.conftest import INTERVAL, SMALL, Proxy

PROMPTS = [f"first{ASSISTANT}", f"second one{ASSISTANT}", f"3{ASSISTANT}"]
BETA = {"beta": 0.5, "controller": "asc@4"}


@pytest_asyncio.fixture
async def backend() -> AsyncIterator[FakeVLLM]:
    """Serve chains that all answer 7, because the order of requests decides which prompt gets which chain."""
    chains = [chain("7", 100 + 17 * (i % 7), ["", "7"], mark=chr(97 + i % 26)) for i in range(64)]
    async with FakeVLLM(chains, INTERVAL).serve() as fake:
        yield fake


async def post(proxy: Proxy, **fields: Any) -> tuple[int, Any, Any]:
    body = {"model": MODEL, "prompt": PROMPTS, "tts": BETA, **fields}
    async with proxy.http.post(f"{proxy.url}/v1/completions", json=body) as response:
        return response.status, response.headers, await response.json(content_type=None)


def prompts_of(proxy: Proxy) -> list[str]:
    """Return all prompts the upstream was asked to continue."""
    asked = [request["prompt"] for request in proxy.backend.requests]
    lists = [prompt if isinstance(prompt[0], list) else [prompt] for prompt in asked]
    return ["".join(map(chr, ids)) for batch in lists for ids in batch]


@pytest.mark.parametrize("kind", ["texts", "ids"])
async def test_each_prompt_of_a_batch_runs_its_own_episode(proxy: Proxy, kind: str) -> None:
    prompts: Any = PROMPTS if kind == "texts" else [list(map(ord, prompt)) for prompt in PROMPTS]
    status, headers, reply = await post(proxy, prompt=prompts)
    assert status == 200, reply
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2]
    assert all(choice["text"].endswith("\\boxed{7}") for choice in reply["choices"])
    assert {choice["finish_reason"] for choice in reply["choices"]} == {"stop"}
    assert reply["id"] == headers["x-request-id"]
    tts = reply["tts"]
    assert [part["request_id"] for part in tts["prompts"]] == [f"{reply['id']}-{i}" for i in range(3)]
    assert all(part["votes"]["7"] >= 2 for part in tts["prompts"])
    for prompt in PROMPTS:
        assert sum(asked.startswith(prompt) for asked in prompts_of(proxy)) > 1


async def test_a_batch_has_one_bill_that_sums_its_prompts(proxy: Proxy) -> None:
    _, headers, reply = await post(proxy)
    parts, tts, usage = reply["tts"]["prompts"], reply["tts"], reply["usage"]
    assert usage["completion_tokens"] == proxy.backend.generated
    assert usage["prompt_tokens"] >= sum(map(len, PROMPTS))
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    for kind, tokens in tts["tokens"].items():
        assert tokens == sum(part["tokens"][kind] for part in parts)
    assert tts["tokens"]["total"] == sum(tokens for kind, tokens in tts["tokens"].items() if kind != "total")
    assert tts["branches"] == sum(part["branches"] for part in parts) >= 6
    assert headers["x-tts-tokens"] == str(tts["tokens"]["total"])
    assert headers["x-tts-branches"] == str(tts["branches"])
    assert (headers["x-tts-applied"], headers["x-tts-stop"], headers["x-tts-controller"]) == (
        "true",
        "answered",
        "asc@4",
    )
    assert await proxy.metric("autotts_requests_total", outcome="answered") == 3


async def test_a_batch_gives_the_answers_its_prompts_give_alone(proxy: Proxy) -> None:
    alone = [(await post(proxy, prompt=prompt, seed=5))[2]["choices"][0]["text"] for prompt in PROMPTS]
    _, _, reply = await post(proxy, seed=5)
    assert {choice["text"][-9:] for choice in reply["choices"]} == {text[-9:] for text in alone}


async def test_a_streamed_batch_sends_each_text_under_its_index(proxy: Proxy) -> None:
    stream = await proxy.openai.completions.create(
        model=MODEL,
        prompt=PROMPTS,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"tts": {**BETA, "progress": True}},
    )
    chunks = [chunk async for chunk in stream]
    texts = ["", "", ""]
    finishes: list[int] = []
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.finish_reason is not None:
                finishes.append(choice.index)
    assert all(text.startswith("<think>") and text.endswith("\\boxed{7}") for text in texts)
    assert finishes == [0, 1, 2]
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == proxy.backend.generated
    bill = chunks[-2].tts  # type: ignore[attr-defined]
    assert bill["tokens"]["total"] == sum(part["tokens"]["total"] for part in bill["prompts"])
    rounds = [choice.reasoning for chunk in chunks for choice in chunk.choices if hasattr(choice, "reasoning")]
    assert rounds
    assert all(line.startswith("round ") for line in rounds)


async def test_a_token_cap_is_shared_evenly_among_prompts(proxy: Proxy) -> None:
    _, _, reply = await post(proxy, tts={"beta": 1, "controller": "self_consistency", "max_total_tokens": 2100})
    parts = reply["tts"]["prompts"]
    assert all(part["tokens"]["total"] <= 700 for part in parts)
    assert reply["tts"]["tokens"]["total"] <= 2100
    status, _, reply = await post(proxy, tts={"beta": 1, "max_total_tokens": 300})
    assert (status, reply["error"]["code"]) == (400, "cap_too_small")
    assert "the share of each of 3 prompts in tts.max_total_tokens is 100" in reply["error"]["message"]
    assert reply["error"]["message"].endswith("; raise it")
    assert reply["error"]["param"] == "tts.max_total_tokens"


async def test_a_cap_that_is_too_small_for_several_prompts_names_one_that_suffices(proxy: Proxy) -> None:
    _, _, reply = await post(proxy, tts={"beta": 1, "max_total_tokens": 300})
    least = int(reply["error"]["message"].partition(" in all")[0].rpartition(" ")[2])
    status, _, reply = await post(proxy, tts={"beta": 1, "max_total_tokens": least - 1})
    assert (status, reply["error"]["code"]) == (400, "cap_too_small")
    status, _, reply = await post(proxy, tts={"beta": 1, "max_total_tokens": least})
    assert (status, len(reply["tts"]["prompts"])) == (200, 3)


@pytest.mark.parametrize("tts", [{}, {"answer": "boxed"}])
async def test_the_cap_that_several_prompts_need_suffices_for_the_shortest(proxy: Proxy, tts: dict[str, Any]) -> None:
    prompts = [f"{'x' * (MAX_LENGTH - 80)}{ASSISTANT}", *PROMPTS]  # the first leaves no room for a whole interval
    _, _, reply = await post(proxy, prompt=prompts, tts={"beta": 1, **tts, "max_total_tokens": 300})
    least = int(reply["error"]["message"].partition(" in all")[0].rpartition(" ")[2])
    status, _, reply = await post(proxy, prompt=prompts, tts={"beta": 1, **tts, "max_total_tokens": least})
    assert (status, len(reply.get("choices", ()))) == (200, 4), reply


async def test_a_too_long_prompt_refuses_the_batch_before_any_is_served(proxy: Proxy) -> None:
    status, _, reply = await post(proxy, prompt=["a", "x" * 3000, "b"])
    assert (status, reply["error"]["code"], reply["error"]["param"]) == (400, "context_length_exceeded", "prompt")
    assert proxy.backend.generated == 0


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_failing_upstream_returns_an_error_with_the_tokens_spent(proxy: Proxy, streamed: bool) -> None:
    proxy.backend.fault, proxy.backend.fault_after = "broken", 1
    body = {"model": MODEL, "prompt": PROMPTS, "tts": BETA, "stream": streamed}
    async with proxy.http.post(f"{proxy.url}/v1/completions", json=body) as response:
        text = await response.text()
        assert response.status == (200 if streamed else HTTPStatus.BAD_GATEWAY)
        assert '"error"' in text
        if not streamed:
            assert int(response.headers["x-tts-tokens"]) == proxy.backend.generated > 0
            assert response.headers["x-should-retry"] == "false"
    assert proxy.backend.running == 0


async def test_a_disconnect_cancels_all_episodes_of_a_batch(proxy: Proxy) -> None:
    proxy.backend.gate.clear()
    session = aiohttp.ClientSession()
    asked = asyncio.create_task(
        session.post(f"{proxy.url}/v1/completions", json={"model": MODEL, "prompt": PROMPTS, "tts": BETA})
    )
    async with asyncio.timeout(10):
        while await proxy.metric("autotts_episodes_in_flight") < 3 or proxy.backend.running < 3:
            assert not asked.done()
    asked.cancel()
    await session.close()
    async with asyncio.timeout(10):
        await proxy.backend.idle.wait()


async def test_each_prompt_takes_an_episode_permit_and_more_than_can_ever_wait_are_refused(backend: FakeVLLM) -> None:
    """Prompts wait if fewer episodes may run at once. If they could never wait, the request is invalid."""
    settings = load(upstream=backend.url, max_episodes=1, queue=2, **SMALL)
    async with running(settings) as url, aiohttp.ClientSession() as http:
        proxy = Proxy(backend, url, http, None)  # type: ignore[arg-type]
        assert (await post(proxy))[0] == 200
        status, _, reply = await post(proxy, prompt=[*PROMPTS, "four"])
        assert (status, reply["error"]["code"], reply["error"]["param"]) == (400, "invalid_value", "prompt")
        assert (await post(proxy))[0] == 200  # all permits are free again


async def test_the_deadline_of_a_batch_also_holds_while_its_prompts_are_planned(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first prompt is planned alone, the others afterwards, and both together take longer than the deadline."""
    read_prompt = plan._read_prompt

    async def read_slowly(*args: Any) -> Any:
        await asyncio.sleep(0.3)
        return await read_prompt(*args)

    monkeypatch.setattr(plan, "_read_prompt", read_slowly)
    status, headers, reply = await post(proxy, tts={**BETA, "answer": "boxed", "deadline_s": 0.5})
    assert (status, reply["error"]["code"]) == (504, "deadline_passed")
    assert headers["x-should-retry"] == "false"
    assert not proxy.backend.requests


async def test_each_prompt_of_a_batch_is_recorded_as_an_episode(backend: FakeVLLM, tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    settings = load(upstream=backend.url, store=path, store_text="full", **SMALL)
    async with running(settings) as url, aiohttp.ClientSession() as http:
        proxy = Proxy(backend, url, http, None)  # type: ignore[arg-type]
        _, _, reply = await post(proxy)
        for name in (reply["id"], *(part["request_id"] for part in reply["tts"]["prompts"])):
            async with http.get(f"{url}/v1/tts/requests/{name}") as response:
                assert response.status == 200
        async with http.post(
            f"{url}/v1/tts/feedback", json={"id": reply["tts"]["prompts"][1]["request_id"], "correct": True}
        ) as response:
            assert response.status in (200, 202)
    async with Store.open(path) as store:
        assert len(await store.episodes()) == 3


async def test_the_first_error_of_a_batch_carries_the_cost_of_all() -> None:
    async def fail(spent: int) -> int:
        error = UpstreamTimeout("late")
        error.spent = spent
        raise error

    async def end(cost: int) -> int:
        return cost

    with pytest.raises(UpstreamTimeout) as raised:
        await together([end(3), fail(5), end(7), fail(11)], lambda cost: cost)
    assert raised.value.spent == 26
    assert await together([end(3), end(7)], lambda cost: cost) == [3, 7]


def test_the_token_ids_of_a_batch_are_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = list[object]()
    check = completion_request._is_prompt

    def count(given: object) -> bool:
        checked.append(given)
        return check(given)

    monkeypatch.setattr(completion_request, "_is_prompt", count)
    prompts: list[Any] = [[i, i + 1, i + 2] for i in range(20)]
    parsed = parse_request(CompletionRequest, json.dumps({"prompt": prompts}).encode())
    assert parsed.pass_through_reason() is None
    parts = parsed.with_controller("asc@4").split_by_prompt()
    assert [part.prompt_ids for part in parts] == prompts
    assert [part.with_controller("asc@4").prompt_ids for part in parts] == prompts
    assert {part.prompt_text for part in parts} == {None}
    assert {part.pass_through_reason() for part in parts} == {None}
    assert checked == prompts


@pytest.mark.parametrize("bad", [True, -1, 1.0, "1", None, [1]])
def test_a_prompt_with_an_invalid_token_id_is_not_served(bad: Any) -> None:
    for prompt in ([1, 2, bad], [[1, 2], [3, bad]]):
        parsed = parse_request(CompletionRequest, json.dumps({"prompt": prompt}).encode())
        assert parsed.pass_through_reason() == PassThroughReason("prompt", "prompt")


def test_a_batch_with_too_many_token_ids_is_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completion_request, "MAX_PROMPT_IDS", 10)
    for prompts, is_served in (([[1] * 5, [2] * 5], True), ([[1] * 5, [2] * 6], False), ([[1] * 10, "text"], True)):
        parsed = parse_request(CompletionRequest, json.dumps({"prompt": prompts}).encode())
        assert (parsed.pass_through_reason() is None) is is_served


@pytest.mark.parametrize("kind", ["texts", "ids"])
async def test_only_a_few_prompts_of_a_batch_start_per_event_loop_iteration(
    proxy: Proxy, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, turn, is_over = asyncio.get_running_loop(), 0, False
    begun: dict[str, Counter[int]] = {"plan_request": Counter(), "serve_request": Counter()}

    def tick() -> None:
        nonlocal turn
        turn += 1
        if not is_over:
            loop.call_soon(tick)

    def counting(name: str, work: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Coroutine[Any, Any, Any]]:
        async def run(*args: Any, **options: Any) -> Any:
            begun[name][turn] += 1
            return await work(*args, **options)

        return run

    for name in begun:
        monkeypatch.setattr(generation, name, counting(name, getattr(generation, name)))
    texts = [f"{i}{ASSISTANT}" for i in range(2 * BEGUN_TOGETHER + 3)]
    prompts: Any = texts if kind == "texts" else [list(map(ord, text)) for text in texts]
    loop.call_soon(tick)
    try:
        status, _, reply = await post(proxy, prompt=prompts, tts={"beta": 0.5, "controller": "single"})
    finally:
        is_over = True
    assert status == 200, reply
    assert [choice["index"] for choice in reply["choices"]] == [*range(len(texts))]
    for turns in begun.values():
        assert turns.total() == len(texts)
        assert max(turns.values()) <= BEGUN_TOGETHER
