"""Two proxies of two workers, two upstreams, PostgreSQL and Redis under load, while each of them is killed in turn."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, Final

import aiohttp
import pytest

from controllers.rollout_state import RolloutStage
from discovery.commands.promote import promote_known
from discovery.promotion.registry import ChangeCause, Registry
from discovery.store import DatabaseUrl
from proxy.upstream.embedded import free_port
from tests.bench.process_usage import resident_bytes
from tests.discovery.store.outside import run_sql
from tests.fakes import MODEL, FakeVLLM, chain
from tests.faults.processes import Command, Forker, forking, until
from tests.faults.test_workers import workers_of
from tests.postgres_server import PASSWORD as DATABASE_PASSWORD
from tests.postgres_server import PostgresServer
from tests.proxy.admission.test_api_keys import ALICE, BOB, bearer
from tests.proxy.admission.test_token_budget import keyed
from tests.proxy.conftest import INTERVAL
from tests.redis_server import MISSING, PROGRAM, RedisServer

CLIENTS: Final = 12
REPLIES: Final = int(os.environ.get("SOAK_FLEET_REPLIES", "60"))
"""Replies that are awaited before and after each fault."""
CAP: Final = 30_000
"""Tokens a minute of the key `alice`; the other key has no cap."""
REQUEST_CAP: Final = 1_500
RETRYABLE: Final = (429, 502, 503, 504)
EMBEDDED_EVERY: Final = 6
"""One in so many requests asks the real vLLM."""
CHAMPIONS: Final = ("adaptive_consistency", "self_consistency")
MOST_S: Final = 20.0
"""Seconds in which every worker must follow a new champion, on a machine that is busy with everything else."""
PROMISED_S: Final = 2.0
"""Seconds in which every worker follows a new champion, as the manual says."""
CHANGES: Final = 5
"""Changes of the champion that are measured."""

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(PROGRAM is None, reason=MISSING),
]


class Load:
    """Clients that ask either proxy and send feedback, with their failures and the feedback that was acknowledged."""

    def __init__(self, urls: list[str], http: aiohttp.ClientSession) -> None:
        self.urls = urls
        self.failures: Counter[str] = Counter()  # that clients may retry
        self.faults: list[str] = []  # that they may not see
        self.acknowledged: list[str] = []  # requests whose feedback was stored
        self.spent: list[tuple[float, int]] = []  # (end, tokens) of the replies to the key with a cap
        self.replies = 0
        self.controllers: Counter[str] = Counter()
        self._http = http
        self._is_over = False
        self._changed = asyncio.Condition()
        self._tasks = [asyncio.create_task(self._work(number)) for number in range(CLIENTS)]

    async def more_replies(self, count: int = REPLIES) -> None:
        """Wait for so many more replies."""
        target = self.replies + count
        async with self._changed:
            await self._changed.wait_for(lambda: self.replies >= target or bool(self.faults))
        assert not self.faults, self.faults[:3]

    async def more_failures(self) -> None:
        """Wait until some client has met a failure that it may retry."""
        target = self.failures.total() + 1
        async with self._changed:
            await self._changed.wait_for(lambda: self.failures.total() >= target or bool(self.faults))
        assert not self.faults, self.faults[:3]

    async def stop(self) -> None:
        self._is_over = True
        await asyncio.gather(*self._tasks)
        assert not self.faults, self.faults[:3]

    async def _work(self, client: int) -> None:
        number = client
        while not self._is_over:
            number += 1
            key = ALICE if client % 2 else BOB
            try:
                outcome = await self._ask(self.urls[number % len(self.urls)], key, number)
            except aiohttp.ClientConnectionError as error:
                outcome = type(error).__name__
            except (aiohttp.ClientError, AssertionError, KeyError, ValueError) as error:
                self.faults.append(f"{type(error).__name__}: {error}")
                outcome = None
            async with self._changed:
                if outcome is None:
                    self.replies += 1
                else:
                    self.failures[outcome] += 1
                self._changed.notify_all()
            if outcome is not None:
                await asyncio.sleep(0.05)  # a client backs off

    async def _ask(self, url: str, key: str, number: int) -> str | None:
        """Send one request and feedback on its answer. Return the failure that a client may retry, or None."""
        model = "autotts-tiny" if number % EMBEDDED_EVERY == 0 else MODEL
        body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": f"What is {number}?"}]}
        body |= {"max_tokens": 200} if number % 3 == 0 else {"tts": {"beta": 0.25, "max_total_tokens": REQUEST_CAP}}
        async with self._http.post(f"{url}/v1/chat/completions", json=body, headers=bearer(key)) as response:
            reply = await response.json()
            if response.status in RETRYABLE:
                return str(response.status)
            assert response.status == 200, (response.status, reply)
        if "tts" not in reply:
            return None
        if key == ALICE:
            self.spent.append((time.monotonic(), reply["tts"]["tokens"]["total"]))
        self.controllers[reply["tts"]["controller"]] += 1
        given = {"request_id": reply["id"], "correct": True}
        async with self._http.post(f"{url}/v1/tts/feedback", json=given, headers=bearer(key)) as response:
            answered = await response.json()
            if response.status in (*RETRYABLE, 404):  # 404: a killed proxy had not written it
                return f"feedback {response.status}"
            assert response.status in (200, 202), (response.status, answered)
            if answered["status"] == "recorded":
                self.acknowledged.append(reply["id"])
        return None


class Machines:
    """Everything that can be killed."""

    def __init__(self, forker: Forker, variables: dict[str, str], ports: list[int]) -> None:
        self.commands: list[Command] = []
        self._forker = forker
        self._variables = variables
        self.ports = ports

    async def start_proxy(self, number: int) -> Command:
        """Start a proxy of two workers at its port."""
        flags = ("--port", self.ports[number], "--interval", INTERVAL, "--workers", 2)
        command = self._forker.start("serve", *flags, **self._variables)
        await command.url()
        return command


def kill_whole(command: Command) -> None:
    """Kill the supervisor and its workers."""
    for pid in [command.pid, *workers_of(command)]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def descriptors(pids: list[int]) -> int:
    return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)


def resident_mb(pids: list[int]) -> float:
    return sum(map(resident_bytes, pids)) / 2**20


def most_within_a_minute(spent: list[tuple[float, int]]) -> int:
    return max(
        (sum(tokens for at, tokens in spent if end - 60 < at <= end) for end, _ in spent),
        default=0,
    )


async def promoted(registry: Registry, name: str, commands: list[Command]) -> float:
    """Promote a champion, and return the seconds until both workers of every proxy have read that."""
    by, began = ChangeCause("operator", "a change", datetime.now(UTC)), time.monotonic()
    _, state = await asyncio.to_thread(promote_known, registry, name, RolloutStage.CHAMPION, 0.0, by)
    line = f"registry version {state.version}:"
    await until(lambda: all(each.output.count(line) == 2 for each in commands), MOST_S)
    return time.monotonic() - began


async def followed(http: aiohttp.ClientSession, url: str, name: str) -> float:
    """Return the seconds until eight new connections in a row are served by a new champion."""
    began, in_a_row = time.monotonic(), 0
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Who?"}], "tts": {"beta": 0.25}}
    while in_a_row < 8:
        async with http.post(f"{url}/v1/chat/completions", json=body, headers=bearer(BOB)) as response:
            reply = await response.json()
        is_new = response.status == 200 and reply["tts"]["controller"] == name
        in_a_row = in_a_row + 1 if is_new else 0
    return time.monotonic() - began


@asynccontextmanager
async def scripted(fake: FakeVLLM, port: int) -> AsyncIterator[None]:
    async with fake.serve(port=port):
        yield


@pytest.mark.vllm
async def test_each_part_of_a_fleet_can_be_killed_under_load(
    vllm: str, synced_postgres: PostgresServer, tmp_path: Path
) -> None:
    fake = FakeVLLM([chain("7", 100 + 47 * (i % 7), ["7"], mark=chr(97 + i % 26)) for i in range(64)], INTERVAL)
    place = synced_postgres.create_database()
    registry = Registry(place)
    await promoted(registry, CHAMPIONS[0], [])
    upstream_port = free_port()
    (tmp_path / "models.toml").write_text(f'{MODEL} = "http://127.0.0.1:{upstream_port}"\nautotts-tiny = "{vllm}"\n')
    async with AsyncExitStack() as stack:
        redis = await stack.enter_async_context(RedisServer())
        variables = {
            "AUTOTTS_UPSTREAM": str(tmp_path / "models.toml"),
            "AUTOTTS_KEYS": str(keyed(tmp_path / "keys.toml", tokens_per_minute=CAP)),
            "AUTOTTS_STORE": str(place),
            "PGPASSWORD": DATABASE_PASSWORD,
            "AUTOTTS_LIMITS": redis.url.get_secret_value(),
            "AUTOTTS_LIMITS_AWAY": "refuse",
            "AUTOTTS_FINALISE_TOKENS": "60",
            "AUTOTTS_PROBE_TOKENS": "8",
        }
        upstream = await stack.enter_async_context(AsyncExitStack())
        await upstream.enter_async_context(scripted(fake, upstream_port))
        machines = Machines(stack.enter_context(forking(tmp_path)), variables, [free_port(), free_port()])
        first, second = [await machines.start_proxy(number) for number in range(2)]
        http = await stack.enter_async_context(
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True, limit=0))
        )
        load = Load([f"http://127.0.0.1:{port}" for port in machines.ports], http)
        await load.more_replies(2 * REPLIES)
        survivors = workers_of(second)
        fds, memory = descriptors(survivors), resident_mb(survivors)

        kill_whole(first)
        await load.more_failures()
        await load.more_replies()
        first = await machines.start_proxy(0)
        await load.more_replies()

        await upstream.aclose()
        await load.more_failures()
        await upstream.enter_async_context(scripted(fake, upstream_port))
        await load.more_replies()

        await asyncio.to_thread(synced_postgres.crash)
        await load.more_replies()  # records go to the spill files
        await asyncio.to_thread(synced_postgres.start)
        await load.more_replies()

        before = len(load.spent)
        await redis.kill()
        await load.more_failures()
        await redis.start()
        await load.more_replies()

        changes = range(1, CHANGES + 1)
        reached = [await promoted(registry, CHAMPIONS[change % 2], [first, second]) for change in changes]
        seconds = [await followed(http, url, CHAMPIONS[CHANGES % 2]) for url in load.urls]
        await load.more_replies()
        await load.stop()

        assert survivors == workers_of(second)
        sys.stdout.write(
            f"{load.replies} replies, {load.failures.total()} failures that clients may retry {dict(load.failures)}, "
            f"{len(load.acknowledged)} rows acknowledged, a new champion known to 4 workers after "
            f"{', '.join(f'{each:.2f}' for each in reached)} s and serving within {max(seconds):.1f} s, descriptors "
            f"{fds} -> {descriptors(survivors)}, memory {memory:.0f} -> {resident_mb(survivors):.0f} MB\n"
        )
        await until(lambda: descriptors(survivors) <= fds + 8)
        assert resident_mb(survivors) < 1.5 * memory
        assert median(reached) < PROMISED_S
        assert max(seconds) < MOST_S
        assert most_within_a_minute(load.spent[:before]) <= CAP
        assert most_within_a_minute(load.spent[before:]) <= CAP
        for command in (first, second):
            assert await command.signal(signal.SIGTERM) == 0, command.output
            assert DATABASE_PASSWORD not in command.output
        assert_stored(place, load.acknowledged)


def assert_stored(place: DatabaseUrl, acknowledged: list[str]) -> None:
    """Assert that every acknowledged row is in the store once."""
    stored = Counter(identity for (identity,) in run_sql(place, "SELECT request_id FROM feedback"))
    assert acknowledged
    assert {identity: stored[identity] for identity in acknowledged if stored[identity] != 1} == {}
