"""Replicas that are killed and come back under load, one after the other: clients see no error."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import AsyncExitStack
from itertools import repeat
from typing import Any

import aiohttp

from proxy.server import running
from proxy.settings import load
from tests.proxy.conftest import SMALL, Proxy
from tests.proxy.upstream.fleet.conftest import scripted

CLIENTS = 16
REPLIES = 60
"""Replies that clients get while a replica is away, and until the next one is killed."""


class Load:
    """Clients that send served and forwarded requests until `stop`, and counts of the outcomes."""

    def __init__(self, proxy: Proxy) -> None:
        self.outcomes: Counter[Any] = Counter()
        self.proxy = proxy
        self._is_over = False
        self._replied = asyncio.Condition()
        self._tasks = [asyncio.create_task(self._send(client)) for client in range(CLIENTS)]

    async def replies(self, count: int) -> None:
        """Wait for so many more replies."""
        target = self.outcomes.total() + count
        async with self._replied:
            await self._replied.wait_for(lambda: self.outcomes.total() >= target)

    async def stop(self) -> None:
        self._is_over = True
        await asyncio.gather(*self._tasks)

    async def _send(self, client: int) -> None:
        number = 0
        while not self._is_over:
            number += 1
            beta = "0.5" if number % 3 else None
            messages = [{"role": "user", "content": f"question {number} of {client}"}]
            status, _, body = await self.proxy.ask(beta, messages=messages)
            async with self._replied:
                failure = body["error"]["message"] if status != 200 else ""
                self.outcomes[status, failure, body.get("tts", {}).get("stop")] += 1
                self._replied.notify_all()


async def until_used(proxy: Proxy, replica: str) -> None:
    """Wait until the proxy uses a replica again. Before that, the loss of the other one would leave none."""
    async with asyncio.timeout(60):
        for _ in repeat(None):
            is_open = await proxy.metric("autotts_replica_circuit_open", replica=replica)
            if not is_open and await proxy.metric("autotts_replica_up", replica=replica):
                return
            await asyncio.sleep(0.02)  # no event announces what the proxy has noticed


async def test_replicas_that_are_killed_in_turn_cost_no_request() -> None:
    replicas = [scripted(), scripted()]
    async with AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(AsyncExitStack()) for _ in replicas]
        for replica, server in zip(replicas, servers, strict=True):
            await server.enter_async_context(replica.serve())
        upstream = ",".join(replica.url for replica in replicas)
        url = await stack.enter_async_context(running(load(**{**SMALL, "upstream": upstream})))
        http = await stack.enter_async_context(aiohttp.ClientSession())
        work = Load(Proxy(replicas[0], url, http, None))  # type: ignore[arg-type]
        for _ in range(2):
            for replica, server in zip(replicas, servers, strict=True):
                await work.replies(REPLIES)
                await server.aclose()
                await work.replies(REPLIES)
                await server.enter_async_context(replica.serve(port=int(replica.url.rpartition(":")[2])))
                await until_used(work.proxy, replica.url)
        await work.stop()
        assert set(work.outcomes) == {(200, "", "answered"), (200, "", None)}
