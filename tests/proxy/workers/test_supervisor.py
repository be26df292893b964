"""The supervisor of workers when the system lacks processes, memory or descriptors. The workers are stand-ins."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from proxy.errors import StartError
from proxy.server import listen
from proxy.settings import load
from proxy.workers import supervisor
from proxy.workers.supervisor import Supervisor
from tests.faults.processes import until

pytestmark = pytest.mark.process

WORKER = "import sys; print('up', flush=True); sys.stdin.buffer.read()"
"""Program of a worker that is up at once, and that SIGTERM or the end of its supervisor ends."""


class ScarceProcesses:
    """Starts processes, but for the attempts `refused`, counted from 1."""

    def __init__(self, *refused: int) -> None:
        self.refused = refused
        self.attempts = 0
        self.started: list[asyncio.subprocess.Process] = []
        self._start = asyncio.create_subprocess_exec

    async def __call__(self, *command: str, **options: Any) -> asyncio.subprocess.Process:
        self.attempts += 1
        if self.attempts in self.refused:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        self.started.append(await self._start(*command, **options))
        return self.started[-1]


@asynccontextmanager
async def supervised(monkeypatch: pytest.MonkeyPatch, processes: ScarceProcesses) -> AsyncIterator[asyncio.Task[None]]:
    """Yield the running supervisor of two workers, once both are up or it has ended. SIGTERM ends it."""
    monkeypatch.setattr(supervisor, "_START", WORKER)
    monkeypatch.setattr(supervisor, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(asyncio, "create_subprocess_exec", processes)
    are_up = asyncio.Event()
    supervising = Supervisor(load(upstream="http://127.0.0.1:1", workers=2), are_up.set)
    running = asyncio.create_task(supervising.run(listen("127.0.0.1", 0)))
    waiting = asyncio.create_task(are_up.wait())
    async with asyncio.timeout(60):
        await asyncio.wait((running, waiting), return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    yield running
    if not running.done():
        os.kill(os.getpid(), signal.SIGTERM)
    async with asyncio.timeout(60):
        await running


async def test_a_worker_that_cannot_be_started_again_is_tried_again_and_the_other_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    processes = ScarceProcesses(3, 4)
    async with supervised(monkeypatch, processes) as running:
        killed, other = processes.started
        killed.kill()
        await until(lambda: len(processes.started) == 3 or running.done())
        assert (running.done(), other.returncode, processes.attempts) == (False, None, 5)
    assert caplog.text.count(f"cannot be started: {os.strerror(errno.EAGAIN)}; it starts again in ") == 2
    assert [worker.returncode for worker in processes.started] == [-signal.SIGKILL, -signal.SIGTERM, -signal.SIGTERM]


async def test_a_worker_that_cannot_be_started_at_first_ends_the_server_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(StartError, match=f"^worker . cannot be started: {os.strerror(errno.EAGAIN)}$"):
        async with supervised(monkeypatch, ScarceProcesses(2)):
            pass
