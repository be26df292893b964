"""Graceful shutdown on a signal: running requests finish, new ones are refused, and all records are written."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import pytest

from discovery.store import Store
from proxy.http.graceful_shutdown import ShutdownMiddleware
from proxy.upstream.embedded import free_port
from tests.fakes import MODEL, FakeVLLM
from tests.faults.processes import ignores_hangups
from tests.proxy.conftest import INTERVAL, backend
from tests.proxy.recording.test_episode_log import until

pytestmark = pytest.mark.process

__all__ = ["backend"]  # a fixture

ROOT = Path(__file__).parents[2]


class Served(NamedTuple):
    """A proxy in its own process."""

    process: asyncio.subprocess.Process
    url: str
    http: aiohttp.ClientSession

    async def ask(self, **fields: Any) -> tuple[int, Any, Any]:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "tts": {"beta": 0.5}, **fields}
        async with self.http.post(f"{self.url}/v1/chat/completions", json=body) as response:
            raw = await response.read()
            return response.status, response.headers, raw if fields.get("stream") else json.loads(raw)

    async def status(self, path: str) -> int:
        async with self.http.get(self.url + path) as response:
            await response.read()
            return response.status

    async def end(self) -> int:
        async with asyncio.timeout(30):
            return await self.process.wait()


@asynccontextmanager
async def serving(backend: FakeVLLM, tmp_path: Path, **variables: str) -> AsyncIterator[Served]:
    port = free_port()
    command = ["-m", "proxy.cli", "serve", "--upstream", backend.url, "--port", str(port), "--interval", str(INTERVAL)]
    given = {"AUTOTTS_FINALISE_TOKENS": "60", "AUTOTTS_PROBE_TOKENS": "8", **variables}
    with (tmp_path / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, *command, "--store", str(tmp_path / "s.db")),
            cwd=ROOT,
            env={**os.environ, **given},
            stdout=log,
            stderr=log,
        )
    try:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as http:
            served = Served(process, f"http://127.0.0.1:{port}", http)

            async def up() -> bool:
                assert process.returncode is None, (tmp_path / "log").read_text()
                try:
                    return await served.status("/ready") == 200
                except aiohttp.ClientConnectionError:
                    return False

            await until(up)
            yield served
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def stops(tmp_path: Path) -> list[str]:
    async with Store.open(tmp_path / "s.db") as store:
        return [episode.stop for episode in await store.episodes()]


@pytest.mark.parametrize(("sign", "stream"), [(signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGHUP, False)])
async def test_a_signal_lets_running_requests_finish_and_refuses_new_ones(
    backend: FakeVLLM, tmp_path: Path, sign: signal.Signals, stream: bool
) -> None:
    async with serving(backend, tmp_path) as served:
        backend.gate.clear()
        asking = asyncio.create_task(served.ask(stream=stream))
        await until(lambda: runs(backend))
        served.process.send_signal(sign)

        async def draining() -> bool:
            return await served.status("/ready") == 503

        await until(draining)
        seen = len(backend.requests)
        status, headers, reply = await served.ask()
        assert (status, reply["error"]["code"]) == (503, "draining")
        assert (headers["retry-after"], headers["connection"]) == ("1", "close")
        assert await served.status("/health") == 200
        assert len(backend.requests) == seen
        backend.gate.set()
        status, _, reply = await asking
        assert status == 200
        assert reply.endswith(b"data: [DONE]\n\n") if stream else reply["tts"]["stop"] == "answered"
        assert await served.end() == 0
    assert await stops(tmp_path) == ["answered"]
    assert f"{sign.name}: running requests have 60 s to end" in (tmp_path / "log").read_text()


async def test_a_request_that_outlasts_the_shutdown_is_cut_and_recorded(backend: FakeVLLM, tmp_path: Path) -> None:
    async with serving(backend, tmp_path, AUTOTTS_DRAIN_S="0.2") as served:
        backend.fault = "hang"
        asking = asyncio.create_task(served.ask())
        await backend.hanging.wait()
        served.process.send_signal(signal.SIGTERM)
        status, headers, reply = await asking
        assert (status, reply["error"]["code"], headers["retry-after"]) == (503, "draining", "1")
        assert headers["x-should-retry"] == "false"  # a retry would spend these tokens again
        assert int(headers["x-tts-tokens"]) > 0
        assert await served.end() == 0
        await backend.idle.wait()
    assert await stops(tmp_path) == ["draining"]


async def test_a_request_cut_by_the_shutdown_before_any_token_may_be_retried(backend: FakeVLLM, tmp_path: Path) -> None:
    async with serving(backend, tmp_path, AUTOTTS_DRAIN_S="0.2") as served:
        backend.gate.clear()
        asking = asyncio.create_task(served.ask())
        await until(lambda: runs(backend))
        served.process.send_signal(signal.SIGTERM)
        status, headers, reply = await asking
        assert (status, reply["error"]["code"], headers["retry-after"]) == (503, "draining", "1")
        assert "x-should-retry" not in headers
        assert await served.end() == 0


async def test_the_log_has_the_status_of_a_forwarded_request_that_the_shutdown_cuts(
    backend: FakeVLLM, tmp_path: Path
) -> None:
    async with serving(backend, tmp_path, AUTOTTS_DRAIN_S="0.2", AUTOTTS_LOG="json") as served:
        backend.gate.clear()
        body = {"model": MODEL, "prompt": "hi", "max_tokens": 4}
        asking = asyncio.create_task(served.http.post(f"{served.url}/v1/completions", json=body))
        await until(lambda: runs(backend))
        served.process.send_signal(signal.SIGTERM)
        async with await asking as response:
            assert (response.status, (await response.json())["error"]["code"]) == (503, "draining")
        assert await served.end() == 0
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines() if line.startswith("{")]
    (line,) = (line for line in lines if line["message"].startswith("POST /v1/completions"))
    assert (line["status"], line["code"]) == (503, "draining")


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/completions", {"prompt": "hi<assistant>"}),
        ("/v1/responses", {"input": "hi"}),
    ],
)
async def test_a_stream_cut_by_the_shutdown_ends_with_an_error_event(
    backend: FakeVLLM, tmp_path: Path, path: str, fields: dict[str, Any]
) -> None:
    async with serving(backend, tmp_path, AUTOTTS_DRAIN_S="0.2") as served:
        backend.fault = "hang"
        body = {"model": MODEL, "stream": True, "tts": {"beta": 0.5}, **fields}
        async with served.http.post(served.url + path, json=body) as response:
            await backend.hanging.wait()
            served.process.send_signal(signal.SIGTERM)
            lines = (await response.text()).splitlines()
        events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
        if path == "/v1/responses":
            assert events[-1]["response"]["status"] == "failed"
            events.pop()
        assert events[-1]["error"]["code"] == "draining"
        assert await served.end() == 0
        await backend.idle.wait()
    assert await stops(tmp_path) == ["draining"]


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_an_idle_proxy_exits_at_once_with_status_0(
    backend: FakeVLLM, tmp_path: Path, sign: signal.Signals
) -> None:
    async with serving(backend, tmp_path) as served:
        assert (await served.ask())[0] == 200
        served.process.send_signal(sign)
        assert await served.end() == 0
    assert await stops(tmp_path) == ["answered"]


async def test_a_proxy_under_nohup_outlives_its_terminal(backend: FakeVLLM, tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # which the process inherits, as from nohup
    try:
        async with serving(backend, tmp_path) as served:
            served.process.send_signal(signal.SIGHUP)
            assert (await served.ask())[0] == 200
            served.process.send_signal(signal.SIGTERM)
            assert await served.end() == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert await stops(tmp_path) == ["answered"]


async def test_a_second_signal_ends_the_shutdown_at_once(backend: FakeVLLM, tmp_path: Path) -> None:
    async with serving(backend, tmp_path) as served:
        backend.fault = "hang"
        asking = asyncio.create_task(served.ask())
        await backend.hanging.wait()
        served.process.send_signal(signal.SIGTERM)

        async def draining() -> bool:
            return await served.status("/ready") == 503

        await until(draining)
        served.process.send_signal(signal.SIGTERM)
        assert await served.end() == 0
        await asyncio.gather(asking, return_exceptions=True)


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGHUP])
async def test_a_hangup_after_the_first_signal_shortens_no_shutdown(
    backend: FakeVLLM, tmp_path: Path, sign: signal.Signals
) -> None:
    """A terminal that closes sends SIGHUP twice, by its shell and by the kernel, and systemd sends it after SIGTERM."""
    async with serving(backend, tmp_path, AUTOTTS_DRAIN_S="2") as served:
        backend.fault = "hang"
        asking = asyncio.create_task(served.ask())
        await backend.hanging.wait()
        served.process.send_signal(sign)

        async def draining() -> bool:
            return await served.status("/ready") == 503

        await until(draining)
        served.process.send_signal(signal.SIGHUP)
        assert ignores_hangups(served.process.pid)
        status, _, reply = await asking
        assert (status, reply["error"]["code"]) == (503, "draining")
        assert await served.end() == 0
    assert "requests were cancelled: they had not ended 2 s after the signal" in (tmp_path / "log").read_text()


async def runs(backend: FakeVLLM) -> bool:
    return backend.running > 0


async def test_the_shutdown_middleware_counts_and_cancels_running_requests() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        await asyncio.Event().wait()

    sent: list[Any] = []
    gate = ShutdownMiddleware(app)
    assert await gate.drain(0) == 0
    task = asyncio.create_task(gate({"type": "http", "path": "/v1/models"}, receive, send))
    await asyncio.sleep(0)
    gate.shut()
    assert await gate.drain(0) == 1
    await task
    assert [message.get("status") for message in sent] == [503, None]
    assert await gate.drain(0) == 0
