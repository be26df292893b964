"""Collecting until the sequential gate decides: which questions, how many per batch, and when it ends."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from discovery.commands import collect_until
from discovery.commands.collect_until import (
    FIRST_BATCH,
    SequentialJob,
    batch_ends,
    collect_until_decided,
    describe_look,
    judgeable_questions,
)
from discovery.data.collect import CollectionProgress
from discovery.data.questions import Question
from discovery.data.recordings import Split, default_split
from discovery.errors import CollectError
from discovery.promotion.conditions import check_held_out
from discovery.promotion.ledger import Ledger
from discovery.promotion.sequential_gate import AXIS_QUESTIONS
from discovery.promotion.verdict import GateReport, GateVerdict
from proxy.cli import app
from proxy.server import running
from proxy.settings import load
from tests.discovery.promotion.test_gate import SPREAD, judged
from tests.fakes import FakeVLLM, chain

PROMOTED = judged({"m": SPREAD})
UNDECIDED = replace(PROMOTED, verdict=GateVerdict.UNDECIDED)
QUESTIONS = [
    Question.model_validate({"question": f"question {number}", "reference": "7", "split": Split.HELD_OUT})
    for number in range(60)
]


def collected(
    verdicts: Sequence[GateReport], questions: int = 60, budget: int = 1000
) -> tuple[list[int], CollectionProgress, GateReport]:
    """Return how many questions each batch had, and the result, if the looks give these reports."""
    batches: list[int] = []
    looks = iter(verdicts)

    async def collect_all(some: Sequence[Question]) -> CollectionProgress:
        done = min(len(some), budget)
        before, batches[:] = sum(batches[-1:]), [*batches, done]
        return CollectionProgress(len(some), done, mine=done - before, is_out_of_budget=len(some) > budget)

    progress, report = asyncio.run(collect_until_decided(collect_all, lambda: next(looks), QUESTIONS[:questions]))
    return batches, progress, report


def test_collecting_goes_on_until_the_verdict_is_not_undecided() -> None:
    batches, progress, report = collected([UNDECIDED, UNDECIDED, PROMOTED])
    assert batches == [20, 25, 31]
    assert (progress.mine, report.verdict) == (31, GateVerdict.PROMOTE)


def test_collecting_ends_with_the_questions_or_the_budget() -> None:
    assert collected([UNDECIDED] * 9, questions=30)[0] == [20, 25, 30]
    batches, progress, report = collected([UNDECIDED] * 9, budget=22)
    assert batches == [20, 22]
    assert progress.is_out_of_budget
    assert report.verdict is GateVerdict.UNDECIDED


def test_collecting_ends_and_says_why_if_the_search_has_seen_a_question() -> None:
    seen = PROMOTED.narrowed(check_held_out((), 3))
    assert seen.verdict is GateVerdict.UNDECIDED
    assert collected([seen] * 9)[0] == [20]
    why = "the search that found it has seen 3 of the questions; judge on others, without --until-decided"
    assert describe_look(seen).endswith(f" needed); this sequence cannot promote: {why}")
    assert "cannot promote" not in describe_look(UNDECIDED)


@pytest.mark.parametrize("questions", [11, FIRST_BATCH, FIRST_BATCH + 1, 400])
def test_the_last_batch_has_all_questions_and_batches_grow(questions: int) -> None:
    ends = list(batch_ends(questions))
    assert ends == sorted(set(ends))
    assert ends[-1] == questions


def test_only_held_out_questions_with_a_reference_are_collected_in_the_order_of_their_hash() -> None:
    plain = [Question.model_validate({"question": f"plain {number}", "reference": "7"}) for number in range(80)]
    unknown = [
        Question.model_validate({"question": f"unknown {number}", "split": Split.HELD_OUT}) for number in range(9)
    ]
    chosen = judgeable_questions([*plain, *unknown, *QUESTIONS])
    ids = [question.question for question in chosen]
    assert {question.question for question in QUESTIONS} <= set(ids)
    assert {default_split(question.question) for question in chosen if question in plain} == {Split.HELD_OUT}
    assert not {question.question for question in unknown} & set(ids)
    assert ids == sorted(ids)
    with pytest.raises(CollectError, match="10 of 19 questions are held-out and have a reference answer"):
        judgeable_questions([*unknown, *QUESTIONS[:10]])


def test_a_controller_that_needs_more_branches_is_refused_before_anything_is_spent(tmp_path: Path) -> None:
    job = SequentialJob("asc@8", "cmc", tmp_path / "ledger", tmp_path / "out.jsonl", "", "b")
    job.check(8)
    with pytest.raises(CollectError, match="asc@8 opens 8 branches; --branches 4 is too few"):
        job.check(4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--until-decided --finalist asc", "needs --finalist, --ledger and --max-tokens-total"),
        ("--finalist asc", "--finalist, --ledger and --probe-tokens are for --until-decided"),
        ("--probe-tokens 20", "--finalist, --ledger and --probe-tokens are for --until-decided"),
    ],
)
def test_missing_options_are_named(tmp_path: Path, options: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOTTS_ADMIN_KEY", "sesame")
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"question": "q"}\n')
    done = CliRunner().invoke(app, ["collect", str(questions), "--out", str(tmp_path / "o.jsonl"), *options.split()])
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())


@pytest.mark.process
@pytest.mark.slow
async def test_the_command_collects_held_out_questions_and_looks_at_them(tmp_path: Path) -> None:
    chains = [chain("7" if i % 3 else "9", 100 + 7 * i, ["", "7"], mark=chr(97 + i % 26)) for i in range(60)]
    settings = {"interval": 40, "finalise_tokens": 60, "probe_tokens": 8, "read_timeout_s": 30, "admin_key": "sesame"}
    lines = [{"question": f"q {i}", "reference": "7", "split": "held-out" if i < 13 else "search"} for i in range(15)]
    questions = tmp_path / "hard.jsonl"
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    ledger, out = tmp_path / "ledger", tmp_path / "out.jsonl"
    async with FakeVLLM(chains, 40).serve() as backend, running(load(upstream=backend.url, **settings)) as url:
        options = f"--branches 4 --url {url} --until-decided --finalist short_m_at_k --champion self_consistency"
        more = f"--ledger {ledger} --probe-tokens 9 --max-tokens-total 10000000 --max-tokens 2000"
        command = ["collect", str(questions), "--out", str(out), *options.split(), *more.split()]
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "proxy.cli",
            *command,
            env=os.environ | {"AUTOTTS_ADMIN_KEY": "sesame"},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output = (await process.communicate())[0].decode()
    assert process.returncode == 0, output
    assert f"{13 - AXIS_QUESTIONS} questions tested: undecided" in output
    assert "short_m_at_k against self_consistency: undecided" in output
    assert "52 of 52 branches" in output  # 13 held-out questions, and none of the search split
    report = tmp_path / "report.json"
    again = f"--champion self_consistency --recordings {out} --ledger {ledger} --sequential --report {report}"
    again += " --probe-tokens 9"
    done = CliRunner().invoke(app, ["gate", "short_m_at_k", *again.split()])
    assert done.exit_code == 0, done.output
    (line,) = Ledger(ledger).judgements()  # the same sequence, with nothing new
    assert json.loads(report.read_text()) == line.report
    assert line.report["probe_tokens"] == 9
    assert (line.k, bool(line.sequence), len(line.questions)) == (1, True, 13)


def test_branches_without_signals_are_counted_over_all_batches() -> None:
    first, second = CollectionProgress(1, mine=2, without_signals=2), CollectionProgress(3, mine=4, without_signals=1)
    both = collect_until._add(first, second)
    assert (both.mine, both.without_signals) == (6, 3)
