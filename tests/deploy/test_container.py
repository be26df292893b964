"""The image's commands run as uid 65534 with a read-only root, and the sandbox works there."""

from __future__ import annotations

import asyncio
import json
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from proxy.upstream.embedded import free_port
from tests.deploy.build_context import install
from tests.deploy.container import NOBODY, SECRETS, Container, lacking, started
from tests.deploy.dockerfile import image
from tests.fakes import FakeVLLM, chain
from tests.readability import ROOT

pytestmark = [pytest.mark.process, pytest.mark.slow]

WRITING = """
import errno, json, pathlib
found = {}
for folder in ("/", "/usr", "/etc", "/opt/autotts", "/dev", "/run/secrets", "/data", "/tmp"):
    try:
        (pathlib.Path(folder) / "written").write_text("x")
        found[folder] = "written"
    except OSError as error:
        found[folder] = errno.errorcode[error.errno]
print(json.dumps(found))
"""
DEFUNCT = """
import pathlib
stats = [path.read_text() for path in pathlib.Path("/proc").glob("[0-9]*/stat")]
print(sum(text.rpartition(")")[2].split()[0] == "Z" for text in stats))
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the project as the image has it: installed from the build context."""
    if reason := lacking():
        pytest.skip(reason)
    target = tmp_path_factory.mktemp("project")
    install(target, tmp_path_factory.mktemp("build"))
    target.chmod(0o755)
    return target


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    """Return a folder with a key file and a controller that programs wrote. The key is `key`."""
    folder = tmp_path / "secrets"
    folder.mkdir(mode=0o755)
    (folder / "keys.toml").write_text(f'alice = {{ sha256 = "{hash_of("key")}" }}\n')
    shutil.copy(ROOT / "controllers/discovered/lockstep_lead.py", folder / "mine.py")
    for file in folder.iterdir():
        file.chmod(0o444)
    return folder


def hash_of(key: str) -> str:
    from proxy.admission.api_keys import hash_key

    return hash_key(key)


async def healthy(container: Container) -> None:
    """Wait until the image's health check passes, as the runtime would."""
    check = image("proxy").health_check
    async with asyncio.timeout(120):
        while not await asyncio.to_thread(container.passes, check):
            assert container.process.poll() is None, container.output


async def test_the_image_serves_an_episode_of_a_sandboxed_controller(
    project: Path, tmp_path: Path, secrets: Path
) -> None:
    port = free_port()
    chains = [chain("7", 100 + 7 * number, mark="ab"[number % 2]) for number in range(64)]
    async with FakeVLLM(chains, 40).serve() as backend, aiohttp.ClientSession() as http:
        settings = {
            "AUTOTTS_UPSTREAM": backend.url,
            "AUTOTTS_PORT": str(port),
            "AUTOTTS_KEYS": f"{SECRETS}/keys.toml",
            "AUTOTTS_CONTROLLER": f"{SECRETS}/mine.py",
            "AUTOTTS_INTERVAL": "40",
            "AUTOTTS_PROBE_TOKENS": "8",
            "AUTOTTS_FINALISE_TOKENS": "60",
        }
        with started(image("proxy"), project, tmp_path, settings, secrets) as container:
            await healthy(container)
            url, keys = f"http://127.0.0.1:{port}", {"authorization": "Bearer key"}
            status = container.status()
            assert set(status["Uid"].split()) == set(status["Gid"].split()) == {str(NOBODY)}
            assert (status["CapEff"], status["CapBnd"], status["NoNewPrivs"]) == ("0" * 16, "0" * 16, "1")
            assert status["NSpid"].split()[-1] == "1"

            written = json.loads(container.run("python", "-c", WRITING).stdout)
            assert {folder for folder, how in written.items() if how == "written"} == {"/data", "/tmp"}
            assert {how for folder, how in written.items() if folder not in ("/data", "/tmp")} == {"EROFS"}

            async with http.get(f"{url}/ready", headers=keys) as response:
                assert (await response.json())["sandbox"] == {"level": "sealed", "lacking": None}
            reply = await ask(http, url, keys)
            assert reply["tts"]["controller"] == "mine", reply["tts"]
            assert reply["tts"].get("fallback") is None
            assert "7" in reply["choices"][0]["message"]["content"]
            async with http.get(f"{url}/metrics") as response:
                assert response.status == 401  # Prometheus needs a key of its own
            assert container.run("python", "-c", DEFUNCT).stdout.strip() == "0"

            assert container.run("kill", "-TERM", "1").returncode == 0
            assert await asyncio.to_thread(container.process.wait, 60) == 0, container.output
    store = tmp_path / "data/autotts.db"
    assert store.stat().st_uid == NOBODY
    assert stat.S_IMODE(store.stat().st_mode) & 0o077 == 0
    listing = [sys.executable, "-m", "proxy.cli", "requests", "list", "--store", str(store)]
    counted = await asyncio.to_thread(subprocess.run, listing, capture_output=True, text=True, timeout=60, check=False)
    assert "mine" in counted.stdout, counted.stderr


async def ask(http: aiohttp.ClientSession, url: str, headers: dict[str, str]) -> Any:
    body = {"model": "fake-model", "messages": [{"role": "user", "content": "hi"}], "tts": {"beta": 0.5}}
    async with http.post(f"{url}/v1/chat/completions", json=body, headers=headers) as response:
        assert response.status == 200, await response.text()
        return await response.json()


def test_without_keys_the_image_does_not_start(project: Path, tmp_path: Path, secrets: Path) -> None:
    settings = {"AUTOTTS_UPSTREAM": "http://127.0.0.1:9", "AUTOTTS_PORT": str(free_port())}
    with started(image("proxy"), project, tmp_path, settings, secrets) as container:
        assert container.process.wait(60) == 2
        assert "--allow-anonymous" in container.output


def test_doctor_finds_every_layer_of_the_sandbox(project: Path, tmp_path: Path, secrets: Path) -> None:
    with started(image("proxy"), project, tmp_path, {}, secrets, ["doctor"]) as container:
        assert container.process.wait(60) == 0, container.output
        assert "landlock" in container.output.lower()
