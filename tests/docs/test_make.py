"""The make targets that the manual describes."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench.peers import ALL
from tests.fakes import FakeVLLM
from tests.readability import ROOT

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed"),
]


def dry_run(*arguments: str, environment: Path) -> str:
    """Return the commands that make would run in a fresh checkout."""
    command = ["make", "--dry-run", "--no-print-directory", *arguments, f"VENV={environment}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout


def test_make_run_with_an_upstream_installs_neither_torch_nor_vllm(tmp_path: Path) -> None:
    commands = dry_run("run", "UPSTREAM=http://gpu-machine:8000", environment=tmp_path / "venv")
    assert "install" in commands
    assert "torch==" not in commands
    assert "[embedded]" not in commands
    assert "autotts serve --upstream 'http://gpu-machine:8000'" in commands


def test_make_run_without_an_upstream_installs_torch(tmp_path: Path) -> None:
    commands = dry_run("run", "ARGS=--port 9000 --beta 0.5", environment=tmp_path / "venv")
    assert "torch==" in commands
    assert "[embedded,search]" in commands
    assert "autotts serve  --port 9000 --beta 0.5" in commands


def test_make_test_installs_each_peer_by_itself(tmp_path: Path) -> None:
    commands = dry_run("test", environment=tmp_path / "venv")
    for name in ("LiteLLM", "agent-clients"):  # if one cannot be installed, the tests of the other still run
        assert f"-m tests.bench.peers {name} ||" in commands
        assert name in {peer.name for peer in ALL}
    assert "-m tests.proxy.api.node_client ||" in commands


def test_make_docs_installs_neither_torch_nor_vllm(tmp_path: Path) -> None:
    commands = dry_run("docs", environment=tmp_path / "venv")
    assert "torch==" not in commands
    assert "[docs]" in commands
    assert "mkdocs build --quiet --strict" in commands


async def test_make_run_with_an_upstream_starts_the_proxy_without_installing(tmp_path: Path) -> None:
    """Run `make run UPSTREAM=…` with this environment instead of one that make sets up."""
    environment = Path(sys.executable).parent.parent
    async with FakeVLLM().serve() as backend:
        process = await asyncio.create_subprocess_exec(
            "make",
            "run",
            f"UPSTREAM={backend.url}",
            f"ARGS=--port 0 --store {tmp_path / 'autotts.db'}",
            f"VENV={environment}",
            f"--old-file={environment}/proxy",
            cwd=ROOT,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
        assert process.stdout is not None
        written = ""
        async for line in process.stdout:
            written += line.decode()
            if "listens on http://" in written:
                os.killpg(process.pid, 15)
                break
        rest, _ = await process.communicate()
    assert f"starting the proxy for the upstream {backend.url}" in written
    assert "install" not in written
    assert "Traceback" not in rest.decode()
