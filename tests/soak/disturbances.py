"""Disturbances of the stack under traffic. After each of them, every valid request can be answered again."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sqlite3
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import closing, suppress
from datetime import UTC, datetime
from itertools import count, islice, repeat
from typing import Final

import aiohttp

from controllers.loading import Spec
from controllers.rollout_state import RolloutStage
from discovery.commands.promote import promote_known
from discovery.errors import PromotionError
from discovery.promotion.registry import ChangeCause
from tests.faults.attack import attacks
from tests.proxy.admission.test_api_keys import bearer
from tests.soak.measurements import from_files, samples
from tests.soak.stack import SoakStack

Disturbance = Callable[[SoakStack, aiohttp.ClientSession], Awaitable[None]]
HOSTILE: Final = ("loop", "memory_list", "crash_exit", "frame_garbage", "standard_flood", "loop_sleep", "frame_flood")
CHAMPIONS: Final = ("self_consistency", "adaptive_consistency", "asc")
BRIEF: Final = """
from controllers import TO_END, answer, branch

class Brief:
    def __init__(self, beta):
        self.beta = beta

    def decide(self, state):
        return [answer(state.leader())] if state.width else [branch(TO_END)]
"""
CANARIES: Final = 8
"""Short-lived canaries of each cycle."""
LASTS_S: Final = 4.0
"""Seconds that most disturbances last."""
POLL_S: Final = 0.5
_numbers = count()
_dice = random.Random(5)


def _cause() -> ChangeCause:
    return ChangeCause("soak", "", datetime.now(UTC), forced=True)


async def promote_and_roll_back(stack: SoakStack, _: aiohttp.ClientSession) -> None:
    """Promote two champions one after another, and roll the second back."""
    for name in _dice.sample(CHAMPIONS, 2):
        await asyncio.to_thread(promote_known, stack.registry, name, RolloutStage.CHAMPION, 0.0, _cause())
        await asyncio.sleep(LASTS_S / 2)
    await asyncio.to_thread(stack.registry.roll_back, _cause())


async def hostile_canary(stack: SoakStack, _: aiohttp.ClientSession) -> None:
    """Let a controller that attacks the sandbox serve half of the requests, and roll it back."""
    name = _dice.choice(HOSTILE)
    spec = Spec(f"hostile{next(_numbers)}", attacks()[name] + f"# {next(_numbers)}\n")
    card = {"name": spec.name, "digest": spec.digest}
    await asyncio.to_thread(stack.registry.install, spec, card, RolloutStage.CANARY, 0.5, _cause())
    stack.installed += 1
    await asyncio.sleep(LASTS_S)
    with suppress(PromotionError):  # the proxy may have rolled it back
        await asyncio.to_thread(stack.registry.drop_canary, spec.digest, _cause())


async def short_lived_canaries(stack: SoakStack, http: aiohttp.ClientSession) -> None:
    """Let one controller after another be canary until it has served a request, or for a few seconds."""
    for number in islice(_numbers, CANARIES):
        spec = Spec(f"brief{number}", f"{BRIEF}# {number}\n")
        card = {"name": spec.name, "digest": spec.digest}
        await asyncio.to_thread(stack.registry.install, spec, card, RolloutStage.CANARY, 0.5, _cause())
        stack.installed += 1
        stack.brief["installed"] += 1
        for _ in repeat(None, round(LASTS_S / POLL_S)):
            served = [each for each in await samples(http, stack.url) if each.name == "autotts_stage_requests_total"]
            if spec.name in from_files(served):
                stack.brief["served"] += 1
                break
            await asyncio.sleep(POLL_S)  # the proxy announces nothing
        with suppress(PromotionError):  # the proxy may have rolled it back
            await asyncio.to_thread(stack.registry.drop_canary, spec.digest, _cause())


async def hostile_shadow(stack: SoakStack, _: aiohttp.ClientSession) -> None:
    """Let a controller that attacks the sandbox run as the shadow."""
    spec = Spec(f"hostile{next(_numbers)}", attacks()[_dice.choice(HOSTILE)] + f"# {next(_numbers)}\n")
    card = {"name": spec.name, "digest": spec.digest}
    await asyncio.to_thread(stack.registry.install, spec, card, RolloutStage.SHADOW, 0.0, _cause())
    stack.installed += 1
    await asyncio.sleep(LASTS_S)


async def reload_keys(stack: SoakStack, http: aiohttp.ClientSession) -> None:
    """Add a key and wait until it is accepted, break the file, and write it as it was."""
    key = f"sk-autotts-{next(_numbers)}"
    stack.write_keys(carol=key)
    statuses: list[int] = []
    for _ in repeat(None, 300):
        async with http.get(f"{stack.url}/metrics", headers=bearer(key)) as response:
            statuses.append(response.status)
        if statuses[-1] == 200:
            break
        await asyncio.sleep(0.1)  # the proxy announces nothing
    if statuses[-1] != 200:
        stack.faults.append(f"a new key is not accepted after {len(statuses)} requests: {Counter(statuses)}")
    stack.keys.write_text("carol = nonsense")
    await asyncio.sleep(LASTS_S / 2)
    stack.write_keys()


async def lock_store(stack: SoakStack, _: aiohttp.ClientSession) -> None:
    """Hold the store's lock as another writer does."""
    with closing(sqlite3.connect(stack.store, isolation_level=None, timeout=10)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        await asyncio.sleep(LASTS_S)
        connection.execute("ROLLBACK")


async def fill_store(stack: SoakStack, _: aiohttp.ClientSession) -> None:
    """Fill the disk of the store."""
    filler = stack.disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while os.statvfs(stack.disk).f_bavail:
            file.write(bytes(1 << 16))
    await asyncio.sleep(LASTS_S)
    filler.unlink()


async def restart_vllm(stack: SoakStack, _: aiohttp.ClientSession) -> None:
    """Kill vLLM and wait until it serves again."""
    pid = stack.vllm.pid
    assert pid is not None
    stack.vllm.restarted.clear()
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(400):
        await stack.vllm.restarted.wait()


DISTURBANCES: Final[Mapping[str, Disturbance]] = {
    "promotion and rollback": promote_and_roll_back,
    "hostile canary": hostile_canary,
    "key reload": reload_keys,
    "short-lived canaries": short_lived_canaries,
    "locked store": lock_store,
    "hostile shadow": hostile_shadow,
    "full disk": fill_store,
}
"""Disturbances of each cycle, in this order. vLLM is restarted in one cycle only, because its counters begin anew."""
