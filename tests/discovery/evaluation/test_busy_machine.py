"""Replay on a busy machine or with killed processes: results stay the same and no controller is blamed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import pytest

from controllers.errors import MachineDisturbed
from controllers.loading import Spec
from controllers.sandbox import handle as handles
from controllers.sandbox.deadline import Clock
from controllers.sandbox.handle import SandboxHandle
from controllers.sandbox.spawner import spawner
from discovery.data.recordings import Cell, Recording, Split, intern_answers
from discovery.errors import GateError
from discovery.evaluation.replay_jobs import MIN_AUDITED, Job, JobResult, ReplayRules, _JobRunner, run_job
from discovery.evaluation.score_set import ScoreSet
from discovery.promotion import comparison
from discovery.promotion.ledger import DISTURBED, FREE_DISTURBANCES, Ledger
from discovery.promotion.verdict import GateReport
from tests.discovery.evaluation.test_evaluate import question
from tests.discovery.promotion.test_gate import FEW, FIRST, quickly, run

pytestmark = [
    pytest.mark.process,
    pytest.mark.xdist_group("serial"),  # not while tests of a real vLLM run, whose limits are seconds
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux seals processes"),
]

BUSY: Final = 4
VERDICTS: Final = int(os.environ.get("SOAK_VERDICTS", "2"))
RECORDINGS: Final[list[Recording]] = [intern_answers(question(number)) for number in range(8)]
HONEST: Final = """
from controllers import advance, answer, branch

class Mine:
    def __init__(self, beta): ...
    def decide(self, state):
        if not state.width:
            return [branch()] * 4
        {first}
        return [advance(i) for i in state.active] or [answer(state.leader())]
"""
THOROUGH: Final = HONEST.format(
    first="""if state.rounds == 1 and state.limits.max_tokens is not None:
            for _ in range({steps}): pass"""
)
"""Decides like HONEST, but under a token cap it first counts for a while."""


@contextmanager
def busy(count: int = BUSY) -> Iterator[None]:
    """Run `count` processes that compute all the time."""
    with ExitStack() as stack:
        for _ in range(count):
            spin = [sys.executable, "-c", "print(flush=True)\nwhile True: pass"]
            process = stack.enter_context(subprocess.Popen(spin, stdout=subprocess.PIPE))
            stack.callback(process.kill)
            assert process.stdout is not None
            process.stdout.readline()
        yield


def played(source: str = HONEST.format(first="pass"), is_audited: bool = True, shuffles: range = range(2)) -> JobResult:
    job = Job(Spec("mine", source), 0.5, Cell("m", "b", Split.SEARCH), shuffles)
    return run_job(job, RECORDINGS, ReplayRules(16, is_audited=is_audited))


def steps(seconds: float) -> int:
    """Return how many loop iterations take `seconds` of processor time on this machine."""
    code = f"import time\nat = time.process_time()\nfor _ in range({10**6}): pass\nprint(time.process_time() - at)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(seconds / float(done.stdout) * 10**6)


def test_only_processes_that_get_an_episode_are_started(monkeypatch: pytest.MonkeyPatch) -> None:
    started, spawn = list[SandboxHandle](), spawner().spawn

    def count(clock: Clock) -> SandboxHandle:
        started.append(spawn(clock=clock))
        return started[-1]

    monkeypatch.setattr(spawner(), "spawn", count)
    assert played().failures == []
    assert len(started) == 1 + MIN_AUDITED  # all episodes fit into one message
    started.clear()
    assert played(is_audited=False).failures == []
    assert len(started) == 1


def test_the_audited_episodes_are_drawn_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """A controller that could compute them would play only these honestly."""
    drawn = list[tuple[int, ...]]()

    def note(self: object, audited: Sequence[int], played: object) -> None:
        drawn.append(tuple(audited))

    monkeypatch.setattr(_JobRunner, "_audit", note)
    for _ in range(2):
        assert played(shuffles=range(20)).failures == []
    assert len(drawn[0]) == len(drawn[1]) == MIN_AUDITED + 1
    assert drawn[0] != drawn[1]


def test_a_slow_decision_within_its_processor_time_passes_on_a_busy_machine() -> None:
    """The sandbox processes of the audit and four busy processes share two processors."""
    with busy():
        result = played(THOROUGH.format(steps=steps(0.1)))
    assert result.failures == []
    assert np.array_equal(result.outcomes, played().outcomes)


def test_a_controller_that_is_late_only_under_a_token_limit_is_reported_as_late() -> None:
    messages = {failure.message for failure in played(THOROUGH.format(steps=10**9)).failures}
    assert len(messages) == 1
    (message,) = messages
    assert (
        "alone in its process, under a token limit, it failed twice: it took longer than 250 ms of processor time"
        in message
    )
    assert "otherwise" not in message


Kill = Callable[..., None]


@pytest.fixture
def kill(monkeypatch: pytest.MonkeyPatch) -> Kill:
    """Kill the processes with the given numbers, counted in the order of first use, while or before they decide."""

    def some(*numbers: int, idle: bool = False) -> None:
        begin, seen = SandboxHandle.begin, dict[SandboxHandle, int]()

        def begin_and_die(self: SandboxHandle, turns: Sequence[Sequence[int]], most: int) -> None:
            dies = seen.setdefault(self, len(seen)) in numbers
            if dies:
                os.kill(self.process, signal.SIGKILL if idle else signal.SIGSTOP)
            while dies and idle and self.alive:
                pass
            begin(self, turns, most)
            if dies and not idle:
                os.kill(self.process, signal.SIGKILL)
                monkeypatch.setattr(handles, "IDLE_S", 0.0)  # the process has its request and stands still

        monkeypatch.setattr(SandboxHandle, "begin", begin_and_die)

    return some


PASS, AUDIT, ALONE = 0, 1, 1 + MIN_AUDITED  # numbers of the first process of each; one process plays all episodes


@pytest.mark.parametrize("idle", [True, False])
@pytest.mark.parametrize("number", [PASS, AUDIT])
def test_a_process_killed_from_outside_changes_no_result(kill: Kill, number: int, idle: bool) -> None:
    honest = played()
    kill(number, idle=idle)
    result = played()
    assert result.failures == []
    assert np.array_equal(result.outcomes, honest.outcomes)


def test_a_controller_whose_process_dies_twice_in_the_audit_is_reported(kill: Kill) -> None:
    kill(AUDIT, ALONE)
    messages = {failure.message for failure in played().failures}
    assert len(messages) == 1
    assert "alone in its process, under a token limit, it failed twice: it was killed by SIGKILL" in messages.pop()


def test_processes_killed_every_time_raise_machine_disturbed(kill: Kill) -> None:
    kill(*range(100), idle=True)
    with pytest.raises(MachineDisturbed, match="killed from outside"):
        played()


# Verdicts


def test_a_gate_verdict_is_the_same_on_a_busy_machine(tmp_path: Path) -> None:
    def verdict(name: str) -> GateReport:
        return run(FEW, Spec("first", FIRST), tmp_path / name, shuffles=2)

    idle = verdict("idle")
    with busy():
        reports = [verdict(str(number)) for number in range(VERDICTS)]
    assert [replace(one, created="") for one in reports] == [replace(idle, created="")] * VERDICTS


def test_a_disturbed_gate_verdict_spends_no_judgement_until_it_happens_too_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ledger"

    def disturbed(*_: object) -> ScoreSet:
        raise MachineDisturbed("it was killed")

    def disturb(message: str) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(comparison, "score_controllers", disturbed)
            with pytest.raises(GateError, match=message):
                quickly("single", path)

    assert quickly("asc@4", path).k == 1
    for number in range(1, FREE_DISTURBANCES + 1):
        free = rf"no judgement is spent, .* disturbance {number} of {FREE_DISTURBANCES} free"
        disturb(f"single could not be judged: it was killed; {free}")
    assert [one.verdict for one in Ledger(path).judgements()[1:]] == [DISTURBED] * FREE_DISTURBANCES
    assert quickly("esc@8", path).k == 2
    disturb(f"one judgement is spent, because {FREE_DISTURBANCES} on these questions were disturbed before")
    assert quickly("single", path).k == 4
    assert [one.k for one in Ledger(path).judgements()] == [1, *[2] * FREE_DISTURBANCES, 2, 3, 4]
