"""Ports that the server cannot listen on, and signals to a command that runs a proxy within."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Iterator

import pytest

from discovery.exit_signals import run_interruptibly
from proxy.errors import StartError
from proxy.server import listen, running
from proxy.settings import load
from tests.fakes import FakeVLLM
from tests.proxy.conftest import SMALL


class RefusingSocket(socket.socket):
    """Socket whose port needs rights that this user lacks."""

    def bind(self, _: object) -> None:
        """Refuse the address."""
        raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize(("port", "is_privileged"), [(80, True), (1024, False)])
def test_a_port_that_needs_the_rights_of_root_is_refused_with_the_way_out(
    port: int, is_privileged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "socket", RefusingSocket)
    with pytest.raises(StartError, match=f"cannot listen on 127.0.0.1:{port}: Permission denied") as caught:
        listen("127.0.0.1", port)
    assert ("; ports below 1024 need root; use --port" in str(caught.value)) is is_privileged


@pytest.fixture
def hangups() -> Iterator[None]:
    """Heed SIGHUP again after the test."""
    before = signal.getsignal(signal.SIGHUP)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hangups")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
async def test_a_signal_cancels_the_command_that_runs_a_proxy(backend: FakeVLLM, number: signal.Signals) -> None:
    async def work() -> None:
        async with running(load(upstream=backend.url, **SMALL)):
            os.kill(os.getpid(), number)
            await asyncio.sleep(10)

    with pytest.raises(asyncio.CancelledError):
        await run_interruptibly(work())
