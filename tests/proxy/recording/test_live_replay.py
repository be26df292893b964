"""Live traffic becomes replay data, on a real vLLM: 200 requests, some of which are run to their ends, and replayed."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI

from deploy.embedded.task import held_back
from discovery.data.recordings import question_id
from discovery.store import Store
from proxy.recording.branch_completion import is_sampled
from proxy.server import running
from proxy.settings import EMBEDDED, load
from tests.proxy.recording.test_episode_log import until
from tests.proxy.test_loop import autotts

pytestmark = pytest.mark.vllm

MODEL = "autotts-tiny"
REQUESTS = 200
SHARE = 0.2
BRANCHES = 16
BETA = 0.1
AT_ONCE = 4
CONTROLLER = "cmc"


async def served(url: str) -> dict[str, bool]:
    """Whether each of 200 requests, by its id, was answered rightly."""
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

        await asyncio.gather(*(ask(one.question, one.answer) for one in held_back(REQUESTS)))
    return right


@pytest.mark.timeout(1500)
async def test_replay_tells_the_truth_about_live(vllm: str, tmp_path: Path) -> None:
    path, store = tmp_path / "s.db", str(tmp_path / "s.db")
    given = {"store": path, "record_fraction": SHARE, "record_branches": BRANCHES, "record_at_once": BRANCHES}
    settings = load(upstream=vllm, max_branches=BRANCHES, **given, **{**EMBEDDED, "controller": CONTROLLER})
    async with running(settings) as url:
        right = await served(url)
        wanted = {one for one in right if is_sampled(one, SHARE)}

        async def finished() -> bool:
            async with Store.open(path) as opened:
                recorded = [one for cell in await opened.summaries() for one in await opened.load(cell.cell)]
                return {one.request for one in recorded} == wanted

        await until(finished, seconds=600)
    assert 20 <= len(wanted) <= 60
    async with Store.open(path) as opened:
        episodes = await opened.episodes()
        assert {one.request_id for one in episodes} == set(right)
        assert (await opened.verify()).bad == []
    problems = {question_id(one.question): one for one in held_back(REQUESTS)}
    assert {one.question for one in episodes} == set(problems)
    data = path.read_bytes()
    assert not [one for one in problems.values() if one.question.encode() in data]  # no text is stored

    questions = tmp_path / "questions.jsonl"
    lines = [{"question": one.question, "reference": one.answer} for one in problems.values()]
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    await autotts("label", "--store", store, "--references", str(questions))

    about = ("--recordings", store, "--controllers", CONTROLLER, "--betas", str(BETA), "--shuffles", "20")
    await autotts("evaluate", *about, "--json", str(tmp_path / "figures.json"))
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert {one["benchmark"] for one in figures} == {"live"}
    assert {one["split"] for one in figures} <= {"search", "validation"}
    assert sum(one["episodes"] for one in figures) == 20 * len(wanted)
    assert not any(one["failures"] for one in figures)

    report, plot = tmp_path / "parity.json", tmp_path / "parity.svg"
    await autotts("parity", "--store", store, "--json", str(report), "--plot", str(plot), code=None)
    told = json.loads(report.read_text())
    assert plot.stat().st_size > 0
    assert told["decisions"]["agreed"] == told["decisions"]["rounds"] == sum(one.rounds for one in episodes)
    assert told["reproduced"]["differing"] == []
    (means,) = told["means"]
    assert told["checked"]
    assert told["holds"] == (means["verdict"] != "disagree")  # about one time in ten a right stack's does
    assert (means["controller"], means["beta"], means["recorded"]) == (CONTROLLER, BETA, len(wanted))
    assert means["accuracy"]["live"]["mean"] == pytest.approx(100 * sum(right.values()) / REQUESTS)
    for figure in ("tokens", "accuracy"):
        live, replayed, paired = (means[figure][of] for of in ("live", "replayed", "paired"))
        assert live["low"] <= replayed["high"], means
        assert replayed["low"] <= live["high"], means
        # One time in twenty a right stack's interval is missed; by as much again, one in ten thousand.
        assert abs(paired["mean"]) <= paired["high"] - paired["low"], means
