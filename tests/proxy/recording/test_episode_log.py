"""The episode log: what it stores of served requests, who may read it, and which texts it keeps."""

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
from proxy.probe_templates import LEAD
from proxy.recording import episode_log, store_writer
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


async def until(probe: Callable[[], Awaitable[Any]], seconds: float = 30) -> Any:
    """Return the first truthy result of `probe`, called repeatedly."""
    async with asyncio.timeout(seconds):
        for _ in repeat(None):
            if result := await probe():
                return result
            await asyncio.sleep(0.02)  # no event announces what the proxy has written


async def call(proxy: Proxy, method: str, path: str, key: str = "", body: Any = None) -> tuple[int, Any]:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    async with proxy.http.request(method, proxy.url + path, headers=headers, json=body) as response:
        return response.status, await response.json()


@pytest.mark.parametrize("controller", ["cmc", "short_m_at_k", "asc", "parallel_probe"])
async def test_a_stored_episode_replays_to_the_same_decisions_and_answer(
    backend: FakeVLLM, tmp_path: Path, controller: str
) -> None:
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


async def test_a_deadline_that_passes_in_the_queue_or_before_the_first_token_is_stored(
    backend: FakeVLLM, tmp_path: Path
) -> None:
    path = tmp_path / "s.db"
    async with serving(backend, path, max_episodes=1) as proxy:
        backend.fault = "hang"
        first = asyncio.create_task(proxy.ask("0.5", tts={"answer": "boxed"}))
        await backend.hanging.wait()
        status, headers, _ = await proxy.ask("0.5", tts={"answer": "boxed", "deadline_s": 0.3})
        assert status == 504
        queued = headers["x-request-id"]
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await backend.idle.wait()
        backend.gate.clear()
        status, headers, _ = await proxy.ask("0.5", tts={"answer": "boxed", "deadline_s": 0.5})
        assert status == 504
        silent = headers["x-request-id"]
        status, found = await call(proxy, "GET", f"/v1/tts/requests/{queued}", ADMIN)
        assert (status, found["stop"]) == (200, "deadline")
    stored = {episode.request_id: episode for episode in await episodes(path)}
    for request in (queued, silent):
        assert (stored[request].stop, stored[request].answer, stored[request].rounds) == ("deadline", None, 0)
        assert sum(stored[request].ledger.values()) == 0


async def test_cut_failed_and_cancelled_episodes_are_stored_with_their_stop_reason(
    backend: FakeVLLM, tmp_path: Path
) -> None:
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
    assert [episode.stop for episode in await episodes(path)] == ["max_tokens", "upstream_error", "disconnected"]


async def test_a_request_whose_final_answer_is_lost_is_not_stored_as_answered(
    backend: FakeVLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The controller has answered and its branch is made to write the answer, which is the last call of a request."""

    async def breaks(*_: Any) -> None:
        raise LookupError

    answered: list[bool] = []
    monkeypatch.setattr(
        "proxy.rollout.controller_manager.ControllerManager.record_episode",
        lambda _, choice, model, outcome: answered.append(outcome.answered),
    )
    backend.chains = [chain("7", 1500, ["7"], mark=chr(97 + i)) for i in range(26)]  # none finishes
    tts = {"controller": "parallel_probe", "answer": "boxed"}
    path = tmp_path / "s.db"
    async with serving(backend, path, store_text="hash") as proxy:
        assert (await proxy.ask("0", tts=tts))[0] == 200
        calls = len(backend.requests)
        backend.fault, backend.fault_after, backend.opened = "hang", 2 * calls - 1, 0
        asking = asyncio.create_task(proxy.ask("0", tts=tts))
        await backend.hanging.wait()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await backend.idle.wait()
        backend.fault, backend.fault_after, backend.opened = "cut", 3 * calls - 1, 0
        status, _, reply = await proxy.ask("0", tts=tts)
        assert (status, reply["tts"]["stop"], reply["tts"]["agreed"]) == (200, "upstream_error", False)
        assert reply["choices"][0]["message"]["content"] == f"{LEAD}7}}"
        backend.fault, backend.opened = "", 0
        monkeypatch.setattr("proxy.episode.reply._gives_answer", breaks)
        assert (await proxy.ask("0", tts=tts))[0] == 500
        for reason in ("answered", "disconnected", "upstream_error", "failed"):
            assert await proxy.metric("autotts_stops_total", reason=reason) == 1
    stored = await episodes(path)
    assert [episode.stop for episode in stored] == ["answered", "disconnected", "upstream_error", "failed"]
    assert [episode.answer for episode in stored] == ["7"] * 4
    assert answered == [True, True, False, False]
    assert [explain(episode)["why"] for episode in stored[1:]] == [
        "The client disconnected.",
        "The upstream failed; the best answer so far was 7 (4 of 4 probed branches; no other was given).",
        "The proxy failed.",
    ]


async def test_a_request_that_the_upstream_refuses_as_invalid_is_no_episode(
    backend: FakeVLLM, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(backend, tmp_path / "s.db") as proxy:
        backend.fault = "refuse"
        status, headers, body = await proxy.ask("0.5", tts={"answer": "boxed"})
        assert (status, body["error"]["code"]) == (400, "upstream_refused")
        assert "x-tts-tokens" not in headers
        assert await proxy.metric("autotts_requests_total", outcome="refused") == 1
        assert await proxy.metric("autotts_stage_requests_total") == 0
        assert not [line for line in caplog.records if line.levelno >= logging.WARNING and "refused" in line.message]
        backend.fault = "unavailable"
        assert (await proxy.ask("0.5", tts={"answer": "boxed"}))[0] >= 500
    assert [episode.stop for episode in await episodes(tmp_path / "s.db")] == ["upstream_error"]


async def test_an_internal_error_is_stored_with_stop_reason_failed(
    backend: FakeVLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def breaks(*_: Any) -> None:
        raise LookupError

    path = tmp_path / "s.db"
    monkeypatch.setattr("proxy.episode.run._run", breaks)
    async with serving(backend, path) as proxy:
        assert (await proxy.ask("0.5"))[0] == 500
        assert await proxy.metric("autotts_stops_total", reason="failed") == 1
    assert [episode.stop for episode in await episodes(path)] == ["failed"]


async def test_without_a_store_no_request_is_kept(backend: FakeVLLM, tmp_path: Path) -> None:
    async with running(load(upstream=backend.url, **SMALL)) as url, aiohttp.ClientSession() as http:
        proxy = Proxy(backend, url, http, None)  # type: ignore[arg-type]
        _, _, body = await proxy.ask("0.5")
        assert (await call(proxy, "GET", f"/v1/tts/requests/{body['id']}"))[0] == 404
        assert (await call(proxy, "GET", "/ready"))[1]["recorder"]["store"] == "off"


# Access and feedback


async def test_a_request_is_visible_to_its_tenant_and_admins_only(backend: FakeVLLM, tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    async with serving(backend, path) as proxy:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "tts": {"beta": 0.5}}
        _, mine = await call(proxy, "POST", "/v1/chat/completions", "mine", body)
        where = f"/v1/tts/requests/{mine['id']}"
        status, record = await call(proxy, "GET", where, "mine")
        assert (status, record["stop"]) == (200, "answered")
        assert (await call(proxy, "GET", where, ADMIN))[0] == 200
        for key in ("other", "", f"{ADMIN}x"):
            status, reply = await call(proxy, "GET", where, key)
            assert (status, reply["error"]["code"]) == (404, "unknown_request")
            assert "or bearer token (the client's api_key; send the same)" in reply["error"]["message"]
        feedback = {"request_id": mine["id"], "correct": True}
        assert (await call(proxy, "POST", "/v1/tts/feedback", "other", feedback))[0] == 404
        assert (await call(proxy, "POST", "/v1/tts/feedback", "mine", feedback))[0] in (200, 202)
        assert (await call(proxy, "GET", "/v1/tts/requests/chatcmpl-none", "mine"))[0] == 404
    async with Store.open(path) as store:
        (kept,) = await store.feedback()
        assert (kept.request_id, kept.kind, kept.value) == (mine["id"], "correct", "true")


async def test_all_feedback_on_a_request_is_stored_in_order(backend: FakeVLLM, tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    async with serving(backend, path, store_text="hash") as proxy:
        _, _, body = await proxy.ask("0.5", tts={"answer": "boxed"})
        for content in ({"correct": True}, {"score": 0.2}, {"answer": "12"}):
            status, reply = await call(proxy, "POST", "/v1/tts/feedback", body={"id": body["id"], **content})
            assert status in (200, 202)
            assert reply["request_id"] == body["id"]
        assert await proxy.metric("autotts_feedback_total") == 3
    async with Store.open(path) as store:
        kept = await store.feedback(body["id"])
    assert [(feedback.kind, json.loads(feedback.value)) for feedback in kept] == [
        ("correct", True),
        ("score", 0.2),
        ("answer", "12"),
    ]


@pytest.mark.parametrize("text", ["none", "hash"])
async def test_feedback_with_a_unit_confirms_an_answer_without(backend: FakeVLLM, tmp_path: Path, text: str) -> None:
    async with serving(backend, tmp_path / "s.db", store_text=text) as proxy:
        _, _, body = await proxy.ask("0.5", tts={"answer": "boxed"})
        feedback = {"id": body["id"], "answer": f"{body['tts']['answer']} dollars"}
        status, _ = await call(proxy, "POST", "/v1/tts/feedback", body=feedback)
        assert status in (200, 202)
        assert await proxy.metric("autotts_feedback_total", kind="answer", content="true") == 1


@pytest.mark.parametrize(
    ("feedback", "expected_text"),
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
async def test_invalid_feedback_is_refused_with_400(
    backend: FakeVLLM, tmp_path: Path, feedback: Any, expected_text: str
) -> None:
    async with serving(backend, tmp_path / "s.db") as proxy:
        status, reply = await call(proxy, "POST", "/v1/tts/feedback", body=feedback)
    assert status == 400
    assert expected_text in reply["error"]["message"]


async def test_feedback_may_give_the_id_twice_and_an_integer_score(backend: FakeVLLM, tmp_path: Path) -> None:
    async with serving(backend, tmp_path / "s.db") as proxy:
        _, _, body = await proxy.ask("0.5", tts={"answer": "boxed"})
        feedback = {"id": body["id"], "request_id": body["id"], "score": 1}
        assert (await call(proxy, "POST", "/v1/tts/feedback", body=feedback))[0] in (200, 202)


async def test_feedback_sent_by_an_admin_is_stored_for_the_tenant_of_the_request(
    backend: FakeVLLM, tmp_path: Path
) -> None:
    path = tmp_path / "s.db"
    async with serving(backend, path) as proxy:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "tts": {"beta": 0.5}}
        _, mine = await call(proxy, "POST", "/v1/chat/completions", "mine", body)
        feedback = {"id": mine["id"], "correct": True}
        assert (await call(proxy, "POST", "/v1/tts/feedback", ADMIN, feedback))[0] in (200, 202)
    (kept,) = await episodes(path)
    async with Store.open(path) as store:
        (recorded,) = await store.feedback()
    assert recorded.tenant == kept.tenant != ""


async def test_feedback_on_a_request_that_was_forgotten_meanwhile_gets_404_and_is_not_counted(
    backend: FakeVLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(episode_log, "ACKNOWLEDGE_S", 30.0)
    path = tmp_path / "s.db"
    async with serving(backend, path) as proxy:
        _, _, body = await proxy.ask("0.5", tts={"answer": "boxed"})
        async with Store.open(path) as store:
            await until(store.episodes)
            await store.forget(request=body["id"])
            for _ in range(2):  # the first finds the owner in memory
                status, reply = await call(proxy, "POST", "/v1/tts/feedback", body={"id": body["id"], "correct": True})
                assert (status, reply["error"]["code"]) == (404, "unknown_request")
            assert await store.feedback() == []
        assert await proxy.metric("autotts_feedback_total") == 0
        assert await proxy.metric("autotts_recorder_records_total", outcome="stored") == 1
        assert await proxy.metric("autotts_recorder_lost_total") == 0


async def test_feedback_keeps_its_order_when_the_clock_is_set_back(
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
    assert [json.loads(feedback.value) for feedback in kept] == [0.1, 0.9, 0.3, 0.6]
    assert len({feedback.created for feedback in kept}) == 4


async def test_a_request_that_another_process_is_writing_is_waited_for(
    backend: FakeVLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both proxies share a store. The second is asked before the first has written what it served."""
    path = tmp_path / "s.db"
    async with serving(backend, path, workers=2) as first, serving(backend, path, workers=2) as second:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "tts": {"beta": 0.5}}
        _, served = await call(first, "POST", "/v1/chat/completions", "mine", body)
        async with Store.open(path) as store:
            (kept,) = await until(store.episodes)
            monkeypatch.setattr(episode_log, "ELSEWHERE_S", 30.0)
            later = replace(kept, id="chatcmpl-later", request_id="chatcmpl-later")
            looked_up = asyncio.Event()
            find = store_writer.StoreWriter.find

            async def noticed(self: store_writer.StoreWriter, request: str) -> ServedEpisode | None:
                looked_up.set()
                return await find(self, request)

            monkeypatch.setattr(store_writer.StoreWriter, "find", noticed)
            feedback = {"request_id": "chatcmpl-later", "correct": True}
            rating = asyncio.create_task(call(second, "POST", "/v1/tts/feedback", "mine", feedback))
            await looked_up.wait()
            await store.add_all([later])
            assert (await rating)[0] in (200, 202)
            assert (await call(second, "GET", f"/v1/tts/requests/{served['id']}", "mine"))[0] == 200
        monkeypatch.setattr(episode_log, "ELSEWHERE_S", 0.2)
        for name, key in (("chatcmpl-never", "mine"), ("chatcmpl-later", "other")):
            assert (await call(second, "GET", f"/v1/tts/requests/{name}", key))[0] == 404


async def test_without_the_store_foreign_and_unknown_requests_get_the_same_503(
    backend: FakeVLLM, tmp_path: Path
) -> None:
    async with serving(backend, tmp_path / "away" / "s.db", spill=tmp_path / "spill") as proxy:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "tts": {"beta": 0.5}}
        _, mine = await call(proxy, "POST", "/v1/chat/completions", "mine", body)
        content = {"correct": True}
        assert (await call(proxy, "POST", "/v1/tts/feedback", "mine", {"id": mine["id"], **content}))[0] in (200, 202)
        for request in (mine["id"], "chatcmpl-none"):
            status, reply = await call(proxy, "POST", "/v1/tts/feedback", "other", {"id": request, **content})
            assert (status, reply["error"]["code"]) == (503, "store_away")
            assert (await call(proxy, "GET", f"/v1/tts/requests/{request}", "other"))[0] == 503


async def test_feedback_on_a_champion_reaches_the_controller_manager_once_per_request(
    backend: FakeVLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    observed: list[tuple[RolloutStage, str, bool]] = []
    monkeypatch.setattr(
        "proxy.rollout.controller_manager.ControllerManager.record_feedback",
        lambda _, stage, digest, model, content: observed.append((stage, model, content)),
    )
    async with serving(backend, tmp_path / "s.db") as proxy:
        _, _, body = await proxy.ask("0.5", tts={"answer": "boxed"})
        for content in ({"answer": "$7$"}, {"correct": False}):  # only the first counts
            await call(proxy, "POST", "/v1/tts/feedback", body={"id": body["id"], **content})
        _, _, named = await proxy.ask("0.5", tts={"answer": "boxed", "controller": "asc"})
        await call(proxy, "POST", "/v1/tts/feedback", body={"id": named["id"], "score": 0.1})
        _, _, other = await proxy.ask("0.5", tts={"answer": "boxed"})
        await call(proxy, "POST", "/v1/tts/feedback", body={"id": other["id"], "answer": "8"})
        _, _, another = await proxy.ask("0.5", tts={"answer": "boxed"})
        with monkeypatch.context() as away:  # the answer cannot be compared, so this feedback does not count
            away.setattr("proxy.recording.store_writer.StoreWriter.find", _away)
            await call(proxy, "POST", "/v1/tts/feedback", body={"id": another["id"], "answer": "7"})
        for score in (0.2, 0.9):
            await call(proxy, "POST", "/v1/tts/feedback", body={"id": another["id"], "score": score})
    assert observed == [(RolloutStage.CHAMPION, MODEL, content) for content in (True, False, False)]


async def _away(*_: Any) -> None:
    raise RecordsAway("the store is away", code="store_away")


# Looking up a request


async def test_a_stored_episode_that_cannot_be_parsed_returns_unreadable_record(
    backend: FakeVLLM, tmp_path: Path
) -> None:
    path = tmp_path / "s.db"
    async with serving(backend, path) as proxy:
        await proxy.ask("0.5", tts={"answer": "boxed"})
    (kept,) = await episodes(path)
    async with Store.open(path) as store:
        await store.add_all([replace(kept, id="bad", request_id="bad", trace="no trace")])
    async with serving(backend, path) as proxy:
        status, reply = await call(proxy, "GET", "/v1/tts/requests/bad", ADMIN)
    assert (status, reply["error"]["code"]) == (500, "unreadable_record")


async def test_an_episode_is_explained_in_a_thread_and_long_answers_are_shortened(
    backend: FakeVLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []
    plain = explain

    def recorded_explain(episode: ServedEpisode) -> Any:
        threads.append(threading.get_ident())
        return plain(episode)

    monkeypatch.setattr("proxy.api.tts.explain", recorded_explain)
    backend.chains = [chain("7" * 200, 400, ["7" * 200]) for _ in range(4)]
    async with serving(backend, tmp_path / "s.db", store_text="hash") as proxy:
        _, _, body = await proxy.ask("0", tts={"answer": "boxed", "controller": "sc@2"})
        status, record = await call(proxy, "GET", f"/v1/tts/requests/{body['id']}")
    assert status == 200
    assert record["answer"] == "7" * 99 + "…"
    assert record["answers"] == [record["answer"]]
    assert threads != [threading.get_ident()]


# Stored texts and deletion


@pytest.mark.parametrize("text", ["none", "hash", "full"])
async def test_store_text_decides_which_texts_are_stored(
    backend: FakeVLLM, tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    path = tmp_path / "s.db"
    backend.chains = [chain(f"{CANARY}-answer", 100, [f"{CANARY}-probe", f"{CANARY}-answer"]) for _ in range(4)]
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
            f"{proxy.url}/v1/tts/feedback", headers=headers, json={"id": reply["id"], "answer": f"{CANARY}-feedback"}
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
    data = b"".join(file.read_bytes() for file in tmp_path.iterdir())  # noqa: ASYNC240
    kinds = ("question", "answer", "probe", "feedback", "key", "stop")
    allowed = {
        "none": (),
        "hash": ("answer", "probe", "feedback"),
        "full": ("answer", "probe", "feedback", "question"),
    }[text]
    assert {kind for kind in kinds if f"{CANARY}-{kind}".encode() in data} == set(allowed)


@pytest.mark.parametrize("fault", ["echo", "babble"])
async def test_a_request_quoted_by_an_upstream_error_is_neither_logged_nor_stored(
    backend: FakeVLLM, tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    caplog.set_level(logging.DEBUG)
    async with serving(backend, tmp_path / "s.db") as proxy:
        for after in (0, 2):  # at the first call, and while the episode runs
            backend.fault, backend.fault_after = fault, len(backend.requests) + after
            await proxy.ask("0.5", messages=[{"role": "user", "content": CANARY}], tts={"answer": "boxed"})
    assert "chatcmpl-" in caplog.text
    assert CANARY not in caplog.text
    assert CANARY not in str([episode.about for episode in await episodes(tmp_path / "s.db")])


async def test_a_forgotten_request_is_erased_and_cannot_be_added_again(backend: FakeVLLM, tmp_path: Path) -> None:
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
        recorded = [recording for cell in await store.summaries() for recording in await store.load(cell.cell)]
        assert {recording.request for recording in recorded} == set(replies)
        forgotten = await store.forget(request=replies[0])
        assert tuple(forgotten) == (1, 1, 1, 0, 1)
        assert before is not None
        await store.add_all(
            [before, *(recording for recording in recorded if recording.request == replies[0])]
        )  # as an import might
        assert await store.episode(replies[0]) is None
        assert (await store.verify()).bad == []
    data = b"".join(file.read_bytes() for file in tmp_path.iterdir())  # noqa: ASYNC240
    assert f"{CANARY}-one".encode() not in data
    assert f"{CANARY}-two".encode() in data
    async with Store.open(path) as store:
        tenant = (await store.episodes())[0].tenant
        assert tuple(await store.forget(tenant=tenant)) == (1, 1, 1, 0, 1)
        assert await store.summaries() == []
        assert await store.episodes() == []


async def test_episodes_older_than_retain_days_are_deleted(backend: FakeVLLM, tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    async with serving(backend, path) as proxy:
        _, _, young = await proxy.ask("0")
    (kept,) = await episodes(path)
    async with Store.open(path) as store:
        await store.add_all([replace(kept, id="old", request_id="old", created="2020-01-01T00:00:00.000000+00:00")])
    async with serving(backend, path, retain_days=30):

        async def only_one_is_left() -> bool:
            return len(await episodes(path)) == 1

        await until(only_one_is_left)
    assert [episode.id for episode in await episodes(path)] == [young["id"]]


# Completed branches


async def recordings(path: Path) -> list[Any]:
    async with Store.open(path) as store:
        return [recording for summary in await store.summaries() for recording in await store.load(summary.cell)]


@pytest.mark.parametrize("controller", ["cmc", "sc@3", "answer_consistency"])
async def test_the_branches_of_a_sampled_request_are_completed_and_recorded(
    backend: FakeVLLM, tmp_path: Path, controller: str
) -> None:
    path = tmp_path / "s.db"
    settings = {"store_text": "hash", "record_fraction": 1.0, "record_branches": 6}
    async with serving(backend, path, **settings) as proxy:
        _, _, body = await proxy.ask("0", tts={"controller": controller, "answer": "boxed"}, temperature=0.7)
        await until(lambda: proxy.metric("autotts_recordings_total", outcome="recorded"))
        assert await proxy.metric("autotts_recording_tokens_total") > 0
        generated = backend.generated
    (recording,) = await recordings(path)
    assert recording.complete
    assert len(recording.branches) == max(6, body["tts"]["branches"])
    assert (recording.origin, recording.benchmark, recording.request) == (Origin.LIVE, BENCHMARK, body["id"])
    assert (recording.interval, recording.sampling) == (INTERVAL, {"temperature": 0.7, "answer": "boxed"})
    for recorded, written in zip(recording.branches, backend.chains, strict=False):
        assert recorded.tokens == written.tokens
        full_intervals = -(-written.tokens // INTERVAL) - 1
        probe_answers = [written.probe_answer(INTERVAL * (k + 1), INTERVAL) or None for k in range(full_intervals)]
        assert list(recorded.probes) == probe_answers
        assert all(cost > 0 for cost in recorded.probe_tokens)
        assert recorded.final in ("7", "9")
    (kept,) = await episodes(path)
    assert kept.about["sampled"] is True
    assert generated >= sum(branch.tokens for branch in recording.branches)
    assert sum(kept.ledger.values()) < generated  # the client is not billed for it


async def test_the_sampled_share_of_requests_matches_the_record_fraction() -> None:
    shares = [sum(is_sampled(f"req-{i}", share) for i in range(5000)) / 5000 for share in (0.0, 0.02, 0.2, 1.0)]
    assert shares == pytest.approx([0, 0.02, 0.2, 1], abs=0.02)


async def test_recording_waits_for_queued_requests_and_uses_a_low_priority(backend: FakeVLLM, tmp_path: Path) -> None:
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
        assert all(request["priority"] > 0 for request in background)
        assert all("priority" not in request for request in backend.requests[:served])
        for request in background:
            prompts = len(request["prompt"]) if isinstance(request["prompt"][0], list) else 1
            assert prompts * request.get("n", 1) <= 2


async def test_recording_works_with_an_upstream_that_refuses_priorities(backend: FakeVLLM, tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    backend.fault = "no_priority"
    async with serving(backend, path, record_fraction=1.0, record_branches=4) as proxy:
        await proxy.ask("0", tts={"controller": "sc@2", "answer": "boxed"})
        await until(lambda: proxy.metric("autotts_recordings_total", outcome="recorded"))
    (recording,) = await recordings(path)
    assert recording.complete


async def test_an_upstream_failure_during_recording_leaves_the_served_request_intact(
    backend: FakeVLLM, tmp_path: Path
) -> None:
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


def test_live_questions_are_never_put_in_the_held_out_split() -> None:
    questions = [question_id(str(i)) for i in range(500)]
    assert {live_split(question) for question in questions} == {Split.SEARCH, Split.VALIDATION}
    kept = [question for question in questions if default_split(question) is not Split.HELD_OUT]
    assert all(live_split(question) is default_split(question) for question in kept)


async def test_a_live_request_for_a_held_out_question_is_recorded_as_held_out(
    backend: FakeVLLM, tmp_path: Path
) -> None:
    from tests.discovery.store.test_replay_store import some

    path = tmp_path / "s.db"
    async with Store.open(path, create=True) as store:
        await store.add([some("hi", split=Split.HELD_OUT)])
    async with serving(backend, path, record_fraction=1.0, record_branches=2) as proxy:
        await proxy.ask("0", tts={"controller": "sc@2", "answer": "boxed"})
        await until(lambda: proxy.metric("autotts_recordings_total", outcome="recorded"))
    async with Store.open(path) as store:
        assert len(await store.load(Cell(MODEL, BENCHMARK, Split.HELD_OUT))) == 1


# Feedback limits


async def test_a_key_over_its_feedback_limit_gets_429_while_another_key_is_accepted(
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
        for feedback in (ids["alice"], {"request_id": "unknown", "correct": True}):
            async with proxy.http.post(f"{proxy.url}/v1/tts/feedback", headers=headers, json=feedback) as response:
                error = (await response.json())["error"]
                assert (response.status, error["code"]) == (429, "rate_limit_exceeded")
                assert 1 <= int(response.headers["retry-after"]) <= 60
                assert error["message"].startswith(
                    "key alice has sent feedback 3 times within a minute, the limit AUTOTTS_"
                )
        assert (await call(proxy, "POST", "/v1/tts/feedback", "key-of-bob", ids["bob"]))[0] in (200, 202)
        async with proxy.http.get(f"{proxy.url}/metrics", headers={"authorization": f"Bearer {ADMIN}"}) as response:
            assert 'autotts_refusals_total{reason="feedback_per_minute"} 2.0' in await response.text()
    async with Store.open(path) as store:
        assert len(await store.feedback()) == 4


async def test_callers_without_a_key_share_one_feedback_limit(backend: FakeVLLM, tmp_path: Path) -> None:
    async with serving(backend, tmp_path / "s.db", feedback_per_minute=2) as proxy:
        feedback = {"request_id": "unknown", "correct": True}
        statuses = [(await call(proxy, "POST", "/v1/tts/feedback", name, feedback))[0] for name in ("a", "b", "c", "")]
        assert statuses == [404, 404, 429, 429]
        assert (await call(proxy, "POST", "/v1/tts/feedback", ADMIN, feedback))[
            0
        ] == 404  # an admin has a limit of its own


@pytest.mark.parametrize(
    ("text", "mode", "is_warned"), [("full", 0o644, True), ("full", 0o600, False), ("none", 0o644, False)]
)
async def test_a_store_with_texts_readable_by_other_users_is_warned_of(
    backend: FakeVLLM, tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str, mode: int, is_warned: bool
) -> None:
    path = tmp_path / "s.db"
    async with Store.open(path, create=True):
        pass
    path.chmod(mode)
    caplog.set_level(logging.INFO, "proxy")
    async with serving(backend, path, store_text=text):
        pass
    assert f"recording to {path} (text: {text})" in caplog.messages
    assert ("other users can read this file, which holds request texts" in caplog.text) == is_warned
    assert path.stat().st_mode & 0o777 == mode
