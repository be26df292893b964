"""The process of the embedded server: start, restart, stop and errors, with a stand-in command."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import aiohttp
import pytest

from proxy.errors import StartError
from proxy.server import Server, listen
from proxy.settings import load
from proxy.upstream import embedded
from proxy.upstream.embedded import EmbeddedServer, free_port
from tests.fakes import FakeVLLM

pytestmark = pytest.mark.process

SERVER = """
import http.server, sys
class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *args): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Healthy).serve_forever()
"""


def stand_in(script: str, on_restart: Callable[[], object] = lambda: None) -> EmbeddedServer:
    port = free_port()
    return EmbeddedServer([sys.executable, "-c", script, str(port)], port=port, on_restart=on_restart)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def folder_and_log(temporary: Path) -> tuple[Path, Path]:
    """Return the temporary folder of the running server and the log file in it."""
    (folder,) = [path for path in temporary.iterdir() if path.is_dir()]
    (log,) = folder.iterdir()
    return folder, log


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


async def test_signals_of_a_terminal_reach_the_server_only_through_the_proxy() -> None:
    """Otherwise ctrl-C or a closed terminal would end it at once, under the requests that the proxy lets end."""
    async with stand_in(SERVER) as server:
        assert server.pid is not None
        assert os.getsid(server.pid) == server.pid != os.getsid(0)


@pytest.mark.process
async def test_the_server_runs_as_long_as_its_context() -> None:
    async with stand_in(SERVER) as server:
        pid = server.pid
        assert pid is not None
        async with aiohttp.ClientSession() as http, http.get(f"{server.url}/health") as response:
            assert response.status == 200
    assert not alive(pid)
    assert server.pid is None


@pytest.mark.process
async def test_the_last_line_of_a_server_that_exits_at_start_is_the_error() -> None:
    with pytest.raises(StartError, match=r"^this CPU has no AVX2$"):
        async with stand_in("import sys; print('noise', flush=True); sys.exit('this CPU has no AVX2')"):
            pass


@pytest.mark.process
async def test_a_server_that_exits_without_output_raises_start_error() -> None:
    with pytest.raises(StartError, match="exited without a message"):
        async with stand_in("pass"):
            pass


@pytest.mark.process
async def test_a_server_not_healthy_in_time_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "START_TIMEOUT_S", 0.2)
    server = stand_in("import time; time.sleep(60)")
    with pytest.raises(StartError, match=r"not healthy within 0\.2 s"):
        await server.__aenter__()
    assert server.pid is None


@pytest.mark.process
async def test_a_server_that_ignores_sigterm_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "STOP_TIMEOUT_S", 0.2)
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SERVER
    async with stand_in(stubborn) as server:
        pid = server.pid
    assert pid is not None
    assert not alive(pid)


@pytest.mark.process
async def test_a_missing_program_raises_start_error() -> None:
    with pytest.raises(StartError, match="cannot start"):
        async with EmbeddedServer(["/nowhere/python"]):
            pass


async def test_a_full_disk_at_start_raises_start_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device", "/tmp/x")

    monkeypatch.setattr(embedded, "create_exclusively", full)
    with pytest.raises(StartError, match="No space left on device"):
        async with stand_in(SERVER):
            pass


@pytest.fixture
def temporary() -> Iterator[Path]:
    """Yield a folder whose path is short enough for sockets in it."""
    with tempfile.TemporaryDirectory(prefix="t-") as folder:
        yield Path(folder)


@pytest.mark.process
async def test_the_files_of_the_server_are_in_a_private_temporary_folder(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    precious = temporary / "precious"
    precious.write_text("keep")
    server = stand_in("import os, tempfile; print(tempfile.gettempdir(), flush=True)\n" + SERVER)
    (temporary / f"autotts-embedded-{server.port}.log").symlink_to(precious)
    before = os.umask(0)
    try:
        async with server:
            folder, log = folder_and_log(temporary)
            assert (mode(folder), mode(log)) == (0o700, 0o600)
            assert log.read_text().strip() == str(folder)  # the server's own temporary files go there too
    finally:
        os.umask(before)
    assert precious.read_text() == "keep"
    assert not folder.exists()


def test_a_folder_too_deep_for_sockets_is_not_set_as_tmpdir() -> None:
    short, deep = Path("/tmp/autotts-12345678"), Path("/", "d" * 80, "autotts-12345678")
    assert embedded._environment(short)["TMPDIR"] == str(short)
    assert embedded._environment(deep).get("TMPDIR") == os.environ.get("TMPDIR")


@pytest.mark.process
async def test_a_killed_server_is_restarted_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "FIRST_WAIT_S", 0.01)
    calls: list[str] = []
    async with stand_in(SERVER, lambda: calls.append("restarted")) as server:
        first = server.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        async with asyncio.timeout(10):
            await server.restarted.wait()
        assert server.pid not in (None, first)
        assert calls == ["restarted"]
        async with aiohttp.ClientSession() as http, http.get(f"{server.url}/health") as response:
            assert response.status == 200


@pytest.mark.process
async def test_a_server_that_keeps_failing_to_restart_is_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(embedded, "FIRST_WAIT_S", 0.001)
    marker = tmp_path / "ran"
    once = f"import os, sys\nif os.path.exists({str(marker)!r}): sys.exit('worn out')\nopen({str(marker)!r}, 'w')\n"
    async with stand_in(once + SERVER) as server:
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        async with asyncio.timeout(20):
            await server.watching
    assert "giving up" in caplog.text
    assert "worn out" in caplog.text


@pytest.mark.vllm
async def test_extra_flags_are_passed_to_vllm() -> None:
    pytest.importorskip("vllm", reason="the extra `embedded` is not installed; `make test` installs it")
    with pytest.raises(StartError, match=r"unrecognized arguments: --no-such-flag"):
        async with EmbeddedServer(args=("--no-such-flag",)):
            pass


async def test_a_restart_of_the_embedded_server_closes_the_circuit_breaker() -> None:
    async with FakeVLLM().serve() as backend:
        server = Server(load(upstream=backend.url))
        server.take_restart()  # before the server runs this does nothing
        with listen("127.0.0.1", 0) as listening:
            task = asyncio.create_task(server.serve(sockets=[listening]))
            await server.up.wait()
            breaker = server._app.state.service.engine.breaker
            while not breaker.fail_to_connect():
                pass
            assert not breaker.is_closed
            server.take_restart()
            assert breaker.is_closed
            server.should_exit = True
            await task
