"""From recordings to live and back, on a real vLLM: collect, discover, gate, promote to canary, serve, roll back."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from openai import AsyncOpenAI

from controllers import Advanced, Limits, Round, State, advance, answer, branch, probe, run_episode
from controllers.installed import lot
from controllers.loading import read
from deploy.embedded.task import Problem, held_back
from discovery.answers import parse_kind
from discovery.formats import as_line
from discovery.recordings import Origin, RecordedBranch, RecordedQuestion, Split, question_id
from proxy.engine import Engine
from proxy.live import LiveEnvironment, Prompt, Sizes
from proxy.probing import template_for
from proxy.server import running
from proxy.settings import EMBEDDED, load

pytestmark = pytest.mark.vllm

MODEL = "autotts-tiny"
BRANCHES = 16
SHARE = 0.5
QUESTIONS = 12


class Everything:
    """A controller that runs every branch to its end and asks it after every interval."""

    def decide(self, state: State) -> Sequence[Any]:
        if not state.width:
            return [move for i in range(BRANCHES) for move in (branch(), probe(i))]
        return [move for i in state.active for move in (advance(i), probe(i))] or [answer(state.leader())]


async def record(engine: Engine, problem: Problem, split: Split) -> RecordedQuestion:
    """Every branch of a question, complete."""
    interval = int(EMBEDDED["interval"])  # type: ignore[call-overload]
    ids = await engine.tokenise_chat({"model": MODEL, "messages": [{"role": "user", "content": problem.question}]})
    template = template_for(load(upstream="http://x").probe_family, await engine.detokenise(MODEL, ids[-8:]))
    prompt = Prompt(MODEL, ids, "", {}, kind=parse_kind("boxed"), template=template)
    environment = LiveEnvironment(engine, prompt, Sizes(interval, 900, 8))
    rounds: list[Round] = []
    await run_episode(Everything(), environment, State(Limits(interval)), lambda _, played: rounds.append(played))
    return RecordedQuestion(
        question_id(problem.question),
        MODEL,
        "embedded",
        interval,
        [_branch(number, environment, rounds) for number in range(BRANCHES)],
        problem.answer,
        split=split,
        origin=Origin.COLLECTED,
    )


def _branch(number: int, environment: LiveEnvironment, rounds: Sequence[Round]) -> RecordedBranch:
    def written(label: int | None) -> str | None:
        return None if label is None else environment.labels.written(label)

    facts = [fact for played in rounds for fact in played.facts if fact.branch == number]
    advanced = [fact for fact in facts if isinstance(fact, Advanced)]
    ended = any(fact.finished for fact in advanced)
    asked = [fact for fact in facts if not isinstance(fact, Advanced)]
    probes = asked[: len(advanced) - ended]  # what follows the last whole interval is the end
    final = next((fact.label for fact in advanced if fact.finished), None)
    tokens = sum(fact.tokens for fact in advanced)
    return RecordedBranch(
        [written(fact.label) for fact in probes], tokens, written(final), [fact.tokens for fact in probes]
    )


async def autotts(*arguments: str, code: int = 0) -> str:
    """What a verb prints."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "proxy.cli", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await process.communicate()
    assert process.returncode == code, said.decode()
    return said.decode()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "registry").mkdir()
    return tmp_path


@pytest.mark.timeout(900)
async def test_the_whole_loop(vllm: str, folder: Path) -> None:
    recordings, registry = folder / "recordings.jsonl", str(folder / "registry")
    async with aiohttp.ClientSession() as http:
        engine = Engine(vllm, http)
        splits = [Split.SEARCH] * 8 + [Split.HELD_OUT] * (QUESTIONS - 8)
        found = [await record(engine, one, split) for one, split in zip(held_back(QUESTIONS), splits, strict=True)]
    recordings.write_text("".join(map(as_line, found)))
    assert all(one.complete and len(one.branches) == BRANCHES for one in found)

    about = ("--recordings", str(recordings), "--shuffles", "2", "--workers", "2")
    await autotts("discover", *about, "--minutes", "1", "--seed", "7", "--out", str(folder / "run"))
    (file,) = (folder / "run").glob("grammar-*.py")
    card = json.loads(file.with_suffix(".json").read_text())
    digest = read(file).digest
    assert (card["digest"], card["explorer"]) == (digest, "grammar")
    assert card["data"]["cells"] == ["autotts-tiny embedded search"]  # what is held out was not looked at

    report = folder / "report.json"
    ledger = ("--ledger", str(folder / "ledger.jsonl"), "--report", str(report))
    await autotts("gate", str(file), "--recordings", str(recordings), *ledger, "--shuffles", "5", "--betas", "0,0.5,1")
    told = json.loads(report.read_text())
    assert (told["digest"], told["k"], told["questions"]) == (digest, 1, QUESTIONS - 8)
    assert told["verdict"] in ("undecided", "reject")  # four questions can show nothing
    canary = ("promote", str(file), "--registry", registry, "--as", "canary", "--share", str(SHARE))
    assert "verdict" in await autotts(*canary, "--report", str(report), code=2)
    assert "FORCED" in await autotts(*canary, "--report", str(report), "--force", "--why", "to see the loop closed")

    settings = load(upstream=vllm, registry=registry, **{**EMBEDDED, "controller": "short_m_at_k"})
    async with running(settings) as url, AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as openai:

        async def ask(number: int) -> Any:
            messages: Any = [{"role": "user", "content": held_back(QUESTIONS)[number % QUESTIONS].question}]
            tts = {"beta": 0.1, "answer": "boxed"}
            return await openai.chat.completions.create(model=MODEL, messages=messages, extra_body={"tts": tts})

        replies = [await ask(number) for number in range(24)]
        for reply in replies:
            is_canary = lot(reply.id) < SHARE
            assert reply.tts["stage"] == ("canary" if is_canary else "champion")
            assert (reply.tts["controller_digest"] == digest[:12]) == is_canary
            assert reply.tts["fallback"] is None
        assert 4 <= sum(reply.tts["stage"] == "canary" for reply in replies) <= 20
        await autotts("rollback", "--registry", registry, "--why", "seen")
        async with asyncio.timeout(30):
            while (await ask(0)).tts["stage"] == "canary" or lot((last := await ask(1)).id) >= SHARE:
                pass  # until one that would have been the canary's is not
        assert last.tts["stage"] == "champion"
    audit = [json.loads(line) for line in (folder / "registry" / "audit.jsonl").read_text().splitlines()]
    assert [line["why"] for line in audit] == ["to see the loop closed", "seen"]
    assert audit[0]["forced"]
