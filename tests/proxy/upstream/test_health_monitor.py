"""Looks at whether the upstream is well: how often it is asked, and who learns what."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp

from proxy.admission import api_keys
from proxy.server import running
from proxy.settings import load
from proxy.telemetry.metrics import Metrics
from proxy.upstream.health_monitor import FRESH_S, HealthMonitor
from tests.fakes import FakeVLLM
from tests.proxy.conftest import SMALL


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Looks:
    """Answers looks, and counts them."""

    def __init__(self) -> None:
        self.count = 0
        self.is_well = True
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self) -> bool:
        self.count += 1
        await self.gate.wait()
        return self.is_well


async def test_a_look_stands_for_a_second() -> None:
    clock, looks = Clock(), Looks()
    health_monitor = HealthMonitor(looks, Metrics(), clock)
    assert [await health_monitor.is_ready() for _ in range(100)] == [True] * 100
    assert looks.count == 1
    looks.is_well = False
    clock.now += FRESH_S
    assert not await health_monitor.is_ready()
    assert looks.count == 2


async def test_whoever_asks_at_once_shares_a_look() -> None:
    looks = Looks()
    health_monitor = HealthMonitor(looks, Metrics(), Clock())
    looks.gate.clear()
    asking = [asyncio.create_task(health_monitor.is_ready()) for _ in range(100)]
    await asyncio.sleep(0)
    asking[0].cancel()  # and may leave
    await asyncio.sleep(0)
    looks.gate.set()
    assert await asyncio.gather(*asking[1:]) == [True] * 99
    assert looks.count == 1


async def test_many_questions_without_a_key_ask_the_upstream_once(tmp_path: Path) -> None:
    key = api_keys.generate_key()
    file = tmp_path / "keys.toml"
    file.write_text(api_keys.key_file_entry("alice", key) + "\n")
    async with (
        FakeVLLM().serve() as backend,
        running(load(upstream=backend.url, keys=file, **SMALL)) as url,
        aiohttp.ClientSession() as http,
    ):

        async def ready(**headers: str) -> dict[str, object]:
            async with http.get(f"{url}/ready", headers=headers) as response:
                told: dict[str, object] = await response.json()
                return told

        answers = await asyncio.gather(*(ready() for _ in range(50)))
        assert answers == [{"ready": True}] * 50
        assert backend.health_checks <= 2
        assert await ready(authorization="Bearer wrong") == {"ready": True}
        told = await ready(authorization=f"Bearer {key}")
        assert told["upstream"] == backend.url
        assert told.keys() > {"ready", "models", "sandbox", "recorder"}
