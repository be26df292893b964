"""Circuit breaker of an upstream that comes back: it closes before its open time has passed."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from itertools import repeat

import aiohttp
import pytest
import pytest_asyncio

from proxy.errors import UpstreamCircuitOpen
from proxy.server import running
from proxy.settings import load
from proxy.upstream import health_monitor
from proxy.upstream.circuit_breaker import EARLY_S, FAILURES, OPEN_S, Breaker, BreakerState
from proxy.upstream.client import UpstreamClient
from proxy.upstream.relayed_body import RelayedBody
from tests.fakes import ASSISTANT, MODEL, FakeVLLM
from tests.proxy.conftest import SMALL

TEXT = [ord(char) for char in ASSISTANT]


def still_clock() -> float:
    """Return the same time always."""
    return 1000.0


@pytest_asyncio.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as http:
        yield http


def open_breaker(breaker: Breaker) -> None:
    """Let connections fail until the breaker opens."""
    while not breaker.fail_to_connect():
        pass


def test_an_answer_after_silence_starts_one_health_check() -> None:
    breaker = Breaker(still_clock)
    open_breaker(breaker)
    assert (breaker.wait_s, breaker.retry_s) == (OPEN_S, EARLY_S)
    assert [breaker.note_answer(has_answered=it) for it in (False, True, True, False, True)] == [
        False,
        True,
        False,  # it had its chance
        False,
        True,
    ]
    breaker.begin_check()
    assert not breaker.end_check(is_up=False)
    assert (breaker.state, breaker.wait_s, breaker.retry_s) == (BreakerState.OPEN, OPEN_S, OPEN_S)


def test_a_failed_health_check_opens_a_breaker_that_has_closed_early() -> None:
    breaker = Breaker(still_clock)
    open_breaker(breaker)
    assert breaker.note_answer(has_answered=True)
    breaker.begin_check()
    assert not breaker.end_check(is_up=True)
    assert breaker.is_closed
    assert [breaker.suspect() for _ in range(FAILURES)][-1] is False  # a check has just passed
    breaker.begin_check()
    assert breaker.end_check(is_up=False)
    assert (breaker.state, breaker.wait_s) == (BreakerState.OPEN, 2 * OPEN_S)


def test_an_answer_while_the_breaker_is_closed_starts_no_health_check() -> None:
    breaker = Breaker(still_clock)
    assert not breaker.note_answer(has_answered=True)
    open_breaker(breaker)
    assert breaker.note_answer(has_answered=True)


async def test_a_single_upstream_that_comes_back_is_used_at_once(
    session: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    async with FakeVLLM().serve() as fake:
        engine = UpstreamClient(fake.url, session, breaker=Breaker(still_clock))
        open_breaker(engine.breaker)
        with pytest.raises(UpstreamCircuitOpen) as refused:
            await engine.tokenise_plain(MODEL, "x")
        assert refused.value.headers == {"retry-after": "5"}
        fake.is_well = False
        assert not await engine.is_healthy()
        assert engine.circuit_breaker == "open"
        fake.is_well = True
        assert await engine.is_healthy()
        assert engine.circuit_breaker == "closed"
        assert await engine.tokenise_plain(MODEL, "x")
        assert caplog.messages == [f"upstream {fake.url} generates again; the circuit breaker has closed"]
        await engine.close()


async def test_a_single_upstream_that_answers_but_generates_nothing_stays_out(session: aiohttp.ClientSession) -> None:
    async with FakeVLLM().serve() as fake:
        engine = UpstreamClient(fake.url, session, breaker=Breaker(still_clock))
        open_breaker(engine.breaker)
        fake.fault = "broken"
        for _ in range(3):
            assert not await engine.is_healthy()
        assert len(fake.requests) == 1
        await engine.close()


@pytest.mark.parametrize("fault", ["", "refuse"])
async def test_answers_that_prove_nothing_do_not_put_off_the_health_check(
    session: aiohttp.ClientSession, fault: str
) -> None:
    async with FakeVLLM().serve() as fake:
        engine = UpstreamClient(fake.url, session, breaker=Breaker(still_clock))

        async def relay_generation() -> int:
            request = RelayedBody(json.dumps({"model": MODEL, "prompt": TEXT}).encode())
            async with engine.relay("POST", "/v1/completions", request, {}, MODEL) as response:
                return response.status

        for _ in range(FAILURES):
            assert engine._transport._checking is None
            fake.fault = fault
            if fault:
                assert await relay_generation() == 400
            else:
                async with engine.relay("GET", "/v1/models", RelayedBody(b""), {}) as response:
                    assert response.status == 200
            fake.fault = "broken"
            assert await relay_generation() == 500
        assert engine._transport._checking is not None
        await engine._transport.check()
        assert engine.circuit_breaker == "open"
        await engine.close()


async def test_an_outage_of_a_single_upstream_is_shown_and_ends_with_it(
    session: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(health_monitor, "CHECK_INTERVAL_S", 0.01)
    monkeypatch.setattr(health_monitor, "FRESH_S", 0.0)
    caplog.set_level(logging.WARNING)
    async with FakeVLLM().serve() as fake, running(load(upstream=fake.url, **SMALL)) as url:

        async def status(path: str) -> int:
            async with session.get(url + path) as response:
                return response.status

        async def page(path: str) -> str:
            async with session.get(url + path) as response:
                return await response.text()

        assert await status("/ready") == 200
        fake.is_well, fake.fault = False, "broken"
        for _ in range(FAILURES):
            async with session.post(f"{url}/v1/completions", json={"model": MODEL, "prompt": TEXT}) as response:
                await response.read()
        for _ in repeat(None):
            if '"circuit_breaker":"open"' in await page("/ready"):
                break
        assert await status("/ready") == 503
        assert "\nautotts_upstream_circuit_open 1.0\n" in await page("/metrics")
        fake.is_well, fake.fault = True, ""
        for _ in repeat(None):
            if await status("/ready") == 200:
                break
        assert '"circuit_breaker":"closed"' in await page("/ready")
        assert "\nautotts_upstream_circuit_open 0.0\n" in await page("/metrics")
    lines = [message for message in caplog.messages if "again" in message or "is down" in message]
    assert sorted(lines) == sorted(
        [
            f"upstream {fake.url} is down; the circuit breaker stays open for 30 s, or until it answers again",
            f"upstream {fake.url} is down; /ready is 503 until a health check passes",
            f"upstream {fake.url} generates again; the circuit breaker has closed",
            f"upstream {fake.url} is up again",
        ]
    )
