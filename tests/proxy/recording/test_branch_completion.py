"""What is run to its end in the background: within its budget, when nothing waits, at nobody's cost, counted."""

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
    """A vLLM that may not say how many requests wait, and does not answer what is handed on until `held` is set."""

    def __init__(self, like: FakeVLLM) -> None:
        super().__init__(like.chains, like.interval)
        self.says_nothing = True
        self.asked, self.held = asyncio.Event(), asyncio.Event()

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(text="") if self.says_nothing else await super()._metrics(request)

    async def _chat(self, request: web.Request) -> web.Response:
        self.asked.set()
        await self.held.wait()
        return await super()._chat(request)


class Looks(list[bool]):
    """What the finisher found when it looked whether it has to wait."""

    def __init__(self) -> None:
        super().__init__()
        self.do: Callable[[], object] = lambda: None  # after each

    async def three(self) -> bool:
        return len(self) >= 3


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Looks:
    seen, plain = Looks(), BranchCompleter._is_busy
    monkeypatch.setattr("proxy.recording.branch_completion.POLL_S", 0.01)

    async def busy(finisher: BranchCompleter) -> bool:
        seen.append(await plain(finisher))
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
    async def found() -> bool:
        return await proxy.metric("autotts_recordings_total", outcome=outcome) == count

    await until(found)


def in_background(backend: FakeVLLM) -> list[dict[str, Any]]:
    return [one for one in backend.requests if one.get("priority")]


@pytest.mark.parametrize(("set_to", "recorded"), [(None, "default"), (0.6, 0.6)])
async def test_a_recording_at_temperature_0_says_how_its_other_branches_were_sampled(
    backend: FakeVLLM, tmp_path: Path, set_to: float | None, recorded: float | str
) -> None:
    async with recording(backend, tmp_path, branch_temperature=set_to) as proxy:
        await vote(proxy, temperature=0)
        await ended(proxy, "recorded")
    (made,) = await recordings(tmp_path / "s.db")
    assert made.sampling == {"temperature": 0, "branch_temperature": recorded, "answer": "boxed"}
    assert intern_answers(made).greedy_first
    temperatures = {r.get("temperature") for r in in_background(backend) if "include_stop_str_in_output" not in r}
    assert temperatures == {set_to}  # the greedy branch had finished


async def test_what_runs_past_its_end_is_not_recorded(backend: FakeVLLM, tmp_path: Path) -> None:
    """Branches of `ignore_eos` answer nothing that a replay could reveal."""
    async with recording(backend, tmp_path) as proxy:
        await vote(proxy, ignore_eos=True)
        readable = await vote(proxy)
        await ended(proxy, "recorded")
    assert [one.request for one in await recordings(tmp_path / "s.db")] == [readable]


# Whatever fails


async def test_one_that_cannot_be_recorded_costs_no_other(
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
    assert [one.request for one in await recordings(tmp_path / "s.db")] == [second]


async def test_a_finisher_that_dies_does_not_keep_records_from_being_written(
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
    assert [one.id for one in await episodes(tmp_path / "s.db")] == [served]


async def test_what_fails_in_the_background_ejects_nothing(backend: FakeVLLM, tmp_path: Path) -> None:
    async with recording(backend, tmp_path) as proxy:
        backend.queued = 1
        for _ in range(6):
            await vote(proxy)
        backend.fault, backend.queued = "broken", 0
        await ended(proxy, "failed", 6)
        backend.fault = ""
        await vote(proxy)
        assert await proxy.metric("autotts_upstream_events_total") == 0


async def test_it_waits_while_the_upstream_is_left_alone(backend: FakeVLLM, tmp_path: Path, looks: Looks) -> None:
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
        await until(looks.three)
        assert all(looks)
        assert not in_background(backend)


# What it costs


@pytest.mark.parametrize(("branches", "calls"), [(2, 0), (4, 0), (4, 1), (4, 2), (4, 3)])
async def test_all_that_was_generated_is_counted(backend: FakeVLLM, tmp_path: Path, branches: int, calls: int) -> None:
    """Also of the call that fails, whichever it is: branches, probes, late probes."""
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
        ids for one in sent[:-1] for ids in (one["prompt"] if isinstance(one["prompt"][0], list) else [one["prompt"]])
    ]
    probes = sum("".join(map(chr, ids)).endswith(LEAD) for ids in ended_well)
    assert counted == backend.generated - generated + probes * len(LONGEST_CLOSING + LEAD)


async def test_what_ends_well_is_counted_though_another_call_is_cut(backend: FakeVLLM) -> None:
    async with aiohttp.ClientSession() as session:
        prompt = Prompt(MODEL, list(map(ord, ASSISTANT)), ASSISTANT, {}, seed=1)  # a call for each branch
        environment = LiveEnvironment(
            UpstreamClient(backend.url, session), prompt, EnvironmentLimits(INTERVAL, 1000, 8)
        )
        backend.fault, backend.fault_after = "hang", 1
        running = asyncio.create_task(environment.execute([branch(), branch()]))

        async def one_is_done() -> bool:
            return environment.meter.requests == 1 and backend.hanging.is_set()

        await until(one_is_done)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    meter = environment.meter
    assert meter.generated_tokens == backend.generated == INTERVAL
    assert meter.aborted_tokens == 1  # of the other, what had come
    environment.salvage()
    assert meter.billed == INTERVAL + 1
    assert [len(one.ids) for one in environment.branches] == [INTERVAL, 1]


async def test_a_small_budget_is_kept_hour_by_hour(
    backend: FakeVLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget, now = 200, [0.0]
    hours: list[int] = []

    class TimedWindow(TokenWindow):
        """A window by a clock that moves on by an hour when tokens do not fit."""

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


async def test_a_budget_too_small_for_anything_leaves_all_out(
    backend: FakeVLLM, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with recording(backend, tmp_path, record_tokens_per_hour=INTERVAL) as proxy:
        await vote(proxy)
        await ended(proxy, "skipped")
        for _ in range(2):
            await vote(proxy)
        assert not in_background(backend)
    told = [record.getMessage() for record in caplog.records if "skipped recording" in record.getMessage()]
    why = f"AUTOTTS_RECORD_TOKENS_PER_HOUR={INTERVAL} is too small for one interval; raise it"
    assert told == [f"skipped recording {count} sampled episodes: {why}" for count in (1, 2)]  # at once, and at the end


# When it waits


@pytest.mark.parametrize("beta", ["0.5", None])
async def test_where_nobody_says_what_waits_it_waits_for_all(
    backend: FakeVLLM, tmp_path: Path, looks: Looks, beta: str | None
) -> None:
    silent = Silent(backend)
    async with silent.serve(), recording(silent, tmp_path) as proxy:
        silent.fault, silent.fault_times = "hang" if beta else "", 1
        other = asyncio.create_task(proxy.ask(beta, tts=VOTING))
        await (silent.asked if beta is None else silent.hanging).wait()
        await vote(proxy)
        await until(looks.three)
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
async def test_it_waits_while_requests_wait_here(
    backend: FakeVLLM, tmp_path: Path, looks: Looks, beta: str | None, settings: dict[str, int], waiting: str
) -> None:
    upstream = Silent(backend)
    async with upstream.serve(), recording(upstream, tmp_path, **settings) as proxy:
        upstream.says_nothing, upstream.queued = False, 1
        await vote(proxy)
        upstream.fault, upstream.fault_after, upstream.fault_times = "hang", len(upstream.requests), 1
        others = [asyncio.create_task(proxy.ask(beta, tts=VOTING)) for _ in range(2)]
        await until(lambda: proxy.metric(waiting))
        upstream.queued = 0
        looks.clear()
        await until(looks.three)
        assert all(looks)
        assert not in_background(upstream)
        for one in others:
            one.cancel()
        await asyncio.gather(*others, return_exceptions=True)


# How many


@pytest.mark.slow
async def test_more_than_may_wait_are_left_out_and_counted(backend: FakeVLLM, tmp_path: Path) -> None:
    backend.queued = 1
    async with recording(backend, tmp_path) as proxy:
        await asyncio.gather(*(vote(proxy) for _ in range(1 + MAX_PENDING)))  # one is in hand
        assert await proxy.metric("autotts_recordings_total", outcome="skipped") == 0
        await vote(proxy)
        assert await proxy.metric("autotts_recordings_total", outcome="skipped") == 1


async def test_those_that_wait_when_the_proxy_ends_are_counted(
    backend: FakeVLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skipped, plain = list[float | None](), BranchCompleter.close

    def close(finisher: BranchCompleter) -> None:
        plain(finisher)
        skipped.append(finisher._metrics.registry.get_sample_value("autotts_recordings_total", {"outcome": "skipped"}))

    monkeypatch.setattr(BranchCompleter, "close", close)
    backend.queued = 1
    async with recording(backend, tmp_path) as proxy:
        for _ in range(3):
            await vote(proxy)
        await backend.looked.wait()  # the first is in hand
    assert skipped == [3]


# What it was made with


async def test_an_episode_of_another_chat_template_is_not_recorded(backend: FakeVLLM, tmp_path: Path) -> None:
    async with recording(backend, tmp_path) as proxy:
        await vote(proxy)
        await ended(proxy, "recorded")
        backend.greeting = "<new>"  # an upstream that was started anew; nobody has looked since
        background = len(in_background(backend))
        await vote(proxy)
        await ended(proxy, "failed")
        assert len(in_background(backend)) == background  # nor does it cost anything
        await vote(proxy)
        await ended(proxy, "recorded", 2)
    first, second = await recordings(tmp_path / "s.db")
    assert first.chat_template != second.chat_template
    kept = {one.id: one.about["chat_template"] for one in await episodes(tmp_path / "s.db")}
    assert kept[second.request] == second.chat_template


async def test_nor_is_one_during_which_that_changes(backend: FakeVLLM, tmp_path: Path, looks: Looks) -> None:
    looks.do = lambda: setattr(backend, "greeting", "<new>" if len(looks) > 2 else "")
    async with recording(backend, tmp_path) as proxy:
        await vote(proxy)
        await ended(proxy, "failed")
        assert in_background(backend)
    assert await recordings(tmp_path / "s.db") == []


async def test_a_branch_that_is_collected_meanwhile_is_refused(backend: FakeVLLM, tmp_path: Path) -> None:
    async with serving(backend, tmp_path / "s.db") as proxy:
        told = []
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "tts": {"beta": 1, **EVERYTHING}}
        for greeting in ("", "<new>", "<new>"):
            backend.greeting = greeting
            told.append(await call(proxy, "POST", "/v1/chat/completions", ADMIN, body))
    assert [status for status, _ in told] == [200, 502, 200]
    assert told[1][1]["error"]["code"] == "upstream_changed"
    assert len({told[i][1]["tts"]["recording"]["chat_template"] for i in (0, 2)}) == 2
    assert [one.stop for one in await episodes(tmp_path / "s.db")] == ["answered"] * 3
