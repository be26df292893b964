"""Log-probabilities of a real vLLM: each is that of its token, however many requests generated the branch."""

from __future__ import annotations

import math
from typing import Any

import aiohttp
import pytest

from controllers import TO_END, Advanced, Probed, advance, branch, probe
from controllers.signals import ALL_SIGNALS
from deploy.embedded import SERVED_MODEL_NAME as MODEL
from deploy.embedded.task import held_back
from discovery.answers import parse_kind
from proxy.environment.live_environment import LiveEnvironment
from proxy.types import EnvironmentLimits, Prompt
from proxy.upstream.client import UpstreamClient

pytestmark = pytest.mark.vllm

INTERVAL = 32
LIMIT = 300
CLOSE = 0.02
"""Largest difference of two log-probabilities of one token: kernels round differently in differently shaped batches."""


async def environment(vllm: str, http: aiohttp.ClientSession, **fields: Any) -> LiveEnvironment:
    engine = UpstreamClient(vllm, http)
    question = held_back(1)[0].question
    ids = await engine.tokenise_chat({"model": MODEL, "messages": [{"role": "user", "content": question}]})
    prompt = Prompt(MODEL, ids, await engine.detokenise(MODEL, ids[-8:]), {}, kind=parse_kind("boxed"), **fields)
    limits = EnvironmentLimits(INTERVAL, LIMIT, 12)
    return LiveEnvironment(engine, prompt, limits, keeps_all_branches=True, signals=ALL_SIGNALS)


async def expected(vllm: str, http: aiohttp.ClientSession, prompt: list[int], ids: list[int]) -> list[float]:
    """Return the log-probability of each of `ids` after `prompt`, as the server reads them in one prompt."""
    body = {"model": MODEL, "prompt": [*prompt, *ids], "max_tokens": 1, "prompt_logprobs": 0}
    async with http.post(f"{vllm}/v1/completions", json=body) as response:
        (choice,) = (await response.json())["choices"]
    known = choice["prompt_logprobs"][len(prompt) :]
    return [entry[str(token)]["logprob"] for entry, token in zip(known, ids, strict=True)]


@pytest.mark.parametrize(
    ("fields", "step"),
    [
        pytest.param({}, 1, id="several branches in a call, one interval each"),
        pytest.param({}, TO_END, id="n branches in one call to the end"),
        pytest.param({"seed": 5}, 2, id="a call per branch"),
        pytest.param({"greedy_first": True}, 3, id="greedy"),
        pytest.param({"stop": ["boxed"]}, 2, id="a stop string"),
    ],
)
async def test_log_probabilities_are_those_of_the_tokens(vllm: str, fields: dict[str, Any], step: int) -> None:
    async with aiohttp.ClientSession() as http:
        env = await environment(vllm, http, **fields)
        facts = [*await env.execute([branch(step)] * 6)]
        while running := [i for i, part in enumerate(env.branches) if part.finish is None]:
            facts += await env.execute([advance(i, step) for i in running])
        assert all(isinstance(fact, Advanced) and fact.confidence is not None for fact in facts)
        for part in env.branches:
            assert len(part.log_probabilities) == len(part.ids)
            assert list(part.log_probabilities) == pytest.approx(
                await expected(vllm, http, list(env.prompt.ids), part.ids), abs=CLOSE
            )
        assert any(part.finish == "stop" for part in env.branches)
        if "stop" in fields:
            assert any(part.ended_by_stop_string for part in env.branches)


async def test_the_confidence_of_a_probe_is_that_of_its_answer(vllm: str) -> None:
    async with aiohttp.ClientSession() as http:
        env = await environment(vllm, http)
        await env.execute([branch()] * 6)
        probes = [fact for fact in await env.execute([probe(i) for i in range(6)]) if isinstance(fact, Probed)]
        late = await env.probe_at([(i, 1) for i in range(6)])
        answered = [fact for fact in probes if fact.label is not None]
        assert answered
        for fact in answered:
            part = env.branches[fact.branch]
            suffix = await env.suffix(fact.branch, lead=True)
            written = env.labels.written(fact.label or 0)
            context = [*env.prompt.ids, *part.ids, *suffix]
            tokens = await env.engine.tokenise_plain(MODEL, written)
            values = await expected(vllm, http, context, tokens)
            mean = 1000 * math.exp(math.fsum(values) / len(values))
            assert fact.confidence == pytest.approx(mean, abs=20), written
        for first, second in zip(probes, late, strict=True):
            assert (first.confidence is None) == (first.label is None)
            assert second.tokens == first.tokens
            assert second.label == first.label
            assert second.confidence == pytest.approx(first.confidence, abs=20)
