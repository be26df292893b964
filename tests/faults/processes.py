"""Run `autotts` commands in processes forked from one that has already imported everything."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import repeat
from pathlib import Path
from typing import Final

FORKER: Final = """
import json, os, signal, sys, traceback
import discovery.data.collect, discovery.promotion.gate, proxy.app, proxy.server, proxy.telemetry.logs, uvloop
from proxy.cli import main

status_files = {}

def reap(*_):
    try:
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            with open(status_files.pop(ended[0]), "w") as file:
                file.write(f"{os.waitstatus_to_exitcode(ended[1])}\\n")
    except ChildProcessError:
        pass

signal.signal(signal.SIGCHLD, reap)
for line in sys.stdin:
    out, folder, environment, arguments = json.loads(line)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    pid = os.fork()
    if not pid:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        output = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(folder)
        os.environ.update(environment)
        sys.argv = ["autotts", *arguments]
        status = 70
        try:
            main()
        except SystemExit as ending:
            status = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    status_files[pid] = out + ".status"
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
    print(pid, flush=True)
"""

URL: Final = re.compile(r"listens on (http://\S+)")


async def until(holds: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until `holds` returns true. It is polled, because no event announces what another process has done."""
    async with asyncio.timeout(seconds):
        for _ in repeat(None):
            if holds():
                return
            await asyncio.sleep(0.01)


class Command:
    """A running `autotts` command."""

    def __init__(self, pid: int, out: Path) -> None:
        self.pid = pid
        self._out = out

    @property
    def output(self) -> str:
        """Everything the command has printed, on either stream."""
        return self._out.read_text(errors="replace")

    @property
    def status(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        with suppress(FileNotFoundError):
            if text := Path(f"{self._out}.status").read_text():
                return int(text)
        return None

    @property
    def deleted(self) -> list[str]:
        """The open files of the command whose names were deleted."""
        links = []
        for entry in Path(f"/proc/{self.pid}/fd").iterdir():
            with suppress(OSError):
                links.append(os.readlink(entry))
        return [link for link in links if link.endswith("(deleted)") and ".db" in link]

    async def url(self) -> str:
        """The address `serve` listens on."""
        await until(lambda: URL.search(self.output) is not None or self.status is not None, 180)
        match = URL.search(self.output)
        assert match is not None, self.output
        return match[1]

    async def ended(self, seconds: float = 120) -> int:
        """The exit status, once there is one."""
        await until(lambda: self.status is not None, seconds)
        status = self.status
        assert status is not None
        return status

    async def signal(self, number: signal.Signals) -> int:
        """Send a signal and wait for the end."""
        os.kill(self.pid, number)
        return await self.ended()


class Forker:
    """Starts `autotts` commands."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self._process = process
        self.folder = folder
        self._count = 0
        self.started: list[Command] = []

    def start(self, *arguments: object, **environment: str) -> Command:
        """Start `autotts` with `arguments` in the folder."""
        self._count += 1
        out = self.folder / f"{self._count}.out"
        out.touch()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        order = [str(out), str(self.folder), environment, [*map(str, arguments)]]
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        self.started.append(Command(int(self._process.stdout.readline()), out))
        return self.started[-1]


@contextmanager
def forking(folder: Path) -> Iterator[Forker]:
    """Yield a Forker for the folder. At the end, commands that still run are killed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AUTOTTS_")}
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", FORKER]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as process:
        forker = Forker(process, folder)
        try:
            yield forker
        finally:
            for command_run in forker.started:
                if command_run.status is None:
                    with suppress(ProcessLookupError):
                        os.kill(command_run.pid, signal.SIGKILL)
            process.communicate()


def ignores_hangups(pid: int) -> bool:
    """Return whether a process ignores SIGHUP."""
    (mask,) = re.findall(r"^SigIgn:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return bool(int(mask, 16) >> (signal.SIGHUP - 1) & 1)
