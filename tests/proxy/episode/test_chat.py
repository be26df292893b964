"""Chat completions through a running proxy over the fake vLLM: replies, streams, deadlines, and the bill."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from openai import OpenAI, omit

from proxy.episode import run
from proxy.probe_templates import LEAD
from proxy.server import running
from proxy.settings import load
from tests.fakes import MODEL, Chain, FakeVLLM, chain
from tests.proxy.conftest import INTERVAL, SERVED, SMALL, Proxy

HEADERS = (
    "x-request-id",
    "x-tts-beta",
    "x-tts-controller",
    "x-tts-branches",
    "x-tts-rounds",
    "x-tts-tokens",
    "x-tts-stop",
)
KINDS = {"total", "winner", "agreeing", "losing", "pruned", "probe", "finalise", "judge", "aborted"}


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


async def test_the_openai_client_works_unchanged(proxy: Proxy) -> None:
    reply = await proxy.openai.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "hi"}], extra_body={"tts": {"beta": 0.5}}
    )
    assert reply.choices[0].message.content == "It is \\boxed{7}"
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None
    assert reply.usage.completion_tokens == proxy.backend.generated


async def test_the_openai_client_reads_a_stream(proxy: Proxy) -> None:
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


async def test_only_the_header_turns_off_a_default_header(proxy: Proxy) -> None:
    async def applied(model: str = MODEL, headers: Any = None, **fields: Any) -> tuple[str | None, str | None]:
        raw = await client.chat.completions.with_raw_response.create(
            model=model, messages=[{"role": "user", "content": "hi"}], extra_headers=headers, **fields
        )
        return raw.headers.get("x-tts-beta"), raw.headers.get("x-tts-branches")

    async with proxy.openai.with_options(default_headers={"x-tts-beta": "0.5"}) as client:
        for fields in ({"extra_body": {"tts": {"beta": 0}}}, {"model": f"{MODEL}@0"}, {"reasoning_effort": "none"}):
            beta, branches = await applied(**fields)
            assert beta == "0.5"
            assert int(branches or 0) > 1
        controller = {"tts": {"controller": "single"}}
        assert await applied(headers={"x-tts-beta": "0"}, extra_body=controller) == ("0", "1")
        raw = await client.chat.completions.with_raw_response.create(
            model=MODEL, messages=[{"role": "user", "content": "hi"}], extra_headers={"x-tts-beta": omit}
        )
        assert (raw.headers["x-tts-applied"], raw.headers["x-tts-reason"]) == ("false", "no_beta")


async def test_the_synchronous_openai_client_works(proxy: Proxy) -> None:
    def ask() -> str | None:
        with OpenAI(base_url=f"{proxy.url}/v1", api_key="unused", max_retries=0) as client:
            reply = client.chat.completions.create(model=f"{MODEL}@0.25", messages=[{"role": "user", "content": "hi"}])
            return reply.choices[0].message.content

    assert await asyncio.to_thread(ask) == "It is \\boxed{7}"


async def test_a_stream_sends_its_first_chunk_at_once_and_then_pings(proxy: Proxy) -> None:
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
async def test_a_disconnected_client_aborts_all_upstream_requests(proxy: Proxy, stream: bool) -> None:
    proxy.backend.fault = "hang"
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": stream, "tts": {"beta": 1, "answer": "boxed"}}
    request = asyncio.create_task(_post(proxy, body))
    await proxy.backend.hanging.wait()
    request.cancel()
    async with asyncio.timeout(1):
        await proxy.backend.idle.wait()
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


async def test_max_total_tokens_is_never_exceeded(proxy: Proxy) -> None:
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


@pytest.mark.parametrize("tts", [{}, {"answer": "boxed"}, {"answer": "choice"}, {"answer": "regex:a(b)"}])
@pytest.mark.parametrize("more", [{}, {"stop": "zzz"}, {"max_tokens": 9}, {"max_tokens": 9, "stop": ["zzz"]}])
@pytest.mark.parametrize("beta", ["0.1", "1"])
async def test_the_cap_that_a_refusal_names_is_the_smallest_that_serves_the_request(
    proxy: Proxy, beta: str, more: dict[str, Any], tts: dict[str, Any]
) -> None:
    content = "Which? " * (len(beta) + len(more))
    body = {"messages": [{"role": "user", "content": content}], **more}
    _, _, reply = await proxy.ask(beta, **body, tts={**tts, "max_total_tokens": 1})
    least = int(reply["error"]["message"].partition("needs at least ")[2].split()[0])
    status, _, reply = await proxy.ask(beta, **body, tts={**tts, "max_total_tokens": least})
    assert status == 200, reply
    assert reply["tts"]["tokens"]["total"] <= least
    for cap in (least // 2, least - 1):
        status, _, reply = await proxy.ask(beta, **body, tts={**tts, "max_total_tokens": cap})
        assert (status, reply["error"]["code"]) == (400, "cap_too_small")
        assert f"needs at least {least} " in reply["error"]["message"]


@pytest.mark.parametrize(
    ("controller", "after", "content"),
    [
        pytest.param("parallel_probe", 2, f"{LEAD}7}}", id="an answer leads and is led into"),
        pytest.param("cmc", 4, "It is \\boxed{7}", id="nothing was asked yet, so the thought is closed and answers"),
    ],
)
async def test_at_the_deadline_the_best_answer_so_far_is_returned(
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
    if content.startswith(LEAD):
        usage = reply["usage"]
        visible = usage["completion_tokens"] - usage["completion_tokens_details"]["reasoning_tokens"]
        assert visible == len("7}") + 1  # the tokens that the proxy added are the prompt's
    assert reply["tts"]["tokens"]["aborted"] > 0
    assert proxy.backend.running == 0


STATED = f"\n\n{LEAD}7}}"
"""How the voted answer is stated after what a branch has written of its reply."""
SOON_S = 3.0
"""Maximum seconds for a reply with a deadline of a second, also on a busy machine."""


async def reply_soon(proxy: Proxy, *, stream: bool, within: float = SOON_S, **fields: Any) -> tuple[str, str, Any]:
    """Return the content, finish reason and `tts` object of a reply, which must come within so many seconds."""
    started = time.monotonic()
    async with asyncio.timeout(20 + within):
        if not stream:
            status, _, reply = await proxy.ask("0.5", **fields)
            assert status == 200, reply
            choice = reply["choices"][0]
            result = choice["message"]["content"] or "", choice["finish_reason"], reply["tts"]
        else:
            body = {"messages": [{"role": "user", "content": "hi"}], "stream": True, **fields}
            headers = {"x-tts-beta": "0.5"}
            async with proxy.http.post(f"{proxy.url}/v1/chat/completions", json=body, headers=headers) as response:
                lines = (await response.text()).splitlines()
            assert lines[-2] == "data: [DONE]"
            chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
            content = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
            result = content, chunks[-1]["choices"][0]["finish_reason"], chunks[-1]["tts"]
    assert time.monotonic() - started < within
    return result


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("after", "content", "finish"), [(0, "<", "length"), (1, "", "length"), (3, "It", "stop")])
async def test_a_deadline_holds_while_the_upstream_hangs_and_no_branch_has_finished(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch, after: int, content: str, finish: str, stream: bool
) -> None:
    monkeypatch.setattr(run, "COMPOSE_S", 0.2)
    proxy.backend.fault, proxy.backend.fault_after = "hang", after
    tts = {"deadline_s": 1.0, "controller": "parallel_probe", "answer": "boxed"}
    got, reason, tts_object = await reply_soon(proxy, stream=stream, tts=tts)
    assert (got, reason) == (content + STATED if content == "It" else content, finish)
    assert (tts_object["stop"], tts_object["agreed"]) == ("deadline", False if content == "It" else None)
    hung = proxy.backend.requests[after:]
    seen = sum(
        request.get("n", 1) * (len(request["prompt"]) if isinstance(request["prompt"][0], list) else 1)
        for request in hung
    )
    tokens = dict(tts_object["tokens"])
    assert (tokens["finalise"], len(hung)) == (0, 2)  # a round, and the closing
    assert tokens.pop("total") == sum(tokens.values())
    assert tokens["aborted"] >= seen
    assert proxy.backend.running == 0


@pytest.mark.slow
async def test_an_upstream_failure_after_the_deadline_still_returns_an_answer(proxy: Proxy) -> None:
    proxy.backend.fault, proxy.backend.fault_after = "hang", 3
    tts = {"deadline_s": 1.5, "controller": "parallel_probe", "answer": "boxed"}
    asking = asyncio.create_task(reply_soon(proxy, stream=False, tts=tts))
    await proxy.backend.hanging.wait()
    proxy.backend.fault = "garbage"
    content, finish, tts_object = await asking
    assert (content, finish, tts_object["stop"]) == (f"It{STATED}", "stop", "deadline")


@pytest.mark.slow
async def test_a_deadline_during_the_final_answer_returns_the_voted_answer(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "COMPOSE_S", 0.2)
    proxy.backend.chains = [chain("7", 1500, ["7"], mark=chr(97 + i)) for i in range(26)]
    tts = {"controller": "parallel_probe", "answer": "boxed"}
    started = time.monotonic()
    _, _, reply = await proxy.ask("0.5", tts={**tts, "deadline_s": 60})
    deadline = min(4.0, max(2.0, 3 * (time.monotonic() - started)))  # so that the final answer begins before it
    assert reply["choices"][0]["message"]["content"] == "So \\boxed{7}"
    proxy.backend.fault, proxy.backend.fault_after = "hang", 2 * len(proxy.backend.requests) - 1
    content, finish, tts_object = await reply_soon(
        proxy, stream=False, within=deadline + 1, tts={**tts, "deadline_s": deadline}
    )
    assert (content, finish) == (f"{LEAD}7}}", "stop")
    assert (tts_object["stop"], tts_object["agreed"]) == ("answered", False)
    assert (tts_object["tokens"]["finalise"], tts_object["tokens"]["aborted"]) == (0, 1)


async def test_a_deadline_before_the_first_token_is_504(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "COMPOSE_S", 0.1)
    proxy.backend.gate.clear()
    async with asyncio.timeout(SOON_S):
        status, headers, reply = await proxy.ask("0.5", tts={"deadline_s": 0.2})
    assert (status, reply["error"]["code"], reply["error"]["param"]) == (504, "deadline_passed", "tts.deadline_s")
    assert reply["error"]["message"].startswith("the deadline passed before the first token; raise tts.deadline_s")
    assert headers["x-should-retry"] == "false"  # a client's retries would wait as long again


@pytest.mark.parametrize("controller", ["cmc", "single"])
async def test_a_deadline_without_a_thought_is_504_though_the_upstream_would_answer(
    proxy: Proxy, controller: str
) -> None:
    proxy.backend.gate.clear()
    asking = asyncio.create_task(proxy.ask("1", tts={"deadline_s": 0.5, "controller": controller, "answer": "boxed"}))
    await proxy.backend.busy.wait()
    await proxy.backend.idle.wait()  # the deadline has passed, and the round was aborted
    proxy.backend.gate.set()
    status, headers, reply = await asking
    assert (status, reply["error"]["code"]) == (504, "deadline_passed")
    assert len(proxy.backend.requests) == 1
    assert headers["x-should-retry"] == "false"


class SilentTokenizer(FakeVLLM):
    """Fake vLLM whose `/tokenize` never answers."""

    async def _tokenise(self, request: web.Request) -> web.Response:
        await asyncio.Event().wait()
        raise AssertionError


@pytest.mark.parametrize("store", [None, "s.db"])
@pytest.mark.parametrize("stream", [False, True])
async def test_planning_counts_towards_the_deadline(tmp_path: Path, store: str | None, stream: bool) -> None:
    async with SilentTokenizer().serve() as backend, aiohttp.ClientSession() as http:
        settings = load(upstream=backend.url, store=tmp_path / store if store else None, **SMALL)
        async with running(settings) as url:
            proxy = Proxy(backend, url, http, None)  # type: ignore[arg-type]
            asking = proxy.ask("0.5", tts={"deadline_s": 0.3}, stream=stream)
            async with asyncio.timeout(SOON_S):
                status, _, reply = await asking
    assert (status, reply["error"]["param"]) == (504, "tts.deadline_s")
    assert backend.requests == []


async def test_waiting_for_a_request_slot_counts_towards_the_deadline(backend: FakeVLLM) -> None:
    backend.fault = "hang"
    async with (
        running(load(upstream=backend.url, max_episodes=1, **SMALL)) as url,
        aiohttp.ClientSession() as http,
    ):
        proxy = Proxy(backend, url, http, None)  # type: ignore[arg-type]
        first = asyncio.create_task(proxy.ask("0.5"))
        await backend.hanging.wait()
        async with asyncio.timeout(SOON_S):
            status, _, reply = await proxy.ask("0.5", tts={"deadline_s": 0.2})
        assert (status, reply["error"]["param"]) == (504, "tts.deadline_s")
        assert len(backend.requests) == 1
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)


VOTE: dict[str, Any] = {"controller": "self_consistency", "answer": "boxed"}


@pytest.mark.parametrize("sampled", [None, 0.6])
async def test_at_temperature_0_the_first_branch_is_greedy_and_the_others_are_sampled(
    backend: FakeVLLM, sampled: float | None
) -> None:
    async with (
        running(load(upstream=backend.url, branch_temperature=sampled, **SMALL)) as url,
        aiohttp.ClientSession() as http,
    ):
        proxy = Proxy(backend, url, http, None)  # type: ignore[arg-type]
        _, _, reply = await proxy.ask("1", temperature=0, top_k=5, tts=VOTE)
    assert (reply["tts"]["temperature"], reply["tts"]["greedy_first"]) == (sampled, True)
    sent = sorted((r["n"], r.get("temperature", "default"), r["top_k"]) for r in backend.requests)
    assert sent == [(1, 0, 5), (63, sampled or "default", 5)]


async def test_at_another_temperature_no_branch_is_greedy(proxy: Proxy) -> None:
    for temperature in (0.7, None):
        _, _, reply = await proxy.ask("1", temperature=temperature, tts=VOTE)
        assert (reply["tts"]["temperature"], reply["tts"]["greedy_first"]) == (temperature, False)
    assert [r.get("temperature") for r in proxy.backend.requests] == [0.7, None]


async def test_at_temperature_0_and_beta_0_the_only_branch_is_greedy(proxy: Proxy) -> None:
    _, _, reply = await proxy.ask("0", temperature=0, tts={"controller": "single", "answer": "boxed"})
    assert reply["tts"]["branches"] == 1
    assert {r.get("temperature") for r in proxy.backend.requests} == {0}


async def test_the_votability_check_runs_on_the_greedy_branch(proxy: Proxy) -> None:
    _, _, reply = await proxy.ask("1", temperature=0, tts={"controller": "cmc"})
    branches = [r for r in proxy.backend.requests if "include_stop_str_in_output" not in r]
    assert reply["tts"]["branches"] > 2
    assert (branches[0]["n"], branches[0]["temperature"]) == (1, 0)
    greedy = [r for r in branches if r.get("temperature") == 0]
    assert len(greedy) > 1  # it is continued greedily
    assert all(isinstance(r["prompt"][0], int) and r["n"] == 1 for r in greedy)  # and alone
    assert {r.get("temperature") for r in branches} == {0, None}


async def test_seeds_do_not_change_which_branch_is_greedy(proxy: Proxy) -> None:
    _, _, reply = await proxy.ask("1", temperature=0, seed=11, tts={"controller": "sc@8", "answer": "boxed"})
    assert reply["tts"]["branches"] == 8
    temperatures = [r.get("temperature") for r in proxy.backend.requests if "seed" in r]
    assert sorted(temperatures, key=str) == [0, *[None] * 7]


async def test_a_round_is_sent_in_as_few_requests_as_possible(proxy: Proxy) -> None:
    await proxy.ask("1", tts={"controller": "self_consistency", "answer": "boxed"})
    assert [r["n"] for r in proxy.backend.requests] == [64]
    proxy.backend.requests.clear()
    _, _, reply = await proxy.ask("0.5", tts={"controller": "cmc"})
    assert reply["tts"]["upstream"]["requests"] == len(proxy.backend.requests)
    assert len(proxy.backend.requests) <= 3 * int(reply["tts"]["rounds"])
    assert all("seed" not in r for r in proxy.backend.requests)


async def test_a_seed_gives_each_request_of_each_branch_its_own_seed(proxy: Proxy) -> None:
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


async def test_a_stop_string_that_spans_two_requests_ends_the_reply(proxy: Proxy) -> None:
    text = "<think>" + "a" * (INTERVAL - 7 - 12) + "</think>\n\n" + "So" * INTERVAL + "STOP and more" + "b" * 200
    assert text.index("STOP") < 3 * INTERVAL < text.index("STOP") + 4
    proxy.backend.chains = [Chain(text, ("7",))]
    _, _, reply = await proxy.ask("0", stop="STOP", tts={"controller": "cmc"})
    assert "STOP" not in json.dumps(reply["choices"])
    assert proxy.backend.generated < 12 * INTERVAL < 2 * len(text)  # of two branches


async def test_an_unfinished_winner_is_made_to_close_and_answer(proxy: Proxy) -> None:
    proxy.backend.chains = [chain("7", 1500, ["7"], mark=chr(97 + i)) for i in range(26)]
    _, headers, reply = await proxy.ask("0", tts={"controller": "parallel_probe"})
    assert headers["x-tts-stop"] == "answered"
    assert reply["choices"][0]["message"]["content"] == "So \\boxed{7}"
    assert reply["tts"]["tokens"]["finalise"] > 0
    assert reply["tts"]["agreed"]
    assert reply["usage"]["completion_tokens"] == proxy.backend.generated


async def test_an_unfinished_winner_without_a_thought_keeps_what_it_has_written(proxy: Proxy) -> None:
    text = "We add them. " * 120
    proxy.backend.chains = [Chain(text + "\\boxed{7}", ("7",))]
    _, _, reply = await proxy.ask("0", tts={"controller": "parallel_probe"})
    content, usage = reply["choices"][0]["message"]["content"], reply["usage"]
    begun, _, added = content.partition("\n\n")
    assert text.startswith(begun)
    assert len(begun) >= INTERVAL
    assert added == "So \\boxed{7}"
    visible = usage["completion_tokens"] - usage["completion_tokens_details"]["reasoning_tokens"]
    assert visible == len(begun) + len(added) + 1
    assert reply["tts"]["agreed"]


@pytest.mark.parametrize(
    ("asked", "added", "finish"),
    [("Write an essay on roses", "", "length"), ("How many roses are there?", f"\n\n{LEAD}7}}", "stop")],
)
async def test_at_the_deadline_only_a_question_with_an_answer_is_led_into_one(
    proxy: Proxy, asked: str, added: str, finish: str
) -> None:
    proxy.backend.chains = [Chain("Roses " * 300, ("7",))]
    proxy.backend.fault, proxy.backend.fault_after = "hang", 1
    messages = [{"role": "user", "content": asked}]
    asking = asyncio.create_task(
        proxy.ask("0.5", messages=messages, tts={"deadline_s": 1.0, "controller": "self_consistency"})
    )
    await proxy.backend.hanging.wait()
    proxy.backend.fault = ""
    status, _, reply = await asking
    (choice,) = reply["choices"]
    assert (status, choice["finish_reason"], reply["tts"]["stop"]) == (200, finish, "deadline")
    assert choice["message"]["content"].startswith("Roses Roses ")
    assert choice["message"]["content"].partition("\n\n")[1:] == (added[:2], added[2:])


async def test_the_final_answer_of_an_unfinished_winner_keeps_the_token_limit(backend: FakeVLLM) -> None:
    backend.chains = [chain("7", 1500, ["7"], mark=chr(97 + i)) for i in range(26)]
    settings, limit = load(upstream=backend.url, **{**SMALL, "finalise_tokens": 450}), 380
    async with running(settings) as url, aiohttp.ClientSession() as http:
        proxy = Proxy(backend, url, http, None)  # type: ignore[arg-type]
        _, _, reply = await proxy.ask("0", tts={"controller": "parallel_probe", "answer": "boxed"}, max_tokens=limit)
    assert reply["tts"]["tokens"]["finalise"] > 0
    assert max(request["max_tokens"] for request in backend.requests) == limit


async def test_the_final_answer_of_an_unfinished_winner_keeps_biases_and_is_greedy(proxy: Proxy) -> None:
    proxy.backend.chains = [chain("7", 1500, ["7"], mark=chr(97 + i)) for i in range(26)]
    kept: dict[str, Any] = {"logit_bias": {"33": -100.0}, "repetition_penalty": 1.1}
    _, _, reply = await proxy.ask("0", tts={"controller": "parallel_probe"}, temperature=0.9, top_p=0.8, **kept)
    assert reply["tts"]["tokens"]["finalise"] > 0
    last = proxy.backend.requests[-1]
    assert {name: last[name] for name in kept} == kept
    assert (last["temperature"], last.get("top_p")) == (0.0, None)


async def test_text_without_an_answer_is_still_a_reply(proxy: Proxy) -> None:
    proxy.backend.chains = [Chain("Roses are red.")]
    status, _, reply = await proxy.ask("0")
    assert status == 200
    assert reply["choices"][0]["message"]["content"] == "Roses are red."
    assert reply["tts"]["answer"] is None
    assert "reasoning" not in reply["choices"][0]["message"]


async def test_a_character_cut_between_requests_is_returned_whole(proxy: Proxy) -> None:
    proxy.backend.chains = [Chain("<think>" + "é" * 90 + "</think>\n\nça: \\boxed{7}", ("7",))]
    _, _, reply = await proxy.ask("0")
    assert reply["choices"][0]["message"]["content"] == "ça: \\boxed{7}"
    assert reply["choices"][0]["message"]["reasoning"] == "é" * 90


async def test_the_model_may_be_left_out(proxy: Proxy) -> None:
    status, _, reply = await proxy.ask("0", model=None)
    assert (status, reply["model"]) == (200, MODEL)


@pytest.mark.parametrize("half", ["\ud800", "\udc00\ud83d"])
async def test_a_lone_surrogate_from_the_upstream_is_replaced(proxy: Proxy, half: str) -> None:
    whole = chain("7", 100, ["7"])
    proxy.backend.chains = [replace(whole, text=whole.text.replace("It is", f"\U0001f600{half} is"))]
    status, _, body = await proxy.ask("0", tts={"answer": "boxed", "controller": "sc@1"})
    assert status == 200
    assert body["choices"][0]["message"]["content"] == "\U0001f600" + "\ufffd" * len(half) + " is \\boxed{7}"
