"""Run the functions of replies in sealed processes, one process for each reply.

Threads of this module wait for the processes, so that no more of them run at once than there are threads.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from typing import Final, Protocol

from controllers.errors import BadController, BoundaryViolation, MachineDisturbed, SandboxUnavailable
from controllers.sandbox.deadline import Clock
from controllers.sandbox.handle import NICE
from controllers.sandbox.spawner import spawner

logger = logging.getLogger(__name__)

RUN_S: Final = 1.0
"""Seconds of processor time after which a process is killed. The seal limits its memory."""
BUDGET_S: Final = 10.0
"""Seconds that the runs of one request may take, of which each counts as RUN_S at most, however busy the machine is.

After that no more of its replies are run.
"""
THREADS: Final = 2
"""Number of processes that run at once, for all requests."""


class FunctionRunner(Protocol):
    """Calls functions of untrusted code."""

    async def run(self, blocks: Sequence[str], function: str, inputs: Sequence[str]) -> Sequence[str] | None:
        """Return the outcome for each of `inputs`; None if the code cannot be run, or was killed."""
        ...


class SealedRunner:
    """Runs the functions of one request in sealed processes, and nowhere else."""

    def __init__(self) -> None:
        self._left_s = BUDGET_S

    async def run(self, blocks: Sequence[str], function: str, inputs: Sequence[str]) -> Sequence[str] | None:
        """Implement FunctionRunner. A run that is cancelled ends by itself within its limit."""
        return await asyncio.get_running_loop().run_in_executor(_threads(), self._run, blocks, function, inputs)

    def _run(self, blocks: Sequence[str], function: str, inputs: Sequence[str]) -> Sequence[str] | None:
        if self._left_s <= 0:
            return None
        started = time.monotonic()
        try:
            handle = spawner().spawn(RUN_S, Clock.CPU)
            try:
                with suppress(OSError):
                    os.setpriority(os.PRIO_PROCESS, handle.process, os.getpriority(os.PRIO_PROCESS, 0) + NICE)
                return handle.call(blocks, function, inputs)
            finally:
                handle.close()
        except SandboxUnavailable as error:
            self._left_s = 0
            logger.warning("functions in replies are not run: %s", error)
        except (BadController, BoundaryViolation) as error:
            logger.debug("a function in a reply is not compared: %s", error)
        except MachineDisturbed as error:
            logger.warning("a function in a reply could not be run: %s", error)
        finally:
            self._left_s -= min(RUN_S, time.monotonic() - started)
        return None


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS, thread_name_prefix="code")
