"""Fair queue: permits, waiting requests, the order of turns, and the error when the queue is full."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from hypothesis import example, given
from hypothesis import settings as effort
from hypothesis import strategies as st
from openai import AsyncOpenAI, RateLimitError

from proxy.admission.fair_queue import FairQueue, Permit, QueueFull
from proxy.server import running
from proxy.settings import load
from tests.fakes import FakeVLLM
from tests.proxy.admission.test_api_keys import ALICE, BOB, BOSS, ask, bearer
from tests.proxy.admission.test_token_budget import keyed
from tests.proxy.conftest import SMALL


async def test_holders_are_served_in_turn_however_many_requests_each_has() -> None:
    fair_queue = FairQueue(1, 100)
    order: list[str] = []
    permits = [fair_queue.enter(holder) for holder in "aaaaaabbc"]

    async def stay(permit: Permit) -> None:
        async with permit:
            order.append(permit.holder)

    await asyncio.gather(*map(stay, permits))
    assert "".join(order) == "aabcabaaa"
    assert (fair_queue.in_flight, fair_queue.waiting) == (0, 0)


async def test_a_holder_at_its_own_limit_does_not_delay_others() -> None:
    fair_queue = FairQueue(3, 10)
    first, second, third = (fair_queue.enter("a", 1) for _ in range(3))
    other = fair_queue.enter("b", 2)
    assert first.granted.is_set()
    assert other.granted.is_set()
    assert not second.granted.is_set()
    first.release()
    first.release()
    assert second.granted.is_set()
    assert not third.granted.is_set()
    assert fair_queue.in_flight == 2


async def test_a_full_queue_raises_queue_full_and_one_holder_cannot_fill_it_alone() -> None:
    fair_queue = FairQueue(1, 4)
    fair_queue.enter("a")
    for _ in range(2):
        fair_queue.enter("a", share=2)
    with pytest.raises(QueueFull) as caught:
        fair_queue.enter("a", share=2)
    assert caught.value.own
    fair_queue.enter("b", share=2)
    fair_queue.enter("c", share=2)
    with pytest.raises(QueueFull) as caught:
        fair_queue.enter("d", share=2)
    assert not caught.value.own
    assert caught.value.after_s > 0
    assert fair_queue.waiting == 4


async def test_a_request_cancelled_while_waiting_leaves_the_queue() -> None:
    fair_queue = FairQueue(1, 10)
    first, second, third = (fair_queue.enter("a") for _ in range(3))

    async def stay(permit: Permit) -> None:
        async with permit:
            await asyncio.Event().wait()

    task = asyncio.create_task(stay(second))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert fair_queue.waiting == 1
    first.release()
    assert third.granted.is_set()
    assert not second.granted.is_set()


@effort(max_examples=200, deadline=None)
@example(2, 2, [("a", 1), ("a", 1), ("a", None), 1])
@given(
    st.integers(1, 4),
    st.integers(0, 6),
    st.lists(st.tuples(st.sampled_from("abc"), st.none() | st.integers(1, 3)) | st.integers(0, 30), max_size=60),
)
def test_no_limit_is_exceeded_and_no_free_permit_is_withheld(places: int, queue: int, moves: list[Any]) -> None:
    async def play() -> None:
        fair_queue = FairQueue(places, queue)
        permits: list[Permit] = []
        for move in moves:
            if isinstance(move, int):
                if permits:
                    permits.pop(move % len(permits)).release()
            else:
                try:
                    permits.append(fair_queue.enter(*move))
                except QueueFull:
                    assert fair_queue.waiting >= queue
            given = [permit for permit in permits if permit.granted.is_set()]
            waiting = [permit for permit in permits if not permit.granted.is_set()]
            assert fair_queue.in_flight == fair_queue.taken.total() == len(given) <= places
            assert fair_queue.waiting == len(waiting) <= queue
            for holder in "abc":
                own = sum(permit.holder == holder for permit in given)
                assert fair_queue.taken[holder] == own
                first = next((permit for permit in waiting if permit.holder == holder), None)
                if first is not None and len(given) < places:
                    assert first.limit is not None
                    assert own >= first.limit
        for permit in permits:
            permit.release()
        assert (fair_queue.in_flight, fair_queue.waiting, dict(fair_queue.taken)) == (0, 0, {})

    asyncio.run(play())


async def test_a_request_looks_at_no_other_holders_that_wait_for_their_own_limits() -> None:
    """Otherwise each request would take longer, the more keys have requests that wait."""

    class Counting(FairQueue):
        asked = 0

        def _may_run(self, holder: str, limit: int | None) -> bool:
            self.asked += 1
            return super()._may_run(holder, limit)

    def looks(holders: int) -> int:
        fair_queue = Counting(2 * holders, holders)
        permits = [fair_queue.enter(f"key {number % holders}", 1) for number in range(2 * holders)]
        assert (fair_queue.in_flight, fair_queue.waiting) == (holders, holders)
        permits[holders].release()
        permits[0].release()
        fair_queue.asked = 0
        fair_queue.enter("key 0", 1).release()
        permits[1].release()
        assert permits[holders + 1].granted.is_set()
        return fair_queue.asked

    assert looks(100) == looks(2)


# Over HTTP


async def settled(url: str, http: aiohttp.ClientSession, **wanted: int) -> dict[str, Any]:
    """Return the state of all keys once its totals are as `wanted`."""
    for _ in range(500):
        async with http.get(f"{url}/v1/tts/keys", headers=bearer(BOSS)) as response:
            state: dict[str, Any] = await response.json()
        if all(state["all"][name] == value for name, value in wanted.items()):
            return state
        await asyncio.sleep(0)
    raise AssertionError(state)


async def test_a_full_queue_returns_429_and_a_disconnect_frees_a_queued_place(
    backend: FakeVLLM,
) -> None:
    backend.gate.clear()
    settings = load(upstream=backend.url, admin_key=BOSS, max_episodes=1, queue=2, **SMALL)
    async with running(settings) as url, aiohttp.ClientSession() as http:
        first = asyncio.create_task(ask(http, url, "x", "0"))
        await settled(url, http, episodes=1)
        stream, plain = (asyncio.create_task(ask(http, url, "x", "0", stream=flag)) for flag in (True, False))
        await settled(url, http, episodes=1, waiting=2)
        status, headers, reply = await ask(http, url, "y", "0")
        assert (status, reply["error"]["type"], reply["error"]["code"]) == (429, "rate_limit_error", "queue_full")
        assert 1 <= int(headers["retry-after"]) <= 60
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="y", max_retries=0) as openai:
            for streamed in (False, True):
                with pytest.raises(RateLimitError):
                    await openai.chat.completions.create(
                        model="fake-model",
                        messages=[{"role": "user", "content": "hi"}],
                        extra_headers={"x-tts-beta": "0"},
                        stream=streamed,
                    )
        plain.cancel()
        stream.cancel()
        await settled(url, http, episodes=1, waiting=0)
        asked = len(backend.requests)
        late = asyncio.create_task(ask(http, url, "y", "0"))
        await settled(url, http, episodes=1, waiting=1)
        assert len(backend.requests) == asked
        backend.gate.set()
        assert (await first)[0] == (await late)[0] == 200
        await settled(url, http, episodes=0, waiting=0)
        async with http.get(f"{url}/metrics") as response:
            page = await response.text()
        assert 'autotts_refusals_total{reason="queue_full"} 3.0' in page
        assert 'autotts_requests_total{controller="",model="fake-model",outcome="disconnected"} 2.0' in page
        assert 'autotts_queue{kind="episode"} 0.0' in page


async def test_a_key_at_its_episode_limit_gets_429_while_another_key_is_served(
    backend: FakeVLLM, tmp_path: Path
) -> None:
    backend.gate.clear()
    file = keyed(tmp_path / "keys.toml", episodes=1)
    settings = load(upstream=backend.url, admin_key=BOSS, keys=file, max_episodes=3, queue=2, **SMALL)
    async with running(settings) as url, aiohttp.ClientSession() as http:
        mine = [asyncio.create_task(ask(http, url, ALICE, "0")) for _ in range(2)]
        await settled(url, http, episodes=1, waiting=1)
        status, _, reply = await ask(http, url, ALICE, "0")
        assert (status, reply["error"]["code"]) == (429, "rate_limit_exceeded")
        assert "key alice" in reply["error"]["message"]
        other = asyncio.create_task(ask(http, url, BOB, "0"))
        await settled(url, http, episodes=2, waiting=1)
        backend.gate.set()
        assert {(await task)[0] for task in (*mine, other)} == {200}


async def test_forwarded_requests_have_their_own_permits_and_queue(backend: FakeVLLM) -> None:
    backend.fault = "hang"
    settings = load(upstream=backend.url, admin_key=BOSS, max_episodes=1, max_passed=1, queue=1, **SMALL)
    async with running(settings) as url, aiohttp.ClientSession() as http:
        episode = asyncio.create_task(ask(http, url, "x", "0"))
        await settled(url, http, episodes=1, passed=0)
        body = {"prompt": [[60]], "max_tokens": 9, "stream": True}
        first = await http.post(f"{url}/v1/completions", json=body)
        second = asyncio.create_task(http.post(f"{url}/v1/completions", json=body))
        await settled(url, http, episodes=1, passed=1, waiting=1)
        async with http.post(f"{url}/v1/completions", json=body) as response:
            assert (response.status, (await response.json())["error"]["code"]) == (429, "queue_full")
        first.close()
        await settled(url, http, episodes=1, passed=1, waiting=0)
        (await second).close()
        episode.cancel()
        await settled(url, http, episodes=0, passed=0, waiting=0)


async def test_a_request_refused_after_admission_releases_its_permit(backend: FakeVLLM) -> None:
    settings = load(upstream=backend.url, admin_key=BOSS, max_episodes=1, queue=0, **SMALL)
    async with running(settings) as url, aiohttp.ClientSession() as http:
        for _ in range(3):
            status, _, reply = await ask(http, url, "x", "0", tts={"max_total_tokens": 1})
            assert (status, reply["error"]["code"]) == (400, "cap_too_small")
        await settled(url, http, episodes=0, waiting=0)
        assert (await ask(http, url, "x", "0"))[0] == 200


async def test_the_queue_counts_those_that_wait_however_they_leave_it() -> None:
    queue = FairQueue(1, 10)
    first, *others = (queue.enter(f"key {number % 3}") for number in range(6))
    assert queue.waiting == len(others) == sum(queue.waiting_of(f"key {number}") for number in range(3))
    others[2].release()
    assert queue.waiting == 4
    first.release()
    assert (queue.waiting, queue.in_flight) == (3, 1)
    for permit in others:
        permit.release()
    assert (queue.waiting, queue.in_flight) == (0, 0)
