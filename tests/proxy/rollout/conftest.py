"""Fixtures of rollout: a registry, and a fake vLLM that can hold its requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web

from discovery.promotion.registry import Registry
from tests.fakes import FakeVLLM, chain
from tests.proxy.conftest import INTERVAL


class HeldVLLM(FakeVLLM):
    """Fake vLLM that generates nothing until `may` is set."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.may = asyncio.Event()
        self.may.set()
        self.came = asyncio.Condition()

    async def _generate(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        async with self.came:
            self.came.notify_all()
        await self.may.wait()
        return await super()._generate(request, body)

    async def waiting(self, count: int) -> None:
        """Wait until `count` requests are held."""
        async with self.came:
            await self.came.wait_for(lambda: self.running == count)


@pytest_asyncio.fixture
async def held_backend() -> AsyncIterator[HeldVLLM]:
    """Serve chains of equal length that all answer 7."""
    chains = [chain("7", 200, ["", "7"], mark=chr(97 + i % 26)) for i in range(64)]
    fake = HeldVLLM(chains, INTERVAL)
    async with fake.serve():
        yield fake


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "installed")
