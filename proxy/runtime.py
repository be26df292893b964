"""How a process of the proxy runs: its event loop, and what its garbage collector leaves alone."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable


def event_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return uvloop's event loop, which is twice as fast, or None if uvloop is not installed."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def freeze_objects() -> None:
    """Exempt the objects made at start from garbage collection, and collect rarely from here on."""
    gc.collect()
    gc.freeze()  # objects made at start are permanent; scanning them repeatedly takes a fifth of a core
    gc.set_threshold(10_000)  # reference counting frees nearly all objects of a request
