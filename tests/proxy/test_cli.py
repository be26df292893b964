"""The command line: what is wrong is one line and status 2; the README's two snippets, run as written."""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from proxy.embedded import free_port

ROOT = Path(__file__).parents[2]


def autotts(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "proxy.cli", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, **environment}
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serve", "--beta", "nan"], "--beta must be a decimal number from 0 to 1"),
        (["serve", "--beta", "1_0"], "--beta must be a decimal number from 0 to 1"),
        (["serve", "--controller", "cmcc"], "there is no controller 'cmcc'; there are single"),
        (["serve", "--upstream", "ftp://x"], "upstream: URL scheme should be 'http' or 'https'"),
        (["demo", "--plot", "x.gif"], "must end in .png or .svg"),
        (["demo", "--plot", "/nowhere/x.png"], "there is no folder /nowhere"),
    ],
)
def test_bad_arguments_are_one_line(arguments: list[str], words: str) -> None:
    done = autotts(*arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.strip().count("\n") == 0


def test_a_bad_variable_is_named() -> None:
    done = autotts("serve", AUTOTTS_INTERVAL="many")
    assert (done.returncode, done.stderr.strip().count("\n")) == (2, 0)
    assert "interval" in done.stderr


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = autotts("serve", "--port", str(taken.getsockname()[1]))
    assert done.returncode == 2
    assert "is taken; stop what listens there or use --port" in done.stderr


class Serving(NamedTuple):
    """A running `autotts serve`."""

    url: str
    process: subprocess.Popen[str]
    welcome: str


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """The command as a user runs it, with the embedded model."""
    pytest.importorskip("vllm", reason="the extra `embedded` is not installed; `make test` installs it")
    command = [sys.executable, "-m", "proxy.cli", "serve", "--port", str(port := free_port())]
    store = tmp_path_factory.mktemp("served") / "autotts.db"
    environment = os.environ | {"AUTOTTS_STORE": str(store)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    welcome = ""
    for line in process.stderr:
        welcome += line
        if line.startswith("print("):
            break
    yield Serving(f"http://127.0.0.1:{port}", process, welcome)
    process.terminate()
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 0, rest
    assert "Traceback" not in rest
    with sqlite3.connect(store) as connection:
        assert connection.execute("SELECT COUNT(*) FROM episodes").fetchone()[0] >= 1
    connection.close()


def block(beginning: str) -> str:
    """The README's code block that begins so, its language line left out."""
    blocks: list[str] = re.findall(r"```\w*\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return next(code for code in blocks if code.startswith(beginning))


@pytest.mark.vllm
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_readmes_curl(serving: Serving) -> None:
    command = block("curl").replace("curl", "curl -sS -D-", 1).replace("http://127.0.0.1:8400", serving.url)
    answer = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True).stdout
    assert answer.startswith("HTTP/1.1 200")
    assert "x-tts-applied: true" in answer
    assert "x-tts-beta: 0.5" in answer
    assert "\\\\boxed{" in answer


@pytest.mark.vllm
@pytest.mark.parametrize("source", ["README.md", "welcome"])
def test_the_python_snippets(serving: Serving, source: str) -> None:
    welcomed = serving.welcome[serving.welcome.index("from openai") :]
    code = welcomed if source == "welcome" else block("from openai")
    code = code.replace("http://127.0.0.1:8400", serving.url)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert re.search(r"\\boxed\{\d+\}", done.stdout)


@pytest.mark.vllm
def test_a_killed_proxy_leaves_no_server_behind() -> None:
    command = [sys.executable, "-m", "proxy.cli", "serve", "--no-record", "--port", str(free_port())]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("print("):
                break
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        if not children.exists():
            pytest.skip("this kernel does not list a process's children")
        child = int(children.read_text().split()[0])
        descriptor = os.pidfd_open(child)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
    try:
        gone = select.select([descriptor], [], [], 30)[0]
        assert gone, "the embedded model outlived the proxy"
    finally:
        os.close(descriptor)
