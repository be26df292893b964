"""Limits in a real Redis: several proxies, killed proxies, and a Redis that goes away and comes back."""

from __future__ import annotations

import asyncio
import logging
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from itertools import count
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from prometheus_client import generate_latest
from pydantic import SecretStr

from proxy.admission import shared_limits
from proxy.admission.limits import LocalLimits
from proxy.admission.redis_scripts import PREFIX
from proxy.admission.shared_limits import LEASE_S, SharedLimits
from proxy.admission.token_budget import BudgetExceeded, Caps
from proxy.errors import LimitsAway, SettingsError
from proxy.server import running
from proxy.settings import AwayPolicy, load
from proxy.telemetry.metrics import Metrics
from tests.fakes import FakeVLLM
from tests.proxy.admission.test_api_keys import ALICE, BOSS, ask, bearer
from tests.proxy.admission.test_limits import spent
from tests.proxy.admission.test_token_budget import keyed
from tests.proxy.conftest import SMALL
from tests.redis_server import MISSING, PASSWORD, PROGRAM, QUOTED, RedisServer

pytestmark = [pytest.mark.process, pytest.mark.skipif(PROGRAM is None, reason=MISSING)]

Open = Callable[..., Any]


@pytest_asyncio.fixture
async def redis() -> AsyncIterator[RedisServer]:
    async with RedisServer() as server:
        yield server


@pytest_asyncio.fixture
async def open_limits(redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Open]:
    """Yield what opens limits in the Redis, as one more proxy does. They look for it often while it is away."""
    monkeypatch.setattr(shared_limits, "RETRY_S", 0.01)
    async with AsyncExitStack() as stack:

        async def open_(per_minute: int | None = None, policy: AwayPolicy = AwayPolicy.LOCAL) -> SharedLimits:
            limits = SharedLimits(redis.url, per_minute, Metrics(), policy)
            await limits.open()
            stack.push_async_callback(limits.close)
            return limits

        yield open_


async def abandon(limits: SharedLimits) -> None:
    """End limits as a kill does: nothing is sent and nothing is renewed."""
    task, limits._task = limits._task, None
    assert task is not None
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    limits._held.clear()
    limits._settlements.clear()


async def let_leases_age(redis: RedisServer, seconds: float) -> None:
    """Move the ends of all leases, as if time had passed."""
    async with redis.client() as client:
        for key in await client.keys("*:leases"):
            for member in map(str, await client.zrange(key, 0, -1)):
                await client.zincrby(key, -1000 * seconds, member)


async def until(is_so: Callable[[], Awaitable[bool]]) -> None:
    """Ask again and again until something is so."""
    async with asyncio.timeout(30):
        for _ in count():
            if await is_so():
                return
            await asyncio.sleep(0)


async def until_back(limits: SharedLimits) -> None:
    async def is_back() -> bool:
        return not limits.is_away

    await until(is_back)


@pytest.mark.parametrize("seed", range(4))
async def test_two_proxies_together_never_exceed_a_cap(open_limits: Open, seed: int) -> None:
    common, cap, places, drawn = 1500, 1000, 3, random.Random(seed)
    proxies = [await open_limits(common) for _ in range(2)]
    used, ran, refused, served = 0, 0, 0, 0

    async def ask_for(limits: SharedLimits, tokens: int, cost: int) -> None:
        nonlocal used, ran, refused, served
        try:
            reservation = await limits.reserve("alice", cap, tokens)
        except BudgetExceeded:
            refused += 1
            return
        used += tokens
        assert used <= cap
        place = await limits.place("episode", "alice", places)
        await place.wait()
        ran += 1
        served += 1
        assert ran <= places
        await asyncio.sleep(0)
        ran -= 1
        place.release()
        used -= tokens - cost
        reservation.settle(cost, time.monotonic())

    requests: list[tuple[SharedLimits, int, int]] = []
    for _ in range(80):
        tokens = drawn.randint(0, 120)
        requests.append((drawn.choice(proxies), tokens, drawn.randint(0, tokens) // 8))
    await asyncio.gather(*(ask_for(*request) for request in requests))
    assert refused
    assert served + refused == 80
    assert ran == 0
    for limits in proxies:
        await limits.reserve("alice", cap, 0)
        assert not limits.is_away
    assert await spent(proxies[0], "alice", cap) == await spent(proxies[1], "alice", cap) == (used, 0)


async def test_proxies_that_wait_for_a_place_take_turns(open_limits: Open) -> None:
    first, second = await open_limits(), await open_limits()
    order: list[str] = []
    held = await first.place("episode", "alice", 1)
    assert held.is_held

    async def serve(name: str, limits: SharedLimits) -> None:
        place = await limits.place("episode", "alice", 1)
        await place.wait()
        order.append(name)
        place.release()

    other = asyncio.create_task(serve("second", second))
    await until(lambda: _waiting(second))
    busy = [asyncio.create_task(serve("first", first)) for _ in range(6)]
    await until(lambda: _waiting(first))
    held.release()
    await asyncio.gather(other, *busy)
    assert order[0] == "second"  # although the other proxy freed the place and has requests for it


async def _waiting(limits: SharedLimits) -> bool:
    """Return whether a proxy waits in Redis for a place."""
    arrivals = f"{PREFIX}episode:alice:arrivals"
    return await limits._scripts._redis.zscore(arrivals, limits._process) is not None


async def test_what_a_killed_proxy_held_is_free_when_its_leases_end(open_limits: Open, redis: RedisServer) -> None:
    killed, other = await open_limits(), await open_limits()
    await killed.reserve("alice", 1000, 900)
    assert (await killed.place("episode", "alice", 1)).is_held
    await abandon(killed)
    with pytest.raises(BudgetExceeded):
        await other.reserve("alice", 1000, 200)
    assert not (await other.place("episode", "alice", 1)).is_held
    await let_leases_age(redis, LEASE_S - 1)
    assert not (await other.place("episode", "alice", 1)).is_held
    await let_leases_age(redis, 1)
    await other.reserve("alice", 1000, 1000)
    assert (await other.place("episode", "alice", 1)).is_held


HOLDER = """
import asyncio, sys
from pydantic import SecretStr
from proxy.admission.shared_limits import SharedLimits
from proxy.telemetry.metrics import Metrics

async def hold():
    limits = SharedLimits(SecretStr(sys.stdin.readline().strip()), None, Metrics())
    await limits.open()
    await limits.reserve("alice", 1000, 900)
    assert (await limits.place("episode", "alice", 1)).is_held
    print("held", flush=True)
    await asyncio.Event().wait()

asyncio.run(hold())
"""


async def test_a_process_that_is_killed_frees_its_place_and_its_tokens(open_limits: Open, redis: RedisServer) -> None:
    limits = await open_limits()
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", HOLDER, stdin=pipe, stdout=pipe)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(f"{redis.url.get_secret_value()}\n".encode())
        assert await process.stdout.readline() == b"held\n"
        place = await limits.place("episode", "alice", 1)
        waiting = asyncio.create_task(place.wait())
        assert await spent(limits, "alice", 1000) == (0, 900)
    finally:
        process.kill()
        await process.wait()
    await let_leases_age(redis, LEASE_S)
    await waiting
    assert place.is_held
    assert await spent(limits, "alice", 1000) == (0, 0)


async def test_leases_of_running_requests_are_renewed(open_limits: Open, redis: RedisServer) -> None:
    limits = await open_limits()
    await limits.reserve("alice", 1000, 900)
    assert (await limits.place("episode", "alice", 1)).is_held
    for _ in range(3):
        await let_leases_age(redis, LEASE_S - 1)
        await limits._renew(list(limits._held))
    assert await spent(limits, "alice", 1000) == (0, 900)
    assert not (await limits.place("episode", "alice", 1)).is_held


async def test_a_settlement_that_is_sent_again_charges_once(open_limits: Open) -> None:
    limits = await open_limits()
    reservation = await limits.reserve("alice", 1000, 500)
    reservation.settle(120, time.monotonic())
    again = dict(limits._settlements)
    assert again
    await limits._send_settlements()
    limits._settlements.update(again)
    await limits._send_settlements()
    assert await spent(limits, "alice", 1000) == (120, 0)


async def test_a_call_that_arrives_after_its_settlement_takes_nothing(open_limits: Open) -> None:
    limits = await open_limits()
    (lease, parts), *_ = await _held_by(limits)
    limits.settle(lease, 10)
    await limits._send_settlements()
    limits._held[lease] = parts
    await limits._renew([lease])
    await limits._reserve(lease, parts, {"alice": 1000})
    assert await spent(limits, "alice", 1000) == (10, 0)
    limits._held.clear()


async def _held_by(limits: SharedLimits) -> list[tuple[str, Any]]:
    await limits.reserve("alice", 1000, 500)
    return list(limits._held.items())


async def test_a_request_cancelled_while_redis_is_asked_leaves_nothing_reserved(
    open_limits: Open, redis: RedisServer
) -> None:
    limits, other = await open_limits(), await open_limits()
    for _ in range(3):
        tasks = [asyncio.create_task(limits.reserve("alice", 1000, 1)) for _ in range(40)]
        tasks += [asyncio.create_task(limits.place("episode", "alice", 100)) for _ in range(40)]
        for index, task in enumerate(tasks):
            if index % 8 == 0:
                await asyncio.sleep(0)
            task.cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        for held in done:
            assert not isinstance(held, Exception)
            if isinstance(held, shared_limits.SharedReservation):
                held.settle(0, time.monotonic())
            elif isinstance(held, shared_limits.SharedPlace):
                held.release()
    async with asyncio.timeout(30):
        while (await _totals(other)) != (0, 0):
            await limits._send_settlements()
    assert not limits._held


async def _totals(limits: SharedLimits) -> tuple[int, int]:
    """Return reserved tokens and running episodes over all proxies."""
    usage = (await limits.usage({"alice": Caps(tokens_per_minute=1000, episodes=100)}))["alice"]
    assert usage.tokens is not None
    assert usage.running is not None
    return usage.tokens.reserved, usage.running["episode"]


# Redis away


async def test_while_redis_is_away_requests_are_refused_if_so_set(open_limits: Open, redis: RedisServer) -> None:
    limits = await open_limits(None, AwayPolicy.REFUSE)
    held = await limits.reserve("alice", 1000, 300)
    await redis.kill()
    for _ in range(3):
        with pytest.raises(LimitsAway, match="AUTOTTS_LIMITS") as refused:
            await limits.reserve("alice", 1000, 100)
        assert (refused.value.status, refused.value.code) == (503, "limits_away")
        assert int(refused.value.headers["retry-after"]) >= 1
        with pytest.raises(LimitsAway):
            await limits.place("episode", "alice", 2)
    await limits.reserve("bob", None, None)  # needs no limit
    assert (await limits.place("episode", "bob", None)).is_held
    assert b"autotts_limits_away 1.0" in generate_latest(limits._metrics.registry)
    assert b'autotts_refusals_total{reason="limits_away"} 6.0' in generate_latest(limits._metrics.registry)
    held.settle(40, time.monotonic())
    await redis.start()
    await until_back(limits)
    assert b"autotts_limits_away 0.0" in generate_latest(limits._metrics.registry)
    assert await spent(limits, "alice", 1000) == (40, 0)
    await limits.reserve("alice", 1000, 960)


async def test_while_redis_is_away_each_process_counts_if_so_set(
    open_limits: Open, redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    limits, other = await open_limits(2000), await open_limits(2000)
    before = await limits.reserve("alice", 1000, 600)
    place = await limits.place("episode", "alice", 1)
    await redis.kill()
    with pytest.raises(BudgetExceeded):
        await limits.reserve("alice", 1000, 500)  # what it reserved before counts
    during = await limits.reserve("alice", 1000, 400)
    assert (await limits.place("episode", "alice", 1)).is_held  # the fair queue of the process limits these
    with pytest.raises(BudgetExceeded):
        await limits.reserve("alice", 1000, 1)
    assert await spent(limits, "alice", 1000) == (0, 1000)
    during.settle(70, time.monotonic())
    await redis.start()
    await until_back(limits)
    with pytest.raises(BudgetExceeded):
        await other.reserve("alice", 1000, 400)
    await until_back(other)
    assert await spent(other, "alice", 1000) == (70, 600)  # Redis had lost its data
    assert not (await other.place("episode", "alice", 2)).is_held
    before.settle(0, time.monotonic())
    place.release()
    await limits._send_settlements()
    assert await spent(other, "alice", 1000) == (70, 0)
    assert (await other.place("episode", "alice", 2)).is_held
    lines = [record.getMessage() for record in caplog.records if record.name == shared_limits.__name__]
    assert any("limits hold in this process alone" in line for line in lines)
    assert any("is back" in line for line in lines)


async def test_a_request_that_waits_for_a_place_ends_when_redis_goes_away(
    open_limits: Open, redis: RedisServer
) -> None:
    strict, lenient = await open_limits(None, AwayPolicy.REFUSE), await open_limits()
    held = await strict.place("episode", "alice", 1)
    refused, served = await strict.place("episode", "alice", 1), await lenient.place("episode", "alice", 1)
    tasks = [asyncio.create_task(place.wait()) for place in (refused, served)]
    await until(lambda: _waiting(strict))
    await until(lambda: _waiting(lenient))
    await redis.kill()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(results[0], LimitsAway)
    assert served.is_held
    held.release()


async def test_a_redis_that_does_not_answer_counts_as_away(open_limits: Open, redis: RedisServer) -> None:
    limits = await open_limits(None, AwayPolicy.REFUSE)
    await limits.reserve("alice", 1000, 1)
    redis.send(signal.SIGSTOP)
    try:
        with pytest.raises(LimitsAway):
            await limits.reserve("alice", 1000, 100)
    finally:
        redis.send(signal.SIGCONT)
    await until_back(limits)
    await limits._send_settlements()
    assert await spent(limits, "alice", 1000) == (0, 1)  # the call that ran late was taken back


async def test_settlements_wait_while_redis_is_away_but_for_a_minute_at_most(
    open_limits: Open, redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = await open_limits()
    old, new = await limits.reserve("alice", 1000, 100), await limits.reserve("alice", 1000, 100)
    await redis.kill()
    old.settle(100, time.monotonic())
    assert len(limits._settlements) == 1
    monkeypatch.setattr(shared_limits, "MINUTE_S", 0.0)
    new.settle(50, time.monotonic())
    assert [settlement.cost for settlement in limits._settlements.values()] == [50]


async def test_a_proxy_starts_without_redis_and_uses_it_when_it_is_there(
    open_limits: Open, redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    await redis.kill()
    limits = await open_limits(None, AwayPolicy.REFUSE)
    assert "requests with limits are refused" in caplog.text
    with pytest.raises(LimitsAway):
        await limits.reserve("alice", 1000, 100)
    await redis.start()
    await until_back(limits)
    await limits.reserve("alice", 1000, 100)
    assert await spent(limits, "alice", 1000) == (0, 100)


async def test_redis_that_loses_its_data_learns_what_runs(open_limits: Open, redis: RedisServer) -> None:
    limits, other = await open_limits(), await open_limits()
    await limits.reserve("alice", 1000, 900)
    async with redis.client() as client:
        await client.flushall()
    await limits._renew(list(limits._held))
    with pytest.raises(BudgetExceeded):
        await other.reserve("alice", 1000, 200)


# The URL


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("http://:secret@host", "it must begin with redis://, or rediss:// for TLS"),
        ("redis://:secret@", "it names no host"),
        ("redis://:sec/ret@host", "its host or port cannot be read; percent-encode"),
        ("redis://:sec#ret@host", "its host or port cannot be read; percent-encode"),
        ("redis://:secret@host:port", "its host or port cannot be read"),
        ("redis://:secret@host/zero", "only the number of a database may follow the host"),
        ("redis://:secret@host/0?password=secret", "only the number of a database may follow the host"),
    ],
)
def test_a_bad_url_is_refused_and_never_quoted(url: str, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError) as caught:
        load(limits=SecretStr(url))
    assert str(caught.value).startswith(f"limits: {problem}")
    monkeypatch.setenv("AUTOTTS_LIMITS", url)
    with pytest.raises(SettingsError) as caught:
        load()
    assert str(caught.value).startswith(f"limits (AUTOTTS_LIMITS): {problem}")
    assert "ret" not in str(caught.value)


def test_an_empty_url_means_limits_of_this_process() -> None:
    settings = load(limits=SecretStr(""))
    assert isinstance(shared_limits.create_limits(settings, Metrics()), LocalLimits)


async def test_the_password_appears_nowhere(
    open_limits: Open, redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    limits = await open_limits()
    wrong = SharedLimits(SecretStr(f"redis://:{QUOTED}-wrong@127.0.0.1:{redis.port}"), None, Metrics())
    await wrong.open()
    await wrong.close()
    assert wrong.is_away
    await redis.kill()
    await limits.reserve("alice", 1000, 1)
    settings = load(limits=redis.url)
    seen = [repr(settings), repr(limits._scripts._redis), repr(vars(limits)), caplog.text]
    seen.append(generate_latest(limits._metrics.registry).decode())
    assert "WRONGPASS" in caplog.text or "invalid username-password pair" in caplog.text
    for text in seen:
        assert PASSWORD not in text
        assert QUOTED not in text


# Over HTTP


async def test_a_budget_and_a_limit_hold_over_two_proxies_until_redis_is_killed(
    backend: FakeVLLM, redis: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_limits, "RETRY_S", 0.01)
    file = keyed(tmp_path / "keys.toml", tokens_per_minute=3000, episodes=1)
    common = {"upstream": backend.url, "keys": file, "admin_key": BOSS, "limits": redis.url, **SMALL}
    settings = load(**common, limits_away="refuse")
    async with running(settings) as first, running(settings) as second, aiohttp.ClientSession() as http:
        backend.gate.clear()
        tasks = [asyncio.create_task(ask(http, url, ALICE, tts={"max_total_tokens": 700})) for url in (first, second)]
        totals = [await _keys(http, url) for url in (first, second)]
        while sum(total["waiting"] for total in totals) != 1 or totals[0]["episodes"] != 1:
            totals = [await _keys(http, url) for url in (first, second)]
        assert totals[0]["reserved"] == totals[1]["reserved"] == 1400
        backend.gate.set()
        replies = await asyncio.gather(*tasks)
        assert [status for status, _, _ in replies] == [200, 200]
        used = sum(reply["tts"]["tokens"]["total"] for _, _, reply in replies)
        for turn in range(40):
            status, headers, reply = await ask(http, (first, second)[turn % 2], ALICE, tts={"max_total_tokens": 700})
            if status != 200:
                break
            used += reply["tts"]["tokens"]["total"]
        assert (status, reply["error"]["code"]) == (429, "rate_limit_exceeded")
        assert f"has spent {used} of its 3000 tokens" in reply["error"]["message"]
        assert 2300 < used <= 3000
        await redis.kill()
        status, headers, reply = await ask(http, first, ALICE)
        assert (status, reply["error"]["code"], reply["error"]["type"]) == (503, "limits_away", "server_error")
        assert int(headers["retry-after"]) >= 1
        assert (await ask(http, first, "sk-autotts-bob"))[0] == 200  # a key without limits
        await redis.start()

        async def is_served() -> bool:
            return (await ask(http, first, ALICE, tts={"max_total_tokens": 300}))[0] == 200

        await until(is_served)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_waits_gets_an_error_that_names_the_cause_when_redis_is_killed(
    backend: FakeVLLM, redis: RedisServer, tmp_path: Path, stream: bool
) -> None:
    file = keyed(tmp_path / "keys.toml", episodes=1)
    settings = load(upstream=backend.url, keys=file, admin_key=BOSS, limits=redis.url, limits_away="refuse", **SMALL)
    async with running(settings) as first, running(settings) as second, aiohttp.ClientSession() as http:
        backend.gate.clear()
        served = asyncio.create_task(ask(http, first, ALICE))

        async def is_running() -> bool:
            return bool((await _keys(http, second))["episodes"] == 1)

        async def is_waiting() -> bool:
            return bool((await _keys(http, second))["waiting"] == 1)

        await until(is_running)
        body = {"model": "fake-model", "messages": [{"role": "user", "content": "hi"}], "stream": stream}
        headers = {**bearer(ALICE), "x-tts-beta": "0.5"}
        waiting = asyncio.create_task(_post(http, second, body, headers))
        await until(is_waiting)
        await redis.kill()
        status, text = await waiting
        assert status == (200 if stream else 503)
        assert "limits_away" in text
        assert "AUTOTTS_LIMITS" in text
        backend.gate.set()
        assert (await served)[0] == 200  # what runs is not disturbed
        state = await _keys(http, second)
        assert (state["waiting"], state["episodes"]) == (0, 0)


async def _post(http: aiohttp.ClientSession, url: str, body: Any, headers: Any) -> tuple[int, str]:
    async with http.post(f"{url}/v1/chat/completions", json=body, headers=headers) as response:
        return response.status, await response.text()


async def _keys(http: aiohttp.ClientSession, url: str) -> Any:
    async with http.get(f"{url}/v1/tts/keys", headers=bearer(BOSS)) as response:
        return (await response.json())["keys"]["alice"]
