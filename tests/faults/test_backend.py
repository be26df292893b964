"""A failing backend: what is repeated and how often, when it is left alone and for how long, what it may say."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from proxy import engine as engines
from proxy.breaker import EJECTED_S, FAILURES, MOST_TIMES, Breaker, Budget, Standing
from proxy.embedded import free_port
from proxy.engine import Call, Engine
from proxy.errors import (
    UpstreamEjected,
    UpstreamError,
    UpstreamNonsense,
    UpstreamRefused,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from proxy.server import running
from proxy.settings import load
from tests.fakes import ASSISTANT, MODEL, FakeVLLM, RawUpstream
from tests.proxy.conftest import SMALL, Proxy, backend, proxy

__all__ = ["backend", "proxy"]  # fixtures


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "PAUSES_S", (0, 0))


def eject(breaker: Breaker) -> None:
    for _ in range(FAILURES):
        assert breaker.admit()
        breaker.fail()
    assert breaker.standing is Standing.EJECTED


def test_five_failures_in_a_row_eject(clock: Clock) -> None:
    breaker = Breaker(clock)
    for _ in range(FAILURES - 1):
        assert not breaker.fail()
    breaker.succeed()
    eject(breaker)
    assert not breaker.admit()
    assert breaker.wait_s == EJECTED_S
    clock.now += EJECTED_S - 0.001
    assert not breaker.admit()


def test_one_request_is_let_through_and_decides(clock: Clock) -> None:
    breaker = Breaker(clock)
    eject(breaker)
    for times in (2, 3):
        clock.now += breaker.wait_s
        assert [breaker.admit() for _ in range(3)] == [True, False, False]
        assert breaker.fail()
        assert breaker.wait_s == times * EJECTED_S
    clock.now += breaker.wait_s
    assert breaker.admit()
    breaker.leave()
    assert [breaker.admit() for _ in range(2)] == [True, False]
    breaker.succeed()
    assert not breaker.fail()
    assert breaker.admit()


def test_ejections_grow_to_a_bound_and_are_forgotten(clock: Clock) -> None:
    breaker = Breaker(clock)
    eject(breaker)
    for _ in range(3 * MOST_TIMES):
        clock.now += breaker.wait_s
        assert breaker.admit()
        breaker.fail()
    assert breaker.wait_s == MOST_TIMES * EJECTED_S
    clock.now += breaker.wait_s
    assert breaker.admit()
    breaker.succeed()
    clock.now += MOST_TIMES * EJECTED_S + 1
    eject(breaker)
    assert breaker.wait_s == EJECTED_S


def test_checks_neither_eject_nor_keep_from_it(clock: Clock) -> None:
    breaker = Breaker(clock)
    for _ in range(2 * FAILURES):
        assert not breaker.fail(is_telling=False)
    for _ in range(FAILURES):
        breaker.fail()
        breaker.succeed(is_telling=False)
    assert not breaker.admit()
    clock.now += EJECTED_S
    assert breaker.admit()
    breaker.succeed(is_telling=False)
    assert breaker.admit()


def test_a_fifth_of_the_requests_may_be_repeated() -> None:
    budget = Budget()
    repeats = 0
    for _ in range(1000):
        budget.earn()
        repeats += budget.spend()
    assert 199 <= repeats <= 202
    for _ in range(1000):
        budget.earn()
    assert sum(budget.spend() for _ in range(100)) == 10


class Upstream:
    """The fake, an engine over it, and what the engine tells."""

    def __init__(self, fake: FakeVLLM, engine: Engine) -> None:
        self.fake = fake
        self.engine = engine
        self.events: list[str] = []
        engine.on_event = self.events.append

    async def generate(self) -> Call:
        call = Call([[ord(char) for char in ASSISTANT]], 20, {})
        await self.engine.generate(MODEL, call)
        return call


@pytest_asyncio.fixture
async def upstream(backend: FakeVLLM, clock: Clock) -> AsyncIterator[Upstream]:
    async with aiohttp.ClientSession() as http:
        yield Upstream(backend, Engine(backend.url, http, breaker=Breaker(clock)))


@pytest.mark.parametrize("fault", ["unavailable", "drop"])
async def test_what_nothing_came_of_is_repeated(upstream: Upstream, fault: str) -> None:
    upstream.fake.fault, upstream.fake.fault_times = fault, 1
    call = await upstream.generate()
    assert len(call.outputs[0].ids) == 20
    assert (len(upstream.fake.requests), upstream.events) == (2, ["retried"])


@pytest.mark.parametrize("fault", ["cut", "garbage", "lie", "error_event", "refuse", "error_body", "foreign"])
async def test_what_something_came_of_is_not(upstream: Upstream, fault: str) -> None:
    upstream.fake.fault = fault
    with pytest.raises(UpstreamNonsense if fault in ("cut", "garbage", "lie", "foreign") else UpstreamRefused):
        await upstream.generate()
    assert (len(upstream.fake.requests), upstream.events) == (1, [])


async def test_repeats_stay_within_their_share(upstream: Upstream) -> None:
    for number in range(100):
        upstream.fake.fault = "unavailable" if number % 2 else ""
        try:
            await upstream.generate()
        except UpstreamError:
            assert number % 2
    assert 10 < upstream.events.count("retried") <= 21
    assert len(upstream.fake.requests) == 100 + upstream.events.count("retried")


async def test_an_ejected_upstream_is_left_alone_until_one_request_finds_it_well(
    upstream: Upstream, clock: Clock
) -> None:
    upstream.fake.fault = "unavailable"
    for _ in range(FAILURES):
        with pytest.raises((UpstreamRefused, UpstreamEjected)):
            await upstream.generate()
    seen = len(upstream.fake.requests)
    assert (seen, upstream.events.count("ejected")) == (FAILURES, 1)
    with pytest.raises(UpstreamEjected) as caught:
        await upstream.generate()
    assert caught.value.headers == {"retry-after": "30"}
    assert not await upstream.engine.healthy()
    assert len(upstream.fake.requests) == seen
    clock.now += EJECTED_S
    upstream.fake.fault = ""
    await upstream.generate()
    assert len(upstream.fake.requests) == seen + 1
    assert await upstream.engine.healthy()


async def test_failures_of_its_own_eject_and_are_not_repeated(upstream: Upstream, clock: Clock) -> None:
    upstream.fake.fault = "broken"
    for _ in range(FAILURES):
        with pytest.raises(UpstreamRefused, match="went wrong"):
            await upstream.generate()
    assert (len(upstream.fake.requests), upstream.events) == (FAILURES, ["ejected"])
    with pytest.raises(UpstreamEjected):
        await upstream.generate()
    clock.now += EJECTED_S
    with pytest.raises(UpstreamRefused):
        await upstream.generate()
    assert upstream.events == ["ejected"] * 2
    assert len(upstream.fake.requests) == FAILURES + 1


@pytest.mark.parametrize("fault", ["error_event", "error_body"])
async def test_so_do_those_it_tells_in_a_response_that_began_well(upstream: Upstream, fault: str) -> None:
    upstream.fake.fault = fault
    for _ in range(FAILURES):
        with pytest.raises(UpstreamRefused):
            await upstream.generate()
    assert (len(upstream.fake.requests), upstream.events) == (FAILURES, ["ejected"])
    with pytest.raises(UpstreamEjected):
        await upstream.generate()


async def test_one_that_can_only_tell_of_its_failure_is_not_back(clock: Clock) -> None:
    failing = RawUpstream([b'data: {"error": {"message": "m", "code": 500}}\n\n'], content_type="text/event-stream")
    async with failing.serve(), aiohttp.ClientSession() as http:
        upstream = Engine(failing.url, http, breaker=Breaker(clock))
        for _ in range(FAILURES + 1):
            with pytest.raises(UpstreamRefused):
                await upstream.generate(MODEL, Call([[1]], 20, {}))
            clock.now += upstream.breaker.wait_s
        assert upstream.breaker.standing is Standing.EJECTED


async def test_one_odd_request_ejects_nobody(upstream: Upstream) -> None:
    for _ in range(FAILURES):
        upstream.fake.fault = "broken"
        for _ in range(FAILURES - 1):
            with pytest.raises(UpstreamRefused):
                await upstream.generate()
        upstream.fake.fault = ""
        await upstream.generate()
    assert upstream.events == []


async def test_what_it_was_not_made_for_says_nothing_of_it(upstream: Upstream) -> None:
    upstream.fake.fault = "unmade"
    for _ in range(2 * FAILURES):
        with pytest.raises(UpstreamRefused):
            await upstream.generate()
    assert upstream.events == []


async def test_silence_counts_and_is_not_repeated(upstream: Upstream, backend: FakeVLLM, clock: Clock) -> None:
    async with aiohttp.ClientSession() as http:
        engine = upstream.engine = Engine(backend.url, http, read_timeout_s=0.05, breaker=Breaker(clock))
        backend.gate.clear()
        for _ in range(FAILURES):
            with pytest.raises(UpstreamTimeout):
                await upstream.generate()
        with pytest.raises(UpstreamEjected):
            await engine.tokenise_suffix(MODEL, "x")
        assert len(backend.requests) == FAILURES


async def test_a_cancelled_request_tells_nothing(upstream: Upstream, clock: Clock) -> None:
    upstream.fake.fault = "unavailable"
    for _ in range(FAILURES):
        with pytest.raises((UpstreamRefused, UpstreamEjected)):
            await upstream.generate()
    clock.now += EJECTED_S
    upstream.fake.fault = "hang"
    trying = asyncio.create_task(upstream.generate())
    await upstream.fake.hanging.wait()
    trying.cancel()
    await asyncio.gather(trying, return_exceptions=True)
    upstream.fake.fault = ""
    await upstream.generate()


async def test_nobody_there(clock: Clock) -> None:
    async with aiohttp.ClientSession() as http:
        engine = Engine(f"http://127.0.0.1:{free_port()}", http, breaker=Breaker(clock))
        for _ in range(FAILURES - 1):  # one of which is repeated
            with pytest.raises(UpstreamUnreachable):
                await engine.tokenise_suffix(MODEL, "x")
        with pytest.raises(UpstreamEjected):
            await engine.tokenise_suffix(MODEL, "x")


async def test_a_backend_that_writes_more_than_it_may_is_cut(upstream: Upstream) -> None:
    upstream.fake.fault = "more"
    call = Call([[ord(char) for char in ASSISTANT]], 20, {}, n=3)
    with pytest.raises(UpstreamNonsense, match="20"):
        await upstream.engine.generate(MODEL, call)
    received = [len(output.ids) for output in call.outputs]
    assert max(received) == 21  # the first piece was of one token, the second of as many as there may be
    assert sum(received) <= 3 * 21


LIES: list[dict[str, Any]] = [
    *({"prompt_tokens": lie} for lie in (-5, 0, 10**30, len(ASSISTANT) + 1, float(len(ASSISTANT)), 5.7, True, "11")),
    *({"completion_tokens": lie} for lie in (-5, 21, 20.0, True, None)),
    *({"prompt_tokens_details": {"cached_tokens": lie}} for lie in (-9, 10**9, 2.0, False, "3")),
    {"prompt_tokens_details": [1]},
]


@pytest.mark.parametrize("lie", LIES)
async def test_what_it_says_it_has_counted_must_be_what_there_is(upstream: Upstream, lie: dict[str, Any]) -> None:
    upstream.fake.usage = lie
    with pytest.raises(UpstreamNonsense):
        await upstream.generate()


@pytest.mark.parametrize("details", [None, {}, {"cached_tokens": None}])
async def test_what_is_cached_need_not_be_told(upstream: Upstream, details: Any) -> None:
    upstream.fake.usage = {"prompt_tokens_details": details}
    call = await upstream.generate()
    assert (call.prompt_tokens, call.cached_tokens) == (len(ASSISTANT), None)


async def test_prompts_are_counted_once_each(upstream: Upstream) -> None:
    prompt = [ord(char) for char in ASSISTANT]
    for call in (Call([prompt], 5, {}, n=4), Call([prompt, [*prompt, ord("<")]], 5, {})):
        await upstream.engine.generate(MODEL, call)
        assert call.prompt_tokens == sum(map(len, call.prompts))


# Through the proxy


async def test_clients_whose_requests_break_it_eject_it_too(proxy: Proxy) -> None:
    proxy.backend.fault = "broken"
    body = {"model": MODEL, "prompt": [ord(char) for char in ASSISTANT], "max_tokens": 5}
    statuses = []
    for _ in range(20):
        async with proxy.http.post(f"{proxy.url}/v1/completions", json=body) as response:
            statuses.append(response.status)
    assert statuses == [500] * FAILURES + [503] * (20 - FAILURES)
    assert len(proxy.backend.requests) == FAILURES


async def test_a_cap_holds_and_all_that_came_is_billed(proxy: Proxy) -> None:
    proxy.backend.fault = "more"
    status, headers, reply = await proxy.ask("1", tts={"answer": "boxed", "max_total_tokens": 500})
    spent = reply["tts"]["tokens"]["total"] if status == 200 else int(headers["x-tts-tokens"])
    assert 0 < spent <= 500
    assert await proxy.metric("autotts_tokens_total") == spent


async def test_a_list_of_models_that_does_not_come_keeps_nobody_waiting(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "CHECK_S", 0.2)
    async with running(load(upstream=proxy.backend.url, **{**SMALL, "read_timeout_s": 600})) as url:
        proxy.backend.fault = "models_hang"
        async with asyncio.timeout(5), proxy.http.get(f"{url}/ready") as response:
            assert response.status == 503


async def test_clients_are_told_when_to_come_back(proxy: Proxy) -> None:
    proxy.backend.fault = "unavailable"
    statuses = [(await proxy.ask("0.5"))[0] for _ in range(FAILURES)]
    assert set(statuses) <= {502, 503}
    status, headers, reply = await proxy.ask("0.5")
    assert (status, reply["error"]["type"], reply["error"]["code"]) == (503, "upstream_error", "upstream_ejected")
    assert 1 <= int(headers["retry-after"]) <= 30
    async with proxy.http.get(f"{proxy.url}/ready") as response:
        assert response.status == 503
    async with proxy.http.get(f"{proxy.url}/health") as response:
        assert response.status == 200
    async with proxy.http.post(f"{proxy.url}/tokenize", json={"prompt": "x"}) as response:
        assert response.status == 503
    assert await proxy.metric("autotts_upstream_events_total", event="ejected") == 1
    assert await proxy.metric("autotts_upstream_events_total", event="retried") >= 1


USAGES: list[Any] = [
    {"prompt_tokens": 1},
    [1],
    "x",
    {"completion_tokens": "x", "prompt_tokens": 1},
    {"completion_tokens": float("inf")},
]
CHUNKS: list[Any] = [
    {"choices": 5},
    {"choices": [5]},
    {"choices": [{"index": 0, "token_ids": "abc", "text": "abc", "finish_reason": None}]},
    {"choices": [{"index": 0, "token_ids": [None], "text": "a", "finish_reason": None}]},
    {"choices": [{"index": 9, "token_ids": [1], "text": "a", "finish_reason": None}]},
    {"choices": [{"index": 0, "token_ids": [1], "text": 5, "finish_reason": None}]},
    {"error": []},
    {"error": {"message": 5}},
    {"error": {"message": "m", "code": 499, "param": {}}},
    {"error": {"message": "m", "code": 10**30}},
]


@pytest.mark.parametrize("said", [*CHUNKS, *({"choices": [], "usage": usage} for usage in USAGES)])
async def test_whatever_a_backend_says_it_is_a_clear_error(proxy: Proxy, said: Any) -> None:
    proxy.backend.babble = said
    status, _, reply = await proxy.ask("0.5", tts={"answer": "boxed"})
    assert status in (400, 502)
    assert reply["error"]["type"] in ("upstream_error", "invalid_request_error")
