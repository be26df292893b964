"""Where the commands of the manual run: a folder with a store, recordings and a controller, and a running proxy.

The proxy serves a fake vLLM. In the folder, `autotts serve` starts, waits until it listens and stops again; all other
commands are forked by the command server.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sqlite3
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, NamedTuple

import aiohttp

from proxy.server import running
from proxy.settings import load
from tests.docs.command_server import PROGRAM
from tests.fakes import MODEL, FakeVLLM, chain

ROOT: Final = Path(__file__).parents[2]
ADMIN_KEY: Final = "secret"  # as the manual has it
INTERVAL: Final = 40
QUESTIONS: Final = 12  # of each split


class Workshop(NamedTuple):
    """A prepared folder to copy, and the values for the names that commands use."""

    folder: Path
    url: str  # of the running proxy
    upstream: str
    request_id: str  # of a request in the folder's store
    digest: str  # of the folder's mine.py

    def substituted(self, code: str) -> str:
        """Return a command or snippet with the names of the manual replaced by the values of this workshop."""
        names = {
            "http://127.0.0.1:8400": self.url,
            "http://gpu-machine:8000": self.upstream,
            "autotts-tiny": MODEL,
            "REQUEST_ID": self.request_id,
            "DIGEST": self.digest,
        }
        for name, value in names.items():
            code = code.replace(name, value)
        return code

    def copy(self, folder: Path, missing: tuple[str, ...] = ()) -> Path:
        """Return a copy of the prepared folder, without the files that are `missing` at first."""
        shutil.copytree(self.folder, folder)
        for name in missing:
            (folder / name).unlink()
        return folder


@asynccontextmanager
async def workshop(folder: Path, controller: str) -> AsyncIterator[Workshop]:
    """Prepare a folder and run a proxy beside it. `controller` is the code of the manual's mine.py."""
    commands = folder.with_suffix(".socket")
    _write_files(folder, controller, commands)
    chains = [chain("7" if i % 4 else "9", 100 + 17 * (i % 7), ["", "7"], mark=chr(97 + i % 26)) for i in range(64)]
    sizes = {"interval": INTERVAL, "finalise_tokens": 60, "probe_tokens": 8, "record_fraction": 0}
    async with FakeVLLM(chains, INTERVAL).serve() as backend, _command_server(commands):
        settings = load(upstream=backend.url, store=folder / "autotts.db", admin_key=ADMIN_KEY, **sizes)
        async with running(settings) as url:
            request_id = await _ask(url)
        # The proxy has ended, so all its records are in the store. The next one writes to a copy.
        served = folder.with_suffix(".db")
        with closing(sqlite3.connect(folder / "autotts.db")) as source, closing(sqlite3.connect(served)) as copy:
            source.backup(copy)
        async with running(settings.model_copy(update={"store": served})) as url:
            yield Workshop(folder, url, backend.url, request_id, sha256(controller.encode()).hexdigest())


def questions() -> Iterator[dict[str, str]]:
    """Yield questions as `autotts collect` reads them."""
    for start in range(3):
        yield {"question": f"Start with {start}. 1) Add 5. What is the result mod 13?", "reference": str(start + 5)}


def recordings() -> Iterator[dict[str, Any]]:
    """Yield lines of the recording format: questions of three splits, on which most branches are right."""
    for split in ("search", "validation", "held-out"):
        for number in range(QUESTIONS):
            branches = []
            for index in range(16):
                answer = "7" if (number + index) % 3 else str(index)
                intervals = 2 + (number + index) % 4
                probes = [None, *[answer] * (intervals - 2)]
                branches.append({"probes": probes, "tokens": intervals * INTERVAL - 5, "final": answer})
            yield {
                "question": f"question {number} of {split}",
                "model": MODEL,
                "benchmark": "sums",
                "interval": INTERVAL,
                "branches": branches,
                "reference": "7",
                "split": split,
            }


def environment(folder: Path) -> dict[str, str]:
    """Return the environment in which the commands of a page run."""
    path = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {"HOME": str(folder), "PATH": path, "PYTHONPATH": str(ROOT), "USER": "reader", "LANG": "C.UTF-8"}


def _write_files(folder: Path, controller: str, commands: Path) -> None:
    folder.mkdir()
    (folder / "mine.py").write_text(controller)
    (folder / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in recordings()))
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in questions()))
    _write_program(folder / "bin", commands)


def _write_program(folder: Path, commands: Path) -> None:
    """Write the `autotts` that pages run: this tree's, but `serve` ends once it listens."""
    folder.mkdir()
    (folder / "client.py").write_text(PROGRAM.format(path=str(commands)))
    program = folder / "autotts"
    program.write_text(
        f'#!/bin/bash\nif [ "$1" = serve ]; then exec {sys.executable} -m tests.docs.serve_once "$@"; fi\n'
        f'exec {sys.executable} -I -S {folder / "client.py"} "$@"\n'
    )
    program.chmod(0o755)


@asynccontextmanager
async def _command_server(path: Path) -> AsyncIterator[None]:
    """Run the server that forks commands, until the context ends."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.docs.command_server", str(path), stdout=asyncio.subprocess.PIPE, cwd=ROOT
    )
    assert process.stdout is not None
    try:
        assert await process.stdout.readline() == b"listening\n"
        yield
    finally:
        process.terminate()
        await process.communicate()


async def _ask(url: str) -> str:
    """Ask for an answer, give feedback on it, and return the request's id."""
    body = {"messages": [{"role": "user", "content": "What is 2 + 5?"}], "tts": {"beta": 0.5}}
    async with aiohttp.ClientSession() as http:
        async with http.post(f"{url}/v1/chat/completions", json=body) as response:
            response.raise_for_status()
            request_id = response.headers["x-request-id"]
        async with http.post(f"{url}/v1/tts/feedback", json={"request_id": request_id, "correct": True}) as response:
            response.raise_for_status()
    return request_id
