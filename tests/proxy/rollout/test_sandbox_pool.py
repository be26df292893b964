"""Pools of sandbox processes: which episodes get a process, what delays them, and what remains after a stop."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import sys
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

import pytest

from controllers.errors import BadController, MachineDisturbed
from controllers.loading import Spec
from controllers.sandbox.handle import SandboxHandle
from proxy.rollout import sandbox_pool as pools
from proxy.rollout.sandbox_pool import SandboxPool

pytestmark = [pytest.mark.process, pytest.mark.skipif(sys.platform != "linux", reason="only Linux seals processes")]

HONEST = "class Mine:\n    def __init__(self, beta): ...\n    def decide(self, state): ...\n"
SLOW = "while True: pass"

Make = Callable[[str, int], SandboxPool]


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    made: list[SandboxPool] = []
    closers = ThreadPoolExecutor(1)

    def make_pool(source: str, size: int) -> SandboxPool:
        made.append(SandboxPool(Spec("mine", source), size, 5.0, closers))
        made[-1].keep(size)
        return made[-1]

    yield make_pool
    for pool in made:
        pool.stop("the test is over")
        await pool.close()
    closers.shutdown()


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        for _ in repeat(None):
            if holds():
                return
            await asyncio.sleep(0.01)  # no event announces what threads and other processes have done


async def filled(pool: SandboxPool, size: int) -> None:
    await until(lambda: len(pool._ready) == size)


async def test_a_controller_that_loads_slowly_does_not_delay_other_pools(make: Make) -> None:
    slow = make(SLOW, 16)
    assert len(slow._work) == 16
    assert await asyncio.to_thread(lambda: 7) == 7
    honest = make(HONEST, 0)
    honest.end(await honest.take())
    assert slow._making >= 14  # two threads, and two seconds of processor time each


async def test_waiting_episodes_get_the_next_ready_process(make: Make) -> None:
    pool = make(HONEST, 2)
    sandboxes = await asyncio.gather(*(pool.take() for _ in range(4)))
    assert len({sandbox.process for sandbox in sandboxes}) == 4
    await filled(pool, 2)
    assert not pool._waiting
    for sandbox in sandboxes:
        pool.end(sandbox)


async def test_the_process_of_a_cancelled_episode_is_ended_and_later_episodes_get_one(make: Make) -> None:
    pool = make(HONEST, 0)
    taking = asyncio.create_task(pool.take())
    await asyncio.sleep(0)
    assert pool._making == 1
    taking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await taking
    assert not pool._waiting
    await until(lambda: not pool._work)  # the process is created and ended
    assert not pool._ready
    pool.keep(1)
    await filled(pool, 1)
    taking = asyncio.create_task(pool.take())
    await asyncio.sleep(0)
    pool.end(await taking)


async def test_a_process_given_to_a_cancelled_episode_returns_to_the_pool(make: Make) -> None:
    pool = make(HONEST, 1)
    await filled(pool, 1)
    sandbox = await pool.take()
    await filled(pool, 1)
    spare = pool._ready.pop()
    taking = asyncio.create_task(pool.take())
    await asyncio.sleep(0)
    pool._put(sandbox)
    taking.cancel()  # before it sees the process it was given
    with pytest.raises(asyncio.CancelledError):
        await taking
    assert list(pool._ready) == [sandbox]
    pool.end(spare)


async def test_a_controller_that_cannot_load_raises_bad_controller_for_every_episode(make: Make) -> None:
    pool = make("import json", 2)
    for _ in range(2):
        with pytest.raises(BadController, match="No module named 'json'"):
            await pool.take()


async def test_waiting_for_a_process_times_out(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "TAKE_TIMEOUT_S", 0.01)
    with pytest.raises(MachineDisturbed, match=r"no process of mine was ready within 0\.01 s"):
        await make(SLOW, 0).take()


async def test_dead_processes_are_replaced_and_never_handed_out(make: Make) -> None:
    pool = make(HONEST, 3)
    await filled(pool, 3)
    dead = list(pool._ready)
    for sandbox in dead:
        os.kill(sandbox.process, signal.SIGKILL)
        assert select.select([sandbox._handle], [], [], 30)[0]
    sandbox = await pool.take()
    assert sandbox not in dead
    assert sandbox.alive
    await filled(pool, 3)
    assert all(ready.alive for ready in pool._ready)
    pool.end(sandbox)


async def test_a_stopped_pool_ends_all_its_processes(make: Make) -> None:
    pool = make(HONEST, 2)
    await filled(pool, 2)
    taken: list[SandboxHandle] = [await pool.take()]
    await filled(pool, 2)
    taken += pool._ready
    pool.stop("quarantined")
    assert not pool._ready
    await until(lambda: not any(sandbox.alive for sandbox in taken))
    pool.end(taken[0])
    with pytest.raises(MachineDisturbed, match="quarantined"):
        await taken[0].decide_later([[0]], 1)


async def test_stopping_a_pool_raises_in_the_episodes_that_wait_for_it(make: Make) -> None:
    pool = make(SLOW, 0)
    waiting = asyncio.create_task(pool.take())
    await asyncio.sleep(0)
    assert pool._making == 1
    pool.stop("quarantined")
    with pytest.raises(MachineDisturbed, match="quarantined"):
        await waiting
