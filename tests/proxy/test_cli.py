"""The command line: errors are one line with status 2, and the README's two snippets run as written."""

from __future__ import annotations

import asyncio
import json
import os
import re
import select
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from deploy.embedded import SERVED_MODEL_NAME
from proxy.cli import base_url, welcome
from proxy.upstream.embedded import free_port
from tests.fakes import MODEL, FakeVLLM

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[2]


def autotts(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "proxy.cli", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, **environment}
    )


@pytest.mark.parametrize(
    ("arguments", "expected_text"),
    [
        (["serve", "--beta", "nan"], "--beta must be a decimal number from 0 to 1"),
        (["serve", "--beta", "1_0"], "--beta must be a decimal number from 0 to 1"),
        (["serve", "--controller", "cmcc"], "there is no controller 'cmcc'; there are single"),
        (["serve", "--upstream", "ftp://x"], "upstream: URL scheme should be 'http' or 'https'"),
        (["demo", "--plot", "x.gif"], "must end in .png or .svg"),
        (["demo", "--plot", "/nowhere/x.png"], "there is no folder /nowhere"),
    ],
)
def test_invalid_arguments_exit_with_a_one_line_error(arguments: list[str], expected_text: str) -> None:
    done = autotts(*arguments)
    assert done.returncode == 2
    assert expected_text in done.stderr
    assert done.stderr.strip().count("\n") == 0


def test_an_invalid_environment_variable_is_named() -> None:
    done = autotts("serve", AUTOTTS_INTERVAL="many")
    assert (done.returncode, done.stderr.strip().count("\n")) == (2, 0)
    assert "interval" in done.stderr


def test_version_prints_name_and_version() -> None:
    done = autotts("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"autotts \d+\.\d+\.\d+\S*\n", done.stdout)


async def started(*arguments: str, **environment: str) -> str:
    """Run `autotts serve` until it listens, stop it and return all it wrote."""
    command = [sys.executable, "-m", "proxy.cli", "serve", "--port", "0", "--no-record", *arguments]
    process = await asyncio.create_subprocess_exec(
        *command, stderr=asyncio.subprocess.PIPE, env=os.environ | environment
    )
    assert process.stderr is not None
    written = ""
    async for line in process.stderr:
        written += line.decode()
        if line.startswith(b"print(") or b"listening on" in line:
            break
    process.terminate()
    _, rest = await process.communicate()
    assert process.returncode == 0
    return written + rest.decode()


async def test_serve_logs_its_upstream_and_shows_an_example_with_a_served_model() -> None:
    async with FakeVLLM().serve() as backend:
        written = await started("--upstream", backend.url)
    before, _, after = written.partition("AutoTTS Proxy listens on http://127.0.0.1:")
    assert f"INFO proxy: starting the proxy for the upstream {backend.url}\n" in before
    assert '-d \'{"model": "fake-model", ' in after
    assert '    model="fake-model",\n' in after
    assert "your model" not in after
    address = after.partition("\n")[0]
    assert f"Dashboard and playground: http://127.0.0.1:{address}/ui\n" in after


async def test_serve_shows_a_question_that_the_embedded_model_knows_if_the_upstream_serves_that() -> None:
    async with FakeVLLM().serve() as backend:
        backend.models = [SERVED_MODEL_NAME]
        written = await started("--upstream", backend.url)
    assert "What is the result mod 13?" in written
    assert "The right answer is 1.\n" in written
    assert "17 * 23" not in written


async def test_embedded_args_with_another_upstream_are_warned_of() -> None:
    async with FakeVLLM().serve() as backend:
        written = await started("--upstream", backend.url, AUTOTTS_EMBEDDED_ARGS="--max-model-len 512")
    assert "AUTOTTS_EMBEDDED_ARGS is ignored" in written


async def test_an_unreachable_upstream_is_warned_of_at_start() -> None:
    password = "hidden"
    written = await started("--upstream", f"http://me:{password}@127.0.0.1:9", "--model", "odd \"name's")
    assert "WARNING proxy: cannot connect to upstream http://127.0.0.1:9: " in written
    assert password not in written
    command = next(line for line in written.splitlines() if line.startswith("curl "))
    body = json.loads(shlex.split(command)[-1])
    assert body["model"] == "odd \"name's"


@pytest.mark.parametrize(
    ("model", "expected_text"), [("other", "serves no model 'other'; it serves fake-model"), (MODEL, "")]
)
async def test_a_model_the_upstream_does_not_serve_is_warned_of_at_start(model: str, expected_text: str) -> None:
    async with FakeVLLM().serve() as backend:
        written = await started("--upstream", backend.url, "--model", f"{model}@0.5" if model == MODEL else model)
    assert (expected_text in written) if expected_text else ("serves no model" not in written)


async def test_with_keys_the_example_request_has_a_placeholder_for_the_key() -> None:
    async with FakeVLLM().serve() as backend:
        written = await started("--upstream", backend.url, AUTOTTS_CLIENT_KEYS=f"alice={'0' * 64}")
    assert "-H 'authorization: Bearer YOUR_KEY'" in written
    assert 'api_key="YOUR_KEY"' in written


def test_a_settings_error_is_reported_before_the_embedded_model_starts() -> None:
    done = autotts("serve", "--port", "0", AUTOTTS_KEYS="/nowhere/keys.toml")
    assert (done.returncode, done.stderr.strip().count("\n")) == (2, 0)
    assert "/nowhere/keys.toml" in done.stderr


def test_the_address_of_the_dashboard_is_shown_if_there_is_one() -> None:
    assert "http://h:1/ui" in welcome("http://h:1", "m", is_embedded=False)
    assert "The right answer is 391.\n" in welcome("http://h:1", "m", is_embedded=False)
    assert "/ui" not in welcome("http://h:1", "m", is_embedded=False, has_ui=False)


def test_an_ipv6_address_is_bracketed_in_the_example_url() -> None:
    assert "curl http://[::1]:8400/v1/" in welcome(base_url("::1", 8400), "m", is_embedded=False)


def test_a_port_in_use_is_refused_with_advice() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = autotts("serve", "--port", str(taken.getsockname()[1]))
    assert done.returncode == 2
    assert "is in use; stop the process that listens there or use --port" in done.stderr


class Serving(NamedTuple):
    """A running `autotts serve`."""

    url: str
    process: subprocess.Popen[str]
    welcome: str


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """Run the command as a user does, with the embedded model."""
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
    """Return the README's code block that starts with `beginning`, without its language line."""
    blocks: list[str] = re.findall(r"```\w*\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return next(code for code in blocks if code.startswith(beginning))


@pytest.mark.vllm
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_curl_command_of_the_readme_gets_a_tts_reply(serving: Serving) -> None:
    command = block("curl").replace("curl", "curl -sS -D-", 1).replace("http://127.0.0.1:8400", serving.url)
    answer = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True).stdout
    assert answer.startswith("HTTP/1.1 200")
    assert "x-tts-applied: true" in answer
    assert "x-tts-beta: 0.5" in answer
    assert "\\\\boxed{" in answer


@pytest.mark.vllm
def test_serve_announces_the_start_of_the_embedded_model(serving: Serving) -> None:
    before, _, after = serving.welcome.partition("AutoTTS Proxy listens on")
    assert "starting the embedded model on vLLM for CPU; this takes 15 to 60 s" in before
    assert 'model="autotts-tiny"' in after


@pytest.mark.vllm
@pytest.mark.parametrize("source", ["README.md", "welcome"])
def test_the_python_snippets_of_readme_and_welcome_print_an_answer(serving: Serving, source: str) -> None:
    welcomed = serving.welcome[serving.welcome.index("from openai") :]
    code = welcomed if source == "welcome" else block("from openai")
    code = code.replace("http://127.0.0.1:8400", serving.url)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert re.search(r"\\boxed\{\d+\}", done.stdout)


@pytest.mark.vllm
def test_a_killed_proxy_leaves_neither_embedded_server_nor_files() -> None:
    command = [sys.executable, "-m", "proxy.cli", "serve", "--no-record", "--port", str(free_port())]
    temporary = Path(tempfile.mkdtemp(prefix="t-"))  # a short path, because sockets are created there
    environment = os.environ | {"TMPDIR": str(temporary)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("print("):
                break
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        if not children.exists():
            pytest.skip("this kernel does not list a process's children")
        child = int(children.read_text().split()[0])
        assert [path.name[:8] for path in temporary.iterdir()] == ["autotts-"]
        descriptor = os.pidfd_open(child)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
    try:
        ended = select.select([descriptor], [], [], 30)[0]
        assert ended, "the embedded model outlived the proxy"
        assert list(temporary.iterdir()) == []
    finally:
        os.close(descriptor)
        shutil.rmtree(temporary)
