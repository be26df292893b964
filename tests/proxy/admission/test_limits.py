"""Contract of the limits: it holds for those of one process and for those in Redis."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack

import pytest
import pytest_asyncio
from starlette.requests import Request

from proxy.admission.auth import Caller
from proxy.admission.limits import LocalLimits, RequestLimits
from proxy.admission.request_slot import RequestSlot, RequestSlots
from proxy.admission.shared_limits import SharedLimits
from proxy.admission.token_budget import GRAIN_S, MINUTE_S, BudgetExceeded, Caps, WindowState
from proxy.errors import BadRequest, TooMany
from proxy.settings import load
from proxy.telemetry.metrics import Metrics
from tests.redis_server import MISSING, PROGRAM, RedisServer

REDIS = pytest.param("redis", marks=[pytest.mark.process, pytest.mark.skipif(PROGRAM is None, reason=MISSING)])
CAPS = {"alice": 1000, "bob": 300, "carol": None}

Make = Callable[[int | None], Awaitable[RequestLimits]]


@pytest_asyncio.fixture(params=["local", REDIS])
async def make_limits(request: pytest.FixtureRequest) -> AsyncIterator[Make]:
    """Yield what opens limits with a common cap of tokens per minute."""
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(RedisServer()) if request.param == "redis" else None

        async def make(per_minute: int | None) -> RequestLimits:
            limits: RequestLimits = LocalLimits(per_minute)
            if server is not None:
                limits = shared = SharedLimits(server.url, per_minute, Metrics())
                stack.callback(lambda: not shared.is_away or pytest.fail("a script failed"))
            await limits.open()
            stack.push_async_callback(limits.close)
            return limits

        yield make


def sent_by(key: str, **caps: int) -> Request:
    """Return a request of a key."""
    request = Request({"type": "http", "state": {}})
    request.state.caller = Caller(key, False, key, Caps(**caps))
    request.state.leases = ExitStack()
    return request


async def spent(limits: RequestLimits, holder: str, cap: int) -> tuple[int, int]:
    """Return the spent and reserved tokens of a holder, or of all under the empty name."""
    tokens = (await limits.usage({holder: Caps(tokens_per_minute=cap)} if holder else {}))[holder].tokens
    assert tokens is not None
    assert tokens.cap == cap
    return tokens.spent, tokens.reserved


async def running(slot: RequestSlot, begun: asyncio.Event, end: asyncio.Event) -> None:
    async with slot:
        begun.set()
        await end.wait()


async def test_tokens_are_reserved_then_settled_once(make_limits: Make) -> None:
    limits = await make_limits(2000)
    reservation = await limits.reserve("alice", 1000, 400)
    assert (await spent(limits, "alice", 1000), await spent(limits, "", 2000)) == ((0, 400), (0, 400))
    reservation.settle(150, time.monotonic())
    reservation.settle(400, time.monotonic())
    await limits.reserve("bob", None, 30)  # earlier settlements count for later reservations
    assert (await spent(limits, "alice", 1000), await spent(limits, "", 2000)) == ((150, 0), (150, 30))
    assert (await limits.usage({"bob": Caps()}))["bob"].tokens is None


async def test_a_reservation_fits_into_both_windows_or_changes_neither(make_limits: Make) -> None:
    limits = await make_limits(1000)
    await limits.reserve("alice", 500, 400)
    with pytest.raises(BudgetExceeded) as refused:
        await limits.reserve("alice", 500, 101)
    assert (refused.value.holder, refused.value.state) == ("alice", WindowState(500, 0, 400))
    assert refused.value.after_s == pytest.approx(GRAIN_S)  # a reservation may end at any time
    with pytest.raises(BudgetExceeded) as refused:
        await limits.reserve("bob", 900, 700)
    assert (refused.value.holder, refused.value.state) == ("", WindowState(1000, 0, 400))
    assert (await spent(limits, "bob", 900), await spent(limits, "", 1000)) == ((0, 0), (0, 400))
    await limits.reserve("bob", 900, 600)


async def test_a_refusal_says_when_spent_tokens_are_forgotten(make_limits: Make) -> None:
    limits = await make_limits(None)
    (await limits.reserve("alice", 500, 400)).settle(400, time.monotonic())
    with pytest.raises(BudgetExceeded) as refused:
        await limits.reserve("alice", 500, 101)
    assert refused.value.state == WindowState(500, 400, 0)
    assert MINUTE_S / 2 < refused.value.after_s <= MINUTE_S + GRAIN_S


async def test_a_cost_above_the_reservation_is_charged(make_limits: Make) -> None:
    limits = await make_limits(None)
    (await limits.reserve("alice", 500, 0)).settle(70, time.monotonic())
    await limits.reserve("alice", 500, 1)
    assert await spent(limits, "alice", 500) == (70, 1)


@pytest.mark.parametrize("seed", range(3))
async def test_no_order_of_requests_exceeds_a_cap(make_limits: Make, seed: int) -> None:
    common, drawn = 1200, random.Random(seed)
    limits = await make_limits(common)
    used: Counter[str] = Counter()  # spent and reserved tokens by holder
    refused = 0

    async def ask(who: str, tokens: int, share: float) -> None:
        nonlocal refused
        try:
            reservation = await limits.reserve(who, CAPS[who], tokens)
        except BudgetExceeded:
            refused += 1
            return
        used[who] += tokens
        assert used[who] <= (CAPS[who] or common)
        assert used.total() <= common
        await asyncio.sleep(0)
        used[who] -= tokens - int(tokens * share)
        reservation.settle(int(tokens * share), time.monotonic())

    requests = [(drawn.choice(list(CAPS)), drawn.randint(0, 200), drawn.random()) for _ in range(60)]
    await asyncio.gather(*(ask(*request) for request in requests))
    assert refused
    await limits.reserve("dave", None, 0)
    assert await spent(limits, "", common) == (used.total(), 0)
    for who, cap in CAPS.items():
        if cap is not None:
            assert await spent(limits, who, cap) == (used[who], 0)


async def test_the_requests_of_a_key_beyond_its_limit_wait_their_turn_and_delay_no_other_key(
    make_limits: Make,
) -> None:
    slots = RequestSlots(load(max_episodes=3), Metrics(), await make_limits(None))
    begun, end = [asyncio.Event() for _ in range(4)], [asyncio.Event() for _ in range(4)]
    alice = [await slots.acquire_episode(sent_by("alice", episodes=2), None) for _ in range(3)]
    bob = await slots.acquire_episode(sent_by("bob", episodes=2), None)
    tasks = [asyncio.create_task(running(*job)) for job in zip([*alice, bob], begun, end, strict=True)]
    for index in (0, 1, 3):
        await begun[index].wait()
    keys = (await slots.as_json({"alice": Caps(episodes=2), "bob": Caps(episodes=2)}))["keys"]
    assert (keys["alice"]["episodes"], keys["alice"]["waiting"]) == (2, 1)
    assert (keys["bob"]["episodes"], keys["bob"]["waiting"]) == (1, 0)
    assert not begun[2].is_set()
    end[0].set()
    await begun[2].wait()
    for event in end:
        event.set()
    await asyncio.gather(*tasks)
    assert (slots.episodes.in_flight, slots.episodes.waiting) == (0, 0)


async def test_a_request_that_is_cancelled_while_it_waits_leaves_no_trace(make_limits: Make) -> None:
    slots = RequestSlots(load(), Metrics(), await make_limits(None))
    begun, end = asyncio.Event(), asyncio.Event()
    first, second, third = [await slots.acquire_episode(sent_by("alice", episodes=1), None) for _ in range(3)]
    one = asyncio.create_task(running(first, begun, end))
    two = asyncio.create_task(running(second, asyncio.Event(), end))
    await begun.wait()
    await asyncio.sleep(0)
    two.cancel()
    await asyncio.gather(two, return_exceptions=True)
    second.release()  # as the leases of its request do
    assert slots.episodes.waiting == 1
    end.set()
    await one
    async with third:
        state = await slots.as_json({"alice": Caps(episodes=1)})
        assert (state["keys"]["alice"]["episodes"], state["keys"]["alice"]["waiting"]) == (1, 0)


async def test_a_request_that_may_not_wait_gives_its_tokens_back(make_limits: Make) -> None:
    limits = await make_limits(None)
    metrics = Metrics()
    slots = RequestSlots(load(queue=0), metrics, limits)
    caps = {"episodes": 1, "tokens_per_minute": 1000}
    held = await slots.acquire_episode(sent_by("alice", **caps), 300)
    with pytest.raises(TooMany):
        await slots.acquire_episode(sent_by("alice", **caps), 300)
    held.release()
    slot = await slots.acquire_episode(sent_by("alice", **caps), 1000)
    assert await spent(limits, "alice", 1000) == (0, 1000)
    slot.settle(7)
    slot.release()
    await slots.acquire_episode(sent_by("alice", **caps), 993)


async def test_kinds_of_requests_are_limited_separately(make_limits: Make) -> None:
    slots = RequestSlots(load(), Metrics(), await make_limits(None))
    episode = await slots.acquire_episode(sent_by("alice", episodes=1), None)
    passed = await slots.acquire_passthrough(sent_by("alice", episodes=1), "model", None)
    async with episode, passed:
        state = (await slots.as_json({"alice": Caps(episodes=1)}))["keys"]["alice"]
        assert (state["episodes"], state["passed"], state["waiting"]) == (1, 1, 0)


async def test_several_prompts_of_one_request_share_its_limit(make_limits: Make) -> None:
    slots = RequestSlots(load(), Metrics(), await make_limits(None))
    order: list[int] = []

    async def serve(index: int, slot: RequestSlot) -> None:
        async with slot:
            order.append(index)

    prompts = await slots.acquire_episodes(sent_by("alice", episodes=1), None, 5)
    await asyncio.gather(*(serve(index, slot) for index, slot in enumerate(prompts)))
    assert order == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("key", "caps", "settings", "most", "raised"),
    [
        ("alice", {"episodes": 2}, {"queue": 0}, 2, "AUTOTTS_QUEUE or the limit `episodes` of key alice"),
        ("alice", {"episodes": 2}, {"queue": 5}, 5, "AUTOTTS_QUEUE or the limit `episodes` of key alice"),
        ("alice", {}, {"queue": 2, "max_episodes": 4}, 5, "AUTOTTS_QUEUE or AUTOTTS_MAX_EPISODES"),
        ("", {}, {"queue": 2, "max_episodes": 4}, 6, "AUTOTTS_QUEUE or AUTOTTS_MAX_EPISODES"),
    ],
)
async def test_more_prompts_than_can_ever_be_admitted_are_a_bad_request(
    make_limits: Make, key: str, caps: dict[str, int], settings: dict[str, int], most: int, raised: str
) -> None:
    slots = RequestSlots(load(**settings), Metrics(), await make_limits(None))
    admitted = await slots.acquire_episodes(sent_by(key, **caps), None, most)
    for slot in reversed(admitted):
        slot.release()
    with pytest.raises(BadRequest) as refused:
        await slots.acquire_episodes(sent_by(key, **caps), None, most + 1)
    assert refused.value.param == "prompt"
    assert f"prompt has {most + 1} prompts, but at most {most} can run and wait at once" in str(refused.value)
    assert str(refused.value).endswith(f"ask the operator to raise {raised}")
    assert (slots.episodes.in_flight, slots.episodes.waiting) == (0, 0)


@pytest.mark.parametrize(
    ("caps", "requested", "source", "param"),
    [
        ({"tokens_per_minute": 8}, None, "a quarter of the limit `tokens_per_minute` of key alice (8)", "prompt"),
        ({"tokens_per_minute": 8}, 100, "the limit `tokens_per_minute` of key alice is 8 tokens", "prompt"),
        ({"tokens_per_minute": 8}, 4, "tts.max_total_tokens is 4 tokens", "tts.max_total_tokens"),
    ],
)
async def test_more_prompts_than_a_minute_has_tokens_are_a_bad_request_and_not_a_rate_limit(
    make_limits: Make, caps: dict[str, int], requested: int | None, source: str, param: str
) -> None:
    """A client that obeyed `retry-after` would ask for ever."""
    slots = RequestSlots(load(), Metrics(), await make_limits(None))
    with pytest.raises(BadRequest) as refused:
        await slots.acquire_episodes(sent_by("alice", **caps), requested, 9)
    assert (refused.value.param, refused.value.code) == (param, "cap_too_small")
    assert source in str(refused.value)
    assert "send fewer prompts in a request, or " in str(refused.value)
    assert (slots.episodes.in_flight, slots.episodes.waiting) == (0, 0)
