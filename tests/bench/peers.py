"""Programs that need other versions of packages, each in its own virtual environment.

Proxies are measured as plain forwarders (`edge.py`), and what scales test-time compute is compared with the controllers
(`rivals.py`). The clients of agents are tested against the proxy.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

ROOT: Final = Path(sys.prefix) / "peers"


class PeerMissing(Exception):
    """A peer cannot be installed."""


@dataclass(frozen=True)
class PeerEnvironment:
    """A virtual environment with packages from PyPI."""

    name: str
    # Arguments of pip, one tuple per call. The last call installs the peer itself.
    installs: tuple[tuple[str, ...], ...]
    variables: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name} {self.installs[-1][-1].rpartition('==')[2]}"

    @property
    def folder(self) -> Path:
        """Folder of its virtual environment."""
        return ROOT / self.name.lower()

    @property
    def python(self) -> Path:
        """Python of its virtual environment."""
        return self.folder / "bin" / "python"

    def environment(self) -> dict[str, str]:
        """Return its environment variables. Only PATH is inherited, so that API keys of the user have no effect."""
        return {"PATH": os.environ["PATH"], "HOME": str(self.folder), **self.variables}

    async def install(self) -> None:
        """Install the peer unless this version is installed already. Raises PeerMissing."""
        stamp = self.folder / "installed"
        if stamp.exists() and stamp.read_text() == repr(self.installs):
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        await _run(sys.executable, "-m", "venv", str(self.folder))
        pip = str(self.folder / "bin" / "pip")
        for packages in self.installs:
            await _run(pip, "--disable-pip-version-check", "install", "--quiet", *packages)
        stamp.write_text(repr(self.installs))


@dataclass(frozen=True, kw_only=True)
class Peer(PeerEnvironment):
    """A proxy from PyPI."""

    # Returns the command that serves, given the environment's folder, the port and the backend's URL.
    serve: Callable[[Path, int, str], list[str]]


async def _run(*command: str) -> None:
    quiet, pipe = asyncio.subprocess.DEVNULL, asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdout=quiet, stderr=pipe)
    _, errors = await process.communicate()
    if process.returncode:
        lines = errors.decode(errors="replace").strip().splitlines() or ["no error message"]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])
        raise PeerMissing(f"not installed: {reason}")


def _litellm(folder: Path, port: int, backend: str) -> list[str]:
    model = {"model": "openai/null", "api_base": f"{backend}/v1", "api_key": "unused"}
    config = folder / "config.yaml"
    config.write_text(json.dumps({"model_list": [{"model_name": "null", "litellm_params": model}]}))  # JSON is YAML
    address = ["--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]
    return [str(folder / "bin" / "litellm"), "--config", str(config), *address, "--telemetry", "False"]


def _optillm(folder: Path, port: int, backend: str) -> list[str]:
    address = ["--host", "127.0.0.1", "--port", str(port), "--base-url", f"{backend}/v1"]
    return [str(folder / "bin" / "optillm"), *address, "--approach", "none", "--log", "error"]


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
"""Packages that optillm's server imports. Its full requirements, with torch, are ten times as large; its speed is
the same with them."""


def _vllm_router(folder: Path, port: int, backend: str) -> list[str]:
    address = ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(port + 1)]
    return [str(folder / "bin" / "vllm-router"), *address, "--worker-urls", backend, "--log-level", "error"]


OPTILLM: Final = Peer(
    "optillm",
    (OPTILLM_IMPORTS, ("--no-deps", "optillm==0.4.0")),
    serve=_optillm,
    variables={"OPENAI_API_KEY": "unused"},
)
ITS_HUB: Final = PeerEnvironment("its_hub", (("its_hub[lm]==1.2.0",),))
"""A library of algorithms for test-time scaling, whose self-consistency is compared with the controllers."""
PEERS: Final = (
    Peer(
        "LiteLLM",
        (("litellm[proxy]==1.106.12",),),
        serve=_litellm,
        variables={
            "LITELLM_MODE": "PRODUCTION",
            "LITELLM_LOG": "ERROR",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # otherwise it downloads prices
            "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",  # only this machine can reach it
        },
    ),
    OPTILLM,
    Peer("vllm-router", (("vllm-router==0.1.17",),), serve=_vllm_router),
)

AGENT_CLIENTS: Final = PeerEnvironment(
    "agent-clients",
    (("instructor==1.17.0", "openai-agents==0.24.0"),),
    {"OPENAI_AGENTS_DISABLE_TRACING": "1"},
)
"""Clients that need other versions of rich and mcp than vLLM does."""
ALL: Final[tuple[PeerEnvironment, ...]] = (*PEERS, AGENT_CLIENTS, ITS_HUB)


def main(names: Sequence[str]) -> int:
    """Install the named environments, or all. Print why one cannot be installed, and return exit status 1 then."""
    status = 0
    for peer in ALL:
        if not names or peer.name in names:
            try:
                asyncio.run(peer.install())
            except PeerMissing as error:
                sys.stderr.write(f"{peer}: {error}\n")
                status = 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
