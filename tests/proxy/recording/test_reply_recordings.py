"""Episodes of whole replies become recordings, which replay reproduces, and are collected with `everything`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import pytest
from typer.testing import CliRunner

from discovery.answers import is_redacted
from discovery.answers.structured import class_of_calls, class_of_document
from discovery.audit.parity import ServedRecords, check_parity, load_records
from discovery.data.collect import collect
from discovery.data.collection_plan import CollectionPlan
from discovery.data.importers import read_jsonl
from discovery.data.questions import Question, collected_kind, read_questions
from discovery.data.recordings import (
    LabelSource,
    Origin,
    RecordedQuestion,
    intern_answers,
    question_id,
    question_text,
)
from discovery.errors import BadRecording, CollectError
from discovery.evaluation.reference_answers import update_labels
from discovery.store import Store
from proxy.cli import app
from proxy.errors import UpstreamError
from proxy.recording.template_drift import TemplateDrift
from tests.chat_fake import SEED, Held, ScriptedReply
from tests.proxy.conftest import Proxy
from tests.proxy.episode.test_whole_replies import PARAMETERS, TIME, VOTES, WEATHER, ask, call, fake, served, text
from tests.proxy.recording.test_episode_log import until

RECORDED: Final[dict[str, Any]] = {"record_fraction": 1.0, "record_branches": 8, "admin_key": "admin"}
JSON: Final = {"type": "json_schema", "json_schema": {"name": "city", "schema": {"type": "object"}}}
DOCUMENTS: Final = ['{"name":"Rome","people":3}', '{"people":3.0, "name":"Rome"}', '{"name":"Oslo","people":2}', "oops"]
FOUR: Final = {"controller": "self_consistency@4"}
TOOLS: Final = {"weather": PARAMETERS, "time": None}


async def ended(proxy: Proxy, outcome: str, count: int = 1) -> None:
    async def has_count() -> bool:
        return await proxy.metric("autotts_recordings_total", outcome=outcome) == count

    await until(has_count)


async def records(path: Path, count: int = 1) -> ServedRecords:
    """Return what the store holds once it has `count` recordings."""

    async def look() -> ServedRecords | None:
        async with Store.open(path) as store:
            kept = await load_records(store)
        return kept if len(kept.recordings) >= count else None

    kept: ServedRecords = await until(look)
    return kept


# Episodes


@pytest.mark.parametrize("stored", ["none", "hash", "full"])
async def test_an_episode_whose_replies_ended_becomes_a_recording(tmp_path: Path, stored: str) -> None:
    async with served(VOTES, store=tmp_path / "s.db", store_text=stored, **RECORDED) as proxy:
        _, headers, reply = await ask(proxy, temperature=0.5, parallel_tool_calls=False)
        await ended(proxy, "recorded")
        kept = await records(tmp_path / "s.db")
        generated, spent = proxy.backend.generated, await proxy.metric("autotts_recording_tokens_total")
    made = kept.recordings[headers["x-request-id"]]
    assert not made.has_probes
    assert (made.origin, made.benchmark, made.interval, made.probe_template) == (Origin.LIVE, "live", 10, "")
    assert made.sampling == {"temperature": 0.5, "answer": "tools", "branch": "reply"}
    assert made.chat_template
    fields = {"tools": [WEATHER, TIME], "parallel_tool_calls": False}
    asked = question_text([{"role": "user", "content": "hi"}], fields)
    assert made.question == question_id(asked)
    assert made.text == (asked if stored == "full" else None)
    scripted = [*VOTES, *VOTES[:3]]  # the fake begins anew after the last reply
    assert [branch.tokens for branch in made.branches] == [reply.tokens for reply in scripted]
    assert all(branch.complete and not branch.probes for branch in made.branches)
    rome = class_of_calls('[{"name": "weather", "arguments": {"city": "Rome é😀", "x": 1.5}}]', TOOLS)
    assert [branch.final == rome for branch in made.branches] == [reply in VOTES[2:4] for reply in scripted]
    assert len({branch.final for branch in made.branches}) == 4
    assert all(is_redacted(branch.final or "") for branch in made.branches)
    assert reply["usage"]["completion_tokens"] + spent == generated
    (episode,) = kept.episodes
    assert episode.recorded_answer == rome
    assert episode.answer == (rome if stored == "none" else reply["tts"]["answer"])


@pytest.mark.slow
@pytest.mark.parametrize("stored", ["none", "full"])
@pytest.mark.parametrize("controller", ["self_consistency@4", "adaptive_consistency", "asc@6", "short_m_at_k@4"])
async def test_replay_reproduces_every_episode_of_replies(tmp_path: Path, controller: str, stored: str) -> None:
    calls = [call(i, json.dumps({"city": "Rome" if i % 3 else f"Oslo {i}", "x": "y" * (7 * i)})) for i in range(8)]
    settings = {**RECORDED, "record_branches": 40}
    async with served(calls, store=tmp_path / "s.db", store_text=stored, **settings) as proxy:
        asked: list[dict[str, Any]] = [{}, {"tools": None, "response_format": JSON}, {"parallel_tool_calls": True}]
        for number, fields in enumerate(asked):
            fake(proxy).replies = [*map(text, DOCUMENTS)] if "response_format" in fields else calls
            _, headers, reply = await ask(proxy, **{"tts": {"controller": controller}, **fields}, user=str(number))
            assert headers["x-tts-controller"] == controller, reply
            await ended(proxy, "recorded", number + 1)
        kept = await records(tmp_path / "s.db", 3)
    report = check_parity(kept)
    assert report.decisions.rounds == report.decisions.agreed > 0
    assert report.decisions.unchecked == []
    assert (report.reproduced.episodes, report.reproduced.differing) == (3, [])


async def test_json_is_recorded_by_whole_documents(tmp_path: Path) -> None:
    async with served([*map(text, DOCUMENTS)], store=tmp_path / "s.db", **RECORDED) as proxy:
        _, headers, _ = await ask(proxy, tools=None, response_format=JSON, tts=FOUR)
        await ended(proxy, "recorded")
        made = (await records(tmp_path / "s.db")).recordings[headers["x-request-id"]]
    rome, oslo = (class_of_document(document, None) for document in DOCUMENTS[1:3])
    assert [branch.final for branch in made.branches] == [rome, rome, oslo, None] * 2
    assert made.sampling == {"answer": "json", "branch": "reply"}
    assert intern_answers(made).finals.tolist() == [0, 0, 1, -1] * 2


async def test_texts_beside_a_penalty_are_recorded_with_their_answers(tmp_path: Path) -> None:
    replies = [text("So \\boxed{7}."), text("It is \\boxed{7.0}."), text("\\boxed{8}"), text("No idea.")]
    async with served(replies, store=tmp_path / "s.db", store_text="hash", **RECORDED) as proxy:
        _, headers, _ = await ask(proxy, tools=None, presence_penalty=0.5, tts=FOUR)
        await ended(proxy, "recorded")
        made = (await records(tmp_path / "s.db")).recordings[headers["x-request-id"]]
    assert [branch.final for branch in made.branches] == ["7", "7", "8", None] * 2
    assert made.sampling == {"presence_penalty": 0.5, "branch": "reply"}


async def test_an_answer_in_markdown_is_recorded_as_replay_reads_it(tmp_path: Path) -> None:
    replies = [text("The answer is **7** dollars."), text("\\boxed{7}"), text("\\boxed{8}"), text("No idea.")]
    async with served(replies, store=tmp_path / "s.db", store_text="hash", **RECORDED) as proxy:
        _, headers, _ = await ask(proxy, tools=None, presence_penalty=0.5, tts=FOUR)
        await ended(proxy, "recorded")
        kept = await records(tmp_path / "s.db")
    made = kept.recordings[headers["x-request-id"]]
    assert [branch.final for branch in made.branches] == ["7 dollars", "7 dollars", "8", None] * 2
    (episode,) = kept.episodes
    assert episode.recorded_answer == "7 dollars"
    assert episode.about["answers"] == ["7 dollars", "8"]


async def test_episodes_with_replies_that_were_cut_are_not_recorded(tmp_path: Path) -> None:
    same = [call(i, '{"city":"Rome"}') for i in range(4)]
    async with served(same, store=tmp_path / "s.db", **RECORDED) as proxy:
        _, _, cut = await ask(proxy, tts={**FOUR, "max_total_tokens": 8})  # the cap cuts the only reply
        assert cut["choices"][0]["finish_reason"] == "length"
        assert cut["tts"]["branches"] == 1
        _, _, judged = await ask(proxy, tools=None, tts={**FOUR, "answer": "select"})
        assert judged["tts"]["branches"] == 4
        _, _, stopped = await ask(proxy, stop=["zzz"])
        assert stopped["tts"]["branches"] == 5
        fake(proxy).held = held = Held(5)
        running = asyncio.create_task(ask(proxy, tts={**FOUR, "deadline_s": 0.2}))
        await held.reached.wait()
        await running
        held.released.set()
        assert await proxy.metric("autotts_recordings_total") == 0
        fake(proxy).held = None
        await ask(proxy, tts=FOUR)
        await ended(proxy, "recorded")
        assert len((await records(tmp_path / "s.db")).recordings) == 1


async def test_a_budget_below_one_reply_skips_the_episode(tmp_path: Path) -> None:
    settings = {**RECORDED, "record_tokens_per_hour": 1000}
    async with served([call(1, "{}")], store=tmp_path / "s.db", **settings) as proxy:
        await ask(proxy, tts=FOUR)
        await ended(proxy, "skipped")
        await ask(proxy, tts=FOUR, max_tokens=100)
        await ended(proxy, "recorded")


async def test_replies_are_opened_for_a_recording_without_the_cap_of_the_request(tmp_path: Path) -> None:
    async with served([call(1, '{"city":"Rome"}')], store=tmp_path / "s.db", **RECORDED) as proxy:
        _, headers, reply = await ask(proxy, max_tokens=100, tts={**FOUR, "max_total_tokens": 500})
        assert reply["tts"]["branches"] == 4
        await ended(proxy, "recorded")
        assert len(proxy.backend.requests) == 8
        assert [body["max_tokens"] for body in proxy.backend.requests] == [100] * 8
        assert len((await records(tmp_path / "s.db")).recordings[headers["x-request-id"]].branches) == 8


async def test_if_a_reply_for_a_recording_fails_the_others_are_cut(tmp_path: Path) -> None:
    settings = {**RECORDED, "read_timeout_s": 600}  # otherwise it would cut them
    replies = [call(i, '{"city":"Rome"}') for i in range(8)]
    replies[4] = text("x", finish="abort")  # the first one that is opened for the recording
    async with served(replies, store=tmp_path / "s.db", **settings) as proxy:
        upstream = fake(proxy)
        upstream.queued = 1  # so that the recording waits
        await ask(proxy, tts=FOUR)
        upstream.held = Held(5)
        upstream.queued = 0
        await ended(proxy, "failed")
        await upstream.idle.wait()
        assert len(upstream.requests) == 8
        assert await proxy.metric("autotts_recordings_total") == 1


async def test_without_a_known_template_requests_are_served_but_not_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(self: TemplateDrift, model: str) -> str:
        raise UpstreamError("no /tokenize")

    async with served([call(1, "{}")], store=tmp_path / "s.db", **RECORDED) as proxy:
        monkeypatch.setattr(TemplateDrift, "template_hash", fail)
        status, _, reply = await ask(proxy, tts=FOUR)
        assert (status, reply["tts"]["branches"]) == (200, 4)
        await ended(proxy, "failed")
        body = {"messages": [{"role": "user", "content": "hi"}], "tools": [WEATHER]}
        tts = {"beta": 1, "controller": "everything@2"}
        headers = {"authorization": "Bearer admin"}
        url = f"{proxy.url}/v1/chat/completions"
        async with proxy.http.post(url, json={**body, "tts": tts}, headers=headers) as response:
            assert response.status == 502


# Collections


CALLED: Final = {
    "question": "What is the weather in Rome?",
    "tools": [WEATHER],
    "reference": '[{"name": "weather", "arguments": {"city": "Rome", "unit": "C"}}]',
}
FILLED: Final = {"question": "Which city?", "response_format": JSON, "reference": '{"people": 3, "name": "Rome"}'}


async def collected(
    tmp_path: Path, lines: Sequence[dict[str, Any]], replies: Sequence[ScriptedReply], budget: int | None = None
) -> list[RecordedQuestion]:
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    questions = read_questions(tmp_path / "questions.jsonl")
    plan = CollectionPlan("", "calls", 6, collected_kind(questions, "auto"), max_tokens=200, keep_text=True)
    async with served(replies, admin_key="admin") as proxy:
        progress = await collect(
            proxy.url, "admin", questions, plan, tmp_path / "out.jsonl", budget=budget, per_request=3
        )
        assert (progress.done, progress.skipped) == (6 * len(questions), [])
        assert progress.tokens == proxy.backend.generated
        assert all(body["max_tokens"] == 200 for body in proxy.backend.requests)
    return read_jsonl(tmp_path / "out.jsonl")


async def test_branches_of_questions_with_tools_are_collected(tmp_path: Path) -> None:
    other = {**CALLED, "tools": [TIME], "reference": "[]"}  # the same messages, but another question
    replies = [call(1, '{"city":"Rome"}'), text("I cannot."), call(2, '{"city":')]
    first, second = await collected(tmp_path, [CALLED, other], replies, budget=100_000)
    assert first.sampling == {"max_tokens": 200, "answer": "tools", "branch": "reply"} == second.sampling
    assert (first.origin, first.has_probes, first.version) == (Origin.COLLECTED, False, second.version)
    assert first.question != second.question
    assert json.loads(first.text or "")["tools"] == [WEATHER]
    assert len(first.branches) == len(second.branches) == 6
    assert all(branch.complete and not branch.probes for branch in first.branches)
    recording = intern_answers(first)
    assert sorted(recording.finals.tolist()).count(-1) == 2
    assert recording.finals.tolist().count(recording.reference) == 2


async def test_branches_of_questions_with_json_are_collected(tmp_path: Path) -> None:
    (made,) = await collected(tmp_path, [FILLED], [*map(text, DOCUMENTS[:3])])
    recording = intern_answers(made)
    assert made.sampling["answer"] == "json"
    assert recording.finals.tolist().count(recording.reference) == 4


async def test_a_recording_says_so_in_the_reply(tmp_path: Path) -> None:
    async with served(VOTES, admin_key="admin") as proxy:
        body = {"messages": [{"role": "user", "content": "hi"}], "tools": [WEATHER, TIME], "seed": SEED}
        tts = {"beta": 1, "controller": "everything@5", "required": True}
        headers = {"authorization": "Bearer admin"}
        url = f"{proxy.url}/v1/chat/completions"
        async with proxy.http.post(url, json={**body, "tts": tts}, headers=headers) as response:
            reply = await response.json()
        assert response.status == 200, reply
        recording = reply["tts"]["recording"]
        assert [branch["tokens"] for branch in recording["branches"]] == [reply.tokens for reply in VOTES]
        assert (recording["interval"], recording["probe_template"]) == (10, "")
        assert reply["tts"]["tokens"]["total"] == proxy.backend.generated
        async with proxy.http.post(url, json={**body, "tts": {**tts, "answer": "select"}}, headers=headers) as response:
            refused = await response.json()
        assert (response.status, refused["error"]["param"]) == (400, "tts.answer")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ({**CALLED, "reference": "Rome"}, "reference: "),
        ({**CALLED, "reference": '[{"name": "time", "arguments": {}}]'}, "not among the question's tools"),
        ({**CALLED, "tools": [{"type": "function"}]}, "tools.0: must be"),
        ({**CALLED, "tools": []}, "tools: "),
        ({"question": "hi", "tool_choice": "none"}, "tool_choice: it needs tools"),
        ({**FILLED, "reference": "{"}, "reference: "),
        ({**FILLED, "response_format": {"type": "text"}}, "response_format: its type must be"),
        ({**CALLED, "tool": []}, "tool"),
    ],
)
def test_a_bad_question_names_its_field(line: dict[str, Any], problem: str, tmp_path: Path) -> None:
    (tmp_path / "questions.jsonl").write_text(json.dumps(line))
    with pytest.raises(BadRecording) as refused:
        read_questions(tmp_path / "questions.jsonl")
    assert problem in str(refused.value)


def test_signals_of_whole_replies_cannot_be_collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "questions.jsonl").write_text(json.dumps(CALLED))
    monkeypatch.setenv("AUTOTTS_ADMIN_KEY", "admin")
    asked = ["collect", str(tmp_path / "questions.jsonl"), "--out", str(tmp_path / "out.jsonl"), "--signals"]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 2
    assert "--signals: the questions ask for tools, whose branches have no signals" in done.output
    assert not (tmp_path / "out.jsonl").exists()


def test_questions_of_one_kind_are_collected_by_it() -> None:
    called, filled, asked = (
        Question.model_validate(line) for line in (CALLED, FILLED, {"question": "hi", "reference": "7"})
    )
    assert [collected_kind([question], "auto") for question in (called, filled, asked)] == ["tools", "json", "auto"]
    assert collected_kind([asked], "boxed") == "boxed"
    assert collected_kind([called], "tools") == "tools"
    with pytest.raises(CollectError, match=r"several kinds \(json, text, tools\)"):
        collected_kind([called, filled, asked], "auto")
    with pytest.raises(CollectError, match="--answer boxed: the questions ask for tools"):
        collected_kind([called], "boxed")


# Labels


async def test_feedback_and_references_label_recorded_replies(tmp_path: Path) -> None:
    replies = [text('{"a":1,"b":1}'), text('{"a":1,"b":2}'), text('{"a":2,"b":2}'), text('{"a":1,"b":3}')]
    async with served(replies, store=tmp_path / "s.db", store_text="none", **RECORDED) as proxy:
        _, headers, reply = await ask(proxy, tools=None, response_format=JSON, tts=FOUR)
        assert reply["choices"][0]["message"]["content"] == '{"a":1,"b":2}'  # by the vote on fields
        await ended(proxy, "recorded")
        feedback = {"request_id": headers["x-request-id"], "correct": True}
        async with proxy.http.post(f"{proxy.url}/v1/tts/feedback", json=feedback) as response:
            assert response.status in (200, 202)
        await records(tmp_path / "s.db")
    right = class_of_document('{"b":2,"a":1}', None)
    asked = Question.model_validate(
        {"messages": [{"role": "user", "content": "hi"}], "response_format": JSON, "reference": '{"b":2,"a":1}'}
    )
    async with Store.open(tmp_path / "s.db") as store:
        await update_labels(store)
        labels = {label.source: label.answer for label in await store.labels()}
        assert labels == {LabelSource.FEEDBACK: right}
        report = await update_labels(store, [asked])
        assert report.unknown == 0
        (cell,) = [summary.cell for summary in await store.summaries()]
        (made,) = await store.load(cell)
    assert (made.reference, made.label_source) == (right, LabelSource.REFERENCE)
    recording = intern_answers(made)
    assert recording.finals.tolist().count(recording.reference) == 2
