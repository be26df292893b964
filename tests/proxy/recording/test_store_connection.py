"""The connection to the store can be closed while it is being opened."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from discovery.store import Store
from proxy.recording.store_connection import StoreConnection


async def test_closing_while_the_store_is_being_opened_ends_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on, plain = asyncio.Event(), asyncio.Event(), Store.open

    @asynccontextmanager
    async def slow(*args: Any, **named: Any) -> AsyncIterator[Store]:
        begun.set()
        await go_on.wait()
        async with plain(*args, **named) as store:
            yield store

    monkeypatch.setattr(Store, "open", slow)
    problems, changes = list[str](), list[bool]()
    connection = StoreConnection(tmp_path / "s.db", None, problems.append, changes.append)
    running = asyncio.create_task(connection.run())
    await begun.wait()
    connection.close()
    go_on.set()
    async with asyncio.timeout(10):
        await running
    assert (problems, changes, connection.store) == ([], [False], None)
    assert connection.tried.is_set()
