"""Servers of this project and of others, each in a process of its own, for as long as a benchmark needs them."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import aiohttp

from proxy.upstream.embedded import free_port
from tests.bench.generator import BODY
from tests.bench.process_usage import PROC, descendants, listener

LIMIT_S: Final = 90
"""Time limit of a server's start."""


Ready = Callable[[str, aiohttp.ClientSession], Awaitable[bool]]
"""Returns whether the server at a URL is ready."""


class ServerFailed(Exception):
    """A server did not start, or returned an invalid response."""


class ServerProcess(NamedTuple):
    """A server that runs."""

    url: str
    pid: int


async def lists_models(url: str, http: aiohttp.ClientSession) -> bool:
    """Return whether a server lists its models."""
    async with http.get(f"{url}/v1/models") as response:
        return response.status == 200


async def answers_chat(url: str, http: aiohttp.ClientSession) -> bool:
    """Return whether a server answers a chat request of the load generator."""
    async with http.post(f"{url}/v1/chat/completions", json=BODY) as response:
        return response.status == 200


async def chat(http: aiohttp.ClientSession, url: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the reply to a chat request. Raises ServerFailed if its status is not 200."""
    async with http.post(f"{url}/v1/chat/completions", json=body) as response:
        reply: dict[str, Any] = await response.json()
        if response.status != 200:
            raise ServerFailed(f"{url} answered {response.status}: {str(reply)[:500]}")
        return reply


@asynccontextmanager
async def own_module(module: str, *arguments: str) -> AsyncIterator[ServerProcess]:
    """Run a module of `tests.bench` that serves on the port that follows its arguments. Raises ServerFailed."""
    port = free_port()
    name, *rest = arguments
    async with served(port, [sys.executable, "-m", module, name, str(port), *rest], settings_environment({})) as server:
        yield server


@asynccontextmanager
async def own_proxy(
    upstream: str,
    settings: Mapping[str, str] = MappingProxyType({}),
    ready: Ready = answers_chat,
    program: Sequence[str] = ("proxy.cli",),
) -> AsyncIterator[ServerProcess]:
    """Run a proxy with these settings and without a store, as `served` does. Raises ServerFailed.

    `program` is the module of its command line, with arguments of its own.
    """
    port = free_port()
    arguments = ["--port", str(port), "--upstream", upstream, "--no-record"]
    command = [sys.executable, "-m", *program, "serve", *arguments]
    async with served(port, command, settings_environment(settings), ready=ready) as server:
        yield server


def settings_environment(settings: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a proxy with these settings."""
    given = {f"AUTOTTS_{name.upper()}": value for name, value in settings.items()}
    return os.environ | {"COVERAGE_PROCESS_START": ""} | given


@asynccontextmanager
async def served(
    port: int,
    command: Sequence[str],
    environment: Mapping[str, str],
    folder: Path | None = None,
    ready: Ready = answers_chat,
) -> AsyncIterator[ServerProcess]:
    """Run a server, wait until it is `ready`, and end it afterwards. Raises ServerFailed."""
    quiet = asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(*command, stdout=quiet, stderr=quiet, env=environment, cwd=folder)
    url = f"http://127.0.0.1:{port}"
    try:
        await _wait_until_ready(url, process, partial(_answers_itself, port, process.pid, ready))
        yield ServerProcess(url, process.pid)
    finally:
        await terminate(process)


async def _answers_itself(port: int, pid: int, ready: Ready, url: str, http: aiohttp.ClientSession) -> bool:
    """Return whether a server is ready, and is the process `pid`: another one may have taken the port meanwhile."""
    if not await ready(url, http):
        return False
    try:
        return not PROC.exists() or listener(port) in (pid, *descendants(pid))
    except LookupError:
        return False


async def _wait_until_ready(url: str, process: asyncio.subprocess.Process, ready: Ready) -> None:
    loop = asyncio.get_running_loop()
    end = loop.time() + LIMIT_S
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(10)) as http:
        while loop.time() < end and process.returncode is None:
            try:
                if await ready(url, http):
                    return
            except (aiohttp.ClientError, TimeoutError):
                pass
            await asyncio.sleep(0.1)
    raise ServerFailed("the server did not start")


async def terminate(process: asyncio.subprocess.Process) -> None:
    """End a process: by SIGTERM, or after ten seconds by SIGKILL."""
    if process.returncode is None:
        process.terminate()
        try:
            async with asyncio.timeout(10):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
