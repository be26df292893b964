"""Branch semaphore: the limit on branches in flight, first come first served, and slots freed by every exit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from hypothesis import example, given
from hypothesis import settings as effort
from hypothesis import strategies as st
from openai import AsyncOpenAI

from proxy.server import running
from proxy.settings import load
from proxy.types import Call
from proxy.upstream.branch_semaphore import BranchSemaphore
from proxy.upstream.client import UpstreamClient
from tests.fakes import ASSISTANT, MODEL, FakeVLLM
from tests.proxy.conftest import SMALL, Proxy
from tests.proxy.recording.test_episode_log import until


class Held:
    """A call that waits for slots and then holds them until `go` is set."""

    def __init__(self, branch_semaphore: BranchSemaphore, branches: int, is_background: bool) -> None:
        self.branches = branches
        self.is_background = is_background
        self.has_slots = False
        self.had_slots = False
        self.go = asyncio.Event()
        self.task = asyncio.create_task(self._stay(branch_semaphore))

    async def _stay(self, branch_semaphore: BranchSemaphore) -> None:
        async with branch_semaphore.hold(self.branches, is_background=self.is_background):
            self.has_slots = self.had_slots = True
            try:
                await self.go.wait()
            finally:
                self.has_slots = False


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@effort(max_examples=300, deadline=None)
@example(3, [(2, False), (5, False), (1, False), (1, True), ("end", 0), ("cancel", 0)], False)
@example(2, [(2, False), (2, False), ("both", 0)], True)
@given(
    st.integers(1, 6),
    st.lists(
        st.tuples(st.integers(1, 8), st.booleans())
        | st.tuples(st.sampled_from(["end", "cancel", "both"]), st.integers(0, 30)),
        max_size=50,
    ),
    st.booleans(),
)
def test_branches_in_flight_stay_within_the_limit_and_every_call_is_served(
    most: int, moves: list[tuple[Any, Any]], at_once: bool
) -> None:
    """With `at_once` the event loop does not run between moves."""

    async def play() -> None:
        branch_semaphore = BranchSemaphore(most)
        calls: list[Held] = []
        cancelled: set[Held] = set()

        def check() -> None:
            holding = [call for call in calls if call.has_slots]
            assert sum(call.branches for call in holding) <= most or len(holding) == 1
            if at_once:
                return
            assert branch_semaphore.taken == sum(call.branches for call in holding)
            waiting = [call for call in calls if not call.task.done() and not call.has_slots]
            assert branch_semaphore.waiting == len(waiting)
            for kind in (False, True):
                waits = [call.had_slots for call in calls if call.is_background is kind and call not in cancelled]
                assert waits == sorted(waits, reverse=True)  # first come, first served
            line = sorted(waiting, key=lambda call: call.is_background)
            if line:
                assert branch_semaphore.taken
                assert branch_semaphore.taken + line[0].branches > most

        for move, value in moves:
            if isinstance(move, int):
                calls.append(Held(branch_semaphore, move, value))
            elif calls:
                call = calls[value % len(calls)]
                if move in ("end", "both"):
                    call.go.set()
                if move in ("cancel", "both"):
                    call.task.cancel()
                    cancelled.add(call)
            if not at_once:
                await settle()
            check()
        for _ in range(len(calls) + 1):
            await settle()
            check()
            for call in calls:
                if call.has_slots:
                    call.go.set()
        await settle()
        assert all(call.task.done() for call in calls)
        assert all(call.had_slots for call in calls if call not in cancelled)
        assert (branch_semaphore.taken, branch_semaphore.waiting) == (0, 0)

    asyncio.run(play())


async def test_background_calls_are_served_after_live_ones() -> None:
    branch_semaphore = BranchSemaphore(1)
    first, background, live = (Held(branch_semaphore, 1, kind) for kind in (False, True, False))
    await settle()
    assert (first.has_slots, branch_semaphore.waiting) == (True, 2)
    first.go.set()
    await settle()
    assert (live.has_slots, background.has_slots) == (True, False)
    live.go.set()
    await settle()
    assert background.has_slots
    background.go.set()
    await background.task


async def test_a_failed_call_releases_its_slots(backend: FakeVLLM) -> None:
    async with aiohttp.ClientSession() as http:
        engine = UpstreamClient(backend.url, http, branch_semaphore=BranchSemaphore(2))
        backend.fault = "cut"
        for _ in range(3):
            call = Call([[ord(char) for char in ASSISTANT]], 20, {}, n=2)
            with pytest.raises(Exception, match="ended a stream before"):
                await engine.generate(MODEL, call)
        assert (engine.branch_semaphore.taken, engine.branch_semaphore.waiting) == (0, 0)


async def test_low_priority_calls_are_generated_after_live_ones(backend: FakeVLLM) -> None:
    async with aiohttp.ClientSession() as http:
        engine = UpstreamClient(backend.url, http, branch_semaphore=BranchSemaphore(1))
        backend.gate.clear()
        tasks = []
        for tokens, priority in ((1, 0), (2, 7), (3, 0)):
            call = Call([[ord(char) for char in ASSISTANT]], tokens, {}, priority=priority)
            tasks.append(asyncio.create_task(engine.generate(MODEL, call)))
            await asyncio.sleep(0)
        backend.gate.set()
        await asyncio.gather(*tasks)
    assert [request["max_tokens"] for request in backend.requests] == [1, 3, 2]


@pytest_asyncio.fixture
async def narrow(backend: FakeVLLM) -> AsyncIterator[Proxy]:
    """Run a proxy with at most five branches in flight."""
    async with (
        running(load(upstream=backend.url, branches_in_flight=5, **SMALL)) as url,
        aiohttp.ClientSession() as http,
        AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as openai,
    ):
        yield Proxy(backend, url, http, openai)


async def test_concurrent_requests_stay_within_the_limit_of_branches_in_flight(narrow: Proxy) -> None:
    tts = {"controller": "self_consistency@4", "answer": "boxed"}

    async def is_full() -> bool:
        return await narrow.metric("autotts_calls_waiting") == 11 and narrow.backend.branches > 0

    narrow.backend.gate.clear()
    asked = [asyncio.create_task(narrow.ask("1", tts=tts)) for _ in range(12)]
    await until(is_full)
    assert await narrow.metric("autotts_episodes_in_flight") == 12
    narrow.backend.gate.set()
    assert [(await request)[0] for request in asked] == [200] * 12
    assert narrow.backend.most_branches == 4  # two calls of four branches exceed five
    assert await narrow.metric("autotts_branches_in_flight") == 0
    assert await narrow.metric("autotts_calls_waiting") == 0


async def test_a_call_over_the_limit_runs_alone_while_others_wait_time_out_or_cancel(narrow: Proxy) -> None:
    async def waiting(calls: int) -> bool:
        return await narrow.metric("autotts_calls_waiting") == calls

    narrow.backend.gate.clear()
    wide = asyncio.create_task(narrow.ask("1", tts={"controller": "self_consistency@9", "answer": "boxed"}))
    await until(lambda: narrow.metric("autotts_branches_in_flight"))
    assert await narrow.metric("autotts_branches_in_flight") == 9
    small = {"controller": "self_consistency@2", "answer": "boxed"}
    late, leaving = (asyncio.create_task(narrow.ask("1", tts=small)) for _ in range(2))
    await until(lambda: waiting(2))
    status, _, reply = await narrow.ask("1", tts={**small, "deadline_s": 0.1})
    assert status == 504, reply
    leaving.cancel()
    await until(lambda: waiting(1))
    narrow.backend.gate.set()
    assert [(await request)[0] for request in (wide, late)] == [200, 200]
    assert narrow.backend.most_branches == 9
    assert await narrow.metric("autotts_branches_in_flight") == 0
