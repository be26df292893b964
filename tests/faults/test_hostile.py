"""Hostile controllers against the sandbox: every attack as two users, a run without the seal, and missing layers."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from proxy.upstream.embedded import free_port
from tests.fakes import FakeVLLM, chain
from tests.faults.attack import FOLDER, attacks

pytestmark = [pytest.mark.process, pytest.mark.skipif(sys.platform != "linux", reason="only Linux seals processes")]

ROOT = Path(__file__).parents[2]
NOBODY = [
    *("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"),
    # the only capability it keeps is reading, to start a Python that only root may read
    *("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"),
]
CONTAINER = [
    *("unshare", "--mount", "--pid", "--net", "--ipc", "--uts", "--fork", "--kill-child", "--mount-proc"),
    *("sh", "-c", 'mount -t tmpfs none /tmp && exec "$@"', "sh"),
]
USERS = {"this user": [], "nobody": NOBODY}
SUITE = [sys.executable, "-m", "tests.faults.attack"]

# Outcomes allowed for an attack, by the prefix of its name. Any other outcome is a hole in the sandbox.
ENDS = {
    "raw ": {"call"},
    "frame_": {"frame", "late", "illegal", "call", "raised"},
    "loop_": {"late", "call"},
    "loop": {"late"},
    "crash_": {"dead", "late", "call", "raised"},
    "memory_": {"call", "raised"},
    "kernel_": {"call"},
    "signal_": {"call"},
    "socket_": {"call"},
    "process_": {"call", "raised"},
    "file_": {"call"},
    "folder_": {"call"},
    "limit_": {"call"},
    "channel_": {"call"},
    "environ": {"call", "harmless"},
}


def needs(*commands: str) -> None:
    if os.geteuid() != 0 or any(shutil.which(command) is None for command in commands):
        pytest.skip(f"needs root and {', '.join(commands)}")


@cache
def suite(*command: str) -> dict[str, Any]:
    environment = {**os.environ, "AUTOTTS_UPSTREAM_API_KEY": "canary"}
    done = subprocess.run(
        [*command], capture_output=True, text=True, timeout=250, check=False, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("user", USERS)
def test_no_attack_escapes_the_sandbox(user: str) -> None:
    if user == "nobody":
        needs("setpriv")
    result = suite(*USERS[user], *SUITE)
    assert result["user"] == (65534 if user == "nobody" else os.geteuid())
    outcomes = result["outcomes"]
    assert {name: outcome["message"] for name, outcome in outcomes.items() if outcome["how"] == "escaped"} == {}
    for name, outcome in outcomes.items():
        for beginning, ends in ENDS.items():
            if name.startswith(beginning):
                assert outcome["how"] in ends, (name, outcome)
                break
    assert result["grown_kib"] < 64 * 1024  # no attack made the process read anything large


def test_the_suite_has_at_least_100_attacks() -> None:
    names = attacks()
    assert len(names) >= 100
    assert len(list(FOLDER.glob("*.py"))) >= 60
    if platform.machine() == "x86_64":
        assert sum(name.startswith("raw ") for name in names) >= 50


def test_without_the_seal_the_suite_reports_escapes() -> None:
    """Run the suite in a container with namespaces, an empty /tmp, no network and an unprivileged user."""
    needs("setpriv", "unshare", "mount")
    if ROOT.is_relative_to("/tmp"):
        pytest.skip("the checkout is in /tmp, which the container hides")
    outcomes = suite(*CONTAINER, *NOBODY, *SUITE, "--open")["outcomes"]
    escaped = {name for name, outcome in outcomes.items() if outcome["how"] == "escaped"}
    assert len(escaped) >= 80
    expected = {"environ_own", "file_read", "file_write", "socket_tcp", "process_fork", "process_shell", "thread"}
    expected |= {"signal_parent", "memory_executable", "memory_mapped", "memory_owner", "limit_memory", "proc_maps"}
    assert expected <= escaped


# Missing layers of the sandbox

LAYERS = ("landlock", "seccomp")
CONTROLLER = "class Mine:\n    def __init__(self, beta): ...\n    def decide(self, state): ...\n"


def without(layer: str, *command: str) -> list[str]:
    if platform.machine() != "x86_64":
        pytest.skip("the wrapper knows the system calls of x86-64 only")
    return [sys.executable, "-m", "tests.faults.without", layer, *command]


@pytest.mark.parametrize("layer", LAYERS)
def test_doctor_fails_and_names_the_missing_layer(layer: str) -> None:
    command = without(layer, sys.executable, "-m", "proxy.cli", "doctor", "--json")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    report = json.loads(done.stdout)
    assert (done.returncode, report["sealed"]) == (1, False)
    assert layer in report["lacking"]
    other = "seccomp" if layer == "landlock" else "landlock"
    assert all(trial["held"] for trial in report["layers"][other])
    assert not any(trial["held"] for trial in report["layers"][layer])


@pytest.mark.parametrize("layer", LAYERS)
def test_evaluate_refuses_controller_files_without_a_complete_sandbox(layer: str, tmp_path: Path) -> None:
    from discovery.data.importers import format_recording_line
    from tests.discovery.evaluation.test_evaluate import question

    (tmp_path / "mine.py").write_text(CONTROLLER)
    (tmp_path / "r.jsonl").write_text(format_recording_line(question(0)))
    about = ["--recordings", str(tmp_path / "r.jsonl"), "--controllers", str(tmp_path / "mine.py")]
    command = without(layer, sys.executable, "-m", "proxy.cli", "evaluate", *about)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    assert "this machine cannot seal controllers" in done.stderr
    assert layer in done.stderr
    assert "--allow-unsandboxed" in done.stderr
    assert done.stderr.strip().count("\n") == 0


@pytest.mark.parametrize("layer", LAYERS)
async def test_serve_falls_back_to_baselines_and_names_the_missing_layer(layer: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(CONTROLLER)
    async with FakeVLLM([chain("7", 100)], 40).serve() as backend, aiohttp.ClientSession() as http:
        url = f"http://127.0.0.1:{(port := free_port())}"
        about = ["--upstream", backend.url, "--port", str(port), "--controller", str(tmp_path / "mine.py")]
        command = without(layer, sys.executable, "-m", "proxy.cli", "serve", *about, "--interval", "40", "--no-record")
        environment = {**os.environ, "AUTOTTS_FINALISE_TOKENS": "60", "AUTOTTS_PROBE_TOKENS": "8", "COLUMNS": "200"}
        serving = asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE, cwd=ROOT, env=environment)
        process = await serving
        stderr = b""
        try:
            assert process.stderr is not None
            while not stderr.rpartition(b"\n")[0].endswith(b"total_tokens)"):
                stderr += await process.stderr.readline()
            body = {"messages": [{"role": "user", "content": "hi"}], "tts": {"beta": 0}}
            async with http.post(f"{url}/v1/chat/completions", json=body) as response:
                assert response.status == 200
                assert response.headers["x-tts-fallback"] == "unsealed"
            async with http.get(f"{url}/ready") as response:
                sandbox = (await response.json())["sandbox"]
                assert (response.status, sandbox["level"]) == (200, "refused")
                assert layer in sandbox["lacking"]
            async with http.get(f"{url}/metrics") as response:
                assert "autotts_sandbox_level 0.0" in await response.text()
        finally:
            process.terminate()
            stderr += (await process.communicate())[1]
        assert "controllers from files are refused and the baseline replaces them" in " ".join(stderr.decode().split())


def test_spawning_a_sandbox_on_another_system_than_linux_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from controllers import SandboxUnavailable
    from controllers.sandbox.spawner import SandboxSpawner

    monkeypatch.setattr("controllers.sandbox.spawner.sys.platform", "darwin")
    with pytest.raises(SandboxUnavailable, match="processes can be sealed on Linux only, not on darwin"):
        SandboxSpawner().spawn()
