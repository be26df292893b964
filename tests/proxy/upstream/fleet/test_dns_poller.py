"""Replicas behind a name: they come and go with its addresses, and stay while it cannot be resolved."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack

import aiohttp
import pytest
import pytest_asyncio

from proxy.errors import UpstreamUnreachable
from proxy.settings import MAX_REPLICAS
from proxy.telemetry.metrics import Metrics
from proxy.types import Call
from proxy.upstream.client import UpstreamClient
from proxy.upstream.fleet.dns_poller import DnsPoller, resolve
from proxy.upstream.fleet.fleet import Fleet
from proxy.upstream.fleet.fleet_client import FleetClient
from proxy.upstream.fleet.replica import Replica
from proxy.upstream_observer import UpstreamObserver
from tests.fakes import ASSISTANT, MODEL, FakeVLLM
from tests.proxy.upstream.fleet.conftest import MakeProxy, scripted

HOSTS = ("127.0.0.1", "127.0.0.2", "127.0.0.3")


class Name:
    """A name with addresses that a test changes, and the fleet behind it. All listen on one port."""

    def __init__(self, port: int, session: aiohttp.ClientSession, poll_s: float = 1000, user: str = "") -> None:
        self.addresses: list[str] | OSError | UnicodeError = list(HOSTS)
        self.resolved = 0
        self.polled = asyncio.Event()  # the name has been resolved twice
        self.metrics = Metrics()
        self.fleet = Fleet([], 1, self.metrics)
        make: Callable[[str], Replica] = lambda url: Replica(UpstreamClient(url, session))  # noqa: E731
        self.poller = DnsPoller(f"http://{user}vllm.test:{port}/v1", poll_s, self.fleet, make, self.resolve)
        self.client = FleetClient(self.fleet, UpstreamObserver(), 5, self.poller)

    async def resolve(self, host: str, port: int) -> list[str]:
        assert host == "vllm.test"
        self.resolved += 1
        if self.resolved > 1:
            self.polled.set()
        if isinstance(self.addresses, OSError | UnicodeError):
            raise self.addresses
        return self.addresses

    @property
    def hosts(self) -> list[str]:
        return [replica.name.split("/")[2].rpartition(":")[0] for replica in self.fleet.replicas]

    def series(self) -> set[str]:
        page = self.metrics.exposition().decode()
        lines = [line for line in page.splitlines() if line.startswith("autotts_replica_up{")]
        return {line.split("//")[1].split(":")[0] for line in lines}

    async def ask(self, count: int = 30) -> None:
        for number in range(count):
            call = Call([[ord(char) for char in ASSISTANT]], 20, {})
            await self.client.route(MODEL, lambda: str(number).encode()).generate(MODEL, call)  # noqa: B023


@pytest_asyncio.fixture
async def fakes() -> AsyncIterator[list[FakeVLLM]]:
    async with AsyncExitStack() as stack:
        served = [await stack.enter_async_context(scripted().serve())]
        port = int(served[0].url.rpartition(":")[2])
        served += [await stack.enter_async_context(scripted().serve(host, port)) for host in HOSTS[1:]]
        yield served


@pytest_asyncio.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as http:
        yield http


@pytest_asyncio.fixture
async def name(fakes: list[FakeVLLM], session: aiohttp.ClientSession) -> AsyncIterator[Name]:
    under_test = Name(int(fakes[0].url.rpartition(":")[2]), session)
    yield under_test
    await under_test.client.close()


async def test_requests_spread_over_the_addresses_of_a_name(name: Name, fakes: list[FakeVLLM]) -> None:
    assert name.client.display_url.startswith("dns+http://vllm.test:")
    await name.ask(90)
    assert name.resolved == 1
    assert name.hosts == list(HOSTS)
    assert all(len(fake.requests) > 5 for fake in fakes)


async def test_replicas_come_and_go_with_the_addresses(name: Name, fakes: list[FakeVLLM]) -> None:
    name.addresses = list(HOSTS[:2])
    await name.ask()
    kept = name.fleet.replicas[1]
    assert name.series() == set(HOSTS[:2])
    name.addresses = list(HOSTS[1:])
    await name.poller.refresh()
    assert name.hosts == list(HOSTS[1:])
    assert name.fleet.replicas[0] is kept  # with its circuit breaker and its health
    assert name.series() == set(HOSTS[1:])
    before = len(fakes[0].requests)
    await name.ask(90)
    assert len(fakes[0].requests) == before
    assert fakes[2].requests


async def test_calls_at_a_replica_that_leaves_go_on_but_later_ones_do_not(name: Name, fakes: list[FakeVLLM]) -> None:
    name.addresses = [HOSTS[0]]
    client = name.client.route(MODEL, bytes)
    fakes[0].gate.clear()
    calls = [Call([[ord(char) for char in ASSISTANT]], 20, {}) for _ in range(2)]
    first = asyncio.create_task(client.generate(MODEL, calls[0]))
    await fakes[0].busy.wait()
    name.addresses = [HOSTS[1]]
    await name.poller.refresh()
    await client.generate(MODEL, calls[1])
    fakes[0].gate.set()
    await first
    assert [len(call.outputs[0].ids) for call in calls] == [20, 20]
    assert [len(fake.requests) for fake in fakes] == [1, 1, 0]


async def test_replicas_stay_while_the_name_cannot_be_resolved(name: Name, caplog: pytest.LogCaptureFixture) -> None:
    await name.ask(1)
    name.addresses = socket.gaierror(-3, "Temporary failure in name resolution")
    with caplog.at_level(logging.WARNING):
        await name.poller.refresh()
        await name.poller.refresh()
    assert name.hosts == list(HOSTS)
    assert caplog.messages == [
        "cannot resolve upstream vllm.test: Temporary failure in name resolution; its replicas stay as they are"
    ]
    await name.ask(1)


async def test_a_name_that_cannot_be_encoded_is_reported_and_asked_for_again(
    name: Name, caplog: pytest.LogCaptureFixture
) -> None:
    name.addresses = UnicodeError("label empty or too long")
    for _ in range(2):
        with pytest.raises(UpstreamUnreachable, match=r"vllm\.test: it is not a host name \(label empty or too long\)"):
            await name.ask(1)
    assert len(caplog.messages) == 1
    name.addresses = [HOSTS[0]]
    await name.poller.refresh()
    await name.ask(1)


async def test_without_any_address_requests_fail_with_the_reason_until_there_is_one(name: Name) -> None:
    name.addresses = socket.gaierror(-2, "Name or service not known")
    assert not await name.client.is_healthy()
    for _ in range(2):
        with pytest.raises(UpstreamUnreachable, match=r"cannot resolve upstream vllm\.test: Name or service not known"):
            await name.ask(1)
    name.addresses = [HOSTS[0]]
    await name.poller.refresh()
    assert await name.client.is_healthy()
    await name.ask(1)


async def test_the_name_is_resolved_again_after_a_while(fakes: list[FakeVLLM], session: aiohttp.ClientSession) -> None:
    under_test = Name(int(fakes[0].url.rpartition(":")[2]), session, poll_s=0.01)
    await under_test.ask(1)
    await under_test.polled.wait()
    await under_test.client.close()


async def test_urls_of_replicas_keep_credentials_and_path_but_show_none(session: aiohttp.ClientSession) -> None:
    under_test = Name(8000, session, user="me:secret@")
    under_test.addresses = ["127.0.0.1", "::1"]
    await under_test.poller.start()
    assert [replica.name for replica in under_test.fleet.replicas] == ["http://127.0.0.1:8000", "http://[::1]:8000"]
    urls = [replica.client._transport._url for replica in under_test.fleet.replicas]
    assert urls == ["http://me:secret@127.0.0.1:8000", "http://me:secret@[::1]:8000"]
    assert "secret" not in under_test.poller.name
    await under_test.client.close()


async def test_the_number_of_replicas_is_limited(
    session: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    under_test = Name(8000, session)
    under_test.addresses = [f"10.0.{number // 250}.{number % 250}" for number in range(MAX_REPLICAS + 1)]
    await under_test.poller.start()
    assert len(under_test.fleet.replicas) == MAX_REPLICAS
    assert f"upstream vllm.test has {MAX_REPLICAS + 1} addresses; {MAX_REPLICAS} are used" in caplog.messages
    await under_test.client.close()


async def test_names_are_resolved_by_the_system() -> None:
    assert "127.0.0.1" in await resolve("localhost", 80)
    with pytest.raises(socket.gaierror):
        await resolve("no-such-name.invalid", 80)


async def test_a_proxy_serves_the_addresses_of_a_name(fakes: list[FakeVLLM], fleet_proxy: MakeProxy) -> None:
    port = fakes[0].url.rpartition(":")[2]
    async with fleet_proxy(upstream=f"dns+http://localhost:{port}") as proxy:
        assert (await proxy.ask())[0] == 200
        assert (await proxy.ask(beta=None))[0] == 200
        async with proxy.http.get(f"{proxy.url}/ready") as response:
            body = await response.json()
        assert (response.status, body["ready"]) == (200, True)
        assert f"http://127.0.0.1:{port}" in {replica["url"] for replica in body["replicas"]}
