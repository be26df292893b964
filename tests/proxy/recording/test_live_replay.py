"""Live traffic becomes replay data on a real vLLM: a sample of the requests is completed, recorded and replayed."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI

from deploy.embedded.task import held_back
from discovery.audit.parity import ServedRecords, load_records
from discovery.data.recordings import question_id
from discovery.store import Store
from proxy.recording.branch_completion import is_sampled
from proxy.server import running
from proxy.settings import EMBEDDED, load
from tests.discovery.evaluation.test_replay_signals import WATCHER
from tests.proxy.recording.test_episode_log import until
from tests.proxy.recording.test_parity import check_facts
from tests.proxy.test_loop import autotts

pytestmark = pytest.mark.vllm

MODEL = "autotts-tiny"
REQUESTS = int(os.environ.get("SOAK_REQUESTS", "48"))
SHARE = 0.2
BRANCHES = 16
BETA = 0.1
AT_ONCE = 8
CONTROLLER = "cmc"
WATCHED = 9
"""Branches of a question whose controller reads signals: as many as it may open."""
WATCHED_REQUESTS = 6


async def served(url: str, requests: int = REQUESTS) -> dict[str, bool]:
    """Send the requests and return by id whether each was answered correctly."""
    right: dict[str, bool] = {}
    free = asyncio.Semaphore(AT_ONCE)
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as openai:

        async def ask(question: str, answer: str) -> None:
            messages: Any = [{"role": "user", "content": question}]
            tts = {"beta": BETA, "answer": "boxed"}
            async with free:
                reply: Any = await openai.chat.completions.create(
                    model=MODEL, messages=messages, extra_body={"tts": tts}
                )
            right[reply.id] = reply.tts["answer"] == answer

        await asyncio.gather(*(ask(problem.question, problem.answer) for problem in held_back(requests)))
    return right


@pytest.mark.timeout(900)
async def test_a_controller_that_reads_signals_sees_the_same_facts_live_and_in_replay(
    vllm: str, tmp_path: Path
) -> None:
    path, file = tmp_path / "s.db", tmp_path / "watcher.py"
    file.write_text(WATCHER)
    given = {
        "store": path,
        "record_fraction": 1.0,
        "record_branches": WATCHED,
        "record_at_once": WATCHED,
        "decision_s": 5,
    }
    settings = load(upstream=vllm, max_branches=WATCHED, **given, **{**EMBEDDED, "controller": str(file)})
    kept: list[ServedRecords] = []

    async def finished() -> bool:
        async with Store.open(path) as opened:
            kept[:] = [await load_records(opened)]
        return len(kept[0].recordings) == WATCHED_REQUESTS

    async with running(settings) as url:
        assert len(await served(url, WATCHED_REQUESTS)) == WATCHED_REQUESTS
        await until(finished, seconds=600)
    await check_facts(kept[0], BETA, settings.interval)


@pytest.mark.timeout(1500)
async def test_replayed_recordings_reproduce_the_tokens_and_accuracy_of_live_traffic(vllm: str, tmp_path: Path) -> None:
    path, store = tmp_path / "s.db", str(tmp_path / "s.db")
    given = {"store": path, "record_fraction": SHARE, "record_branches": BRANCHES, "record_at_once": BRANCHES}
    settings = load(upstream=vllm, max_branches=BRANCHES, **given, **{**EMBEDDED, "controller": CONTROLLER})
    async with running(settings) as url:
        right = await served(url)
        wanted = {request_id for request_id in right if is_sampled(request_id, SHARE)}

        async def finished() -> bool:
            async with Store.open(path) as opened:
                recorded = [
                    recording for cell in await opened.summaries() for recording in await opened.load(cell.cell)
                ]
                return {recording.request for recording in recorded} == wanted

        await until(finished, seconds=600)
    assert 1 <= len(wanted) <= 2.5 * REQUESTS * SHARE  # by chance outside in fewer than 1 of 10,000 runs
    async with Store.open(path) as opened:
        episodes = await opened.episodes()
        assert {episode.request_id for episode in episodes} == set(right)
        assert (await opened.verify()).bad == []
    problems = {question_id(problem.question): problem for problem in held_back(REQUESTS)}
    assert {episode.question for episode in episodes} == set(problems)
    data = path.read_bytes()
    assert not [problem for problem in problems.values() if problem.question.encode() in data]  # no text is stored

    questions = tmp_path / "questions.jsonl"
    lines = [{"question": problem.question, "reference": problem.answer} for problem in problems.values()]
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    await autotts("label", "--store", store, "--references", str(questions))

    about = ("--recordings", store, "--controllers", CONTROLLER, "--betas", str(BETA), "--shuffles", "20")
    await autotts("evaluate", *about, "--json", str(tmp_path / "figures.json"))
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert {row["benchmark"] for row in figures} == {"live"}
    assert {row["split"] for row in figures} <= {"search", "validation"}
    assert sum(row["episodes"] for row in figures) == 20 * len(wanted)
    assert not any(row["failures"] for row in figures)

    report, plot = tmp_path / "parity.json", tmp_path / "parity.svg"
    await autotts("parity", "--store", store, "--json", str(report), "--plot", str(plot), code=None)
    parity = json.loads(report.read_text())
    assert plot.stat().st_size > 0
    assert parity["decisions"]["agreed"] == parity["decisions"]["rounds"] == sum(episode.rounds for episode in episodes)
    assert parity["reproduced"]["differing"] == []
    (means,) = parity["means"]
    assert parity["checked"]
    assert parity["holds"] == (means["verdict"] != "disagree")  # about one run in ten disagrees by chance
    assert (means["controller"], means["beta"], means["recorded"]) == (CONTROLLER, BETA, len(wanted))
    assert means["accuracy"]["live"]["mean"] == pytest.approx(100 * sum(right.values()) / REQUESTS)
    for figure in ("tokens", "accuracy"):
        live, replayed, paired = (means[figure][of] for of in ("live", "replayed", "paired"))
        if REQUESTS >= 200:  # means of other questions: a small sample's intervals miss each other by chance
            assert live["low"] <= replayed["high"], means
            assert replayed["low"] <= live["high"], means
        # A 95% interval misses the truth in 1 of 20 runs; an interval twice as wide in about 1 of 10,000.
        assert abs(paired["mean"]) <= paired["high"] - paired["low"], means
