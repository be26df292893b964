"""The real stack under test: vLLM with the embedded model, a relay that spoils requests, and the proxy."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final

from discovery.promotion.registry import Registry
from proxy.admission import api_keys
from proxy.settings import EMBEDDED
from proxy.upstream.embedded import EmbeddedServer
from tests.faults.processes import URL
from tests.proxy.admission.test_api_keys import ALICE, BOB, ROOT
from tests.soak.relay import Relay
from tests.soak.server import VARIABLE

DISK_MB: Final = 64
RETIRED_S: Final = 5.0
"""Seconds for which the proxy keeps the metrics of controllers that serve no longer. By default it is ten minutes."""


class SoakStack:
    """Everything that runs, and the files that disturbances change."""

    def __init__(self, folder: Path, vllm: EmbeddedServer, relay: Relay, has_small_disk: bool) -> None:
        self.folder = folder
        self.has_small_disk = has_small_disk  # whether the store's folder can be filled
        self.vllm = vllm
        self.relay = relay
        self.registry = Registry(folder / "registry")
        self.disk = folder / "disk"
        self.store = self.disk / "store.db"
        self.keys = folder / "keys.toml"
        self.tasks = folder / "tasks"
        self.log = folder / "log"
        self.url = ""
        self.pid = 0
        self.faults: list[str] = []  # that disturbances have noticed
        self.installed = 0  # controllers from files that were canary or shadow for a while
        self.brief = Counter[str]()  # short-lived canaries: those installed, and those that have served a request

    def write_keys(self, **more: str) -> None:
        """Write the key file, with further keys by name."""
        named = {"alice": ALICE, "bob": BOB, **more}
        limits = ", tokens_per_minute = 1000000, episodes = 50 }"
        lines = [api_keys.key_file_entry(name, key).replace(" }", limits) for name, key in named.items()]
        replaced = self.keys.with_suffix(".new")
        replaced.write_text("\n".join([*lines, api_keys.key_file_entry("root", ROOT, admin=True)]))
        replaced.chmod(0o600)
        replaced.replace(self.keys)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Run the proxy, and fail if it does not end in order."""
        self.write_keys()
        variables = {
            **EMBEDDED,
            "upstream": self.relay.url,
            "keys": self.keys,
            "store": self.store,
            "registry": self.folder / "registry",
            "spill": self.folder / "spill",
            "record_fraction": 0,
            "tokens_per_minute": 10**7,
            "retired_metrics_s": RETIRED_S,
        }
        environment = {f"AUTOTTS_{name.upper()}": str(value) for name, value in variables.items()}
        kept = {name: value for name, value in os.environ.items() if not name.startswith("AUTOTTS_")}
        with self.log.open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "tests.soak.server", "serve", "--port", "0"),
                env={**kept, **environment, VARIABLE: str(self.tasks)},
                cwd=self.folder,
                stdout=log,
                stderr=log,
            )
        try:
            async with asyncio.timeout(120):
                while (listening := URL.search(self.log.read_text())) is None:
                    assert process.returncode is None, self.log.read_text()
                    await asyncio.sleep(0.05)
            self.url, self.pid = listening[1], process.pid
            yield
            process.terminate()
            async with asyncio.timeout(120):
                assert await process.wait() == 0, self.log.read_text()[-2000:]
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


@contextmanager
def small_disk(place: Path) -> Iterator[bool]:
    """Mount a small disk at a folder, and yield whether that was possible."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(place)]
    is_mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", str(place)], check=True)


@asynccontextmanager
async def running_stack(folder: Path, dice: random.Random) -> AsyncIterator[SoakStack]:
    """Yield the stack without its proxy."""
    async with AsyncExitStack() as stack:
        has_small_disk = stack.enter_context(small_disk(folder / "disk"))
        vllm = await stack.enter_async_context(EmbeddedServer())
        relay = Relay(vllm.url, dice)
        await stack.enter_async_context(relay.serve())
        yield SoakStack(folder, vllm, relay, has_small_disk)
