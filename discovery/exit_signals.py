"""Signals that end a command in order."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


def exit_signals() -> tuple[signal.Signals, ...]:
    """Return the signals that a service manager or a closed terminal sends.

    SIGHUP is left out if it is ignored, so that `nohup` keeps its meaning.
    """
    is_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return (signal.SIGTERM,) if is_ignored else (signal.SIGTERM, signal.SIGHUP)


def ignore_hangups() -> None:
    """Ignore SIGHUP from now on, because the process is ending.

    A terminal that closes sends it twice, by its shell and by the kernel, and systemd may send it right after SIGTERM.
    The second must neither shorten the shutdown nor end the process before it has cleaned up.
    """
    with suppress(RuntimeError):  # no event loop runs
        asyncio.get_running_loop().remove_signal_handler(signal.SIGHUP)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


async def run_interruptibly(work: Coroutine[Any, Any, T]) -> T:
    """Run `work`. A signal that ends the command cancels it in as orderly a way as an interrupt does."""
    task = asyncio.ensure_future(work)

    def end() -> None:
        ignore_hangups()
        task.cancel()

    for each in exit_signals():
        asyncio.get_running_loop().add_signal_handler(each, end)
    return await task
