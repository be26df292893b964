"""Fleet: which replica a call goes to, and where it goes if that one is loaded, fails or is down."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import aiohttp
import pytest
import pytest_asyncio

from proxy.errors import UpstreamCircuitOpen, UpstreamError, UpstreamRefused, UpstreamUnreachable
from proxy.telemetry.metrics import Metrics
from proxy.types import Call, Model
from proxy.upstream.branch_semaphore import BranchSemaphore
from proxy.upstream.circuit_breaker import FAILURES, OPEN_S, Breaker
from proxy.upstream.client import UpstreamClient
from proxy.upstream.embedded import free_port
from proxy.upstream.fleet.fleet import Fleet
from proxy.upstream.fleet.fleet_client import FleetClient
from proxy.upstream.fleet.replica import RECHECK_S, Replica
from proxy.upstream_observer import UpstreamObserver
from tests.fakes import ASSISTANT, MODEL, FakeVLLM

LIMIT = 10
PROMPT = [ord(char) for char in ASSISTANT]


class Clock:
    """Clock that stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class FleetUnderTest:
    """A fleet of fake vLLMs, the first of which takes requests with `KEY` first."""

    def __init__(self, fakes: Sequence[FakeVLLM], session: aiohttp.ClientSession, key: bytes = b"key") -> None:
        self.clock, self.metrics, self.key = Clock(), Metrics(), key
        self.members = [
            Replica(
                UpstreamClient(
                    fake.url,
                    session,
                    read_timeout_s=5,
                    breaker=Breaker(self.clock),
                    branch_semaphore=BranchSemaphore(LIMIT),
                )
            )
            for fake in fakes
        ]
        self.fleet = Fleet(self.members, 0.5, self.metrics)
        self.client = FleetClient(self.fleet, UpstreamObserver(), 5)
        by_url = {member.name: (fake, member) for fake, member in zip(fakes, self.members, strict=True)}
        self.order: list[tuple[FakeVLLM, Replica]] = []
        while (chosen := self.fleet.choose(MODEL, key, [member for _, member in self.order])) is not None:
            self.order.append(by_url[chosen.name])
        self.fakes = [fake for fake, _ in self.order]  # in the order in which they take requests with the key

    def route(self, key: bytes | None = None) -> FleetClient:
        return self.client.route(MODEL, lambda: self.key if key is None else key)

    def moves(self, at: int, reason: str) -> float:
        value = self.metrics.registry.get_sample_value(
            "autotts_replica_moves_total", {"replica": self.fakes[at].url, "reason": reason}
        )
        return value or 0.0


@pytest_asyncio.fixture
async def fleet(replicas: list[FakeVLLM]) -> AsyncIterator[FleetUnderTest]:
    async with aiohttp.ClientSession() as session:
        under_test = FleetUnderTest(replicas, session)
        yield under_test
        await under_test.client.close()


def call(branches: int = 1) -> Call:
    return Call([PROMPT], 20, {}, n=branches)


def seen(fleet: FleetUnderTest) -> list[int]:
    """Return how many completions each replica got, in the order of the key."""
    return [len([r for r in fake.requests if not isinstance(r["prompt"], str)]) for fake in fleet.fakes]


async def test_calls_with_the_same_key_go_to_the_same_replica(fleet: FleetUnderTest) -> None:
    for _ in range(4):
        client = fleet.route()
        await client.generate(MODEL, call())
        await client.generate(MODEL, call(3))
    assert seen(fleet) == [8, 0, 0]


async def test_keys_spread_over_all_replicas(fleet: FleetUnderTest) -> None:
    for number in range(90):
        await fleet.route(str(number).encode()).generate(MODEL, call())
    assert sum(seen(fleet)) == 90
    assert min(seen(fleet)) >= 5


async def test_a_loaded_replica_passes_new_requests_to_the_next_but_keeps_its_own(fleet: FleetUnderTest) -> None:
    own, other = fleet.route(), fleet.route()
    fleet.fakes[0].gate.clear()
    running = asyncio.create_task(own.generate(MODEL, call(5)))  # half of its slots
    await fleet.fakes[0].busy.wait()
    await other.generate(MODEL, call())
    assert seen(fleet) == [1, 1, 0]
    assert (fleet.moves(0, "spilled"), fleet.moves(0, "failed")) == (1, 0)
    again = asyncio.create_task(own.generate(MODEL, call()))
    fleet.fakes[0].gate.set()
    await asyncio.gather(running, again)
    await other.generate(MODEL, call())
    assert seen(fleet) == [2, 2, 0]


async def test_if_all_are_loaded_the_least_loaded_takes_the_request(fleet: FleetUnderTest) -> None:
    first, second, third = (member for _, member in fleet.order)
    with first.occupied(9), second.occupied(7), third.occupied(8):
        await fleet.route().generate(MODEL, call())
    assert seen(fleet) == [0, 1, 0]


async def test_each_replica_has_branch_slots_of_its_own(fleet: FleetUnderTest) -> None:
    for fake in fleet.fakes:
        fake.gate.clear()
    work = [asyncio.create_task(fleet.route().generate(MODEL, call(LIMIT))) for _ in range(4)]
    await asyncio.gather(*(fake.busy.wait() for fake in fleet.fakes))
    assert (fleet.client.branches_in_flight, fleet.client.calls_waiting) == (3 * LIMIT, 1)
    assert [state.branches for state in fleet.client.replica_states()].count(2 * LIMIT) == 1
    for fake in fleet.fakes:
        fake.gate.set()
    await asyncio.gather(*work)
    assert [fake.most_branches for fake in fleet.fakes] == [LIMIT] * 3
    assert (fleet.client.branches_in_flight, fleet.client.calls_waiting) == (0, 0)


@pytest.mark.parametrize("fault", ["drop", "unavailable", "broken", "error_body"])
async def test_a_call_without_any_token_goes_on_at_the_next_replica(fleet: FleetUnderTest, fault: str) -> None:
    fleet.fakes[0].fault = fault
    sent = call(3)
    client = fleet.route()
    await client.generate(MODEL, sent)
    assert [len(output.ids) for output in sent.outputs] == [20] * 3
    assert seen(fleet)[1:] == [1, 0]
    assert fleet.moves(0, "failed") == 1
    fleet.fakes[0].fault = ""
    await client.generate(MODEL, call())
    assert seen(fleet)[1:] == [2, 0]  # a request stays where its prompt is cached now


@pytest.mark.parametrize("fault", ["refuse", "garbage", "lie", "cut"])
async def test_a_request_that_is_refused_or_has_tokens_is_not_sent_again(fleet: FleetUnderTest, fault: str) -> None:
    fleet.fakes[0].fault = fault
    with pytest.raises(UpstreamError):
        await fleet.route().generate(MODEL, call())
    assert seen(fleet) == [1, 0, 0]


async def test_a_request_that_fails_everywhere_raises_the_last_error(fleet: FleetUnderTest) -> None:
    for fake in fleet.fakes:
        fake.fault = "broken"
    with pytest.raises(UpstreamRefused, match="this went wrong"):
        await fleet.route().generate(MODEL, call())
    assert seen(fleet) == [1, 1, 1]


async def test_one_replica_that_fails_opens_its_own_breaker_only(fleet: FleetUnderTest) -> None:
    fleet.fakes[0].fault = "broken"
    for _ in range(FAILURES):
        await fleet.route().generate(MODEL, call())
    first = fleet.order[0][1]
    await first.client._transport.check()
    assert [member.client.breaker.is_closed for _, member in fleet.order] == [False, True, True]
    assert fleet.client.is_available
    before = seen(fleet)
    await fleet.route().generate(MODEL, call())
    assert seen(fleet) == [before[0], before[1] + 1, 0]
    fleet.fakes[0].fault = ""
    await first.begin_check()
    assert first.is_available
    await fleet.route().generate(MODEL, call())
    assert seen(fleet) == [before[0] + 1, before[1] + 1, 0]


async def break_first(fleet: FleetUnderTest) -> tuple[Replica, FakeVLLM]:
    """Let the first replica fail until its breaker opens, and check it once. Return it and its fake."""
    first, fake = fleet.order[0][1], fleet.fakes[0]
    fake.fault = "broken"
    for _ in range(FAILURES):
        await fleet.route().generate(MODEL, call())
    await first.client._transport.check()
    await first.begin_check()
    return first, fake


async def test_a_breaker_is_checked_early_once_and_again_after_a_restart(fleet: FleetUnderTest) -> None:
    first, fake = await break_first(fleet)
    checks = len(fake.requests)
    fake.fault = ""
    await first.begin_check()
    assert (first.is_available, len(fake.requests)) == (False, checks)  # it answered all the time, and had its chance
    fake.is_well = False
    await first.begin_check()
    fake.is_well = True
    await first.begin_check()
    assert first.is_available


async def test_a_breaker_that_is_due_is_checked(fleet: FleetUnderTest) -> None:
    first, fake = await break_first(fleet)
    fake.fault = ""
    fleet.clock.now += 2 * OPEN_S
    await first.begin_check()
    assert first.is_available


async def test_a_replica_that_has_come_back_is_used_at_once_when_it_is_the_only_one(fleet: FleetUnderTest) -> None:
    for fake in fleet.fakes:
        fake.is_well = False
    await asyncio.gather(*(member.begin_check() for member in fleet.members))
    assert not fleet.client.is_available
    fleet.fakes[2].is_well = True
    for member in fleet.members:
        member._checked_at -= RECHECK_S  # as if a second had passed
    await fleet.route().generate(MODEL, call())
    assert seen(fleet) == [0, 0, 1]


async def test_a_replica_whose_health_check_fails_gets_no_new_requests(fleet: FleetUnderTest) -> None:
    fleet.fakes[0].is_well = False
    await asyncio.gather(*(member.begin_check() for member in fleet.members))
    assert [member.is_up for _, member in fleet.order] == [False, True, True]
    await fleet.route().generate(MODEL, call())
    assert seen(fleet) == [0, 1, 0]


async def test_a_fleet_is_healthy_as_soon_as_one_replica_is(fleet: FleetUnderTest) -> None:
    fleet.fakes[0].fault = "models_hang"
    fleet.fakes[1].is_well = False
    assert await fleet.client.is_healthy()
    assert [model.id for model in await fleet.client.models(is_check=True)] == [MODEL]
    fleet.fakes[2].is_well = False
    await asyncio.gather(*(member.begin_check() for _, member in fleet.order[1:]))
    assert [member.is_up for _, member in fleet.order] == [None, False, False]


async def test_a_fleet_that_is_down_names_a_replica(session: aiohttp.ClientSession) -> None:
    down = [FakeVLLM(), FakeVLLM()]
    for fake in down:
        fake.url = f"http://me:secret@127.0.0.1:{free_port()}"
    fleet = Fleet([Replica(UpstreamClient(fake.url, session)) for fake in down], 0.5, Metrics())
    client = FleetClient(fleet, UpstreamObserver(), 5)
    assert not await client.is_healthy()
    with pytest.raises(UpstreamUnreachable, match=r"cannot connect to upstream http://127\.0\.0\.1:") as caught:
        await client.route(MODEL, lambda: b"").generate(MODEL, call())
    assert "secret" not in str(caught.value)
    for _ in range(FAILURES):
        with pytest.raises(UpstreamError):
            await client.route(MODEL, lambda: b"").generate(MODEL, call())
    assert not client.is_available
    with pytest.raises(UpstreamCircuitOpen):
        await client.route(MODEL, lambda: b"").generate(MODEL, call())
    await client.close()


async def test_a_replica_without_the_model_gets_no_requests_for_it(fleet: FleetUnderTest) -> None:
    fleet.fakes[0].models = ["other"]
    await asyncio.gather(*(member.begin_check() for member in fleet.members))
    await fleet.route().generate(MODEL, call())
    assert seen(fleet) == [0, 1, 0]
    assert {model.id for model in await fleet.client.models()} == {"other", MODEL}


async def test_a_model_is_as_long_as_all_its_replicas_allow(fleet: FleetUnderTest) -> None:
    fleet.fakes[1].max_length = 700
    assert await fleet.client.models() == [Model(MODEL, 700)]


async def test_models_that_a_replica_does_not_list_are_warned_of_once(
    replicas: list[FakeVLLM], session: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    url = replicas[0].url.replace("//", "//me:secret@")
    member = Replica(UpstreamClient(url, session), frozenset({"typo", MODEL}))
    assert len(await member.read_cards()) == 1  # as before the start, by a client that is soon closed
    assert caplog.messages == []
    for _ in range(2):
        assert await member.begin_check()
    assert caplog.messages == [
        f"upstream {replicas[0].url} does not serve typo, which AUTOTTS_UPSTREAM names; it serves {MODEL}"
    ]
    await member.close()


async def test_a_replica_that_goes_down_and_comes_back_is_logged_once_each(
    replicas: list[FakeVLLM], session: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    member = Replica(UpstreamClient(replicas[0].url, session))
    for fault in ("", "no_models", "no_models", "", ""):
        replicas[0].fault = fault
        assert await member.begin_check() is not bool(fault)
    assert caplog.messages == [
        f"upstream {replicas[0].url} is down; it gets no new requests until a health check passes",
        f"upstream {replicas[0].url} is up again",
    ]
    await member.close()


async def test_background_work_does_not_open_a_breaker(fleet: FleetUnderTest) -> None:
    fleet.fakes[0].fault = "broken"
    for _ in range(2 * FAILURES):
        await fleet.route().for_background().generate(MODEL, call())
    assert fleet.order[0][1].client.breaker.is_closed
    assert seen(fleet)[0] == 2 * FAILURES


async def test_the_load_of_a_fleet_is_the_average(fleet: FleetUnderTest) -> None:
    for fake, queued, cache in zip(fleet.fakes, (0, 4, 6), (0.1, 0.2, 0.9), strict=True):
        fake.queued, fake.cache = queued, cache
    load = await fleet.client.read_load()
    assert load.waiting == 4
    assert load.cache == pytest.approx(0.4)


@pytest_asyncio.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as http:
        yield http
