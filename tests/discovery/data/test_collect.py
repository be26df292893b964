"""Collecting recordings: completeness, interruptions, several collectors, the token budget and error messages."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web
from rich.console import Console

from controllers import Limits, State, Stop, run_episode, run_sync
from controllers.builtin import create
from discovery.commands.collect import CollectionProgressBar
from discovery.data.collect import AWAY_S, PAUSE_S, CollectionProgress, RetryTiming, collect
from discovery.data.collection_plan import CLOSING_TOKENS, PROBE_TOKENS, CollectionPlan
from discovery.data.importers import format_recording_line, read_jsonl
from discovery.data.questions import Question, read_questions
from discovery.data.recordings import (
    Origin,
    RecordedBranch,
    RecordedQuestion,
    Split,
    default_split,
    intern_answers,
    question_id,
)
from discovery.errors import BadRecording, CollectError
from discovery.evaluation.replay import ReplayEnvironment
from proxy.server import running
from proxy.settings import load
from proxy.upstream.embedded import free_port
from tests.fakes import MODEL, FakeVLLM, chain
from tests.faults.processes import until

pytestmark = pytest.mark.slow

INTERVAL = 40
SETTINGS = {"interval": INTERVAL, "finalise_tokens": 60, "probe_tokens": 8, "read_timeout_s": 30, "admin_key": "sesame"}
CHAINS = [chain("7" if i % 3 else "9", 100 + 7 * i, ["", "7"], mark=chr(97 + i % 26)) for i in range(60)]
QUESTIONS = 3
BRANCHES = 5
ALL = QUESTIONS * BRANCHES
ORDER = CollectionPlan("", "hard", BRANCHES)


@pytest_asyncio.fixture
async def backend() -> AsyncIterator[FakeVLLM]:
    async with FakeVLLM(CHAINS, INTERVAL).serve() as fake:
        yield fake


@pytest_asyncio.fixture
async def url(backend: FakeVLLM) -> AsyncIterator[str]:
    async with running(load(upstream=backend.url, **SETTINGS)) as url:
        yield url


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    """Return a file of questions."""
    lines = [
        {"id": f"q{i}", "messages": [{"role": "user", "content": f"question {i}"}], "reference": "7"}
        for i in range(QUESTIONS)
    ]
    lines[0]["split"] = "held-out"
    path = tmp_path / "hard.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def questions(asked: Path) -> Sequence[Question]:
    return read_questions(asked)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


class Verb:
    """A running `autotts collect`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def ends(self, code: int) -> str:
        output, _ = await self.process.communicate()
        assert self.process.returncode == code, output.decode()
        return output.decode()

    async def kill(self) -> None:
        self.process.kill()
        await self.process.communicate()


@asynccontextmanager
async def verb(url: str, asked: Path, out: Path, *arguments: str, key: str | None = "sesame") -> AsyncIterator[Verb]:
    command = ("collect", str(asked), "--out", str(out), "--url", url, "--branches", str(BRANCHES), *arguments)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "proxy.cli", *command),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=os.environ | ({} if key is None else {"AUTOTTS_ADMIN_KEY": key}),
    )
    try:
        yield Verb(process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def collect_singly(*arguments: Any, **options: Any) -> CollectionProgress:
    """Collect with one branch per request, so that requests can be counted."""
    return await collect(*arguments, per_request=1, **options)


def content(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def put(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in content(out).splitlines()]


def parts(out: Path) -> Counter[tuple[str, int]]:
    return Counter((line["id"], line["part"]) for line in lines(out))


def spent(out: Path) -> int:
    return sum(line["branches"][0]["tokens"] + sum(line["branches"][0]["probe_tokens"]) for line in lines(out))


def check_complete(out: Path) -> list[RecordedQuestion]:
    """Check that every branch of every question is recorded once and complete. Return recordings by question."""
    assert set(parts(out).values()) == {1}
    order = [question_id(f"question {i}") for i in range(QUESTIONS)]
    recordings = sorted(read_jsonl(out), key=lambda recorded: order.index(recorded.question))
    assert [len(one.branches) for one in recordings] == [BRANCHES] * QUESTIONS
    assert all(one.complete for one in recordings)
    return recordings


# What is collected


@pytest.mark.process
async def test_a_collected_recording_is_complete_and_names_its_settings(
    backend: FakeVLLM, url: str, questions: Sequence[Question], out: Path
) -> None:
    order = CollectionPlan(MODEL, "hard", BRANCHES, "boxed", 0.5, 0.9, 1000)
    at = await collect(url, "sesame", questions, order, out)
    assert (at.total, at.done, at.mine, at.skipped, at.is_out_of_budget) == (ALL, ALL, ALL, [], False)
    assert at.tokens == at.spent == spent(out)
    recordings = check_complete(out)
    assert backend.opened == ALL
    lengths = sorted(branch.tokens for one in recordings for branch in one.branches)
    assert lengths == sorted(one.tokens for one in CHAINS[:ALL])
    for number, recording in enumerate(recordings):
        assert recording.question == questions[number].question == question_id(f"question {number}")
        assert (recording.model, recording.benchmark, recording.interval) == (MODEL, "hard", INTERVAL)
        assert (recording.reference, recording.text, recording.origin) == ("7", None, Origin.COLLECTED)
        assert recording.split == (default_split(recording.question) if number else Split.HELD_OUT)
        assert recording.sampling == {"temperature": 0.5, "top_p": 0.9, "max_tokens": 1000, "answer": "boxed"}
        assert recording.probe_template == "qwen3/2"
        state = State(Limits(INTERVAL, max_branches=BRANCHES))
        run_sync(run_episode(create("sc@5", 1), ReplayEnvironment(intern_answers(recording), range(BRANCHES)), state))
        assert state.stop is Stop.ANSWERED
    sent = backend.requests[0]
    assert (sent["temperature"], sent["top_p"], sent["n"]) == (0.5, 0.9, BRANCHES)


async def test_question_texts_are_stored_only_with_keep_text(
    url: str, questions: Sequence[Question], out: Path
) -> None:
    await collect(url, "sesame", questions, replace(ORDER, keep_text=True), out)
    assert [one.text for one in check_complete(out)] == [f"question {i}" for i in range(QUESTIONS)]


async def test_recorded_branches_are_not_requested_again(
    backend: FakeVLLM, url: str, questions: Sequence[Question], out: Path
) -> None:
    await collect(url, "sesame", questions[:2], replace(ORDER, branches=3), out)
    assert backend.opened == 6
    at = await collect(url, "sesame", questions, ORDER, out)
    assert (at.done, at.mine) == (ALL, ALL - 6)
    check_complete(out)
    assert (await collect(url, "sesame", questions, ORDER, out)).mine == 0
    assert backend.opened == ALL


@pytest.mark.slow
@pytest.mark.parametrize(
    "other",
    [replace(ORDER, temperature=0.5), replace(ORDER, answer="boxed"), replace(ORDER, benchmark="soft")],
    ids=["temperature", "answer", "benchmark"],
)
async def test_other_settings_start_new_recordings_in_the_same_file(
    url: str, questions: Sequence[Question], out: Path, other: CollectionPlan
) -> None:
    await collect(url, "sesame", questions, ORDER, out)
    before = spent(out)
    at = await collect(url, "sesame", questions, other, out, budget=10**9)
    assert (at.mine, at.spent) == (ALL, spent(out) - before)
    assert len(read_jsonl(out)) == 2 * QUESTIONS


# The command, interruptions and several collectors


@pytest.mark.process
async def test_the_collect_command_records_refuses_to_overwrite_and_resumes(url: str, asked: Path, out: Path) -> None:
    async with verb(url, asked, out, "--usd-per-million", "1000000") as command:
        output = await command.ends(0)
    check_complete(out)
    assert output.startswith(f"{out}: {ALL} of {ALL} branches, {ALL} of them in this run; {spent(out):,} tokens in ")
    assert f"${spent(out):,}.00" in output
    async with verb(url, asked, out) as command:
        assert "the file holds recordings; continue them with --resume" in await command.ends(2)
    async with verb(url, asked, out, "--resume") as command:
        assert f"{ALL} of {ALL} branches, 0 of them in this run" in await command.ends(0)
    check_complete(out)


@pytest.mark.process
async def test_a_killed_collection_resumes_without_repeating_saved_branches(
    backend: FakeVLLM, url: str, asked: Path, out: Path
) -> None:
    backend.fault, backend.fault_after = "hang", 2  # the second question's request
    async with verb(url, asked, out, "--at-once", str(BRANCHES)) as command:
        await until(lambda: backend.branches == BRANCHES and backend.hanging.is_set())
        await command.kill()
    known = lines(out)
    assert len(known) == BRANCHES
    assert backend.opened == 2 * BRANCHES
    async with asyncio.timeout(10):
        await backend.idle.wait()  # abandoned requests are cancelled
    backend.fault = ""
    async with verb(url, asked, out, "--resume") as command:
        await command.ends(0)
    check_complete(out)
    assert lines(out)[: len(known)] == known
    assert backend.opened == ALL + BRANCHES


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_an_interrupted_collection_keeps_finished_branches(
    backend: FakeVLLM, url: str, asked: Path, out: Path, number: signal.Signals
) -> None:
    backend.fault, backend.fault_after = "hang", 2  # the second question's request
    async with verb(url, asked, out, "--at-once", str(BRANCHES)) as command:
        await until(lambda: backend.branches == BRANCHES and backend.hanging.is_set())
        command.process.send_signal(number)
        assert "interrupted; finished branches are saved, continue with --resume" in await command.ends(130)
    async with asyncio.timeout(10):
        await backend.idle.wait()
    assert len(lines(out)) == sum(parts(out).values()) == BRANCHES


async def test_an_incomplete_line_is_collected_again(
    backend: FakeVLLM, url: str, questions: Sequence[Question], out: Path
) -> None:
    await collect(url, "sesame", questions, ORDER, out)
    put(out, content(out)[:-20])
    assert len(read_jsonl(out)[-1].branches) == BRANCHES - 1
    at = await collect(url, "sesame", questions, ORDER, out)
    assert (at.done, at.mine) == (ALL, 1)
    check_complete(out)
    put(out, content(out)[:-1])  # only the newline is missing
    assert (await collect(url, "sesame", questions, ORDER, out)).mine == 0
    check_complete(out)


@pytest.mark.process
async def test_two_collectors_share_the_work(backend: FakeVLLM, url: str, asked: Path, out: Path) -> None:
    backend.gate.clear()
    few = ("--resume", "--at-once", "3")
    async with verb(url, asked, out, *few) as first, verb(url, asked, out, *few) as second:
        await until(lambda: backend.branches == 6)  # both work, on different branches
        backend.gate.set()
        outputs = [await first.ends(0), await second.ends(0)]
    check_complete(out)
    assert backend.opened == ALL
    mine = [int(words.split("branches, ")[1].split()[0]) for words in outputs]
    assert sum(mine) == ALL
    assert min(mine) >= 3


@pytest.mark.process
async def test_branches_of_a_killed_collector_are_done_by_another(
    backend: FakeVLLM, url: str, asked: Path, out: Path
) -> None:
    backend.gate.clear()
    few = ("--resume", "--at-once", "3")
    async with verb(url, asked, out, *few) as first, verb(url, asked, out, *few) as second:
        await until(lambda: backend.branches == 6)
        await first.kill()
        await until(lambda: backend.branches == 3)
        backend.gate.set()
        await second.ends(0)
    check_complete(out)


# The budget


BOUNDED = replace(ORDER, max_tokens=200)
RESERVE = BOUNDED.reserved_tokens(INTERVAL)


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [1, 4])
async def test_a_budget_is_not_exceeded_and_resume_continues(
    backend: FakeVLLM, url: str, questions: Sequence[Question], out: Path, at_once: int
) -> None:
    backend.chains = [chain("7", 200, ["", "7"], mark=chr(97 + i)) for i in range(ALL)]
    each = (await collect(url, "sesame", questions[:1], replace(BOUNDED, branches=1), out)).spent
    for budget, least in ((each * 3 + RESERVE, 4), (each * 4 + RESERVE - 1, 4), (each * 8 + RESERVE, 9)):
        at = await collect(url, "sesame", questions, BOUNDED, out, at_once, budget)
        assert (at.is_out_of_budget, at.reserve) == (True, RESERVE)
        assert at.spent == spent(out) <= budget
        assert at.done == len(lines(out)) == least
    at = await collect(url, "sesame", questions, BOUNDED, out, at_once, 10**9)
    assert not at.is_out_of_budget
    check_complete(out)


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [1, 8])
@pytest.mark.parametrize("max_tokens", [None, 1500])
async def test_a_budget_is_not_exceeded_however_long_branches_become(
    backend: FakeVLLM, url: str, questions: Sequence[Question], out: Path, at_once: int, max_tokens: int | None
) -> None:
    """Without a client limit the context length bounds a branch; the proxy holds each branch to its reserve."""
    backend.chains = [chain("7", 80 if i < 3 else 1400, ["", "7"], mark=chr(97 + i)) for i in range(ALL)]
    at = await collect(url, "sesame", questions, replace(ORDER, max_tokens=max_tokens), out, at_once, 16_000)
    assert at.is_out_of_budget
    assert at.done > 3
    assert at.spent == spent(out) <= 16_000
    assert backend.generated < at.spent  # prompt tokens of probes are charged too
    assert all(one.complete for one in read_jsonl(out))


async def test_the_reserve_of_a_branch_is_sent_as_the_token_cap_of_its_request(
    questions: Sequence[Question], out: Path
) -> None:
    """The first branch runs alone, because the number of probes is not known yet."""
    async with answering(lambda _: recorded()) as stub:
        await collect_singly(stub.url, "sesame", questions, replace(ORDER, max_tokens=70), out, 8, 10**6)
    first, *others = (asked["tts"]["max_total_tokens"] for asked in stub.asked)
    assert first == (70 + 3 * PROBE_TOKENS) * 8 // 7 + CLOSING_TOKENS
    assert others == [(70 + 2 * PROBE_TOKENS) * 8 // 7 + CLOSING_TOKENS] * (ALL - 1)


async def test_a_budget_needs_a_limit_per_branch(questions: Sequence[Question], out: Path) -> None:
    async with answering(lambda _: recorded(), longest=None) as stub:
        with pytest.raises(CollectError, match=r"context length of fake-model: .* needs --max-tokens"):
            await collect_singly(stub.url, "sesame", questions, ORDER, out, budget=10**6)
        assert (
            await collect_singly(stub.url, "sesame", questions, replace(ORDER, max_tokens=70), out, budget=10**6)
        ).done
    async with answering(lambda _: recorded(WHOLE | {"complete": False}, stop="max_tokens")) as stub:
        with pytest.raises(CollectError, match="--max-tokens-total left it 1,430 tokens, which may be too few"):
            await collect_singly(stub.url, "sesame", questions, ORDER, out.with_name("other.jsonl"), budget=10**6)
    assert spent_on_nothing(out.with_name("other.jsonl")) == 69


def spent_on_nothing(out: Path) -> int:
    return sum(line["tokens"] for line in lines(out.with_name(f"{out.name}.lost")))


async def test_retries_respect_the_budget_and_lost_tokens_are_recorded(
    questions: Sequence[Question], out: Path
) -> None:
    order = replace(ORDER, max_tokens=100, branches=1)
    fail = "the upstream failed"
    async with answering(lambda _: refused(502, fail, x_tts_tokens="1000")) as stub:
        at = await collect_singly(stub.url, "sesame", questions, order, out, 1, 3500, timing=RetryTiming(0))
        assert (at.is_out_of_budget, at.skipped, at.spent, len(stub.asked)) == (True, [], 3000, 3)
        for budget, times in ((3500, 3), (3000 + order.reserved_tokens(None), 4)):
            at = await collect_singly(stub.url, "sesame", questions, order, out, 1, budget, timing=RetryTiming(0))
            assert (at.is_out_of_budget, len(stub.asked)) == (True, times)
    assert (at.spent, spent_on_nothing(out), content(out)) == (4000, 4000, b"")
    async with answering(lambda _: recorded()) as stub:
        other = await collect_singly(stub.url, "sesame", questions, replace(order, temperature=0.5), out, 1, 3500)
        assert (other.done, other.spent) == (QUESTIONS, QUESTIONS * 69)  # other settings have lost no tokens
        assert (
            await collect_singly(stub.url, "sesame", questions, order, out, 1, 10**6)
        ).spent == 4000 + QUESTIONS * 69


async def test_a_failure_of_unknown_cost_is_charged_its_full_reserve(questions: Sequence[Question], out: Path) -> None:
    order = replace(ORDER, max_tokens=100, branches=1)
    async with answering(lambda number: None if number == 1 else recorded()) as stub:
        at = await collect_singly(stub.url, "sesame", questions, order, out, 1, 10**6, timing=RetryTiming(0))
    assert (at.done, at.spent) == (QUESTIONS, QUESTIONS * 69 + order.reserved_tokens(INTERVAL))


async def test_a_request_that_was_not_sent_costs_nothing(questions: Sequence[Question], out: Path) -> None:
    """The proxy is restarted between two attempts."""
    time = Time()
    async with answering(lambda i: recorded() if i else refused(429, "later")) as stub:

        async def nap(seconds: float) -> None:
            if not time.naps:
                await stub.stop()
            elif len(time.naps) == 2:
                await stub.start()
            await time.nap(seconds)

        at = await collect_singly(
            stub.url, "sesame", questions, replace(ORDER, branches=1), out, 1, 10**6, timing=RetryTiming(1, nap)
        )
    assert (at.done, at.spent, len(stub.asked)) == (QUESTIONS, QUESTIONS * 69, QUESTIONS + 1)
    assert time.naps == [1.0, 2.0, PAUSE_S]


async def test_an_invalid_line_of_lost_tokens_is_refused(questions: Sequence[Question], out: Path) -> None:
    lost = out.with_name(f"{out.name}.lost")
    put(lost, b'{"of": [], "tokens": 3}\n{"tokens": 3}\n')
    async with answering(lambda _: recorded()) as stub:
        with pytest.raises(BadRecording, match=r"out.jsonl.lost:2: not a record of lost tokens"):
            await collect_singly(stub.url, "sesame", questions, ORDER, out)
        put(lost, b'{"of": [], "tokens": 3}\n{"of"')  # its writer was killed
        assert (await collect_singly(stub.url, "sesame", questions, ORDER, out)).spent == ALL * 69


@pytest.mark.process
async def test_two_collectors_share_the_budget(backend: FakeVLLM, url: str, asked: Path, out: Path) -> None:
    backend.chains = [chain("7", 200, ["", "7"], mark=chr(97 + i)) for i in range(ALL)]
    each = (await collect(url, "sesame", read_questions(asked)[:1], replace(BOUNDED, branches=1), out)).spent
    backend.gate.clear()
    few = ("--resume", "--at-once", "4", "--max-tokens", "200", "--max-tokens-total", str(each * 4 + 2 * RESERVE))
    async with verb(url, asked, out, *few) as first, verb(url, asked, out, *few) as second:
        await until(lambda: backend.running == 2)  # the first branch of each collector
        backend.gate.set()
        outputs = [await first.ends(0), await second.ends(0)]
    made = 5 + RESERVE // each
    assert (len(lines(out)), spent(out)) == (made, each * made)
    assert all(f"stopped: {each * made:,} tokens are spent" in words for words in outputs)


@pytest.mark.process
async def test_an_exhausted_budget_exits_with_0_and_says_how_to_continue(url: str, asked: Path, out: Path) -> None:
    async with verb(url, asked, out, "--max-tokens-total", "1000") as command:
        output = await command.ends(0)
    assert "stopped: 0 tokens are spent, and one more branch may cost 7,917, which could exceed 1,000; " in output
    assert "continue with --resume and a larger --max-tokens-total, or limit branches with --max-tokens" in output
    async with verb(url, asked, out, "--resume", "--max-tokens-total", "10000") as command:
        assert output.partition("; continue with")[0] != (output := await command.ends(0))
    assert f"stopped: {spent(out):,} tokens are spent" in output
    assert "limit branches" not in output


# Progress


def shown(*changes: CollectionProgress) -> str:
    """Return the progress bar's output after `changes`."""
    console = Console(file=StringIO(), force_terminal=True, width=160, color_system=None)
    with CollectionProgressBar(2.5, console) as bar:
        for at in changes:
            bar.update(at)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_the_progress_bar_shows_tokens_cost_and_remaining_time() -> None:
    """100 branches existed before; three have taken 20 minutes each since."""
    begun = CollectionProgress(total=640, done=100)
    output = shown(begun, CollectionProgress(total=640, done=103, mine=2, tokens=1_200_000, seconds=3600.0))
    assert "103/640 1,200,000 tokens in 3,600 s (333/s), $3.00, 7 days, 11:00:00 left" in output
    assert "left" not in shown(begun, replace(begun, seconds=3600.0))
    assert "640/640 9 tokens in 60 s (0/s), $0.00, 0:00:00 left" in shown(
        begun, CollectionProgress(total=640, done=640, tokens=9, seconds=60)
    )


async def test_elapsed_seconds_are_measured_by_the_given_clock(questions: Sequence[Question], out: Path) -> None:
    async with answering(lambda _: recorded()) as stub:
        pace = RetryTiming(clock=lambda: 500.0 * len(stub.asked))
        at = await collect_singly(stub.url, "sesame", questions, ORDER, out, 1, timing=pace)
    assert at.seconds == 500 * ALL


# Refused arguments and failing branches


@pytest.mark.process
@pytest.mark.parametrize(
    ("key", "message"),
    [
        (None, "AUTOTTS_ADMIN_KEY is not set: recording needs the admin key"),
        ("", "AUTOTTS_ADMIN_KEY is not set"),
        ("schlüssel", "AUTOTTS_ADMIN_KEY has characters that are not allowed in an HTTP header"),
        ("open", "the proxy returns 403: controller everything@5 is for admins"),
    ],
)
async def test_invalid_admin_keys_are_refused(url: str, asked: Path, out: Path, key: str | None, message: str) -> None:
    async with verb(url, asked, out, key=key) as command:
        output = await command.ends(2)
    assert message in output
    assert output.count("\n") == 1
    assert content(out) == b""
    if key:
        assert key not in output.replace("open/v1", "")


@pytest.mark.process
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--temperature", "0"), "at 0 all branches are identical"),
        (("--answer", "prose"), "use one of auto"),
        (("--model", "other"), "there is no model 'other'; the proxy serves fake-model"),
    ],
)
async def test_invalid_arguments_are_refused(
    url: str, asked: Path, out: Path, arguments: tuple[str, ...], message: str
) -> None:
    async with verb(url, asked, out, *arguments) as command:
        output = await command.ends(2)
    assert message in output
    assert output.count("\n") == 1


async def test_an_address_without_a_proxy_is_refused(
    questions: Sequence[Question], out: Path, backend: FakeVLLM
) -> None:
    with pytest.raises(CollectError, match=r"no proxy answers at .*; start one, or set --url"):
        await collect(f"http://127.0.0.1:{free_port()}", "sesame", questions, ORDER, out)
    with pytest.raises(CollectError, match="without a recording; --url must be the address of an AutoTTS proxy"):
        await collect(backend.url, "sesame", questions, ORDER, out)


async def test_a_failing_branch_is_retried(
    backend: FakeVLLM, url: str, questions: Sequence[Question], out: Path
) -> None:
    backend.fault, backend.fault_after, backend.fault_times = "cut", 10, 3
    at = await collect(url, "sesame", questions, ORDER, out, 2, timing=RetryTiming(0))
    assert (at.done, at.skipped) == (ALL, [])
    assert at.tokens > spent(out)  # failed attempts have cost tokens
    check_complete(out)


@pytest.mark.process
async def test_a_branch_that_fails_too_often_is_skipped_and_collected_on_resume(
    backend: FakeVLLM, url: str, asked: Path, out: Path
) -> None:
    questions = read_questions(asked)
    backend.fault, backend.fault_after, backend.fault_times = "cut", 1, 4
    at = await collect(url, "sesame", questions[:1], ORDER, out, 1, timing=RetryTiming(0))
    assert (at.total, at.done) == (BRANCHES, BRANCHES - 1)
    (skipped,) = at.skipped
    assert skipped.startswith("question q0, branch 0: 502: ")
    async with verb(url, asked, out, "--resume") as command:
        await command.ends(0)
    check_complete(out)


# Other replies of a proxy


Answer = Callable[[int], web.Response | None]


class Stub:
    """Fake proxy at `url` that replies to the n-th branch request with `answer(n)`; None drops the connection."""

    def __init__(self, answer: Answer, models: Sequence[str], longest: int | None) -> None:
        self.answer = answer
        self.served = models
        self.longest = longest
        self.readiness = [200]  # statuses of /ready in order, the last repeats; 0 drops the connection
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.url = ""
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        """Start serving; after a stop, at the same address."""
        app = web.Application()
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/ready", self.ready)
        app.router.add_post("/v1/chat/completions", self.chat)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", int(self.url.rpartition(":")[2] or 0)).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def models(self, _: web.Request) -> web.Response:
        cards = [{"id": name, "object": "model", "max_model_len": self.longest} for name in self.served]
        return web.json_response({"object": "list", "data": cards})

    async def ready(self, request: web.Request) -> web.Response:
        status = self.readiness.pop(0) if len(self.readiness) > 1 else self.readiness[0]
        if not status and request.transport is not None:
            request.transport.abort()
        return web.Response(status=status or 500)

    async def chat(self, request: web.Request) -> web.Response:
        self.asked.append(await request.json())
        self.keys.append(request.headers["authorization"])
        response = self.answer(len(self.asked) - 1)
        if response is None and request.transport is not None:
            request.transport.abort()
        return _repeated(response, self.counts[-1]) if response else web.Response()

    @property
    def counts(self) -> list[int]:
        """Number of branches that each request asked for."""
        return [int(asked["tts"]["controller"].removeprefix("everything@")) for asked in self.asked]


def _repeated(response: web.Response, count: int) -> web.Response:
    """Return a reply whose only recorded branch is repeated as often as the request asked for branches."""
    if response.content_type != "application/json" or not (response.text or "").startswith('{"id": "c", "object"'):
        return response
    reply = json.loads(response.text or "")
    recording = reply["tts"]["recording"]
    if count > 1 and isinstance(recording, dict) and len(recording["branches"]) == 1:
        recording["branches"] *= count
        reply["tts"]["tokens"]["total"] *= count
    return web.json_response(reply)


@asynccontextmanager
async def answering(answer: Answer, models: Sequence[str] = (MODEL,), longest: int | None = 100) -> AsyncIterator[Stub]:
    stub = Stub(answer, models, longest)
    try:
        await stub.start()
        yield stub
    finally:
        await stub.stop()


WHOLE = {"probes": ["7"], "tokens": 60, "final": "7", "probe_tokens": [9], "complete": True}
RECORDING = {
    "interval": INTERVAL,
    "sampling": {},
    "probe_template": "qwen3/2",
    "chat_template": "",
    "branches": [WHOLE],
}


def recorded(branch: dict[str, Any] | None = None, **change: Any) -> web.Response:
    """Return a reply with a recording; `change` updates its `tts` or its recording."""
    recording = RECORDING | {"branches": [branch or WHOLE]} | {k: v for k, v in change.items() if k in RECORDING}
    tts = {"recording": recording, "stop": "answered", "tokens": {"total": 69}}
    tts |= {k: v for k, v in change.items() if k not in RECORDING}
    model = change.get("model", MODEL)
    message = {"role": "assistant", "content": "7"}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    reply = {"id": "c", "object": "chat.completion", "created": 1, "model": model, "choices": choices}
    return web.json_response(reply | {"tts": tts})


def refused(status: int, message: str, **headers: str) -> web.Response:
    error = {"message": message, "type": "server_error", "param": None, "code": None}
    return web.json_response(
        {"error": error}, status=status, headers={k.replace("_", "-"): v for k, v in headers.items()}
    )


async def test_requests_carry_the_settings_of_the_plan(questions: Sequence[Question], out: Path) -> None:
    async with answering(lambda _: recorded(sampling={"temperature": 0.7})) as stub:
        order = CollectionPlan(MODEL, "hard", 1, "boxed", temperature=0.7)
        await collect_singly(f"{stub.url}/v1/", "sesame", questions[:1], order, out)
    assert stub.asked == [
        {
            "model": MODEL,
            "messages": [{"role": "user", "content": "question 0"}],
            "temperature": 0.7,
            "tts": {"controller": "everything@1", "beta": 1, "answer": "boxed", "required": True},
        }
    ]
    assert stub.keys == ["Bearer sesame"]


async def test_signals_are_requested_and_recorded_beside_branches_without_them(
    questions: Sequence[Question], out: Path
) -> None:
    """Both kinds of branches belong to one recording; branches that lack requested signals are counted."""
    sure = WHOLE | {"confidences": [900, 800], "lowests": [700, 600], "probe_confidences": [500]}
    order = CollectionPlan("", "hard", 1, signals=True)
    async with answering(lambda number: recorded(sure if number else WHOLE)) as stub:
        at = await collect(stub.url, "sesame", questions[:1], order, out)
        assert (at.done, at.without_signals, stub.asked[0]["tts"]["signals"]) == (1, 1, True)
        at = await collect(stub.url, "sesame", questions[:1], replace(order, branches=3), out)
        assert (at.done, at.mine, at.without_signals) == (3, 2, 0)
    (recording,) = read_jsonl(out)
    assert [list(branch.confidences) for branch in recording.branches] == [[], [900, 800], [900, 800]]
    assert [list(branch.probe_confidences) for branch in recording.branches] == [[], [500], [500]]


@pytest.mark.parametrize("at_once", [1, 3])
async def test_a_branch_is_on_disk_before_the_next_is_requested(
    questions: Sequence[Question], out: Path, at_once: int
) -> None:
    flying: list[int] = []

    def answer(number: int) -> web.Response:
        flying.append(number - len(lines(out)))
        return recorded()

    async with answering(answer) as stub:
        await collect_singly(stub.url, "sesame", questions, ORDER, out, at_once)
    assert max(flying) == at_once - 1


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 504])
async def test_transient_errors_are_retried_three_times(questions: Sequence[Question], out: Path, status: int) -> None:
    """The waiting time doubles with each attempt."""
    async with answering(lambda number: refused(status, "later") if number < 3 else recorded()) as stub:
        at = await collect_singly(
            stub.url, "sesame", questions[:1], replace(ORDER, branches=1), out, timing=RetryTiming(0.001)
        )
    assert (at.done, len(stub.asked)) == (1, 4)


async def test_a_dropped_connection_is_retried(questions: Sequence[Question], out: Path) -> None:
    order = replace(ORDER, branches=1)
    async with answering(lambda number: None if number < 2 else recorded()) as stub:
        assert (await collect_singly(stub.url, "sesame", questions[:1], order, out, timing=RetryTiming(0))).done == 1
    async with answering(lambda _: None) as stub:
        at = await collect_singly(stub.url, "sesame", questions, order, out, timing=RetryTiming(0))
    assert (at.done, len(at.skipped), len(stub.asked)) == (1, 2, 8)
    assert min(at.skipped).startswith(f"question q1, branch 0: {stub.url}/v1/: ")


class Time:
    """A clock that is advanced by naps."""

    def __init__(self) -> None:
        self.now = 0.0
        self.naps: list[float] = []
        self.looking = 0  # tasks that wait between readiness checks
        self.most_looking = 0

    async def nap(self, seconds: float) -> None:
        self.now += seconds
        self.naps.append(seconds)
        self.looking += seconds == PAUSE_S
        self.most_looking = max(self.most_looking, self.looking)
        for _ in range(5):
            await asyncio.sleep(0)
        self.looking -= seconds == PAUSE_S

    @property
    def pace(self) -> RetryTiming:
        return RetryTiming(1, self.nap, lambda: self.now)


async def test_a_retry_waits_as_long_as_the_proxy_asks(questions: Sequence[Question], out: Path) -> None:
    time = Time()
    says = [{"retry_after": "7"}, {"retry_after": "soon"}, {"retry_after": "86400", "x_tts_tokens": "50"}]
    async with answering(lambda i: refused(429, "later", **says[i]) if i < 3 else recorded()) as stub:
        at = await collect_singly(stub.url, "sesame", questions[:1], replace(ORDER, branches=1), out, timing=time.pace)
    assert time.naps == [7.0, 2.0, 300.0]
    assert (at.tokens, at.spent) == (119, 119)


@pytest.mark.slow
@pytest.mark.parametrize("answer", [None, 502, 503], ids=str)
async def test_a_temporarily_unavailable_proxy_costs_no_branch(
    questions: Sequence[Question], out: Path, answer: int | None
) -> None:
    """Branches wait meanwhile, and a single task checks readiness."""
    time = Time()

    def say(_: int) -> web.Response | None:
        if len(stub.readiness) > 1:
            return None if answer is None else refused(answer, "gone")
        return recorded()

    async with answering(say) as stub:
        stub.readiness = [0, 503] * 60 + [200]
        at = await collect_singly(stub.url, "sesame", questions, ORDER, out, 8, timing=time.pace)
    assert (at.done, at.skipped) == (ALL, [])
    assert len(stub.asked) == ALL + 8
    assert Counter(time.naps) == {1.0: 8, PAUSE_S: 120}
    assert time.most_looking == 1


@pytest.mark.slow
async def test_waiting_for_an_unavailable_proxy_ends_after_900_seconds(
    questions: Sequence[Question], out: Path
) -> None:
    time = Time()
    async with answering(lambda _: recorded()) as stub:
        await collect_singly(stub.url, "sesame", questions[:1], ORDER, out)
        stub.answer, stub.readiness, stub.asked = lambda _: None, [0], []
        with pytest.raises(CollectError, match=r"not been available for 900 s \(.*\); .* --resume continues"):
            await collect_singly(stub.url, "sesame", questions, ORDER, out, 8, timing=time.pace)
    assert AWAY_S < time.now < AWAY_S + 9
    assert (len(stub.asked), len(lines(out))) == (1, BRANCHES)


@pytest.mark.process
async def test_branches_claimed_by_another_process_are_left_to_it(questions: Sequence[Question], out: Path) -> None:
    """Claimed branches are skipped and collected after their claimant has ended."""
    order = CollectionPlan("", "hard", 300)
    script = (
        "import json, sys\n"
        "from pathlib import Path\n"
        "from discovery.data.shared_jsonl import WorkClaims\n"
        "claims = WorkClaims(Path(sys.argv[1]))\n"
        "names = (json.dumps([sys.argv[2], 'hard', {}, sys.argv[3], part]) for part in range(256))\n"
        "print(all([claims.take(name) for name in names]), flush=True)\n"
        "sys.stdin.read()\n"
    )
    arguments = (f"{out}.lock", MODEL, questions[0].question)
    other = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", script, *arguments), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert other.stdin is not None
    assert other.stdout is not None
    assert await other.stdout.readline() == b"True\n"
    before: list[int] = []

    def change(at: CollectionProgress) -> None:
        if at.done == 44 and not before and other.stdin is not None:
            before.append(at.done)
            other.stdin.close()

    async with answering(lambda _: recorded()) as stub:
        at = await collect_singly(stub.url, "sesame", questions[:1], order, out, on_change=change)
    await other.communicate()
    assert before
    assert (at.done, len(stub.asked)) == (300, 300)


@pytest.mark.process
async def test_skipped_branches_are_reported_with_the_reason(asked: Path, out: Path) -> None:
    async with (
        answering(lambda _: refused(503, "the store\nis [red]away", retry_after="0")) as stub,
        verb(stub.url, asked, out, "--branches", "1") as command,
    ):
        output = await command.ends(1)
    assert output.count("skipped: question q") == QUESTIONS
    assert "question q0, branch 0: 503: the store is [red]away\n" in output
    assert "retry them with --resume" in output
    assert len(stub.asked) == QUESTIONS * 4


@pytest.mark.parametrize("status", [401, 403, 404, 405])
async def test_a_permanent_refusal_ends_the_collection_at_once(
    questions: Sequence[Question], out: Path, status: int
) -> None:
    async with answering(lambda _: refused(status, "do otherwise")) as stub:
        with pytest.raises(CollectError, match=f"the proxy returns {status}: do otherwise") as caught:
            await collect_singly(stub.url, "sesame", questions, ORDER, out)
    assert ("AUTOTTS_ADMIN_KEY" in str(caught.value)) == (status in (401, 403))
    assert len(stub.asked) <= 8


@pytest.mark.process
@pytest.mark.parametrize("status", [400, 413, 422])
async def test_a_refused_question_is_skipped_and_others_are_collected(asked: Path, out: Path, status: int) -> None:
    """The refused question is reported by id with the reason; all others are collected, also on resume."""

    def answer(_: int) -> web.Response:
        is_bad = stub.asked[-1]["messages"][0]["content"] == "question 0"
        return refused(status, "the prompt is\ntoo long") if is_bad else recorded()

    async with answering(answer) as stub:
        for times in (1, 2):
            async with verb(stub.url, asked, out, "--at-once", "2", "--resume") as command:
                output = await command.ends(1)
            assert f"{ALL - BRANCHES} of {ALL} branches" in output
            assert output.count("skipped: ") == 1
            assert f"skipped: question q0: {status}: the prompt is too long\n" in output
            assert len(stub.asked) - (ALL - BRANCHES) <= 2 * times
    assert len(lines(out)) == ALL - BRANCHES


async def test_equal_refusals_of_the_first_three_questions_end_the_collection(tmp_path: Path, out: Path) -> None:
    many = [Question.model_validate({"question": f"{i}"}) for i in range(20)]
    async with answering(lambda _: refused(400, "no such field")) as stub:
        with pytest.raises(CollectError, match="each of the first 3 questions with the same error: 400: no such field"):
            await collect_singly(stub.url, "sesame", many, ORDER, out, 1)
        assert len(stub.asked) == 3
        stub.answer, stub.asked = lambda number: refused(400, f"it has {number} tokens"), []
        at = await collect_singly(stub.url, "sesame", many, ORDER, out, 1)
        assert (len(at.skipped), at.done, at.is_out_of_budget) == (20, 0, False)
        stub.answer, stub.asked = lambda number: recorded() if number == 2 else refused(400, "image"), []
        at = await collect_singly(stub.url, "sesame", many, replace(ORDER, branches=1), out, 1)
        assert (len(at.skipped), at.done) == (19, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference": "8"}, "question q1: its reference is now '8', but '7' in .*out.jsonl:6"),
        ({"reference": None}, "question q1: its reference is now None, but '7' in "),
        ({"split": Split.VALIDATION}, "question q1: its split is now 'validation', but 'search' in "),
    ],
)
async def test_a_changed_reference_or_split_is_refused_on_resume(
    questions: Sequence[Question], out: Path, change: dict[str, Any], message: str
) -> None:
    async with answering(lambda _: recorded()) as stub:
        await collect_singly(stub.url, "sesame", questions, ORDER, out, 1)
        before, corrected = content(out), [questions[0], questions[1].model_copy(update=change), questions[2]]
        with pytest.raises(CollectError, match=f"{message}.*; set it back, .* or collect into another file"):
            await collect_singly(stub.url, "sesame", corrected, replace(ORDER, branches=9), out)
        assert (len(stub.asked), content(out)) == (ALL, before)
        await collect_singly(stub.url, "sesame", corrected, ORDER, out.with_name("other.jsonl"))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda _: web.json_response({"id": "c", "choices": []}), "replies without a recording"),
        (lambda _: web.Response(text="<html>", content_type="text/html"), "replies without a recording"),
        (lambda _: web.Response(text="{", content_type="application/json"), "returns no chat completion"),
        (lambda _: recorded(model="x"), "the proxy answers as model 'x'; set --model x"),
        (lambda _: recorded(interval=0), "replies with an invalid recording: .*interval"),
        (lambda _: recorded(branches=[WHOLE, WHOLE]), "an invalid recording: .*2 branches"),
        (lambda _: recorded(recording=[]), "replies with an invalid recording"),
        (lambda _: recorded(WHOLE | {"complete": False}, stop="deadline"), r"cuts branches short \(deadline\)"),
        (lambda _: recorded(WHOLE | {"complete": False}, stop="max_tokens"), r"cuts branches short \(max_tokens\)"),
        (
            lambda number: recorded(interval=INTERVAL + number // 2),
            "differs from .*interval was 40 and is now 41",
        ),
    ],
)
async def test_an_invalid_recording_ends_the_collection(
    questions: Sequence[Question], out: Path, answer: Answer, message: str
) -> None:
    async with answering(answer) as stub:
        with pytest.raises(CollectError, match=message):
            await collect_singly(stub.url, "sesame", questions, ORDER, out, 2)
    assert len(stub.asked) <= 4


async def test_a_branch_cut_by_an_upstream_error_is_retried(questions: Sequence[Question], out: Path) -> None:
    cut = WHOLE | {"complete": False, "tokens": 40}
    async with answering(lambda i: recorded(cut, stop="upstream_error") if i == 1 else recorded()) as stub:
        at = await collect_singly(stub.url, "sesame", questions[:1], ORDER, out, 1, timing=RetryTiming(0))
    assert (at.done, at.tokens, len(stub.asked)) == (BRANCHES, 69 * (BRANCHES + 1), BRANCHES + 1)


async def test_a_request_asks_for_several_branches_of_one_question(questions: Sequence[Question], out: Path) -> None:
    """Branches in flight never exceed `at_once`, and all branches of a reply are on disk before the next request."""
    flying: list[int] = []

    def answer(number: int) -> web.Response:
        flying.append(sum(stub.counts) - len(lines(out)))
        return recorded()

    async with answering(answer) as stub:
        at = await collect(stub.url, "sesame", questions, replace(ORDER, branches=20), out, 24)
    assert (at.done, max(flying)) == (60, 24)
    assert {asked["messages"][0]["content"] for asked in stub.asked} == {f"question {i}" for i in range(QUESTIONS)}
    assert stub.counts[:2] == [16, 4]
    assert set(parts(out).values()) == {1}


async def test_the_cap_of_a_request_is_the_reserve_of_all_its_branches(
    questions: Sequence[Question], out: Path
) -> None:
    """The first branch runs alone. Later requests have as many branches as the budget allows."""
    plan = replace(ORDER, max_tokens=70, branches=9)
    reserve = plan.reserved_tokens(INTERVAL)
    async with answering(lambda _: recorded()) as stub:
        at = await collect(stub.url, "sesame", questions, plan, out, 8, 5 * reserve)
    assert stub.counts[:2] == [1, 4]
    assert [asked["tts"]["max_total_tokens"] for asked in stub.asked[1:]] == [n * reserve for n in stub.counts[1:]]
    assert (at.done, at.spent) == (27, 27 * 69)


async def test_complete_branches_of_a_failed_request_are_kept_and_the_others_requested_again(
    questions: Sequence[Question], out: Path
) -> None:
    cut = WHOLE | {"complete": False, "tokens": 40}
    reply: dict[str, Any] = {
        "branches": [WHOLE, cut, WHOLE, cut, cut],
        "stop": "upstream_error",
        "tokens": {"total": 2 * 69 + 3 * 49},
    }
    async with answering(lambda number: recorded(**({} if number else reply))) as stub:
        at = await collect(stub.url, "sesame", questions[:1], ORDER, out, timing=RetryTiming(0))
    assert stub.counts == [5, 3]
    assert (at.done, at.spent) == (BRANCHES, BRANCHES * 69 + 3 * 49)
    assert spent_on_nothing(out) == 3 * 49
    assert set(parts(out).values()) == {1}
    assert [line["part"] for line in lines(out)] == [0, 2, 1, 3, 4]


async def test_skipped_branches_of_a_request_are_named(questions: Sequence[Question], out: Path) -> None:
    cut = WHOLE | {"complete": False}
    reply: dict[str, Any] = {"branches": [cut, WHOLE, cut], "stop": "upstream_error"}
    order = replace(ORDER, branches=3)
    async with answering(lambda number: refused(503, "later") if number else recorded(**reply)) as stub:
        at = await collect(stub.url, "sesame", questions[:1], order, out, timing=RetryTiming(0))
    assert (at.done, at.skipped) == (1, ["question q0, branches 0, 2: 503: later"])


async def test_a_proxy_that_opens_fewer_branches_per_request_is_asked_for_fewer(
    questions: Sequence[Question], out: Path
) -> None:
    async with answering(lambda number: recorded(branches=[WHOLE] * min(2, stub.counts[number]))) as stub:
        at = await collect(stub.url, "sesame", questions, ORDER, out, 5)
    assert at.done == ALL
    assert max(stub.counts[1:]) == 2
    assert set(parts(out).values()) == {1}


async def test_a_changed_proxy_is_noticed_at_the_first_branch(questions: Sequence[Question], out: Path) -> None:
    async with answering(lambda _: recorded()) as stub:
        await collect_singly(stub.url, "sesame", questions[:1], ORDER, out)
    before = content(out)
    async with answering(lambda _: recorded(chat_template="new")) as stub:
        with pytest.raises(CollectError, match="chat template was '' and is now 'new'; the two are not comparable"):
            await collect_singly(stub.url, "sesame", questions, ORDER, out)
    assert len(stub.asked) == 1
    assert content(out) == before


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        (lambda recording: "{}\n", BadRecording, r"out.jsonl:2: model: Field required"),
        (
            lambda recording: format_recording_line(recording),
            CollectError,
            r"out.jsonl:2 was not collected \(it has no part\); name another file",
        ),
        (
            lambda recording: format_recording_line(replace(recording, interval=9), 1),
            CollectError,
            r"out.jsonl:2 differs from what is in",
        ),
    ],
)
async def test_an_output_file_with_lines_of_another_kind_is_refused(
    questions: Sequence[Question],
    out: Path,
    line: Callable[[RecordedQuestion], str],
    error: type[Exception],
    message: str,
) -> None:
    branch, asked = RecordedBranch(["7"], 60, "7", [9]), questions[0]
    recording = RecordedQuestion(asked.question, MODEL, "hard", INTERVAL, [branch], "7", split=Split.HELD_OUT)
    put(out, (format_recording_line(recording, 0) + line(recording)).encode())
    before = content(out)
    async with answering(lambda _: recorded()) as stub:
        with pytest.raises(error, match=message):
            await collect_singly(stub.url, "sesame", questions, ORDER, out)
    assert (stub.asked, content(out)) == ([], before)


async def test_the_model_must_be_named_if_several_are_served(questions: Sequence[Question], out: Path) -> None:
    async with answering(lambda _: recorded(), [MODEL, "other"]) as stub:
        with pytest.raises(CollectError, match="--model is needed; the proxy serves fake-model, other"):
            await collect_singly(stub.url, "sesame", questions, ORDER, out)
