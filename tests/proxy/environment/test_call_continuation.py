"""Continuation of calls: a replica that fails takes no tokens of a branch with it, and none is generated twice."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import pytest

from controllers import TO_END, Advanced, branch, probe
from controllers.signals import ALL_SIGNALS
from proxy.environment.live_environment import LiveEnvironment
from proxy.errors import UpstreamDisconnected
from proxy.server import running
from proxy.settings import load
from proxy.types import EnvironmentLimits, Prompt
from proxy.upstream.client import UpstreamClient
from proxy.upstream.detokeniser import Detokeniser
from tests.breaking_fake import BreakingVLLM, breaking_fleet
from tests.fakes import ASSISTANT, EOS, MODEL, FakeVLLM, chain
from tests.proxy.conftest import INTERVAL, SMALL, Proxy
from tests.proxy.upstream.fleet.conftest import question_for

CHAINS = [chain("7", 100 + 17 * i, ["5", "7"], mark=chr(97 + i)) for i in range(8)]
PROMPT = [ord(char) for char in ASSISTANT]


def environment(engine: Any, **fields: Any) -> LiveEnvironment:
    prompt, limits = Prompt(MODEL, PROMPT, "", {}, **fields), EnvironmentLimits(INTERVAL, 1000, 12)
    return LiveEnvironment(engine, prompt, limits, keeps_all_branches=True, signals=ALL_SIGNALS)


@pytest.mark.parametrize("seed", [None, 3])
async def test_outputs_are_those_of_a_replica_that_does_not_fail(seed: int | None) -> None:
    async with breaking_fleet(CHAINS, INTERVAL) as (engine, fakes):
        world = environment(engine, seed=seed)
        facts = await world.execute([branch(2), branch(TO_END), branch(), probe(0)])
        assert [fact.tokens for fact in facts if isinstance(fact, Advanced)] == [80, 117, 40]
        for script, live in zip(CHAINS, world.branches, strict=False):
            assert live.text == script.text[: len(live.text)]
            assert live.ids == [*map(ord, script.text), EOS][: len(live.ids)]
            assert list(live.log_probabilities) == script.log_probabilities[: len(live.ids)]
        assert world.branches[1].finish == "stop"
        meter = world.meter
        assert (meter.aborted_tokens, meter.generated_tokens) == (0, 80 + 117 + 40 + 3)
        assert sum(fake.generated for fake in fakes) == meter.generated_tokens - 3 * 20 - 2  # the rests
        assert meter.requests == sum(len(fake.requests) for fake in fakes)
        assert meter.max_unseen_tokens > 0


async def test_the_rest_of_a_seeded_branch_has_another_seed() -> None:
    async with breaking_fleet(CHAINS, INTERVAL) as (engine, fakes):
        await environment(engine, seed=3).execute([branch()])
        requests = [request for fake in fakes for request in fake.requests]
        rest, first = sorted(requests, key=lambda request: request["max_tokens"])
        assert first["max_tokens"] == rest["max_tokens"] + 20 == 40
        assert first["seed"] != rest["seed"]


@pytest.mark.parametrize("fault", ["cut", "hang", "error_event"])
async def test_a_call_that_fails_everywhere_keeps_what_has_arrived(fault: str) -> None:
    async with breaking_fleet(CHAINS, INTERVAL, size=4) as (engine, fakes):
        for fake in fakes:
            fake.always = fault
        world = environment(engine)
        for replica in engine._fleet.replicas:
            replica.client.read_timeout_s = 0.3
        with pytest.raises(Exception, match=r"http://127\.0\.0\.1:\d+|engine died"):
            await world.execute([branch(2)])
        assert sorted(len(fake.requests) for fake in fakes) == [0, 1, 1, 1]  # it may be the request that breaks them
        world.salvage()
        assert (len(world.branches[0].ids), world.branches[0].text) == (60, CHAINS[0].text[:60])
        assert (world.meter.aborted_tokens, world.meter.billed) == (60, 60)


@pytest.mark.parametrize("fault", ["garbage", "lie", "more"])
async def test_invalid_replies_are_not_continued(fault: str) -> None:
    async with breaking_fleet(CHAINS, INTERVAL) as (engine, fakes):
        for fake in fakes:
            fake.always = fault
        with pytest.raises(Exception, match=r"http://127\.0\.0\.1:\d+"):
            await environment(engine).execute([branch()])
        assert sum(len(fake.requests) for fake in fakes) == 1


async def test_one_upstream_is_not_asked_again(backend: FakeVLLM) -> None:
    backend.fault = "cut"
    async with aiohttp.ClientSession() as session:
        world = environment(UpstreamClient(backend.url, session))
        with pytest.raises(UpstreamDisconnected):
            await world.execute([branch()])
    assert len(backend.requests) == 1
    assert world.meter.aborted_tokens == 1


async def test_text_that_a_server_held_back_for_stop_strings_is_decoded(backend: FakeVLLM) -> None:
    async with aiohttp.ClientSession() as session:
        detokeniser = Detokeniser(UpstreamClient(backend.url, session), MODEL)
        ids = [*map(ord, "some words")]
        assert await detokeniser.completed(PROMPT, ids, "some wo") == "some words"
        assert await detokeniser.completed(PROMPT, ids, "some other") == "some other"


# A replica that is killed in the middle of an episode


class Killable:
    """Two scripted replicas, and a proxy before them. The first can be killed."""

    def __init__(self) -> None:
        self.first = BreakingVLLM(CHAINS, INTERVAL)
        self.first.always = ""
        self.other = BreakingVLLM(CHAINS, INTERVAL, self.first)
        self.other.always = ""
        self.stack = AsyncExitStack()
        self.kill = AsyncExitStack()

    async def __aenter__(self) -> Proxy:
        await self.stack.enter_async_context(self.other.serve())
        await self.kill.enter_async_context(self.first.serve())
        self.stack.push_async_callback(self.kill.aclose)
        upstream = f"{self.first.url},{self.other.url}"
        settings = load(**{**SMALL, "upstream": upstream, "controller": "self_consistency"})
        url = await self.stack.enter_async_context(running(settings))
        http = await self.stack.enter_async_context(aiohttp.ClientSession())
        self.question = question_for(self.first.url, [self.first.url, self.other.url])
        return Proxy(self.first, url, http, None)  # type: ignore[arg-type]

    async def __aexit__(self, *_: object) -> None:
        await self.stack.aclose()


async def test_an_episode_goes_on_when_its_replica_is_killed() -> None:
    killable = Killable()
    async with killable as proxy:
        first, other = killable.first, killable.other
        first.always, first.fault_after = "hang", 1  # its second request; the first one succeeds
        messages = [{"role": "user", "content": killable.question}]
        asking = asyncio.create_task(proxy.ask("0.5", messages=messages, tts={"max_total_tokens": 1500}))
        await first.hanging.wait()
        running_branches = first.branches
        await killable.kill.aclose()
        status, _, body = await asking
        assert (status, body["choices"][0]["finish_reason"]) == (200, "stop")
        assert "\\boxed{7}" in body["choices"][0]["message"]["content"]
        tts = body["tts"]
        assert tts["stop"] in ("answered", "max_tokens")
        assert running_branches
        assert tts["tokens"]["aborted"] == 0
        assert body["usage"]["completion_tokens"] <= 1500
        sent = first.generated + other.generated + first.first * running_branches
        assert tts["tokens"]["total"] == sent  # none was generated or billed twice
        assert await proxy.metric("autotts_replica_moves_total", replica=first.url, reason="failed") >= 1
        assert (await proxy.ask("0.5", messages=messages))[0] == 200
        async with proxy.http.get(f"{proxy.url}/ready") as response:
            assert response.status == 200


async def test_a_probe_goes_on_at_another_replica() -> None:
    async with breaking_fleet(CHAINS, INTERVAL) as (engine, fakes):
        for fake in fakes:
            fake.always = ""
        world = environment(engine)
        await world.execute([branch()])
        for fake in fakes:
            fake.always = None
        before = world.meter.suffix_tokens
        (fact,) = await world.execute([probe(0)])
        suffix = world.meter.suffix_tokens - before
        assert fact.tokens == suffix + 3
        assert world.meter.generated_tokens == INTERVAL + 3
        probes = [request for fake in fakes for request in fake.requests if request.get("temperature") == 0]
        assert sorted(request["max_tokens"] for request in probes) == [10, 12]
        assert len(probes[0]["prompt"]) != len(probes[1]["prompt"])
