"""Programs that a loop starts: `autotts` commands, and a proxy with the embedded model."""

from __future__ import annotations

import asyncio
import os
import secrets
import shlex
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

import aiohttp

from proxy.errors import StartError
from proxy.upstream.embedded import free_port

START_S: Final = 300.0
"""Seconds that the proxy and the embedded model may take to start."""
STOP_S: Final = 60.0
POLL_S: Final = 0.25
TAIL_LINES: Final = 5
"""Last lines of the log that an error message repeats."""


class CommandFailed(StartError):
    """An `autotts` command ended with an error."""


class CommandRunner:
    """Runs `autotts` commands as a user would, and appends their output to a log."""

    def __init__(self, log: Path, say: Callable[[str], None]) -> None:
        self.log = log
        self._say = say
        self._admin_key = secrets.token_hex(16)

    async def run(self, *arguments: str, accepted: Sequence[int] = (0,)) -> int:
        """Run `autotts ARGUMENTS` to its end and return its exit status. Raises CommandFailed for other statuses."""
        self._say(f"$ autotts {shlex.join(arguments)}")
        with self.log.open("ab") as output:
            process = await self._start(arguments, output.fileno(), {})
            try:
                status = await process.wait()
            except asyncio.CancelledError:
                await _stop(process)
                raise
        if status not in accepted:
            raise CommandFailed(f"autotts {arguments[0]} ended with status {status}: {self._last_lines()}")
        return status

    @asynccontextmanager
    async def proxy(self, settings: Mapping[str, str]) -> AsyncIterator[str]:
        """Run a proxy with the embedded model and these settings (`AUTOTTS_…`), and yield its URL.

        Raises StartError.
        """
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        self._say("$ autotts serve  # with the embedded model, which takes 15 to 60 s")
        with self.log.open("ab") as output:
            process = await self._start(("serve", "--port", str(port)), output.fileno(), settings)
            try:
                await self._until_ready(process, url)
                yield url
            finally:
                await _stop(process)

    async def _start(
        self, arguments: Sequence[str], output: int, settings: Mapping[str, str]
    ) -> asyncio.subprocess.Process:
        environment = {**os.environ, "AUTOTTS_ADMIN_KEY": self._admin_key, **settings}
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "proxy.cli", *arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
        )

    async def _until_ready(self, process: asyncio.subprocess.Process, url: str) -> None:
        try:
            async with asyncio.timeout(START_S), aiohttp.ClientSession() as session:
                while process.returncode is None:
                    with suppress(aiohttp.ClientError):
                        async with session.get(f"{url}/ready") as reply:
                            if reply.status == 200:
                                return
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise StartError(f"the proxy was not ready within {START_S:.0f} s: {self._last_lines()}") from None
        raise StartError(f"the proxy ended at once: {self._last_lines()}")

    def _last_lines(self) -> str:
        lines = self.log.read_text("utf-8", "replace").strip().splitlines()[-TAIL_LINES:]
        return f"{' / '.join(lines)} (log: {self.log})"


async def _stop(process: asyncio.subprocess.Process) -> None:
    """Stop a process as an interrupt would; kill it if that takes too long."""
    if process.returncode is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        async with asyncio.timeout(STOP_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
