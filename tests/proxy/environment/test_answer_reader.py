"""Answers are read and compared off the event loop, and no tenant's answers delay another's."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from discovery.answers import Judge, Labels, canonical, parse_kind, read_answer
from discovery.answers.judge import EqualityResult
from proxy.environment import answer_reader
from proxy.environment.answer_reader import EpisodeGrader, GraderPool, PlainGrader, TimeBudget
from proxy.telemetry.metrics import Metrics

PATTERN = parse_kind(r"regex:x.*y|x")


class ScriptedJudge(Judge):
    """Judge that returns scripted results."""

    def __init__(self, script: Callable[[str, str], EqualityResult]) -> None:
        super().__init__()
        self.script = script
        self.compared: list[tuple[str, str]] = []

    def compare(self, one: str, other: str, *, wait_s: float | None = None) -> EqualityResult:
        self.compared.append((one, other))
        return self.script(one, other)


class Gate:
    """Script that holds each comparison until it is opened."""

    def __init__(self) -> None:
        self.opened: dict[str, threading.Event] = {}
        self.running: list[str] = []
        self.most = 0
        self.started = threading.Event()

    def __call__(self, one: str, other: str) -> EqualityResult:
        self.running.append(one)
        self.most = max(self.most, len(self.running))
        self.started.set()
        assert self.opened.setdefault(one, threading.Event()).wait(30)
        self.running.remove(one)
        return EqualityResult(False, 0.01)

    def open(self, one: str) -> None:
        self.opened.setdefault(one, threading.Event()).set()


def limits(metrics: Metrics) -> dict[str, float]:
    samples = next(iter(metrics.answer_limits.collect())).samples
    return {s.labels["limit"]: s.value for s in samples if s.name.endswith("_total") and s.value}


async def graders(script: Callable[[str, str], EqualityResult]) -> AsyncIterator[GraderPool]:
    pool = GraderPool(Metrics(), ScriptedJudge(script))
    yield pool
    await pool.close()


@pytest.fixture
async def killing() -> AsyncIterator[GraderPool]:
    """A pool whose every comparison ends with a killed process."""
    async for pool in graders(lambda one, other: EqualityResult(False, 1.0, True)):
        yield pool


def comparisons(pool: GraderPool) -> int:
    judge = pool.judge
    assert isinstance(judge, ScriptedJudge)
    return len(judge.compared)


OTHERS = [(number, str(number)) for number in range(8)]


async def test_after_a_killed_comparison_the_episode_is_compared_by_form(killing: GraderPool) -> None:
    grader = killing.grader("a")
    for _ in range(5):
        assert await grader.compare("9", OTHERS) is None
    assert comparisons(killing) == 1  # it cost 1 s and a new process
    assert limits(killing.metrics) == {"judge_episode": 5}


async def test_a_tenant_over_its_budget_is_compared_by_form_and_another_is_not(killing: GraderPool) -> None:
    for _ in range(20):
        await killing.grader("a").compare("9", OTHERS)
    most = answer_reader.TENANT_S / (1 + answer_reader.KILL_S)
    assert most <= comparisons(killing) <= most + 1
    counted = limits(killing.metrics)
    assert counted["judge_tenant"] >= 20 - most - 1
    before = comparisons(killing)
    await killing.grader("b").compare("9", OTHERS)
    assert comparisons(killing) == before + 1


async def test_comparisons_of_one_tenant_are_serial_and_tenants_run_concurrently() -> None:
    gate = Gate()
    async for pool in graders(gate):
        first, second = pool.grader("a"), pool.grader("a")
        waiting = [asyncio.create_task(g.compare(name, OTHERS[:1])) for g, name in ((first, "a1"), (second, "a2"))]
        gate.open("b")
        assert await pool.grader("b").compare("b", OTHERS[:1]) is None  # while both of a's wait
        assert gate.running in ([], ["a1"])
        gate.open("a1")
        gate.open("a2")
        await asyncio.gather(*waiting)
        assert gate.most <= 2
        assert [one for one, _ in pool.judge.compared if one != "b"] == ["a1", "a2"]  # type: ignore[attr-defined]


async def test_a_cancelled_comparison_blocks_its_tenants_next_one_until_it_ends() -> None:
    gate = Gate()
    async for pool in graders(gate):
        grader = pool.grader("a")
        for number in range(5):
            task = asyncio.create_task(grader.compare(f"a{number}", OTHERS[:1]))
            await asyncio.sleep(0)
            assert await asyncio.to_thread(gate.started.wait, 30)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert gate.running == ["a0"]
        gate.open("a0")
        gate.open("last")
        await grader.compare("last", OTHERS[:1])
        assert [one for one, _ in pool.judge.compared] == ["a0", "last"]  # type: ignore[attr-defined]


async def test_the_first_equal_label_is_returned_and_a_busy_judge_is_counted() -> None:
    async for pool in graders(lambda one, other: EqualityResult(other == "3", 0.01)):
        assert await pool.grader("a").compare("9", OTHERS) == 3
        assert comparisons(pool) == 4
        assert await pool.grader("a").compare("9", []) is None
        assert limits(pool.metrics) == {}
    async for pool in graders(lambda one, other: EqualityResult(False, waited=True)):
        assert await pool.grader("a").compare("9", OTHERS) is None
        assert (comparisons(pool), limits(pool.metrics)) == (1, {"judge_busy": 1})


async def test_patterns_and_long_texts_are_read_in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    where: list[str] = []

    def reading(*args: Any, **kwargs: Any) -> Any:
        where.append(threading.current_thread().name.partition("_")[0])
        return read_answer(*args, **kwargs)

    monkeypatch.setattr("proxy.environment.answer_reader.read_answer", reading)
    async for pool in graders(lambda one, other: EqualityResult(False)):
        grader = pool.grader("a")
        answers = [
            await grader.read("x", PATTERN),
            await grader.read("The answer is 7.", parse_kind("auto")),
            await grader.read("." * answer_reader.SHORT + " The answer is 7.", parse_kind("auto")),
        ]
        assert [answer and answer.written for answer in answers] == ["x", "7", "7"]
        assert where == ["grading", threading.main_thread().name, "reading"]


async def test_a_pattern_has_a_time_budget_per_episode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_reader, "EPISODE_S", 1e-9)
    async for pool in graders(lambda one, other: EqualityResult(False)):
        grader = pool.grader("a")
        await grader.read("x" * 1000, PATTERN)
        assert await grader.read("x", PATTERN) is None
        assert limits(pool.metrics) == {"pattern_episode": 1}


@pytest.mark.process
async def test_math_verify_decides_where_canonical_forms_do_not() -> None:
    pool = GraderPool(Metrics())
    try:
        assert await label(pool.grader("a"), r"\log_2 8", "3") == [0, 0]
        assert await label(PlainGrader(), r"\log_2 8", "3") == [0, 1]
    finally:
        await pool.close()


async def label(grader: EpisodeGrader | PlainGrader, *answers: str) -> list[int]:
    labels, numbers = Labels(), []
    for written in answers:
        form = canonical(written)
        assert form is not None
        numbers.append(labels.assign(form, written, await grader.compare(written, labels.undecided(form))))
    return numbers


def test_a_time_budget_refills() -> None:
    now = [0.0]
    budget = TimeBudget(10, 0.5, lambda: now[0])
    budget.spend(12)
    assert budget.left == -2
    now[0] = 6
    assert budget.left == 1
    now[0] = 1000
    assert budget.left == 10


async def test_lanes_of_tenants_do_not_pile_up() -> None:
    """Without keys, a caller may send any token, and so be any tenant."""
    async for pool in graders(lambda one, other: EqualityResult(False, 1.0)):
        for number in range(500):
            await pool.grader(f"tenant {number}").read("x", PATTERN)
        assert len(pool._lanes) <= 2


async def test_a_lane_stays_while_an_episode_uses_it_and_until_its_budget_is_full() -> None:
    async for pool in graders(lambda one, other: EqualityResult(False, 1.0)):
        running, lane = pool.grader("running"), pool._lanes["running"]
        await pool.grader("spender").compare("7", OTHERS)
        spender = pool._lanes["spender"]
        for number in range(20):
            pool.grader(f"tenant {number}")
        assert pool._lanes["running"] is lane
        assert pool._lanes["spender"] is spender
        del running
        for number in range(20):
            pool.grader(f"tenant {number}")
        assert "running" not in pool._lanes
        assert "spender" in pool._lanes
