"""A failing upstream: retries and their budget, the circuit breaker and its health checks, and invalid replies."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from aiohttp.client_reqrep import ConnectionKey

from proxy.errors import (
    UpstreamCircuitOpen,
    UpstreamError,
    UpstreamProtocolError,
    UpstreamRefused,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from proxy.server import running
from proxy.settings import load
from proxy.types import Call
from proxy.upstream import health_check, retry, transport
from proxy.upstream.circuit_breaker import (
    CHECK_PAUSE_S,
    FAILURES,
    MAX_OPENINGS,
    OPEN_S,
    Breaker,
    BreakerState,
)
from proxy.upstream.client import UpstreamClient
from proxy.upstream.embedded import free_port
from proxy.upstream.health_check import HealthCheck
from proxy.upstream.retry import RetryBudget
from tests.fakes import ASSISTANT, MODEL, FakeVLLM
from tests.proxy.conftest import SMALL, Proxy, backend, proxy

__all__ = ["backend", "proxy"]  # fixtures


class Clock:
    """Clock that stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "RETRY_PAUSES_S", (0, 0))


def open_by_connections(breaker: Breaker) -> None:
    assert [breaker.fail_to_connect() for _ in range(FAILURES)] == [False] * (FAILURES - 1) + [True]
    assert breaker.state is BreakerState.OPEN


def test_five_failed_connections_in_a_row_open_the_breaker(clock: Clock) -> None:
    breaker = Breaker(clock)
    for _ in range(FAILURES - 1):
        assert not breaker.fail_to_connect()
    breaker.succeed(is_generation=False)
    open_by_connections(breaker)
    assert (breaker.is_closed, breaker.is_due, breaker.wait_s) == (False, False, OPEN_S)
    clock.now += OPEN_S - 0.001
    assert not breaker.is_due
    clock.now += 0.001
    assert breaker.is_due


def test_suspicions_with_passed_health_checks_never_open_the_breaker(clock: Clock) -> None:
    breaker = Breaker(clock)
    for _ in range(100):
        assert [breaker.suspect() for _ in range(FAILURES)] == [False] * (FAILURES - 1) + [True]
        breaker.begin_check()
        assert not breaker.end_check(is_up=True)
        assert breaker.is_closed
        clock.now += CHECK_PAUSE_S


def test_health_checks_for_suspicions_are_rate_limited(clock: Clock) -> None:
    breaker = Breaker(clock)
    calls = 0
    for _ in range(1000):
        if breaker.suspect():
            calls += 1
            breaker.end_check(is_up=True)
        clock.now += CHECK_PAUSE_S / 50
    assert calls == 20


def test_only_a_generation_resets_the_count_of_suspicions(clock: Clock) -> None:
    breaker = Breaker(clock)
    for _ in range(100):
        assert not any(breaker.suspect() for _ in range(FAILURES - 1))
        breaker.succeed(is_generation=True)
    assert not any(breaker.suspect() for _ in range(FAILURES - 1))
    breaker.succeed(is_generation=False)
    assert breaker.suspect()


def test_after_the_wait_a_health_check_closes_or_reopens_the_breaker(clock: Clock) -> None:
    breaker = Breaker(clock)
    for _ in range(FAILURES):
        breaker.suspect()
    breaker.begin_check()
    assert breaker.is_closed  # requests do not wait for this check
    assert breaker.end_check(is_up=False)
    for times in (2, 3):
        clock.now += breaker.wait_s
        breaker.begin_check()
        assert (breaker.state, breaker.is_due) == (BreakerState.HALF_OPEN, True)
        assert not breaker.suspect()  # results of earlier requests are ignored
        assert not breaker.fail_to_connect()
        assert breaker.end_check(is_up=False)
        assert breaker.wait_s == times * OPEN_S
    clock.now += breaker.wait_s
    breaker.begin_check()
    assert not breaker.end_check(is_up=True)
    assert breaker.is_closed


def test_the_wait_of_the_breaker_grows_to_a_limit_and_is_reset(clock: Clock) -> None:
    breaker = Breaker(clock)
    open_by_connections(breaker)
    for _ in range(3 * MAX_OPENINGS):
        clock.now += breaker.wait_s
        breaker.begin_check()
        breaker.end_check(is_up=False)
    assert breaker.wait_s == MAX_OPENINGS * OPEN_S
    clock.now += breaker.wait_s
    breaker.begin_check()
    breaker.end_check(is_up=True)
    clock.now += MAX_OPENINGS * OPEN_S + 1
    open_by_connections(breaker)
    assert breaker.wait_s == OPEN_S


def test_a_reset_closes_the_breaker_and_resets_its_wait(clock: Clock) -> None:
    breaker = Breaker(clock)
    for _ in range(3):
        open_by_connections(breaker)
        breaker.reset()
        assert (breaker.is_closed, breaker.wait_s) == (True, 0)
    open_by_connections(breaker)
    assert breaker.wait_s == OPEN_S


def test_the_retry_budget_allows_a_fifth_of_the_requests() -> None:
    budget = RetryBudget()
    repeats = 0
    for _ in range(1000):
        budget.earn()
        repeats += budget.spend()
    assert 199 <= repeats <= 202
    for _ in range(1000):
        budget.earn()
    assert sum(budget.spend() for _ in range(100)) == 10


class Upstream:
    """A fake vLLM, a client of it, and the events that the client reports."""

    def __init__(self, fake: FakeVLLM, session: aiohttp.ClientSession, breaker: Breaker) -> None:
        self.fake = fake
        self.events: list[str] = []
        self.engine = UpstreamClient(fake.url, session, breaker=breaker, on_event=self.events.append)

    async def generate(self) -> Call:
        call = Call([[ord(char) for char in ASSISTANT]], 20, {})
        await self.engine.generate(MODEL, call)
        return call

    async def fail(self, times: int = FAILURES) -> None:
        """Make `times` requests fail, then wait for the health check that follows."""
        for _ in range(times):
            with pytest.raises(UpstreamError):
                await self.generate()
        await self.engine._transport.check()

    @property
    def checks(self) -> int:
        """Number of health checks that generated a token."""
        return sum(request["prompt"] == "1" for request in self.fake.requests)


@pytest_asyncio.fixture
async def upstream(backend: FakeVLLM, clock: Clock) -> AsyncIterator[Upstream]:
    async with aiohttp.ClientSession() as http:
        client = Upstream(backend, http, Breaker(clock))
        yield client
        await client.engine.close()


@pytest.mark.parametrize("fault", ["unavailable", "drop"])
async def test_a_request_that_fails_before_any_output_is_retried(upstream: Upstream, fault: str) -> None:
    upstream.fake.fault, upstream.fake.fault_times = fault, 1
    call = await upstream.generate()
    assert len(call.outputs[0].ids) == 20
    assert (len(upstream.fake.requests), upstream.events) == (2, ["retried"])


@pytest.mark.parametrize("fault", ["cut", "garbage", "lie", "error_event", "refuse", "error_body", "foreign"])
async def test_a_request_that_fails_after_some_output_is_not_retried(upstream: Upstream, fault: str) -> None:
    upstream.fake.fault = fault
    with pytest.raises(UpstreamProtocolError if fault in ("cut", "garbage", "lie", "foreign") else UpstreamRefused):
        await upstream.generate()
    assert (len(upstream.fake.requests), upstream.events) == (1, [])


async def test_retries_stay_within_the_retry_budget(upstream: Upstream) -> None:
    for number in range(100):
        upstream.fake.fault = "unavailable" if number % 2 else ""
        try:
            await upstream.generate()
        except UpstreamError:
            assert number % 2
    assert 10 < upstream.events.count("retried") <= 21
    assert len(upstream.fake.requests) == 100 + upstream.events.count("retried")


@pytest.mark.parametrize("fault", ["unavailable", "broken", "drop", "error_event", "error_body", "cut", "garbage"])
async def test_an_upstream_that_also_fails_the_health_check_opens_the_breaker(
    upstream: Upstream, clock: Clock, fault: str
) -> None:
    upstream.fake.fault = fault
    await upstream.fail()
    assert upstream.events.count("ejected") == 1
    seen = len(upstream.fake.requests)
    with pytest.raises(UpstreamCircuitOpen) as caught:
        await upstream.generate()
    assert caught.value.headers == {"retry-after": "5"}
    assert len(upstream.fake.requests) == seen
    clock.now += OPEN_S
    with pytest.raises(UpstreamCircuitOpen):  # it fails the health check again
        await upstream.generate()
    assert upstream.engine.breaker.wait_s == 2 * OPEN_S
    upstream.fake.fault = ""
    clock.now += 2 * OPEN_S
    await upstream.generate()
    assert await upstream.engine.is_healthy()


@pytest.mark.parametrize("fault", ["broken", "error_event", "error_body", "cut", "garbage", "drop", "lie", "foreign"])
async def test_failing_requests_with_a_passed_health_check_keep_the_breaker_closed(
    upstream: Upstream, fault: str
) -> None:
    upstream.fake.fault, upstream.fake.spares_text = fault, True
    for _ in range(20):
        await upstream.fail(1)
    assert "ejected" not in upstream.events
    assert upstream.engine.breaker.is_closed
    assert upstream.checks >= 1
    upstream.fake.fault = ""
    await upstream.generate()


async def test_the_health_check_passes_a_busy_upstream_and_fails_a_stuck_one(
    upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health_check, "ANSWER_S", 0.2)
    async with aiohttp.ClientSession() as http:
        for growth, is_up in ((5, True), (0, False)):
            check = HealthCheck(upstream.fake.url, http)
            upstream.fake.gate.clear()
            upstream.fake.growth = growth
            assert await check.is_up() is is_up
            upstream.fake.gate.set()
            assert await check.is_up()


async def test_the_health_check_retries_once_after_a_timeout(
    upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health_check, "ANSWER_S", 0.3)
    async with aiohttp.ClientSession() as http:
        check = HealthCheck(upstream.fake.url, http)
        upstream.fake.fault, upstream.fake.fault_times = "hang", 1
        assert await check.is_up()
        upstream.fake.fault_times = 0
        assert not await check.is_up()


async def test_an_unhealthy_modelless_or_absent_upstream_fails_the_health_check(upstream: Upstream) -> None:
    async with aiohttp.ClientSession() as http:
        check = HealthCheck(upstream.fake.url, http)
        assert await check.is_up()
        upstream.fake.is_well = False
        assert not await check.is_up()
        upstream.fake.is_well, upstream.fake.fault = True, "no_models"
        assert not await check.is_up()
        assert not await HealthCheck(f"http://127.0.0.1:{free_port()}", http).is_up()


async def test_running_out_of_file_descriptors_does_not_open_the_breaker(upstream: Upstream) -> None:
    key: Any = ConnectionKey("h", 80, False, True, None, None, None)
    for _ in range(2 * FAILURES):
        upstream.engine._transport.record_failure(
            aiohttp.ClientConnectorError(key, OSError(errno.EMFILE, "too many open files"))
        )
    assert upstream.engine.breaker.is_closed
    for _ in range(FAILURES):
        upstream.engine._transport.record_failure(
            aiohttp.ClientConnectorError(key, OSError(errno.ECONNREFUSED, "refused"))
        )
    assert not upstream.engine.breaker.is_closed


async def test_a_reset_lets_requests_through_without_a_health_check(upstream: Upstream) -> None:
    upstream.fake.fault = "broken"
    await upstream.fail()
    with pytest.raises(UpstreamCircuitOpen):
        await upstream.generate()
    upstream.fake.fault = ""
    upstream.engine.reset()
    await upstream.generate()


async def test_requests_wait_for_a_pending_health_check_only_for_a_limited_time(
    upstream: Upstream, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream.fake.fault = "broken"
    await upstream.fail()
    clock.now += OPEN_S
    upstream.fake.gate.clear()
    monkeypatch.setattr(transport, "CHECK_S", 0.05)
    for _ in range(2):
        with pytest.raises(UpstreamCircuitOpen) as caught:
            await upstream.generate()
        assert caught.value.headers == {"retry-after": "1"}
    upstream.fake.fault = ""
    upstream.fake.gate.set()
    await upstream.engine._transport.check()
    await upstream.generate()


async def test_failures_followed_by_a_success_do_not_open_the_breaker(upstream: Upstream) -> None:
    for _ in range(FAILURES):
        upstream.fake.fault = "broken"
        for _ in range(FAILURES - 1):
            with pytest.raises(UpstreamRefused):
                await upstream.generate()
        upstream.fake.fault = ""
        await upstream.generate()
    assert (upstream.events, upstream.checks) == ([], 0)


async def test_unsupported_requests_are_not_counted_as_failures(upstream: Upstream) -> None:
    upstream.fake.fault = "unmade"
    for _ in range(2 * FAILURES):
        with pytest.raises(UpstreamRefused):
            await upstream.generate()
    assert upstream.events == []


async def test_a_timeout_counts_as_a_failure_and_is_not_retried(
    upstream: Upstream, backend: FakeVLLM, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health_check, "ANSWER_S", 0.2)
    async with aiohttp.ClientSession() as http:
        engine = upstream.engine = UpstreamClient(backend.url, http, read_timeout_s=0.05, breaker=Breaker(clock))
        backend.gate.clear()
        for _ in range(FAILURES):
            with pytest.raises(UpstreamTimeout):
                await upstream.generate()
        await engine._transport.check()
        with pytest.raises(UpstreamCircuitOpen):
            await engine.tokenise_suffix(MODEL, "x")
        assert len(backend.requests) == FAILURES + upstream.checks


async def test_cancelled_requests_are_not_counted_as_failures(upstream: Upstream) -> None:
    upstream.fake.fault = "hang"
    for _ in range(2 * FAILURES):
        upstream.fake.hanging.clear()
        hanging = asyncio.create_task(upstream.generate())
        await upstream.fake.hanging.wait()
        hanging.cancel()
        await asyncio.gather(hanging, return_exceptions=True)
    assert (upstream.events, upstream.checks) == ([], 0)


async def test_a_request_waiting_for_a_health_check_may_be_cancelled_alone(upstream: Upstream, clock: Clock) -> None:
    upstream.fake.fault = "broken"
    await upstream.fail()
    clock.now += OPEN_S
    upstream.fake.fault = ""
    upstream.fake.busy.clear()
    upstream.fake.gate.clear()
    leaving, staying = (asyncio.create_task(upstream.generate()) for _ in range(2))
    await upstream.fake.busy.wait()
    leaving.cancel()
    upstream.fake.gate.set()
    assert len((await staying).outputs[0].ids) == 20
    assert leaving.cancelled()


async def test_refused_connections_open_the_breaker(clock: Clock) -> None:
    async with aiohttp.ClientSession() as http:
        engine = UpstreamClient(f"http://127.0.0.1:{free_port()}", http, breaker=Breaker(clock))
        for _ in range(FAILURES - 1):  # one of them is retried
            with pytest.raises(UpstreamUnreachable):
                await engine.tokenise_suffix(MODEL, "x")
        with pytest.raises(UpstreamCircuitOpen):
            await engine.tokenise_suffix(MODEL, "x")


async def test_an_upstream_that_sends_too_many_tokens_is_cut_off(upstream: Upstream) -> None:
    upstream.fake.fault = "more"
    call = Call([[ord(char) for char in ASSISTANT]], 20, {}, n=3)
    with pytest.raises(UpstreamProtocolError, match="20"):
        await upstream.engine.generate(MODEL, call)
    received = [len(output.ids) for output in call.outputs]
    assert max(received) == 21  # the first piece has one token, the second 20, the maximum
    assert sum(received) <= 3 * 21


LIES: list[dict[str, Any]] = [
    *({"prompt_tokens": lie} for lie in (-5, 0, 10**30, len(ASSISTANT) + 1, float(len(ASSISTANT)), 5.7, True, "11")),
    *({"completion_tokens": lie} for lie in (-5, 21, 20.0, True, None)),
    *({"prompt_tokens_details": {"cached_tokens": lie}} for lie in (-9, 10**9, 2.0, False, "3")),
    {"prompt_tokens_details": [1]},
]


@pytest.mark.parametrize("lie", LIES)
async def test_a_false_usage_of_the_upstream_raises_protocol_error(upstream: Upstream, lie: dict[str, Any]) -> None:
    upstream.fake.usage = lie
    with pytest.raises(UpstreamProtocolError):
        await upstream.generate()


@pytest.mark.parametrize("details", [None, {}, {"cached_tokens": None}])
async def test_the_count_of_cached_tokens_is_optional(upstream: Upstream, details: Any) -> None:
    upstream.fake.usage = {"prompt_tokens_details": details}
    call = await upstream.generate()
    assert (call.prompt_tokens, call.cached_tokens) == (len(ASSISTANT), None)


async def test_each_prompt_of_a_call_is_counted_once(upstream: Upstream) -> None:
    prompt = [ord(char) for char in ASSISTANT]
    for call in (Call([prompt], 5, {}, n=4), Call([prompt, [*prompt, ord("<")]], 5, {})):
        await upstream.engine.generate(MODEL, call)
        assert call.prompt_tokens == sum(map(len, call.prompts))


# Through the proxy


async def test_failing_requests_of_one_client_do_not_block_others(proxy: Proxy) -> None:
    proxy.backend.fault, proxy.backend.spares_text = "broken", True
    poison = {"model": MODEL, "prompt": [ord(char) for char in ASSISTANT], "max_tokens": 5}
    for _ in range(4 * FAILURES):
        async with proxy.http.post(f"{proxy.url}/v1/completions", json=poison) as response:
            assert response.status == 500
        async with proxy.http.post(f"{proxy.url}/tokenize", json={"prompt": "x"}) as response:
            assert response.status == 200
    proxy.backend.fault = ""
    assert (await proxy.ask("0.5"))[0] == 200
    assert await proxy.metric("autotts_upstream_events_total", event="ejected") == 0


async def test_disconnects_and_deadlines_are_not_counted_as_upstream_failures(proxy: Proxy) -> None:
    proxy.backend.fault = "hang"
    body = {"model": MODEL, "prompt": [ord(char) for char in ASSISTANT], "max_tokens": 5, "stream": True}
    for _ in range(2 * FAILURES):
        async with proxy.http.post(f"{proxy.url}/v1/completions", json=body) as response:
            await response.content.readany()
        await proxy.backend.idle.wait()
    for _ in range(2 * FAILURES):
        await proxy.ask("0.5", tts={"deadline_s": 0.05})
    assert not any(request["prompt"] == "1" for request in proxy.backend.requests)  # no health check was triggered
    proxy.backend.fault = ""
    assert (await proxy.ask("0.5"))[0] == 200


async def test_an_upstream_that_fails_every_request_gets_no_more_of_them(proxy: Proxy) -> None:
    proxy.backend.fault = "broken"
    body = {"model": MODEL, "prompt": [ord(char) for char in ASSISTANT], "max_tokens": 5}
    async with asyncio.timeout(10):
        status = 500
        while status == 500:
            async with proxy.http.post(f"{proxy.url}/v1/completions", json=body) as response:
                status = response.status
    assert status == 503
    assert len(proxy.backend.requests) < 20 * FAILURES


async def test_the_token_cap_holds_and_all_received_tokens_are_billed(proxy: Proxy) -> None:
    proxy.backend.fault = "more"
    status, headers, reply = await proxy.ask("1", tts={"answer": "boxed", "max_total_tokens": 500})
    spent = reply["tts"]["tokens"]["total"] if status == 200 else int(headers["x-tts-tokens"])
    assert 0 < spent <= 500
    assert await proxy.metric("autotts_tokens_total") == spent


async def test_ready_returns_503_when_the_list_of_models_hangs(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "CHECK_S", 0.2)
    async with running(load(upstream=proxy.backend.url, **{**SMALL, "read_timeout_s": 600})) as url:
        proxy.backend.fault = "models_hang"
        async with asyncio.timeout(5), proxy.http.get(f"{url}/ready") as response:
            assert response.status == 503


async def test_an_open_breaker_returns_503_with_retry_after(proxy: Proxy) -> None:
    proxy.backend.fault = "unavailable"
    async with asyncio.timeout(10):
        code = ""
        while code != "upstream_ejected":
            status, headers, reply = await proxy.ask("0.5")
            assert status in {502, 503}
            code = reply["error"]["code"]
    assert (status, reply["error"]["type"]) == (503, "upstream_error")
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


@pytest.mark.parametrize("payload", [*CHUNKS, *({"choices": [], "usage": usage} for usage in USAGES)])
async def test_a_malformed_upstream_chunk_gives_a_clear_error(proxy: Proxy, payload: Any) -> None:
    proxy.backend.babble = payload
    status, _, reply = await proxy.ask("0.5", tts={"answer": "boxed"})
    assert status in (400, 502)
    assert reply["error"]["type"] in ("upstream_error", "invalid_request_error")
