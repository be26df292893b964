"""Branches in flight: never more than there may be, in the order they came, nothing kept by what has gone."""

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
from tests.proxy.conftest import SMALL, Proxy, backend
from tests.proxy.recording.test_episode_log import until

__all__ = ["backend"]  # a fixture


class Held:
    """A call that holds slots, or waits for them, until it is told to go."""

    def __init__(self, branch_semaphore: BranchSemaphore, branches: int, is_background: bool) -> None:
        self.branches = branches
        self.is_background = is_background
        self.has_slots = False
        self.was_there = False
        self.go = asyncio.Event()
        self.task = asyncio.create_task(self._stay(branch_semaphore))

    async def _stay(self, branch_semaphore: BranchSemaphore) -> None:
        async with branch_semaphore.hold(self.branches, is_background=self.is_background):
            self.has_slots = self.was_there = True
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
def test_no_more_are_in_flight_than_may_be_and_nobody_is_forgotten(
    most: int, moves: list[tuple[Any, Any]], at_once: bool
) -> None:
    """With `at_once` the loop does not run between moves."""

    async def play() -> None:
        branch_semaphore = BranchSemaphore(most)
        calls: list[Held] = []
        cancelled: set[Held] = set()

        def check() -> None:
            there = [call for call in calls if call.has_slots]
            assert sum(call.branches for call in there) <= most or len(there) == 1
            if at_once:
                return
            assert branch_semaphore.taken == sum(call.branches for call in there)
            waiting = [call for call in calls if not call.task.done() and not call.has_slots]
            assert branch_semaphore.waiting == len(waiting)
            for kind in (False, True):
                waits = [call.was_there for call in calls if call.is_background is kind and call not in cancelled]
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
        assert all(call.was_there for call in calls if call not in cancelled)
        assert (branch_semaphore.taken, branch_semaphore.waiting) == (0, 0)

    asyncio.run(play())


async def test_what_nobody_waits_for_comes_last() -> None:
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


async def test_a_call_that_fails_lets_go(backend: FakeVLLM) -> None:
    async with aiohttp.ClientSession() as http:
        engine = UpstreamClient(backend.url, http, branch_semaphore=BranchSemaphore(2))
        backend.fault = "cut"
        for _ in range(3):
            call = Call([[ord(char) for char in ASSISTANT]], 20, {}, n=2)
            with pytest.raises(Exception, match="ended a stream before"):
                await engine.generate(MODEL, call)
        assert (engine.branch_semaphore.taken, engine.branch_semaphore.waiting) == (0, 0)


async def test_recordings_are_generated_after_what_is_waited_for(backend: FakeVLLM) -> None:
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
    """A proxy that has no more than five branches in flight."""
    async with (
        running(load(upstream=backend.url, branches_in_flight=5, **SMALL)) as url,
        aiohttp.ClientSession() as http,
        AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as openai,
    ):
        yield Proxy(backend, url, http, openai)


async def test_requests_together_stay_within_the_bound(narrow: Proxy) -> None:
    said = {"controller": "self_consistency@4", "answer": "boxed"}

    async def is_full() -> bool:
        return await narrow.metric("autotts_calls_waiting") == 11 and narrow.backend.branches > 0

    narrow.backend.gate.clear()
    asked = [asyncio.create_task(narrow.ask("1", tts=said)) for _ in range(12)]
    await until(is_full)
    assert await narrow.metric("autotts_episodes_in_flight") == 12
    narrow.backend.gate.set()
    assert [(await one)[0] for one in asked] == [200] * 12
    assert narrow.backend.most_branches == 4  # two such calls are more than five
    assert await narrow.metric("autotts_branches_in_flight") == 0
    assert await narrow.metric("autotts_calls_waiting") == 0


async def test_a_heavier_call_goes_alone_and_others_wait_and_leave(narrow: Proxy) -> None:
    async def waiting(calls: int) -> bool:
        return await narrow.metric("autotts_calls_waiting") == calls

    narrow.backend.gate.clear()
    wide = asyncio.create_task(narrow.ask("1", tts={"controller": "self_consistency@9", "answer": "boxed"}))
    await until(lambda: narrow.metric("autotts_branches_in_flight"))
    assert await narrow.metric("autotts_branches_in_flight") == 9
    small = {"controller": "self_consistency@2", "answer": "boxed"}
    late, leaving = (asyncio.create_task(narrow.ask("1", tts=small)) for _ in range(2))
    await until(lambda: waiting(2))
    status, _, told = await narrow.ask("1", tts={**small, "deadline_s": 0.1})
    assert status == 504, told
    leaving.cancel()
    await until(lambda: waiting(1))
    narrow.backend.gate.set()
    assert [(await one)[0] for one in (wide, late)] == [200, 200]
    assert narrow.backend.most_branches == 9
    assert await narrow.metric("autotts_branches_in_flight") == 0
