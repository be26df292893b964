"""The embedded model as a child process: started on loopback, restarted if it dies, stopped with the proxy."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final

import aiohttp

from deploy.embedded.server import FOLDER
from discovery.data.atomic_files import create_exclusively
from proxy.errors import StartError

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 300
STOP_TIMEOUT_S = 15
POLL_S = 0.25
FIRST_WAIT_S = 1.0
LOG: Final = "server.log"
LONGEST_FOLDER: Final = 68
"""Maximum characters of the temporary folder's path.

vLLM puts sockets with names of 37 characters into it, and the kernel accepts socket paths of 107 characters.
"""
MOST_RESTARTS = 5
"""Maximum number of failed restarts in a row. The wait doubles after each; a healthy start resets the count."""


class EmbeddedServer:
    """Child process that runs `deploy.embedded.server` on a free port of 127.0.0.1.

    Use it as an async context manager. Entering waits until the server is healthy, or raises StartError with a one-line
    reason. Leaving stops the server. `args` are further flags of `vllm serve`; they override the defaults.

    The log and temporary files are in a private folder (mode 0700), which is removed when the server stops.
    """

    def __init__(
        self,
        command: list[str] | None = None,
        port: int | None = None,
        *,
        args: Sequence[str] = (),
        on_restart: Callable[[], object] = lambda: None,
    ) -> None:
        self.port = port or free_port()
        self.restarted = asyncio.Event()  # set when the server has died and is healthy again
        self._on_restart = on_restart  # called when `restarted` is set
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = command or [sys.executable, "-m", "deploy.embedded.server", "--port", str(self.port), *args]
        self._process: asyncio.subprocess.Process | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._folder: Path | None = None  # of the log and temporary files

    @property
    def pid(self) -> int | None:
        """Process id of the child; None while it is not running."""
        return None if self._process is None else self._process.pid

    @property
    def watching(self) -> asyncio.Task[None]:
        """Task that restarts the child. It ends after MOST_RESTARTS failures in a row."""
        if self._watcher is None:
            raise RuntimeError("the server has not been started")
        return self._watcher

    async def __aenter__(self) -> EmbeddedServer:
        await self._start()
        self._watcher = asyncio.create_task(self._watch())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
            with suppress(asyncio.CancelledError):
                await self._watcher
        await self._stop()

    async def _start(self) -> None:
        self._remove_folder()
        try:
            self._folder = Path(tempfile.mkdtemp(prefix="autotts-"))  # mode 0700, a random name
            with create_exclusively(self._folder / LOG, 0o600) as log:
                self._process = await asyncio.create_subprocess_exec(
                    *self._command,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=_environment(self._folder),
                    start_new_session=True,  # signals of a terminal come only through the proxy
                )
        except OSError as error:
            self._remove_folder()
            raise StartError(f"the embedded model cannot start: {error.strerror}: {error.filename}") from None
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await self._healthy()
        except TimeoutError:
            last_line = self._last_line()  # stopping removes the log
            await self._stop()
            raise StartError(
                f"the embedded model was not healthy within {START_TIMEOUT_S} s; the last line of its log: {last_line}"
            ) from None
        except (StartError, asyncio.CancelledError):
            await self._stop()
            raise

    async def _healthy(self) -> None:
        """Return when the server answers; raise StartError when its process ends first."""
        process = self._process
        async with aiohttp.ClientSession() as session:
            while process is not None and process.returncode is None:
                with suppress(aiohttp.ClientError):
                    async with session.get(f"{self.url}/health") as response:
                        if response.status == 200:
                            return
                await asyncio.sleep(POLL_S)
        raise StartError(self._last_line())

    def _last_line(self) -> str:
        lines: list[str] = []
        if self._folder is not None:
            lines = (self._folder / LOG).read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "the embedded model exited without a message"

    async def _watch(self) -> None:
        """Restart the server whenever it exits, until that fails too often."""
        failures = 0
        while failures < MOST_RESTARTS:
            if self._process is not None:
                self.restarted.clear()
                code = await self._process.wait()
                logger.error(
                    "the embedded model exited with status %s; restarting it; the last line of its log: %s",
                    code,
                    self._last_line(),
                )
            await asyncio.sleep(FIRST_WAIT_S * 2**failures)
            try:
                await self._start()
                failures = 0
                self.restarted.set()
                self._on_restart()
            except StartError as error:
                failures += 1
                logger.error("cannot restart the embedded model: %s", error)
        logger.critical(
            "the embedded model failed to restart %s times in a row; giving up; restart the proxy", MOST_RESTARTS
        )

    async def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await process.wait()
        except TimeoutError:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        self._remove_folder()

    def _remove_folder(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


def _environment(folder: Path) -> dict[str, str]:
    """Return the child's environment. Temporary files go to `folder` unless socket paths would be too long."""
    variables = {**os.environ, FOLDER: str(folder)}
    return variables if len(str(folder)) > LONGEST_FOLDER else {**variables, "TMPDIR": str(folder)}


def free_port() -> int:
    """Return a port of 127.0.0.1 that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
