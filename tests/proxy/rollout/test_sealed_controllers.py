"""Controllers from files run sealed or are refused, and a baseline continues the episode when they fail."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from itertools import repeat
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from openai import AsyncOpenAI

from controllers.loading import discovered
from controllers.sandbox import spawner as spawners
from controllers.sandbox.handle import IDLE_S
from controllers.sandbox.proof import Proof
from controllers.sandbox.spawner import SandboxSpawner
from proxy.errors import SettingsError
from proxy.rollout import failure_counter, sandboxes
from proxy.rollout.sandbox_pool import SandboxPool
from proxy.server import running
from proxy.settings import load
from tests.fakes import FakeVLLM
from tests.proxy.conftest import SERVED, SMALL, Proxy

pytestmark = pytest.mark.process

LOCKSTEP = """
from controllers import State, advance, answer, branch

class Mine:
    def __init__(self, beta: float) -> None:
        self.most = 2 + round(6 * beta)

    def decide(self, state: State):
        if not state.width:
            return [branch()] * self.most
        {later}
        return [advance(i) for i in state.active] or [answer(state.leader())]
"""
HONEST = LOCKSTEP.format(later="")
FAULTS = {
    "late": "while state.rounds == 1: pass",
    "dead": "assert state.rounds < 1 or Mine.__init__.__globals__['__builtins__']['__import__']('posix')._exit(0)",
    "call": "if state.rounds: Mine.__init__.__globals__['__builtins__']['__import__']('posix').open('/', 0)",
    "raised": "if state.rounds: raise ValueError('no idea')",
    "illegal": "if state.rounds: return [advance(99)]",
}

Serve = Callable[..., AbstractAsyncContextManager[Proxy]]


@pytest.fixture
def serve(backend: FakeVLLM, tmp_path: Path) -> Serve:
    """Return a context that runs a proxy whose default controller is a file with the given source."""

    @asynccontextmanager
    async def with_source(source: str, **settings: Any) -> AsyncIterator[Proxy]:
        path = tmp_path / "mine.py"
        path.write_text(source)
        given = {**SMALL, "controller": str(path), "decision_s": 5.0, **settings}  # generous: this machine may be busy
        async with (
            running(load(upstream=backend.url, **given)) as url,
            aiohttp.ClientSession() as http,
            AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as openai,
        ):
            yield Proxy(backend, url, http, openai)

    return with_source


@pytest.fixture(autouse=True)
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable the static check, which is only advice."""
    monkeypatch.setattr("controllers.loading.advise", lambda source: [])


async def test_a_controller_from_a_file_decides_in_a_sealed_process(serve: Serve) -> None:
    async with serve(HONEST) as proxy:
        status, headers, reply = await proxy.ask("1")
        assert status == 200, reply
        assert (headers["x-tts-controller"], headers["x-tts-branches"], headers["x-tts-stop"]) == (
            "mine",
            "8",
            "answered",
        )
        assert "x-tts-fallback" not in headers
        assert reply["tts"]["fallback"] is None
        assert await proxy.metric("autotts_sandbox_level") == 2
        async with proxy.http.get(f"{proxy.url}/ready") as response:
            assert (await response.json())["sandbox"] == {"level": "sealed", "lacking": None}


async def test_concurrent_requests_may_name_a_controller_from_a_file(serve: Serve) -> None:
    async with serve(HONEST, sandbox_pool=2) as proxy:
        replies = await asyncio.gather(*(proxy.ask("0.5", tts={"controller": "mine"}) for _ in range(8)))
        assert [(status, headers["x-tts-branches"]) for status, headers, _ in replies] == [(200, "5")] * 8
        status, _, reply = await proxy.ask("0.5", tts={"controller": "../mine.py"})
        assert status == 400
        assert reply["error"]["message"].endswith("short_m_at_k, cmc, everything, lockstep_lead, mine")


@pytest.mark.parametrize("fault", FAULTS)
async def test_the_baseline_continues_the_episode_of_a_failed_controller(serve: Serve, fault: str) -> None:
    decision_s = 2.0 if fault == "late" else 5.0
    async with serve(LOCKSTEP.format(later=FAULTS[fault]), decision_s=decision_s) as proxy:
        status, headers, reply = await proxy.ask("1")
        assert status == 200, reply
        assert (headers["x-tts-stop"], headers["x-tts-fallback"]) == ("answered", fault)
        assert headers["x-tts-branches"] == "8"  # the baseline continues the branches already open
        assert reply["choices"][0]["message"]["content"] == "It is \\boxed{7}"
        assert reply["usage"]["completion_tokens"] == proxy.backend.generated
        assert await proxy.metric("autotts_fallbacks_total", controller="mine", reason=fault) == 1
        assert await proxy.metric("autotts_decision_seconds_count", controller="adaptive_consistency") > 0


async def test_the_baseline_advances_no_more_branches_than_it_needs(serve: Serve) -> None:
    wide = LOCKSTEP.format(later=FAULTS["raised"]).replace("2 + round(6 * beta)", "40")
    async with serve(wide) as proxy:
        _, headers, reply = await proxy.ask("1")
        assert (headers["x-tts-stop"], headers["x-tts-fallback"], headers["x-tts-branches"]) == (
            "answered",
            "raised",
            "40",
        )
        assert reply["tts"]["answer"] == "7"
        assert reply["usage"]["completion_tokens"] < 40 * 100  # the shortest chain has 100 tokens


async def test_the_last_chunk_of_a_stream_has_the_fallback_reason(serve: Serve) -> None:
    async with serve(LOCKSTEP.format(later=FAULTS["raised"])) as proxy:
        stream = await proxy.openai.chat.completions.create(
            model="fake-model",
            messages=[{"role": "user", "content": "hi"}],
            extra_headers={"x-tts-beta": "1"},
            stream=True,
        )
        chunks = [chunk async for chunk in stream]
        assert chunks[-1].tts["fallback"] == "raised"  # type: ignore[attr-defined]


async def test_three_failures_quarantine_a_controller(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    async with serve(LOCKSTEP.format(later=FAULTS["illegal"])) as proxy:
        with caplog.at_level(logging.ERROR):
            reasons = [(await proxy.ask("0"))[1]["x-tts-fallback"] for _ in range(5)]
        assert reasons == ["illegal"] * 3 + ["quarantined"] * 2
        assert await proxy.metric("autotts_controller_quarantined", controller="mine") == 1
        assert "controller mine" in caplog.text
        assert "is quarantined: 3 failures" in caplog.text
        assert "x-tts-fallback" not in (await proxy.ask("0", tts={"controller": "cmc"}))[1]


async def test_failures_outside_the_window_do_not_quarantine_a_controller(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failure_counter, "WINDOW_S", 0.0)
    async with serve(LOCKSTEP.format(later=FAULTS["illegal"])) as proxy:
        assert [(await proxy.ask("0"))[1]["x-tts-fallback"] for _ in range(5)] == ["illegal"] * 5


async def test_a_controller_file_that_does_not_load_falls_back(serve: Serve) -> None:
    async with serve(HONEST + "\nraise SystemExit(3)") as proxy:
        status, headers, _ = await proxy.ask("0")
        assert (status, headers["x-tts-fallback"]) == (200, "raised")


async def test_a_disconnect_ends_the_sealed_process_of_the_request(serve: Serve) -> None:
    async with serve(LOCKSTEP.format(later="while True: pass"), decision_s=60.0) as proxy:
        asking = asyncio.create_task(proxy.ask("1"))
        while await proxy.metric("autotts_episodes_in_flight") == 0 or not proxy.backend.opened:
            pass
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        while await proxy.metric("autotts_episodes_in_flight"):
            pass
        assert await proxy.metric("autotts_fallbacks_total") == 0


@pytest.fixture
def unsealable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a machine on which the sandbox cannot be proven."""
    spawner = SandboxSpawner()
    spawner.proof = Proof(reason="no landlock")
    for module in (spawners, sandboxes):
        monkeypatch.setattr(module, "spawner", lambda: spawner)


@pytest.mark.usefixtures("unsealable")
async def test_without_a_sandbox_controller_files_fall_back_to_the_baseline(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve(HONEST) as proxy:
        status, headers, _ = await proxy.ask("1")
        assert (status, headers["x-tts-fallback"], headers["x-tts-stop"]) == (200, "unsealed", "answered")
        assert "x-tts-fallback" not in (await proxy.ask("0", tts={"controller": "cmc"}))[1]
        assert await proxy.metric("autotts_sandbox_level") == 0
        async with proxy.http.get(f"{proxy.url}/ready") as response:
            assert response.status == 200
            assert (await response.json())["sandbox"] == {"level": "refused", "lacking": "no landlock"}
        assert "controllers from files are refused and the baseline replaces them: no landlock" in caplog.text


@pytest.mark.usefixtures("unsealable")
async def test_allow_unsandboxed_runs_controllers_unsealed_and_logs_a_warning(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve(HONEST, allow_unsandboxed=True) as proxy:
        _, headers, _ = await proxy.ask("1")
        assert headers["x-tts-branches"] == "8"
        assert "x-tts-fallback" not in headers
        assert await proxy.metric("autotts_sandbox_level") == 1
        assert "NOT SANDBOXED" in caplog.text


@pytest.mark.parametrize(
    ("name", "expected_text"), [("cmc.py", "built-in controller cmc"), ("a b.py", "name the file with")]
)
def test_ambiguous_or_invalid_controller_file_names_are_refused(tmp_path: Path, name: str, expected_text: str) -> None:
    (tmp_path / name).write_text(HONEST)
    with pytest.raises(SettingsError, match=expected_text):
        load(upstream="http://127.0.0.1:1", controller=str(tmp_path / name))


async def test_every_controller_that_serve_accepts_by_name_may_be_named_by_a_request(proxy: Proxy) -> None:
    for name in (*SERVED, *discovered()):
        assert load(upstream="http://127.0.0.1:1", controller=name).controller == name
        status, headers, reply = await proxy.ask("0.5", tts={"controller": name, "answer": "boxed"})
        assert (status, headers["x-tts-controller"]) == (200, name), reply
        assert headers.get("x-tts-fallback") in (None, "unsealed")  # unsealed where the kernel cannot seal


@pytest.mark.parametrize("name", ["lockstep", "lockstep_lead@8", "nothing"])
async def test_an_unknown_controller_gets_the_same_message_in_settings_and_requests(proxy: Proxy, name: str) -> None:
    status, _, reply = await proxy.ask("0.5", tts={"controller": name})
    assert (status, reply["error"]["code"]) == (400, "unknown_controller")
    with pytest.raises(SettingsError) as caught:
        load(upstream="http://127.0.0.1:1", controller=name)
    assert str(caught.value) == f"controller: {reply['error']['message']}"
    assert "lockstep_lead" in reply["error"]["message"]


# Process deaths


def children() -> list[int]:
    """Return the process ids of all sandbox processes."""
    zygote = spawners.spawner()._zygote
    assert zygote is not None
    return [int(number) for number in Path(f"/proc/{zygote.pid}/task/{zygote.pid}/children").read_text().split()]


def state_of(process: int) -> str:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "gone"


async def until(holds: Callable[..., bool]) -> None:
    async with asyncio.timeout(60):
        for _ in repeat(None):
            if holds():
                return
            await asyncio.sleep(0.01)  # no event announces what threads and other processes have done


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> list[SandboxPool]:
    """Return a list that holds the pool of the default controller once it is created."""
    made: list[SandboxPool] = []

    def make(*about: Any) -> SandboxPool:
        made.append(SandboxPool(*about))
        return made[-1]

    monkeypatch.setattr(sandboxes, "SandboxPool", make)
    return made


async def asking_at_once(proxy: Proxy, pool: list[SandboxPool], count: int) -> list[asyncio.Task[tuple[int, Any, Any]]]:
    """Start requests and return once all their controllers are in an endless decision."""
    asked = [asyncio.create_task(proxy.ask("0")) for _ in range(count)]
    third = 3  # the third message: after the file and the opening round, the endless decision
    await until(lambda: [worker._number for worker in pool[0]._in_use] == [third] * count)
    began = {worker: worker._meter.read() for worker in pool[0]._in_use}
    await until(lambda: all(worker._meter.read().since(start).cpu > IDLE_S for worker, start in began.items()))
    return asked


ENDLESS = LOCKSTEP.format(later="while True: pass")


async def test_processes_that_die_together_count_as_one_failure(serve: Serve, pool: list[SandboxPool]) -> None:
    async with serve(ENDLESS, decision_s=60.0, sandbox_pool=0) as proxy:
        asked = await asking_at_once(proxy, pool, 4)
        for process in children():
            os.kill(process, signal.SIGKILL)
        reasons = [headers["x-tts-fallback"] for _, headers, _ in await asyncio.gather(*asked)]
        assert reasons == ["dead"] * 4
        assert await proxy.metric("autotts_controller_quarantined", controller="mine") == 0


async def test_processes_that_die_one_after_another_count_separately(serve: Serve, pool: list[SandboxPool]) -> None:
    async with serve(ENDLESS, decision_s=60.0, sandbox_pool=0) as proxy:
        for _ in range(3):
            (asked,) = await asking_at_once(proxy, pool, 1)
            (process,) = children()
            os.kill(process, signal.SIGKILL)
            assert (await asked)[1]["x-tts-fallback"] == "dead"
        assert await proxy.metric("autotts_controller_quarantined", controller="mine") == 1


async def test_the_death_of_the_zygote_is_not_counted_against_a_controller(
    serve: Serve, pool: list[SandboxPool]
) -> None:
    async with serve(ENDLESS, decision_s=60.0, sandbox_pool=2) as proxy:
        asked = await asking_at_once(proxy, pool, 4)
        zygote = spawners.spawner()._zygote
        assert zygote is not None
        zygote.kill()
        reasons = [headers["x-tts-fallback"] for _, headers, _ in await asyncio.gather(*asked)]
        assert reasons == ["disturbed"] * 4
        assert await proxy.metric("autotts_controller_quarantined", controller="mine") == 0
        assert await proxy.metric("autotts_fallbacks_total", controller="mine", reason="disturbed") == 4


async def test_processes_that_died_idle_are_not_given_to_requests(serve: Serve, pool: list[SandboxPool]) -> None:
    async with serve(HONEST, sandbox_pool=3) as proxy:
        for _ in range(4):
            await until(lambda: len(pool[0]._ready) == 3)
            idle = list(pool[0]._ready)
            for worker in idle:
                os.kill(worker.process, signal.SIGKILL)
            await until(lambda idle=idle: not any(worker.alive for worker in idle))
            assert "x-tts-fallback" not in (await proxy.ask("0"))[1]


async def test_quarantine_ends_all_running_processes_of_a_controller(serve: Serve, pool: list[SandboxPool]) -> None:
    """Processes of other requests are also ended, in the middle of their decisions."""
    source = LOCKSTEP.format(later="if self.most == 8: raise ValueError\n        while True: pass")
    async with serve(source, decision_s=60.0, sandbox_pool=2) as proxy:
        asked = await asking_at_once(proxy, pool, 2)
        for _ in range(3):
            assert (await proxy.ask("1"))[1]["x-tts-fallback"] == "raised"
        reasons = [headers["x-tts-fallback"] for _, headers, _ in await asyncio.gather(*asked)]
        assert reasons == ["quarantined"] * 2
        await until(lambda: not children())
