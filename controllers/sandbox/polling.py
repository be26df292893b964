"""Wait for a descriptor to become ready, in a thread or in an event loop."""

from __future__ import annotations

import asyncio
import select
from typing import Any


def is_ready(descriptor: int, event: int, seconds: float = 0.0) -> bool:
    """Wait up to `seconds` until `event` is possible on a descriptor; return whether it is."""
    waiting = select.poll()
    waiting.register(descriptor, event)
    return bool(waiting.poll(max(0.0, seconds) * 1000))


async def wait_ready(descriptor: int, event: int, seconds: float) -> bool:
    """Wait like `is_ready`, without blocking the event loop."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[bool] = loop.create_future()
    reading = event == select.POLLIN
    (loop.add_reader if reading else loop.add_writer)(descriptor, _settle, done, True)
    timer = loop.call_later(seconds, _settle, done, False)
    try:
        return await done
    finally:
        timer.cancel()
        (loop.remove_reader if reading else loop.remove_writer)(descriptor)


def _settle(done: asyncio.Future[Any], result: bool) -> None:
    if not done.done():
        done.set_result(result)
