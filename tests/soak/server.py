"""`autotts` that lists its asyncio tasks and its threads that start sandboxes, a line each.

SIGUSR1 writes their names to the file in AUTOTTS_SOAK_TASKS. Other pools start their threads when they need them first.
The variable's name is removed before the settings are read.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Final

from proxy.cli import main

VARIABLE: Final = "AUTOTTS_SOAK_TASKS"
MAKER: Final = "thread that starts sandboxes"

if __name__ == "__main__":
    target = Path(os.environ.pop(VARIABLE))

    def write(number: int, frame: FrameType | None) -> None:
        tasks = list(asyncio.tasks._all_tasks)  # type: ignore[attr-defined]  # of the loop, which this may interrupt
        temporary = target.with_suffix(".new")
        names = sorted(str(getattr(task.get_coro(), "__qualname__", task)) for task in tasks if not task.done())
        makers = [MAKER for thread in threading.enumerate() if thread.name.startswith("sandbox-make")]
        temporary.write_text("\n".join([*names, *makers]))
        temporary.replace(target)

    signal.signal(signal.SIGUSR1, write)
    main()
