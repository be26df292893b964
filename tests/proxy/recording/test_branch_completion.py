"""Sampled branches are completed in the background: within a budget, only when idle, unbilled and counted."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from controllers import branch
from discovery.data.recordings import intern_answers
from proxy.admission.token_budget import GRAIN_S, TokenWindow
from proxy.environment.live_environment import LiveEnvironment
from proxy.probe_templates import LEAD
from proxy.recording.branch_completion import HOUR_S, MAX_PENDING, BranchCompleter
from proxy.recording.store_writer import StoreWriter
from proxy.types import EnvironmentLimits, Prompt
from proxy.upstream.client import UpstreamClient
from tests.fakes import ASSISTANT, LONGEST_CLOSING, MODEL, FakeVLLM
from tests.proxy.conftest import INTERVAL, Proxy, backend
from tests.proxy.recording.test_episode_log import ADMIN, call, episodes, recordings, serving, until

__all__ = ["backend"]  # a fixture

VOTING = {"controller": "sc@2", "answer": "boxed"}
EVERYTHING = {"controller": "everything@1", "answer": "boxed"}


class Silent(FakeVLLM):
    """Fake vLLM that may hide its metrics and answers forwarded chats only once `held` is set."""

    def __init__(self, like: FakeVLLM) -> None:
        super().__init__(like.chains, like.interval)
        self.hides_metrics = True
        self.asked, self.held = asyncio.Event(), asyncio.Event()

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(text="") if self.hides_metrics else await super()._metrics(request)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        self.asked.set()
        await self.held.wait()
        return await super()._chat(request)


class Looks(list[bool]):
    """Results of the completer's checks whether it has to wait."""

    def __init__(self) -> None:
        super().__init__()
        self.do: Callable[[], object] = lambda: None  # called after each check

    async def has_three(self) -> bool:
        return len(self) >= 3


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Looks:
    seen, plain = Looks(), BranchCompleter._is_busy
    monkeypatch.setattr("proxy.recording.branch_completion.POLL_S", 0.01)

    async def busy(branch_completer: BranchCompleter) -> bool:
        seen.append(await plain(branch_completer))
        seen.do()
        return seen[-1]

    monkeypatch.setattr(BranchCompleter, "_is_busy", busy)
    return seen


@asynccontextmanager
async def recording(backend: FakeVLLM, tmp_path: Path, **settings: Any) -> AsyncIterator[Proxy]:
    given = {"record_fraction": 1.0, "record_branches": 4, "store_text": "hash", **settings}
    async with serving(backend, tmp_path / "s.db", **given) as proxy:
        yield proxy


async def vote(proxy: Proxy, **fields: Any) -> str:
    status, _, body = await proxy.ask("0", tts=VOTING, **fields)
    assert status == 200
    return str(body["id"])


async def ended(proxy: Proxy, outcome: str, count: int = 1) -> None:
    async def has_count() -> bool:
        return await proxy.metric("autotts_recordings_total", outcome=outcome) == count

    await until(has_count)


def in_background(backend: FakeVLLM) -> list[dict[str, Any]]:
    return [request for request in backend.requests if request.get("priority")]


@pytest.mark.parametrize(("set_to", "recorded"), [(None, "default"), (0.6, 0.6)])
async def test_a_recording_at_temperature_0_stores_the_branch_temperature(
    backend: FakeVLLM, tmp_path: Path, set_to: float | None, recorded: float | str
) -> None:
    async with recording(backend, tmp_path, branch_temperature=set_to) as proxy:
        await vote(proxy, temperature=0)
        await ended(proxy, "recorded")
    (made,) = await recordings(tmp_path / "s.db")
    assert made.sampling == {"temperature": 0, "branch_temperature": recorded, "answer": "boxed"}
    assert intern_answers(made).greedy_first
    temperatures = {r.get("temperature") for r in in_background(backend) if "include_stop_str_in_output" not in r}
    assert temperatures == {set_to}  # the greedy branch had already finished


async def test_a_request_with_ignore_eos_is_not_recorded(backend: FakeVLLM, tmp_path: Path) -> None:
    """Branches with `ignore_eos` have no answer that a replay could reveal."""
    async with recording(backend, tmp_path) as proxy:
        await vote(proxy, ignore_eos=True)
        readable = await vote(proxy)
        await ended(proxy, "recorded")
    assert [recording.request for recording in await recordings(tmp_path / "s.db")] == [readable]


# Failures


async def test_a_recording_that_fails_does_not_stop_the_next(
    backend: FakeVLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr("proxy.recording.branch_completion.recorded_branches.branches", lambda *_: [][0])
        async with recording(backend, tmp_path) as proxy:
            first = await vote(proxy)
            await ended(proxy, "failed")
            broken.undo()
            second = await vote(proxy)
            await ended(proxy, "recorded")
    assert f"{first}: recording failed: IndexError" in caplog.text
    assert [recording.request for recording in await recordings(tmp_path / "s.db")] == [second]


async def test_a_crash_of_the_branch_completer_does_not_stop_the_store_writer(
    backend: FakeVLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def dies(_: BranchCompleter) -> None:
        raise MemoryError

    closed, plain = list[bool](), StoreWriter.close

    async def close(recorder: StoreWriter) -> None:
        await plain(recorder)
        closed.append(True)

    monkeypatch.setattr(BranchCompleter, "next", dies)
    monkeypatch.setattr(StoreWriter, "close", close)
    async with recording(backend, tmp_path) as proxy:
        served = await vote(proxy)
    assert closed
    assert [episode.id for episode in await episodes(tmp_path / "s.db")] == [served]


async def test_background_failures_do_not_open_the_circuit_breaker(backend: FakeVLLM, tmp_path: Path) -> None:
    async with recording(backend, tmp_path) as proxy:
        backend.queued = 1
        for _ in range(6):
            await vote(proxy)
        backend.fault, backend.queued = "broken", 0
        await ended(proxy, "failed", 6)
        backend.fault = ""
        await vote(proxy)
        assert await proxy.metric("autotts_upstream_events_total") == 0


async def test_recording_waits_while_the_circuit_breaker_is_open(
    backend: FakeVLLM, tmp_path: Path, looks: Looks
) -> None:
    async with recording(backend, tmp_path) as proxy:
        backend.queued = 1
        await vote(proxy)
        backend.fault = "broken"
        async with asyncio.timeout(10):
            while (await proxy.ask("0", tts=VOTING))[0] != 503:
                pass
        assert await proxy.metric("autotts_upstream_events_total", event="ejected") == 1
        backend.fault, backend.queued = "", 0
        looks.clear()
        await until(looks.has_three)
        assert all(looks)
        assert not in_background(backend)


# Cost


@pytest.mark.parametrize(("branches", "calls"), [(2, 0), (4, 0), (4, 1), (4, 2), (4, 3)])
async def test_all_tokens_of_a_failed_recording_are_counted(
    backend: FakeVLLM, tmp_path: Path, branches: int, calls: int
) -> None:
    """This includes the call that fails, be it for branches, probes or late probes."""
    async with recording(backend, tmp_path, record_branches=branches) as proxy:
        backend.queued = 1
        await vote(proxy)
        generated, served = backend.generated, len(backend.requests)
        backend.fault, backend.fault_after = "lie", served + calls
        backend.queued = 0
        await ended(proxy, "failed")
        counted = await proxy.metric("autotts_recording_tokens_total")
    sent = backend.requests[served:]
    assert len(sent) == calls + 1
    ended_well = [
        ids
        for call in sent[:-1]
        for ids in (call["prompt"] if isinstance(call["prompt"][0], list) else [call["prompt"]])
    ]
    probes = sum("".join(map(chr, ids)).endswith(LEAD) for ids in ended_well)
    assert counted == backend.generated - generated + probes * len(LONGEST_CLOSING + LEAD)


async def test_a_finished_call_is_counted_in_full_when_another_is_cancelled(backend: FakeVLLM) -> None:
    async with aiohttp.ClientSession() as session:
        prompt = Prompt(MODEL, list(map(ord, ASSISTANT)), ASSISTANT, {}, seed=1)  # a call for each branch
        environment = LiveEnvironment(
            UpstreamClient(backend.url, session), prompt, EnvironmentLimits(INTERVAL, 1000, 8)
        )
        backend.fault, backend.fault_after = "hang", 1
        running = asyncio.create_task(environment.execute([branch(), branch()]))

        async def first_is_done() -> bool:
            return environment.meter.requests == 1 and backend.hanging.is_set()

        await until(first_is_done)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    meter = environment.meter
    assert meter.generated_tokens == backend.generated == INTERVAL
    assert meter.aborted_tokens == 1  # tokens of the cancelled call that had arrived
    environment.salvage()
    assert meter.billed == INTERVAL + 1
    assert [len(part.ids) for part in environment.branches] == [INTERVAL, 1]


async def test_recording_stays_within_its_token_budget_every_hour(
    backend: FakeVLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget, now = 200, [0.0]
    hours: list[int] = []

    class TimedWindow(TokenWindow):
        """Window with a clock that advances by an hour whenever tokens do not fit."""

        def fits(self, tokens: int, _: float) -> bool:
            if super().fits(tokens, now[0]):
                return True
            hours.append(backend.generated)
            now[0] += HOUR_S + GRAIN_S
            return False

        def settle(self, reserved: int, cost: int, _: float) -> None:
            super().settle(reserved, cost, now[0])

    monkeypatch.setattr("proxy.recording.branch_completion.TokenWindow", TimedWindow)
    monkeypatch.setattr("proxy.recording.branch_completion.POLL_S", 0.001)
    async with recording(backend, tmp_path, record_tokens_per_hour=budget) as proxy:
        backend.queued = 1
        await vote(proxy)
        hours.append(backend.generated)
        backend.queued = 0
        await ended(proxy, "recorded")
        assert await proxy.metric("autotts_recording_tokens_total") > 2 * budget
    assert len(hours) > 3
    assert all(0 < later - earlier <= budget for earlier, later in itertools.pairwise(hours))


async def test_a_token_budget_too_small_for_an_interval_skips_all_recordings(
    backend: FakeVLLM, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with recording(backend, tmp_path, record_tokens_per_hour=INTERVAL) as proxy:
        await vote(proxy)
        await ended(proxy, "skipped")
        for _ in range(2):
            await vote(proxy)
        assert not in_background(backend)
    messages = [record.getMessage() for record in caplog.records if "skipped recording" in record.getMessage()]
    why = f"AUTOTTS_RECORD_TOKENS_PER_HOUR={INTERVAL} is too small for one interval; raise it"
    assert messages == [
        f"skipped recording {count} sampled episodes: {why}" for count in (1, 2)
    ]  # at the first skip, and at shutdown


# When it waits


@pytest.mark.parametrize("beta", ["0.5", None])
async def test_without_upstream_metrics_recording_waits_for_all_running_requests(
    backend: FakeVLLM, tmp_path: Path, looks: Looks, beta: str | None
) -> None:
    silent = Silent(backend)
    async with silent.serve(), recording(silent, tmp_path) as proxy:
        silent.fault, silent.fault_times = "hang" if beta else "", 1
        other = asyncio.create_task(proxy.ask(beta, tts=VOTING))
        await (silent.asked if beta is None else silent.hanging).wait()
        await vote(proxy)
        await until(looks.has_three)
        assert all(looks)
        assert not in_background(silent)
        other.cancel()
        silent.held.set()
        await ended(proxy, "recorded")


@pytest.mark.parametrize(
    ("beta", "settings", "waiting"),
    [
        ("0", {"max_episodes": 1}, "autotts_queue"),
        (None, {"max_passed": 1}, "autotts_queue"),
        ("0", {"branches_in_flight": 2}, "autotts_calls_waiting"),
    ],
)
async def test_recording_waits_while_requests_are_queued_in_the_proxy(
    backend: FakeVLLM, tmp_path: Path, looks: Looks, beta: str | None, settings: dict[str, int], waiting: str
) -> None:
    upstream = Silent(backend)
    async with upstream.serve(), recording(upstream, tmp_path, **settings) as proxy:
        upstream.hides_metrics, upstream.queued = False, 1
        await vote(proxy)
        upstream.fault, upstream.fault_after, upstream.fault_times = "hang", len(upstream.requests), 1
        others = [asyncio.create_task(proxy.ask(beta, tts=VOTING)) for _ in range(2)]
        await until(lambda: proxy.metric(waiting))
        upstream.queued = 0
        looks.clear()
        await until(looks.has_three)
        assert all(looks)
        assert not in_background(upstream)
        for other in others:
            other.cancel()
        await asyncio.gather(*others, return_exceptions=True)


# Limit on pending recordings


@pytest.mark.slow
async def test_recordings_over_the_pending_limit_are_skipped_and_counted(backend: FakeVLLM, tmp_path: Path) -> None:
    backend.queued = 1
    async with recording(backend, tmp_path) as proxy:
        await asyncio.gather(*(vote(proxy) for _ in range(1 + MAX_PENDING)))  # one is being processed
        assert await proxy.metric("autotts_recordings_total", outcome="skipped") == 0
        await vote(proxy)
        assert await proxy.metric("autotts_recordings_total", outcome="skipped") == 1


async def test_recordings_pending_at_shutdown_are_counted_as_skipped(
    backend: FakeVLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skipped, plain = list[float | None](), BranchCompleter.close

    def close(branch_completer: BranchCompleter) -> None:
        plain(branch_completer)
        skipped.append(
            branch_completer._metrics.registry.get_sample_value("autotts_recordings_total", {"outcome": "skipped"})
        )

    monkeypatch.setattr(BranchCompleter, "close", close)
    backend.queued = 1
    async with recording(backend, tmp_path) as proxy:
        for _ in range(3):
            await vote(proxy)
        await backend.looked.wait()  # the first is being processed
    assert skipped == [3]


# Changes of the chat template


async def test_an_episode_from_before_a_chat_template_change_is_not_recorded(backend: FakeVLLM, tmp_path: Path) -> None:
    async with recording(backend, tmp_path) as proxy:
        await vote(proxy)
        await ended(proxy, "recorded")
        backend.greeting = "<new>"  # as after a restart of the upstream; not yet noticed
        background = len(in_background(backend))
        await vote(proxy)
        await ended(proxy, "failed")
        assert len(in_background(backend)) == background  # nothing is generated for it
        await vote(proxy)
        await ended(proxy, "recorded", 2)
    first, second = await recordings(tmp_path / "s.db")
    assert first.chat_template != second.chat_template
    kept = {episode.id: episode.about["chat_template"] for episode in await episodes(tmp_path / "s.db")}
    assert kept[second.request] == second.chat_template


async def test_a_chat_template_change_during_recording_fails_the_recording(
    backend: FakeVLLM, tmp_path: Path, looks: Looks
) -> None:
    looks.do = lambda: setattr(backend, "greeting", "<new>" if len(looks) > 2 else "")
    async with recording(backend, tmp_path) as proxy:
        await vote(proxy)
        await ended(proxy, "failed")
        assert in_background(backend)
    assert await recordings(tmp_path / "s.db") == []


async def test_collecting_across_a_chat_template_change_is_refused_with_502(backend: FakeVLLM, tmp_path: Path) -> None:
    async with serving(backend, tmp_path / "s.db") as proxy:
        replies = []
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "tts": {"beta": 1, **EVERYTHING}}
        for greeting in ("", "<new>", "<new>"):
            backend.greeting = greeting
            replies.append(await call(proxy, "POST", "/v1/chat/completions", ADMIN, body))
    assert [status for status, _ in replies] == [200, 502, 200]
    assert replies[1][1]["error"]["code"] == "upstream_changed"
    assert len({replies[i][1]["tts"]["recording"]["chat_template"] for i in (0, 2)}) == 2
    assert [episode.stop for episode in await episodes(tmp_path / "s.db")] == ["answered", "failed", "answered"]
