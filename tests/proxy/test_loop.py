"""From recordings to live and back, on a real vLLM: collect, discover, gate, promote to canary, serve, roll back."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI

from controllers.loading import read
from controllers.rollout_state import lot
from deploy.embedded.task import held_back
from discovery.data.importers import read_jsonl
from discovery.data.recordings import Split, question_id
from proxy.server import running
from proxy.settings import EMBEDDED, load

pytestmark = pytest.mark.vllm

MODEL = "autotts-tiny"
BRANCHES = 16
SHARE = 0.5
QUESTIONS = 12


async def autotts(*arguments: str, code: int | None = 0, **environment: str) -> str:
    """Run a command and return its output. Fail unless its status is `code` or `code` is None."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "proxy.cli", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=os.environ | environment,
    )
    output, _ = await process.communicate()
    assert code is None or process.returncode == code, output.decode()
    return output.decode()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "registry").mkdir()
    return tmp_path


@pytest.mark.timeout(900)
async def test_a_controller_is_discovered_gated_promoted_served_and_rolled_back(vllm: str, folder: Path) -> None:
    recordings, registry = folder / "recordings.jsonl", str(folder / "registry")
    splits = [Split.SEARCH] * 8 + [Split.HELD_OUT] * (QUESTIONS - 8)
    asked = [
        {"question": problem.question, "reference": problem.answer, "split": split}
        for problem, split in zip(held_back(QUESTIONS), splits, strict=True)
    ]
    (folder / "embedded.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    async with running(load(upstream=vllm, admin_key="sesame", **EMBEDDED)) as url:
        collect = ("collect", str(folder / "embedded.jsonl"), "--out", str(recordings), "--url", url)
        await autotts(*collect, "--branches", str(BRANCHES), "--answer", "boxed", AUTOTTS_ADMIN_KEY="sesame")
    collected = read_jsonl(recordings)
    split_of = {
        question_id(problem.question): split for problem, split in zip(held_back(QUESTIONS), splits, strict=True)
    }
    assert {recording.question: recording.split for recording in collected} == split_of
    assert all(recording.complete and len(recording.branches) == BRANCHES for recording in collected)

    about = ("--recordings", str(recordings), "--shuffles", "2", "--workers", "2")
    await autotts("discover", *about, "--rounds", "2", "--seed", "7", "--out", str(folder / "run"))
    (file,) = (folder / "run").glob("grammar-*.py")
    card = json.loads(file.with_suffix(".json").read_text())
    digest = read(file).digest
    assert (card["digest"], card["explorer"]) == (digest, "grammar")
    assert card["data"]["cells"] == ["autotts-tiny embedded search"]  # held-out questions were not used

    report = folder / "report.json"
    ledger = ("--ledger", str(folder / "ledger.jsonl"), "--report", str(report))
    await autotts("gate", str(file), "--recordings", str(recordings), *ledger, "--shuffles", "5", "--betas", "0,0.5,1")
    verdict = json.loads(report.read_text())
    assert (verdict["digest"], verdict["k"], verdict["questions"]) == (digest, 1, QUESTIONS - 8)
    assert verdict["verdict"] in ("undecided", "reject")  # four questions are too few for a verdict
    canary = ("promote", str(file), "--registry", registry, "--as", "canary", "--share", str(SHARE))
    assert "verdict" in await autotts(*canary, "--report", str(report), code=2)
    assert "FORCED" in await autotts(*canary, "--report", str(report), "--force", "--why", "to see the loop closed")

    settings = load(upstream=vllm, registry=registry, **{**EMBEDDED, "controller": "short_m_at_k"})
    async with running(settings) as url, AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as openai:

        async def ask(number: int) -> Any:
            messages: Any = [{"role": "user", "content": held_back(QUESTIONS)[number % QUESTIONS].question}]
            tts = {"beta": 0.1, "answer": "boxed"}
            return await openai.chat.completions.create(model=MODEL, messages=messages, extra_body={"tts": tts})

        replies = await asyncio.gather(*(ask(number) for number in range(24)))
        for reply in replies:
            is_canary = lot(reply.id) < SHARE
            assert reply.tts["stage"] == ("canary" if is_canary else "champion")
            assert (reply.tts["controller_digest"] == digest[:12]) == is_canary
            assert reply.tts["fallback"] is None
        assert 4 <= sum(reply.tts["stage"] == "canary" for reply in replies) <= 20
        await autotts("rollback", "--registry", registry, "--why", "seen")
        async with asyncio.timeout(30):
            while (await ask(0)).tts["stage"] == "canary" or lot((last := await ask(1)).id) >= SHARE:
                pass  # until a request of the canary's share gets the champion
        assert last.tts["stage"] == "champion"
    audit = [json.loads(line) for line in (folder / "registry" / "audit.jsonl").read_text().splitlines()]
    assert [line["why"] for line in audit] == ["to see the loop closed", "seen"]
    assert audit[0]["forced"]
