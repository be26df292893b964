"""Health monitor: how often the upstream is checked, and who sees the details."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import pytest

from proxy.admission import api_keys
from proxy.server import running
from proxy.settings import load
from proxy.telemetry.metrics import Metrics
from proxy.upstream.health_monitor import FRESH_S, HealthMonitor
from tests.fakes import FakeVLLM
from tests.proxy.conftest import SMALL


class Clock:
    """Clock that stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class CountedCheck:
    """Health check that counts its calls."""

    def __init__(self) -> None:
        self.count = 0
        self.is_well = True
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self) -> bool:
        self.count += 1
        await self.gate.wait()
        return self.is_well


async def test_a_health_check_is_reused_until_it_is_stale() -> None:
    clock, health_check = Clock(), CountedCheck()
    health_monitor = HealthMonitor(lambda: ["u"], health_check, Metrics(), clock)
    assert [await health_monitor.is_ready() for _ in range(100)] == [True] * 100
    assert health_check.count == 1
    health_check.is_well = False
    clock.now += FRESH_S
    assert not await health_monitor.is_ready()
    assert health_check.count == 2


async def test_a_check_that_fails_by_a_fault_counts_as_unhealthy_and_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock, faults = Clock(), [ValueError("secret")]

    async def check() -> bool:
        if faults:
            raise faults.pop()
        return True

    health_monitor = HealthMonitor(lambda: ["u"], check, Metrics(), clock)
    assert not await health_monitor.is_ready()
    assert "unhandled error in the proxy: ValueError" in caplog.text
    assert "secret" not in caplog.text
    clock.now += FRESH_S
    assert await health_monitor.is_ready()


@pytest.mark.parametrize(
    ("addresses", "lines"),
    [
        (
            ["http://a"],
            ["upstream http://a is down; /ready is 503 until a health check passes", "upstream http://a is up again"],
        ),
        (
            ["http://a", "http://b"],
            [
                "every upstream of http://a, http://b is down; /ready is 503 until a health check passes",
                "at least one upstream of http://a, http://b is up again",
            ],
        ),
        (
            ["http://a/v1?x=1, 2"],
            [
                "upstream http://a/v1?x=1, 2 is down; /ready is 503 until a health check passes",
                "upstream http://a/v1?x=1, 2 is up again",
            ],
        ),
    ],
)
async def test_the_log_says_whether_one_or_every_upstream_is_down(
    addresses: list[str], lines: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    clock, health_check = Clock(), CountedCheck()
    health_monitor = HealthMonitor(lambda: addresses, health_check, Metrics(), clock)
    for health_check.is_well in (True, False, True):
        await health_monitor.is_ready()
        clock.now += FRESH_S
    assert caplog.messages == lines


async def test_concurrent_callers_share_a_health_check() -> None:
    health_check = CountedCheck()
    health_monitor = HealthMonitor(lambda: ["u"], health_check, Metrics(), Clock())
    health_check.gate.clear()
    asking = [asyncio.create_task(health_monitor.is_ready()) for _ in range(100)]
    await asyncio.sleep(0)
    asking[0].cancel()  # a caller may leave
    await asyncio.sleep(0)
    health_check.gate.set()
    assert await asyncio.gather(*asking[1:]) == [True] * 99
    assert health_check.count == 1


async def test_ready_requests_share_checks_and_show_details_only_with_a_key(tmp_path: Path) -> None:
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
                reply: dict[str, object] = await response.json()
                return reply

        answers = await asyncio.gather(*(ready() for _ in range(50)))
        assert answers == [{"ready": True}] * 50
        assert backend.health_checks <= 2
        assert await ready(authorization="Bearer wrong") == {"ready": True}
        details = await ready(authorization=f"Bearer {key}")
        assert details["upstream"] == backend.url
        assert details.keys() > {"ready", "models", "sandbox", "recorder"}
