"""Other people's proxies as plain pass-throughs, to be measured beside ours; each has an environment of its own."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path(sys.prefix) / "peers"


class PeerMissing(Exception):
    """It cannot be installed here."""


class Peer(NamedTuple):
    """A proxy from PyPI."""

    name: str
    installs: tuple[tuple[str, ...], ...]  # what pip is asked for, one call after another; the last is for itself
    serve: Callable[[Path, int, str], list[str]]  # its command, by its environment, its port and the URL behind it
    variables: Mapping[str, str]

    def __str__(self) -> str:
        return f"{self.name} {self.installs[-1][-1].rpartition('==')[2]}"

    @property
    def folder(self) -> Path:
        """Where its environment is."""
        return ROOT / self.name.lower()

    def environment(self) -> dict[str, str]:
        """Its variables; of ours none but where programs are, so that nobody's keys change what it does."""
        return {"PATH": os.environ["PATH"], "HOME": str(self.folder), **self.variables}

    async def install(self) -> None:
        """Unless it is there already. Raises PeerMissing."""
        stamp = self.folder / "installed"
        if stamp.exists() and stamp.read_text() == repr(self.installs):
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        await _run(sys.executable, "-m", "venv", str(self.folder))
        pip = str(self.folder / "bin" / "pip")
        for packages in self.installs:
            await _run(pip, "--disable-pip-version-check", "install", "--quiet", *packages)
        stamp.write_text(repr(self.installs))


async def _run(*command: str) -> None:
    quiet, pipe = asyncio.subprocess.DEVNULL, asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdout=quiet, stderr=pipe)
    _, wrong = await process.communicate()
    if process.returncode:
        lines = wrong.decode(errors="replace").strip().splitlines() or ["no word why"]
        why = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])
        raise PeerMissing(f"not installed: {why}")


def _litellm(folder: Path, port: int, backend: str) -> list[str]:
    model = {"model": "openai/null", "api_base": f"{backend}/v1", "api_key": "unused"}
    config = folder / "config.yaml"
    config.write_text(json.dumps({"model_list": [{"model_name": "null", "litellm_params": model}]}))  # JSON is YAML
    place = ["--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]
    return [str(folder / "bin" / "litellm"), "--config", str(config), *place, "--telemetry", "False"]


def _optillm(folder: Path, port: int, backend: str) -> list[str]:
    place = ["--host", "127.0.0.1", "--port", str(port), "--base-url", f"{backend}/v1"]
    return [str(folder / "bin" / "optillm"), *place, "--approach", "none", "--log", "error"]


OPTILLM_IMPORTS: Final = (
    "aiohttp==3.14.5",
    "cerebras_cloud_sdk==1.91.0",
    "flask==3.1.3",
    "math-verify==0.9.0",
    "networkx==3.6.1",
    "numpy==2.4.6",
    "openai==3.57.0",
    "pyyaml==6.0.4",
    "requests==2.34.2",
    "sympy==1.14.0",
    "z3-solver==4.15.4.0",
)
"""What its server imports. It asks for ten times as much, torch among it, and is no faster or slower with that."""

PEERS: Final = (
    Peer(
        "LiteLLM",
        (("litellm[proxy]==1.106.12",),),
        _litellm,
        {
            "LITELLM_MODE": "PRODUCTION",
            "LITELLM_LOG": "ERROR",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # or it would ask the network for prices
            "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",  # nobody but this machine reaches it
        },
    ),
    Peer(
        "optillm",
        (OPTILLM_IMPORTS, ("--no-deps", "optillm==0.4.0")),
        _optillm,
        {"OPENAI_API_KEY": "unused"},
    ),
)


def main(names: Sequence[str]) -> int:
    """Install the named proxies, all if none is named; say which cannot be."""
    status = 0
    for peer in PEERS:
        if not names or peer.name in names:
            try:
                asyncio.run(peer.install())
            except PeerMissing as error:
                sys.stderr.write(f"{peer}: {error}\n")
                status = 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
