"""Tasks that cannot be voted on end early and cheaply. The check costs votable tasks nothing."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from deploy.embedded.task import held_back
from discovery.answers import parse_kind
from proxy.admission.token_budget import EpisodeCaps
from proxy.environment.branch_generator import MIN_CHUNKS, OPEN_STREAM_INTERVAL
from proxy.episode.plan import plan_request
from proxy.requests.chat_request import ChatRequest
from proxy.requests.generation_request import TtsOptions
from proxy.rollout.controller_manager import ControllerManager
from proxy.server import running
from proxy.settings import EMBEDDED, load
from proxy.telemetry.metrics import Metrics
from proxy.types import STREAM_INTERVAL, BetaSource, EffectiveBeta
from proxy.upstream.client import UpstreamClient
from tests.fakes import Chain, chain
from tests.proxy.conftest import INTERVAL, SERVED, SMALL, Proxy

pytestmark = pytest.mark.slow

POEM = "Roses are red, violets are blue, " * 12 + "and that is all."
CODE = "Here you are:\n\n```python\n" + "print('x')\n" * 20 + "```\nRun it with Python."
TOOL = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": [' + "2, " * 60 + "3]}}</tool_call>"
THOUGHT = "<think>" + "t" * 150 + "</think>\n\n" + POEM

QUESTION = [{"role": "user", "content": "What is 3 + 4?"}]

PROSE = {"poem": POEM, "code": CODE, "tool": TOOL, "thought": THOUGHT}


def reply_of(text: str) -> str:
    return text.partition("</think>\n\n")[2] or text


@pytest.mark.parametrize("controller", SERVED)
@pytest.mark.parametrize("text", PROSE.values(), ids=PROSE)
async def test_prose_is_returned_unchanged_and_costs_at_most_two_branches(
    proxy: Proxy, controller: str, text: str
) -> None:
    proxy.backend.chains = [Chain(text)]
    status, headers, reply = await proxy.ask("1", tts={"controller": controller})
    assert status == 200, reply
    assert headers["x-tts-stop"] == reply["tts"]["stop"] == "not_votable"
    assert reply["choices"][0]["message"]["content"] == reply_of(text)
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert reply["tts"]["answer"] is None
    tokens = reply["tts"]["tokens"]
    assert tokens["winner"] == len(text) + 1
    assert tokens["total"] - tokens["probe"] <= 2 * (len(text) + 1)
    assert tokens["total"] == sum(v for k, v in tokens.items() if k != "total")
    assert reply["usage"]["completion_tokens"] == proxy.backend.generated
    assert await proxy.metric("autotts_stops_total", reason="not_votable") == 1


async def test_a_misleading_probe_answer_ends_the_episode_at_the_first_finished_branch(proxy: Proxy) -> None:
    proxy.backend.chains = [Chain(POEM + "x" * i, ("7",)) for i in range(64)]
    _, headers, reply = await proxy.ask("1", messages=QUESTION, tts={"controller": "parallel_probe"})
    assert headers["x-tts-stop"] == "not_votable"
    assert reply["choices"][0]["message"]["content"] == POEM
    assert reply["tts"]["answer"] is None
    assert reply["tts"]["tokens"]["winner"] == len(POEM) + 1


async def test_after_an_unreadable_first_probe_no_token_is_generated_twice(proxy: Proxy) -> None:
    _, headers, reply = await proxy.ask("1", tts={"controller": "self_consistency"})
    lone = [r for r in proxy.backend.requests if r["n"] == 1]
    assert [r["n"] for r in proxy.backend.requests] == [1] * len(lone) + [63]
    assert headers["x-tts-stop"] == "answered"
    assert reply["tts"]["tokens"]["aborted"] == 0
    assert reply["tts"]["branches"] == proxy.backend.opened == 64
    assert reply["usage"]["completion_tokens"] == proxy.backend.generated
    spent = sum(chain.tokens for chain in proxy.backend.chains)
    assert reply["tts"]["tokens"]["total"] == spent + reply["tts"]["tokens"]["probe"]


async def test_a_readable_first_probe_opens_all_branches_after_one_interval(proxy: Proxy) -> None:
    proxy.backend.chains = [chain("7", 300, ["7"], mark=chr(97 + i % 26)) for i in range(64)]
    await proxy.ask("1", messages=QUESTION, tts={"controller": "self_consistency"})
    sizes = [(r["n"], r["max_tokens"]) for r in proxy.backend.requests]
    assert sizes[0] == (1, INTERVAL)  # the first interval of the first
    assert len(sizes) == 4  # its probe, its rest, and the others together
    assert sizes[-1][0] == 63 or sizes[-2][0] == 63


async def test_a_readable_probe_alone_does_not_open_the_other_branches(proxy: Proxy) -> None:
    proxy.backend.chains = [Chain(POEM, ("7",))]
    _, headers, reply = await proxy.ask("1", tts={"controller": "self_consistency"})
    assert headers["x-tts-stop"] == "not_votable"
    assert reply["tts"]["branches"] == proxy.backend.opened == 1
    assert reply["tts"]["tokens"]["winner"] == len(POEM) + 1


async def test_a_named_answer_kind_skips_the_votability_check(proxy: Proxy) -> None:
    proxy.backend.chains = [chain("7", 300, ["7"], mark="a")]
    await proxy.ask("1", tts={"controller": "self_consistency", "answer": "boxed"})
    assert [r["n"] for r in proxy.backend.requests] == [64]


async def test_two_branches_are_opened_without_a_votability_check(proxy: Proxy) -> None:
    proxy.backend.chains = [Chain(POEM)]
    _, headers, reply = await proxy.ask("0", tts={"controller": "cmc"})
    assert headers["x-tts-stop"] == "not_votable"
    assert reply["tts"]["branches"] == proxy.backend.opened == 2


async def test_texts_without_comparison_run_one_branch(proxy: Proxy) -> None:
    _, headers, reply = await proxy.ask("1", tts={"controller": "self_consistency", "answer": "text"})
    assert headers["x-tts-stop"] == "not_votable"
    assert reply["tts"]["branches"] == 1
    assert reply["tts"]["tokens"]["probe"] == 0


@pytest.mark.parametrize(
    ("kind", "texts", "answer"),
    [
        ("text:words", ["A short Poem.", "a short poem", "Something else"], "A short Poem."),
        ("json", ['{"a": 1.0}', '```json\n{"a": 1}\n```', '{"a": 2}'], '{"a": 1.0}'),
        (r"regex:ticket (\w+)", ["see ticket AB1 now", "ticket AB1", "ticket CD2"], "AB1"),
        ("code:lines", ["```\nx = 1\n```", "x = 1  ", "y = 2"], "x = 1"),
    ],
)
async def test_other_answer_kinds_are_voted_on(proxy: Proxy, kind: str, texts: list[str], answer: str) -> None:
    proxy.backend.chains = [Chain(text) for text in texts]
    _, headers, reply = await proxy.ask("0.4", tts={"controller": "sc@3", "answer": kind})
    assert headers["x-tts-stop"] == "answered", reply
    assert (
        reply["tts"]["answer"].strip() == answer or reply["tts"]["answer"] in reply["choices"][0]["message"]["content"]
    )
    assert reply["tts"]["agreed"]
    assert sorted(reply["tts"]["votes"].values()) == [1, 2]
    assert reply["tts"]["tokens"]["probe"] == 0


async def test_spellings_of_one_answer_share_votes_and_the_reply_quotes_one(proxy: Proxy) -> None:
    spellings = ["1,234", "1234.0", "x = 1234", "99", "99", r"\frac{2468}{2}"]
    proxy.backend.chains = [chain(s, 200 + i, [s], mark=chr(97 + i)) for i, s in enumerate(spellings)]
    _, _, reply = await proxy.ask("1", tts={"controller": "sc@6"})
    tts = reply["tts"]
    assert tts["answer"] in reply["choices"][0]["message"]["content"]
    assert tts["votes"][tts["answer"]] == 4
    assert tts["votes"]["99"] == 2
    assert tts["agreed"]


@pytest.mark.process
async def test_equal_expressions_are_compared_by_math_verify(proxy: Proxy) -> None:
    spellings = [r"\log_2 8", "3", "5", "5", r"\log_3 27"]
    proxy.backend.chains = [chain(s, 200 + i, [s], mark=chr(97 + i)) for i, s in enumerate(spellings)]
    _, _, reply = await proxy.ask("1", tts={"controller": "sc@5"})
    assert sorted(reply["tts"]["votes"].values()) == [2, 3]
    assert reply["tts"]["answer"] in spellings[:2]


async def test_max_total_tokens_holds_during_the_votability_check(proxy: Proxy) -> None:
    proxy.backend.chains = [Chain("<think>" + "t" * 700 + "</think>\n\n" + POEM)]
    for cap in (300, 600, 1200, 5000):
        proxy.backend.generated = 0
        status, _, reply = await proxy.ask("1", tts={"max_total_tokens": cap, "controller": "self_consistency"})
        assert status == 200, reply
        assert reply["tts"]["tokens"]["total"] <= cap
        assert proxy.backend.generated <= cap  # including tokens of aborted requests


@pytest.mark.parametrize("spec", ["prose", "regex:(a", "boxed:1"])
async def test_an_unknown_answer_kind_is_refused(proxy: Proxy, spec: str) -> None:
    status, _, reply = await proxy.ask("1", tts={"answer": spec})
    assert status == 400
    assert reply["error"]["param"] == "tts.answer"
    assert proxy.backend.generated == 0


async def test_the_message_states_the_voted_answer_if_the_branch_disagrees(proxy: Proxy) -> None:
    """The branch answers 7 to probes and 8 in its final answer: the message states the vote, and `agreed` is false."""
    proxy.backend.chains = [Chain("<think>" + "a" * 900, ("7", "7", "7", "7", "8"))]
    _, headers, reply = await proxy.ask(
        "0", tts={"controller": "answer_consistency", "deadline_s": 30}, max_tokens=5 * INTERVAL
    )
    assert headers["x-tts-stop"] == "answered"
    assert reply["tts"]["answer"] in reply["choices"][0]["message"]["content"]


@pytest.mark.parametrize(("kind", "probes"), [("auto", 2), ("text", 2), ("boxed", 1), ("text:words", 1)])
async def test_the_votability_check_is_reserved_under_the_cap(proxy: Proxy, kind: str, probes: int) -> None:
    """The reserve covers the final answer, in own words and led, and the probes and look-ahead of the check."""
    cap, request = 1000, ChatRequest(messages=[{"role": "user", "content": "hi"}])
    request = request.model_copy(update={"tts": TtsOptions(max_total_tokens=cap, answer=parse_kind(kind))})
    engine = UpstreamClient(proxy.backend.url, proxy.http)
    (model,) = await engine.models()
    settings = load(upstream=proxy.backend.url, **SMALL)
    plan = await plan_request(
        engine,
        ControllerManager(settings, Metrics()),
        settings,
        EpisodeCaps(settings.max_branches),
        model,
        request,
        EffectiveBeta(1.0, BetaSource.HEADER),
    )
    assert plan.limits.max_tokens is not None
    reserve = (
        len(plan.prompt.template.longest_closing) + plan.final_answer_limits.free + probes * plan.limits.probe_tokens
    )
    assert plan.limits.max_tokens + reserve + (plan.environment_limits.ahead or 0) == cap
    assert (plan.environment_limits.ahead is None) == (probes == 1)


async def test_aborted_tokens_are_billed_except_a_few_per_branch(proxy: Proxy) -> None:
    proxy.backend.chains = [Chain(POEM + "x" * i, ("7",)) for i in range(64)]
    _, headers, _ = await proxy.ask("0.3", tts={"controller": "cmc"})
    assert headers["x-tts-stop"] == "not_votable"
    assert max(request["stream_interval"] for request in proxy.backend.requests) <= OPEN_STREAM_INTERVAL
    unseen = await proxy.metric("autotts_unseen_tokens_total")
    assert 0 <= unseen <= OPEN_STREAM_INTERVAL * proxy.backend.most_branches


async def test_short_calls_stream_in_small_chunks_and_long_ones_in_large_chunks(proxy: Proxy) -> None:
    await proxy.ask("0.3", tts={"controller": "cmc", "answer": "boxed"}, max_tokens=200)
    short = {r["stream_interval"] for r in proxy.backend.requests if r["max_tokens"] == INTERVAL}
    assert short == {INTERVAL // MIN_CHUNKS}
    proxy.backend.requests.clear()
    await proxy.ask("0.3", tts={"controller": "self_consistency", "answer": "boxed"})
    assert proxy.backend.requests[0]["stream_interval"] == STREAM_INTERVAL


STEPS_UNTIL_ABORTED = 8
"""Steps that vLLM may take on a busy machine until it notices that a request was cut."""


@pytest.mark.vllm
@pytest.mark.parametrize("controller", ["cmc", "self_consistency"])
async def test_unbilled_tokens_on_vllm_are_within_the_unseen_metric(vllm: str, controller: str) -> None:
    async with running(load(upstream=vllm, **EMBEDDED)) as url, aiohttp.ClientSession() as http:

        async def metric(server: str, name: str) -> float:
            async with http.get(f"{server}/metrics") as response:
                families = text_string_to_metric_families(await response.text())
            return sum(sample.value for family in families for sample in family.samples if sample.name == name)

        before = await metric(vllm, "vllm:generation_tokens_total")
        body = {
            "messages": [{"role": "user", "content": held_back(1)[0].question}],
            "tts": {"beta": 0.3, "controller": controller, "deadline_s": 0.4},
        }
        async with http.post(f"{url}/v1/chat/completions", json=body) as response:
            reply = await response.json()
        assert reply["tts"]["stop"] in ("deadline", "answered")
        async with asyncio.timeout(10):
            while await metric(vllm, "vllm:num_requests_running"):
                pass
        generated = await metric(vllm, "vllm:generation_tokens_total") - before
        billed = reply["usage"]["completion_tokens"]
        late = reply["tts"]["branches"] * STEPS_UNTIL_ABORTED
        assert billed <= generated <= billed + await metric(url, "autotts_unseen_tokens_total") + late
