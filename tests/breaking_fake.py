"""A fake vLLM that breaks off its completions, so that another one must continue them by their token ids."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import aiohttp
from aiohttp import web

from proxy.telemetry.metrics import Metrics
from proxy.upstream.client import UpstreamClient
from proxy.upstream.fleet.fleet import Fleet
from proxy.upstream.fleet.fleet_client import FleetClient
from proxy.upstream.fleet.replica import Replica
from proxy.upstream_observer import UpstreamObserver
from tests.fakes import MODEL, Chain, FakeVLLM


class BreakingVLLM(FakeVLLM):
    """A fake vLLM that breaks off every completion but those that continue one that it, or a sibling, broke off."""

    def __init__(self, chains: Sequence[Chain], interval: int, sibling: BreakingVLLM | None = None) -> None:
        super().__init__(chains, interval)
        self.first = 20
        self.broken: set[tuple[int, ...]] = sibling.broken if sibling else set()  # prompts with what was sent
        self.always: str | None = None  # fault of all completions instead; empty for none
        self._sibling = sibling

    async def _generate(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
        is_rest = any(tuple(prompt) in self.broken for prompt in prompts)
        self.fault = "" if is_rest or isinstance(body["prompt"], str) else "cut"
        if self.always is not None and not isinstance(body["prompt"], str):
            self.fault = self.always
        return await super()._generate(request, body)

    def _write(self, prompt: list[int], body: dict[str, Any]) -> tuple[list[int], str]:
        if self._sibling is not None:  # together they open the chains in order
            self.opened = self._sibling.opened
        ids, finish = super()._write(prompt, body)
        if self._sibling is not None:
            self._sibling.opened = self.opened
        if self.fault:
            self.broken.add((*prompt, *ids[: self.first_of(ids)]))
        return ids, finish


@asynccontextmanager
async def breaking_fleet(
    chains: Sequence[Chain], interval: int, size: int = 3
) -> AsyncIterator[tuple[FleetClient, list[BreakingVLLM]]]:
    """Yield a client of replicas each of whose calls breaks off, and the replicas."""
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession())
        fakes: list[BreakingVLLM] = []
        for _ in range(size):
            fakes.append(BreakingVLLM(chains, interval, *fakes[:1]))
            await stack.enter_async_context(fakes[-1].serve())
        members = [Replica(UpstreamClient(fake.url, session)) for fake in fakes]
        client = FleetClient(Fleet(members, 1, Metrics()), UpstreamObserver(), 60)
        stack.push_async_callback(client.close)
        yield client.route(MODEL, bytes), fakes
