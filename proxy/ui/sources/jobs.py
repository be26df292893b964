"""Offline commands that the dashboard runs: one at a time, in a process of its own that ends with the proxy."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Final

from discovery.data.atomic_files import PRIVATE
from discovery.store.databases.places import StorePlace, child_environment
from proxy.errors import BadRequest
from proxy.settings import Settings

if TYPE_CHECKING:
    from proxy.ui.page import PageContext

ENTRY: Final = "proxy.ui.sources.job_process"
TERM_S: Final = 5.0
"""Seconds that a stopped command has to end by itself."""
WHAT_IF_AT_ONCE: Final = 2
"""Replays of single requests that run at the same time."""
LOG_TAIL: Final = 2_000
"""Characters of a log that a page shows."""
_OWN_PREFIX: Final = "AUTOTTS_"
"""Variables of the proxy's own settings and keys, which a command must not inherit."""


class JobState(StrEnum):
    """State of a command."""

    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    STOPPED = "stopped"


class CommandJob:
    """A command that runs or has run."""

    def __init__(self, kind: str, name: str, log: Path, process: asyncio.subprocess.Process) -> None:
        self.kind = kind
        self.name = name
        self.log = log
        self.started = datetime.now(UTC)
        self.state = JobState.RUNNING
        self.is_stopping = False  # it was told to end, but has not ended yet
        self.process = process

    @property
    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return self.state is JobState.RUNNING

    def tail(self) -> str:
        """Return the end of its output."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - LOG_TAIL))
                return file.read(LOG_TAIL).decode(errors="replace")
        except OSError:
            return ""


class CommandJobs:
    """The command that one dashboard runs, and the latest one that it has run."""

    def __init__(self) -> None:
        self.latest: CommandJob | None = None
        self._starting = asyncio.Lock()
        self._waiting: asyncio.Task[None] | None = None

    def running(self, kind: str) -> CommandJob | None:
        """Return the command of a kind that runs now."""
        job = self.latest
        return job if job is not None and job.is_running and job.kind == kind else None

    def failed(self, kind: str) -> CommandJob | None:
        """Return the latest command if it is of this kind and failed."""
        job = self.latest
        return job if job is not None and job.state is JobState.FAILED and job.kind == kind else None

    async def start(
        self, kind: str, name: str, arguments: Sequence[str], log: Path, limit_s: float, store: StorePlace | None = None
    ) -> CommandJob:
        """Run `autotts` with arguments that may name a store; it is killed after `limit_s`.

        Raises BadRequest, also while another runs.
        """
        async with self._starting:
            if self.latest is not None and self.latest.is_running:
                raise BadRequest(
                    f"{self.latest.kind} {self.latest.name} is running; wait until it has ended, or stop it",
                    code="job_running",
                )
            try:
                descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, PRIVATE)
            except OSError as error:
                raise BadRequest(f"{log}: {error.strerror}; check AUTOTTS_UI_RUNS") from None
            try:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", ENTRY, *arguments),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=descriptor,
                    stderr=descriptor,
                    start_new_session=True,
                    env=inherited_environment(store),
                )
            finally:
                os.close(descriptor)
            self.latest = CommandJob(kind, name, log, process)
            self._waiting = asyncio.create_task(self._wait(self.latest, limit_s))
            return self.latest

    async def stop(self, kind: str) -> None:
        """Stop the command of a kind, if one runs, with all processes that it started."""
        job, waiting = self.running(kind), self._waiting
        if job is None or waiting is None:
            return
        job.is_stopping = True
        _signal(job, signal.SIGTERM)
        await asyncio.wait({waiting}, timeout=TERM_S)
        _signal(job, signal.SIGKILL)
        await asyncio.wait({waiting})

    async def close(self) -> None:
        """Kill the command that runs."""
        if self.latest is not None and self.latest.is_running:
            self.latest.is_stopping = True
            _signal(self.latest, signal.SIGKILL)
        if self._waiting is not None:
            await asyncio.wait({self._waiting})

    async def _wait(self, job: CommandJob, limit_s: float) -> None:
        """Wait until a command has ended. Processes that it left behind are killed."""
        with suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                await job.process.wait()
        _signal(job, signal.SIGKILL)
        status = await job.process.wait()
        ended = JobState.FAILED if status else JobState.FINISHED
        job.state = JobState.STOPPED if job.is_stopping else ended


class ReplaySlots:
    """Semaphores that bound how many replays of pages run at once; further ones wait."""

    def __init__(self) -> None:
        self.what_if = asyncio.Semaphore(WHAT_IF_AT_ONCE)
        self.worst_questions = asyncio.Semaphore(1)


def replay_slots_of(context: PageContext) -> ReplaySlots:
    """Return the semaphores of the dashboard that a request is sent to."""
    slots: ReplaySlots = context.request.scope["ui_host"].state.ui_replay_slots
    return slots


def jobs_of(context: PageContext) -> CommandJobs:
    """Return the commands of the dashboard that a request is sent to."""
    jobs: CommandJobs = context.request.scope["ui_host"].state.ui_jobs
    return jobs


def inherited_environment(store: StorePlace | None) -> dict[str, str]:
    """Return the environment of a command: that of the proxy without its settings and keys, with a store's password."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(_OWN_PREFIX)}
    return child_environment(store, environment=inherited)


def missing_settings(settings: Settings) -> list[str]:
    """Return the variables that must be set before a command can be started."""
    needed = {"AUTOTTS_STORE": settings.store, "AUTOTTS_UI_RUNS": settings.ui_runs}
    return [name for name, value in needed.items() if value is None]


def _signal(job: CommandJob, number: signal.Signals) -> None:
    """Send a signal to all processes of a command; they are one process group."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(job.process.pid, number)
