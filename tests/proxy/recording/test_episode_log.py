"""What is kept of served requests: as it was, by whom it may be seen, and what of it may be read."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import repeat
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from openai import AsyncOpenAI

from controllers import Limits, State
from controllers.builtin import create
from controllers.rollout_state import RolloutStage
from discovery.audit.explain import explain
from discovery.data.packed_rounds import unpack_rounds
from discovery.data.recordings import Cell, Origin, Split, default_split, live_split, question_id
from discovery.store import ServedEpisode, Store
from proxy.admission import api_keys
from proxy.errors import RecordsAway
from proxy.recording.branch_completion import BENCHMARK, is_sampled
from proxy.server import running
from proxy.settings import load
from tests.fakes import MODEL, FakeVLLM, chain
from tests.proxy.conftest import INTERVAL, SMALL, Proxy, backend

__all__ = ["backend"]  # a fixture

CANARY = "zx81-canary"
ADMIN = "admin-key-of-the-test"


@asynccontextmanager
async def serving(backend: FakeVLLM, path: Path, **settings: Any) -> AsyncIterator[Proxy]:
    given = {"store": path, "record_fraction": 0.0, "admin_key": ADMIN, **SMALL, **settings}
    async with (
        running(load(upstream=backend.url, **given)) as url,
        aiohttp.ClientSession() as http,
        AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as openai,
    ):
        yield Proxy(backend, url, http, openai)


async def episodes(path: Path) -> list[ServedEpisode]:
    async with Store.open(path) as store:
        return await store.episodes()


async def until(found: Callable[[], Awaitable[Any]], seconds: float = 30) -> Any:
    """What `found` gives, as soon as it gives anything."""
    async with asyncio.timeout(seconds):
        for _ in repeat(None):
            if result := await found():
                return result
            await asyncio.sleep(0.02)  # no event tells of what the proxy has written


async def call(proxy: Proxy, method: str, path: str, key: str = "", body: Any = None) -> tuple[int, Any]:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    async with proxy.http.request(method, proxy.url + path, headers=headers, json=body) as response:
        return response.status, await response.json()


@pytest.mark.parametrize("controller", ["cmc", "short_m_at_k", "asc", "parallel_probe"])
async def test_an_episode_is_kept_as_it_was(backend: FakeVLLM, tmp_path: Path, controller: str) -> None:
    path = tmp_path / "s.db"
    async with serving(backend, path, store_text="hash") as proxy:
        _, _, body = await proxy.ask("0.5", tts={"controller": controller, "answer": "boxed"}, temperature=0.7)
    (kept,) = await episodes(path)
    tts = body["tts"]
    assert (kept.request_id, kept.model, kept.controller, kept.beta) == (body["id"], MODEL, controller, 0.5)
    assert (kept.rounds, kept.branches, kept.stop) == (tts["rounds"], tts["branches"], tts["stop"])
    assert kept.ledger == {kind: count for kind, count in tts["tokens"].items() if kind != "total"}
    assert (kept.answer, kept.question) == (tts["answer"], question_id("hi"))
    about = kept.about
    assert (about["beta_source"], about["sampling"]) == ("header", {"temperature": 0.7, "answer": "boxed"})
    assert set(about["answers"]) <= {"7", "9"}
    assert about["usage"]["completion_tokens"] == body["usage"]["completion_tokens"]
    assert about["seconds"] > 0
    assert len(about["chat_template"]) == 32
    assert kept.digest.startswith(tts["controller_digest"])
    rounds = unpack_rounds(kept.trace)
    limits: Any = about["limits"]
    state, again = State(Limits(**limits)), create(controller, kept.beta)
    for actions, facts in rounds:
        decided = again.decide(state)
        assert list(state.affordable(decided)) == actions
        state.apply(actions, facts)
    assert (state.spent, state.rounds, about["decided"]) == (about["spent"], kept.rounds, kept.rounds)
    assert state.answer is not None
    assert about["answers"][state.answer] == kept.answer


async def test_one_that_is_cut_or_left_is_kept_too(backend: FakeVLLM, tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    async with serving(backend, path) as proxy:
        await proxy.ask("1", tts={"answer": "boxed", "max_total_tokens": 900})
        backend.fault = "cut"
        assert (await proxy.ask("0.5", tts={"answer": "boxed"}))[0] == 502
        backend.fault = "hang"
        asking = asyncio.create_task(proxy.ask("0.5", tts={"answer": "boxed"}))
        await backend.hanging.wait()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await backend.idle.wait()
    assert [one.stop for one in await episodes(path)] == ["max_tokens", "upstream_error", "disconnected"]


async def test_a_fault_of_the_proxys_own_is_not_said_to_be_its_clients(
    backend: FakeVLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def breaks(*_: Any) -> None:
        raise LookupError

    path = tmp_path / "s.db"
    monkeypatch.setattr("proxy.episode.run._run", breaks)
    async with serving(backend, path) as proxy:
        assert (await proxy.ask("0.5"))[0] == 500
        assert await proxy.metric("autotts_stops_total", reason="failed") == 1
    assert [one.stop for one in await episodes(path)] == ["failed"]


async def test_off_the_path_nothing_is_kept_without_a_store(backend: FakeVLLM, tmp_path: Path) -> None:
    async with running(load(upstream=backend.url, **SMALL)) as url, aiohttp.ClientSession() as http:
        proxy = Proxy(backend, url, http, None)  # type: ignore[arg-type]
        _, _, body = await proxy.ask("0.5")
        assert (await call(proxy, "GET", f"/v1/tts/requests/{body['id']}"))[0] == 404
        assert (await call(proxy, "GET", "/ready"))[1]["recorder"]["store"] == "off"


# Who may see what


async def test_a_request_is_for_its_tenant_and_admins(backend: FakeVLLM, tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    async with serving(backend, path) as proxy:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "tts": {"beta": 0.5}}
        _, mine = await call(proxy, "POST", "/v1/chat/completions", "mine", body)
        where = f"/v1/tts/requests/{mine['id']}"
        status, told = await call(proxy, "GET", where, "mine")
        assert (status, told["stop"]) == (200, "answered")
        assert (await call(proxy, "GET", where, ADMIN))[0] == 200
        for key in ("other", "", f"{ADMIN}x"):
            status, told = await call(proxy, "GET", where, key)
            assert (status, told["error"]["code"]) == (404, "unknown_request")
        said = {"request_id": mine["id"], "correct": True}
        assert (await call(proxy, "POST", "/v1/tts/feedback", "other", said))[0] == 404
        assert (await call(proxy, "POST", "/v1/tts/feedback", "mine", said))[0] in (200, 202)
        assert (await call(proxy, "GET", "/v1/tts/requests/chatcmpl-none", "mine"))[0] == 404
    async with Store.open(path) as store:
        (kept,) = await store.feedback()
        assert (kept.request_id, kept.kind, kept.value) == (mine["id"], "correct", "true")


async def test_later_feedback_wins_and_earlier_is_kept(backend: FakeVLLM, tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    async with serving(backend, path, store_text="hash") as proxy:
        _, _, body = await proxy.ask("0.5", tts={"answer": "boxed"})
        for said in ({"correct": True}, {"score": 0.2}, {"answer": "12"}):
            status, told = await call(proxy, "POST", "/v1/tts/feedback", body={"id": body["id"], **said})
            assert status in (200, 202)
            assert told["request_id"] == body["id"]
        assert await proxy.metric("autotts_feedback_total") == 3
    async with Store.open(path) as store:
        kept = await store.feedback(body["id"])
    assert [(one.kind, json.loads(one.value)) for one in kept] == [("correct", True), ("score", 0.2), ("answer", "12")]


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({}, "Field required"),
        ({"request_id": "x"}, "one of correct, answer and score"),
        ({"request_id": "x", "correct": True, "score": 1}, "one of correct, answer and score"),
        ({"request_id": "x", "score": 1.5}, "score: "),
        ({"request_id": "x", "correct": "yes"}, "correct: "),
        ({"request_id": "x", "correct": True, "more": 1}, "more: "),
        ({"request_id": "x", "score": "1"}, "score: "),
        ({"request_id": "x", "score": True}, "score: "),
        ({"request_id": "x", "answer": " \n"}, "answer: no answer can be read from it"),
        ({"request_id": "x", "answer": "\\boxed{}"}, "answer: no answer can be read from it"),
        ({"request_id": "x", "answer": "veiled:0123456789abcdef01234567"}, "answer: it begins with"),
        ({"request_id": "x", "answer": " veiled:7"}, "answer: it begins with"),
        ({"request_id": "x", "id": "y", "correct": True}, "id: "),
        ([], "must be a JSON object"),
    ],
)
async def test_feedback_that_says_nothing_is_refused(backend: FakeVLLM, tmp_path: Path, said: Any, words: str) -> None:
    async with serving(backend, tmp_path / "s.db") as proxy:
        status, told = await call(proxy, "POST", "/v1/tts/feedback", body=said)
    assert status == 400
    assert words in told["error"]["message"]


async def test_a_request_may_be_named_twice_and_a_score_be_whole(backend: FakeVLLM, tmp_path: Path) -> None:
    async with serving(backend, tmp_path / "s.db") as proxy:
        _, _, body = await proxy.ask("0.5", tts={"answer": "boxed"})
        said = {"id": body["id"], "request_id": body["id"], "score": 1}
        assert (await call(proxy, "POST", "/v1/tts/feedback", body=said))[0] in (200, 202)


async def test_feedback_is_of_the_requests_tenant_whoever_gives_it(backend: FakeVLLM, tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    async with serving(backend, path) as proxy:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "tts": {"beta": 0.5}}
        _, mine = await call(proxy, "POST", "/v1/chat/completions", "mine", body)
        said = {"id": mine["id"], "correct": True}
        assert (await call(proxy, "POST", "/v1/tts/feedback", ADMIN, said))[0] in (200, 202)
    (kept,) = await episodes(path)
    async with Store.open(path) as store:
        (heard,) = await store.feedback()
    assert heard.tenant == kept.tenant != ""


async def test_later_feedback_is_later_though_the_clock_is_set_back(
    backend: FakeVLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock(datetime):
        at = datetime.now(UTC)

        @classmethod
        def now(cls, _: Any = None) -> datetime:  # type: ignore[override]
            cls.at -= timedelta(seconds=30)
            return cls.at

    path = tmp_path / "s.db"
    async with serving(backend, path) as proxy:
        _, _, body = await proxy.ask("0.5", tts={"answer": "boxed"})
        monkeypatch.setattr("proxy.recording.episode_log.datetime", Clock)
        for score in (0.1, 0.9, 0.3, 0.6):
            await call(proxy, "POST", "/v1/tts/feedback", body={"id": body["id"], "score": score})
    async with Store.open(path) as store:
        kept = await store.feedback(body["id"])
    assert [json.loads(one.value) for one in kept] == [0.1, 0.9, 0.3, 0.6]
    assert len({one.created for one in kept}) == 4


async def test_while_the_store_is_away_anothers_request_is_told_as_one_nobody_made(
    backend: FakeVLLM, tmp_path: Path
) -> None:
    async with serving(backend, tmp_path / "away" / "s.db", spill=tmp_path / "spill") as proxy:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "tts": {"beta": 0.5}}
        _, mine = await call(proxy, "POST", "/v1/chat/completions", "mine", body)
        said = {"correct": True}
        assert (await call(proxy, "POST", "/v1/tts/feedback", "mine", {"id": mine["id"], **said}))[0] in (200, 202)
        for request in (mine["id"], "chatcmpl-none"):
            status, told = await call(proxy, "POST", "/v1/tts/feedback", "other", {"id": request, **said})
            assert (status, told["error"]["code"]) == (503, "store_away")
            assert (await call(proxy, "GET", f"/v1/tts/requests/{request}", "other"))[0] == 503


async def test_what_clients_say_reaches_the_watch(
    backend: FakeVLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[tuple[RolloutStage, bool]] = []
    monkeypatch.setattr(
        "proxy.rollout.controller_manager.ControllerManager.record_feedback",
        lambda _, stage, digest, content: heard.append((stage, content)),
    )
    async with serving(backend, tmp_path / "s.db") as proxy:
        _, _, body = await proxy.ask("0.5", tts={"answer": "boxed"})
        for said in ({"answer": "$7$"}, {"correct": False}):  # the first counts
            await call(proxy, "POST", "/v1/tts/feedback", body={"id": body["id"], **said})
        _, _, named = await proxy.ask("0.5", tts={"answer": "boxed", "controller": "asc"})
        await call(proxy, "POST", "/v1/tts/feedback", body={"id": named["id"], "score": 0.1})
        _, _, other = await proxy.ask("0.5", tts={"answer": "boxed"})
        await call(proxy, "POST", "/v1/tts/feedback", body={"id": other["id"], "answer": "8"})
        _, _, another = await proxy.ask("0.5", tts={"answer": "boxed"})
        with monkeypatch.context() as away:  # whether it is the answer cannot be told: that uses nothing up
            away.setattr("proxy.recording.store_writer.StoreWriter.find", _away)
            await call(proxy, "POST", "/v1/tts/feedback", body={"id": another["id"], "answer": "7"})
        for score in (0.2, 0.9):
            await call(proxy, "POST", "/v1/tts/feedback", body={"id": another["id"], "score": score})
    assert heard == [(RolloutStage.CHAMPION, said) for said in (True, False, False)]


async def _away(*_: Any) -> None:
    raise RecordsAway("the store is away", code="store_away")


# What is told of one


async def test_an_episode_that_cannot_be_read_is_told_to_be(backend: FakeVLLM, tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    async with serving(backend, path) as proxy:
        await proxy.ask("0.5", tts={"answer": "boxed"})
    (kept,) = await episodes(path)
    async with Store.open(path) as store:
        await store.add_all([replace(kept, id="bad", request_id="bad", trace="no trace")])
    async with serving(backend, path) as proxy:
        status, told = await call(proxy, "GET", "/v1/tts/requests/bad", ADMIN)
    assert (status, told["error"]["code"]) == (500, "unreadable_record")


async def test_a_long_one_is_told_in_a_thread_and_its_answers_in_part(
    backend: FakeVLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []
    plain = explain

    def told(episode: ServedEpisode) -> Any:
        threads.append(threading.get_ident())
        return plain(episode)

    monkeypatch.setattr("proxy.api.tts.explain", told)
    backend.chains = [chain("7" * 200, 400, ["7" * 200]) for _ in range(4)]
    async with serving(backend, tmp_path / "s.db", store_text="hash") as proxy:
        _, _, body = await proxy.ask("0", tts={"answer": "boxed", "controller": "sc@2"})
        status, found = await call(proxy, "GET", f"/v1/tts/requests/{body['id']}")
    assert status == 200
    assert found["answer"] == "7" * 99 + "…"
    assert found["answers"] == [found["answer"]]
    assert threads != [threading.get_ident()]


# What may be read


@pytest.mark.parametrize("text", ["none", "hash", "full"])
async def test_only_what_may_be_is_stored(
    backend: FakeVLLM, tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    path = tmp_path / "s.db"
    backend.chains = [chain(f"{CANARY}-answer", 100, [f"{CANARY}-hunch", f"{CANARY}-answer"]) for _ in range(4)]
    async with serving(
        backend, path, store_text=text, record_fraction=1.0, record_branches=4, probe_tokens=60
    ) as proxy:
        messages = [{"role": "user", "content": f"{CANARY}-question"}]
        tts = {"answer": "boxed", "controller": "sc@2"}
        headers = {"authorization": f"Bearer {CANARY}-key", "x-tts-beta": "0.5"}
        body = {"model": MODEL, "messages": messages, "tts": tts, "stop": f"{CANARY}-stop"}
        for stop in (None, f"{CANARY}-stop"):
            async with proxy.http.post(
                f"{proxy.url}/v1/chat/completions", headers=headers, json={**body, "stop": stop}
            ) as response:
                reply = await response.json()
            assert response.status == 200
        async with proxy.http.post(
            f"{proxy.url}/v1/tts/feedback", headers=headers, json={"id": reply["id"], "answer": f"{CANARY}-said"}
        ) as response:
            assert response.status in (200, 202)
        await until(lambda: proxy.metric("autotts_recordings_total", outcome="recorded"))
        for bad in ({"messages": CANARY}, {"messages": messages, "tts": {"beta": CANARY}}):
            async with proxy.http.post(f"{proxy.url}/v1/chat/completions", headers=headers, json=bad) as response:
                assert response.status == 400
        async with proxy.http.get(f"{proxy.url}/metrics") as response:
            page = await response.text()
    assert CANARY not in page
    assert CANARY not in caplog.text
    data = b"".join(one.read_bytes() for one in tmp_path.iterdir())  # noqa: ASYNC240
    words = ("question", "answer", "hunch", "said", "key", "stop")
    allowed = {"none": (), "hash": ("answer", "hunch", "said"), "full": ("answer", "hunch", "said", "question")}[text]
    assert {what for what in words if f"{CANARY}-{what}".encode() in data} == set(allowed)


@pytest.mark.parametrize("fault", ["echo", "babble"])
async def test_an_upstream_that_quotes_the_request_is_not_quoted_in_a_log(
    backend: FakeVLLM, tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    caplog.set_level(logging.DEBUG)
    async with serving(backend, tmp_path / "s.db") as proxy:
        for after in (0, 2):  # at once, and while the episode runs
            backend.fault, backend.fault_after = fault, len(backend.requests) + after
            await proxy.ask("0.5", messages=[{"role": "user", "content": CANARY}], tts={"answer": "boxed"})
    assert "chatcmpl-" in caplog.text
    assert CANARY not in caplog.text
    assert CANARY not in str([one.about for one in await episodes(tmp_path / "s.db")])


async def test_what_is_forgotten_is_gone_and_stays_so(backend: FakeVLLM, tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    async with serving(backend, path, store_text="full", record_fraction=1.0, record_branches=2) as proxy:
        replies = []
        for name in ("one", "two"):
            _, _, body = await proxy.ask(
                "0", messages=[{"role": "user", "content": f"{CANARY}-{name}"}], tts={"answer": "boxed"}
            )
            replies.append(body["id"])
            await call(proxy, "POST", "/v1/tts/feedback", body={"id": body["id"], "correct": True})

        async def both() -> bool:
            return await proxy.metric("autotts_recordings_total", outcome="recorded") == 2

        await until(both)
    async with Store.open(path) as store:
        before = await store.episode(replies[0])
        recorded = [one for cell in await store.summaries() for one in await store.load(cell.cell)]
        assert {one.request for one in recorded} == set(replies)
        forgotten = await store.forget(request=replies[0])
        assert tuple(forgotten) == (1, 1, 1, 0, 1)
        assert before is not None
        await store.add_all([before, *(one for one in recorded if one.request == replies[0])])  # as a file might
        assert await store.episode(replies[0]) is None
        assert (await store.verify()).bad == []
    data = b"".join(one.read_bytes() for one in tmp_path.iterdir())  # noqa: ASYNC240
    assert f"{CANARY}-one".encode() not in data
    assert f"{CANARY}-two".encode() in data
    async with Store.open(path) as store:
        tenant = (await store.episodes())[0].tenant
        assert tuple(await store.forget(tenant=tenant)) == (1, 1, 1, 0, 1)
        assert await store.summaries() == []
        assert await store.episodes() == []


async def test_what_is_older_than_it_may_be_goes(backend: FakeVLLM, tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    async with serving(backend, path) as proxy:
        _, _, young = await proxy.ask("0")
    (kept,) = await episodes(path)
    async with Store.open(path) as store:
        await store.add_all([replace(kept, id="old", request_id="old", created="2020-01-01T00:00:00.000000+00:00")])
    async with serving(backend, path, retain_days=30):

        async def one_left() -> bool:
            return len(await episodes(path)) == 1

        await until(one_left)
    assert [one.id for one in await episodes(path)] == [young["id"]]


# Run to their ends


async def recordings(path: Path) -> list[Any]:
    async with Store.open(path) as store:
        return [one for summary in await store.summaries() for one in await store.load(summary.cell)]


@pytest.mark.parametrize("controller", ["cmc", "sc@3", "answer_consistency"])
async def test_branches_are_run_to_their_ends_afterwards(backend: FakeVLLM, tmp_path: Path, controller: str) -> None:
    path = tmp_path / "s.db"
    settings = {"store_text": "hash", "record_fraction": 1.0, "record_branches": 6}
    async with serving(backend, path, **settings) as proxy:
        _, _, body = await proxy.ask("0", tts={"controller": controller, "answer": "boxed"}, temperature=0.7)
        await until(lambda: proxy.metric("autotts_recordings_total", outcome="recorded"))
        assert await proxy.metric("autotts_recording_tokens_total") > 0
        generated = backend.generated
    (found,) = await recordings(path)
    assert found.complete
    assert len(found.branches) == max(6, body["tts"]["branches"])
    assert (found.origin, found.benchmark, found.request) == (Origin.LIVE, BENCHMARK, body["id"])
    assert (found.interval, found.sampling) == (INTERVAL, {"temperature": 0.7, "answer": "boxed"})
    for recorded, written in zip(found.branches, backend.chains, strict=False):
        assert recorded.tokens == written.tokens
        whole = -(-written.tokens // INTERVAL) - 1
        hunches = [written.hunch(INTERVAL * (k + 1), INTERVAL) or None for k in range(whole)]
        assert list(recorded.probes) == hunches
        assert all(cost > 0 for cost in recorded.probe_tokens)
        assert recorded.final in ("7", "9")
    (kept,) = await episodes(path)
    assert generated >= sum(branch.tokens for branch in found.branches)
    assert sum(kept.ledger.values()) < generated  # the client is not billed for it


async def test_what_is_recorded_does_not_depend_on_how_it_went() -> None:
    shares = [sum(is_sampled(f"req-{i}", share) for i in range(5000)) / 5000 for share in (0.0, 0.02, 0.2, 1.0)]
    assert shares == pytest.approx([0, 0.02, 0.2, 1], abs=0.02)


async def test_it_waits_while_requests_do_and_is_of_low_priority(backend: FakeVLLM, tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    backend.queued = 3
    async with serving(backend, path, record_fraction=1.0, record_branches=4, record_at_once=2) as proxy:
        await proxy.ask("0", tts={"controller": "sc@2", "answer": "boxed"})
        served = len(backend.requests)
        await backend.looked.wait()
        assert len(backend.requests) == served
        backend.queued = 0
        await until(lambda: proxy.metric("autotts_recordings_total", outcome="recorded"))
        background = backend.requests[served:]
        assert background
        assert all(one["priority"] > 0 for one in background)
        assert all("priority" not in one for one in backend.requests[:served])
        for one in background:
            prompts = len(one["prompt"]) if isinstance(one["prompt"][0], list) else 1
            assert prompts * one.get("n", 1) <= 2


async def test_an_upstream_that_takes_no_priority(backend: FakeVLLM, tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    backend.fault = "no_priority"
    async with serving(backend, path, record_fraction=1.0, record_branches=4) as proxy:
        await proxy.ask("0", tts={"controller": "sc@2", "answer": "boxed"})
        await until(lambda: proxy.metric("autotts_recordings_total", outcome="recorded"))
    (found,) = await recordings(path)
    assert found.complete


async def test_an_upstream_that_fails_costs_the_recording_alone(backend: FakeVLLM, tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    async with serving(backend, path, record_fraction=1.0, record_branches=8) as proxy:
        backend.queued = 1
        status, _, _ = await proxy.ask("0", tts={"controller": "sc@2", "answer": "boxed"})
        assert status == 200
        backend.fault = "cut"
        backend.queued = 0
        await until(lambda: proxy.metric("autotts_recordings_total", outcome="failed"))
        backend.fault = ""
        await proxy.ask("0", tts={"controller": "sc@2", "answer": "boxed"})
        await until(lambda: proxy.metric("autotts_recordings_total", outcome="recorded"))
    assert len(await recordings(path)) == 1
    assert len(await episodes(path)) == 2


def test_nothing_live_is_held_out() -> None:
    questions = [question_id(str(i)) for i in range(500)]
    assert {live_split(one) for one in questions} == {Split.SEARCH, Split.VALIDATION}
    assert all(live_split(one) is default_split(one) for one in questions if default_split(one) is not Split.HELD_OUT)


async def test_a_question_that_is_held_out_already_stays_so(backend: FakeVLLM, tmp_path: Path) -> None:
    from tests.discovery.store.test_sqlite import some

    path = tmp_path / "s.db"
    async with Store.open(path, create=True) as store:
        await store.add([some("hi", split=Split.HELD_OUT)])
    async with serving(backend, path, record_fraction=1.0, record_branches=2) as proxy:
        await proxy.ask("0", tts={"controller": "sc@2", "answer": "boxed"})
        await until(lambda: proxy.metric("autotts_recordings_total", outcome="recorded"))
    async with Store.open(path) as store:
        assert len(await store.load(Cell(MODEL, BENCHMARK, Split.HELD_OUT))) == 1


# How much feedback


async def test_a_key_may_give_so_much_feedback_a_minute_and_others_are_not_held_up(
    backend: FakeVLLM, tmp_path: Path
) -> None:
    file, path = tmp_path / "keys.toml", tmp_path / "s.db"
    file.write_text("".join(api_keys.key_file_entry(name, f"key-of-{name}") + "\n" for name in ("alice", "bob")))
    async with serving(backend, path, keys=file, feedback_per_minute=3) as proxy:
        ids = {}
        for name in ("alice", "bob"):
            body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "tts": {"beta": 0.5}}
            _, reply = await call(proxy, "POST", "/v1/chat/completions", f"key-of-{name}", body)
            ids[name] = {"request_id": reply["id"], "correct": True}
        for _ in range(3):
            assert (await call(proxy, "POST", "/v1/tts/feedback", "key-of-alice", ids["alice"]))[0] in (200, 202)
        headers = {"authorization": "Bearer key-of-alice"}
        for said in (ids["alice"], {"request_id": "unknown", "correct": True}):
            async with proxy.http.post(f"{proxy.url}/v1/tts/feedback", headers=headers, json=said) as response:
                told = (await response.json())["error"]
                assert (response.status, told["code"]) == (429, "rate_limit_exceeded")
                assert 1 <= int(response.headers["retry-after"]) <= 60
                assert told["message"].startswith(
                    "key alice has sent feedback 3 times within a minute, the limit AUTOTTS_"
                )
        assert (await call(proxy, "POST", "/v1/tts/feedback", "key-of-bob", ids["bob"]))[0] in (200, 202)
        async with proxy.http.get(f"{proxy.url}/metrics", headers={"authorization": f"Bearer {ADMIN}"}) as response:
            assert 'autotts_refusals_total{reason="feedback_per_minute"} 2.0' in await response.text()
    async with Store.open(path) as store:
        assert len(await store.feedback()) == 4


async def test_callers_without_a_key_share_one_limit_on_feedback(backend: FakeVLLM, tmp_path: Path) -> None:
    async with serving(backend, tmp_path / "s.db", feedback_per_minute=2) as proxy:
        said = {"request_id": "unknown", "correct": True}
        statuses = [(await call(proxy, "POST", "/v1/tts/feedback", name, said))[0] for name in ("a", "b", "c", "")]
        assert statuses == [404, 404, 429, 429]
        assert (await call(proxy, "POST", "/v1/tts/feedback", ADMIN, said))[0] == 404  # whose limit is its own


@pytest.mark.parametrize(
    ("text", "mode", "is_told"), [("full", 0o644, True), ("full", 0o600, False), ("none", 0o644, False)]
)
async def test_a_store_of_texts_that_others_can_read_is_told_of(
    backend: FakeVLLM, tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str, mode: int, is_told: bool
) -> None:
    path = tmp_path / "s.db"
    async with Store.open(path, create=True):
        pass
    path.chmod(mode)
    async with serving(backend, path, store_text=text):
        pass
    assert ("other users can read the store" in caplog.text) == is_told
    assert path.stat().st_mode & 0o777 == mode
