"""The pool of math-verify's processes."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from controllers.sandbox.deadline import Clock
from discovery.answers import Judge
from discovery.answers import judge as judge_module

pytestmark = pytest.mark.process

ENDLESS = r"9^{9^{9^9}}"


def test_after_a_killed_comparison_a_spare_process_takes_the_next_one() -> None:
    with Judge(seconds=1, workers=2) as judge:
        assert judge.same("1+x", "x+1")
        spare = judge._idle[0]
        assert spare._process is not None  # it was started together with the first
        finding = judge.compare(ENDLESS, "5")
        assert (finding.equal, finding.killed) == (False, True)
        assert finding.seconds >= judge.seconds
        assert all(worker._process is not None for worker in judge._workers)  # the killed process is replaced
        assert judge.compare(ENDLESS, "6").seconds == 0  # the comparison is not repeated
        assert judge.same(r"\frac{2}{4}", r"\frac12")
        assert judge.compare(r"\frac{2}{4}", r"\frac12").seconds == 0


def test_signals_of_a_terminal_do_not_reach_the_processes() -> None:
    with Judge(workers=1) as judge:
        assert judge.same("1+x", "x+1")
        process = judge._workers[0]._process
        assert process is not None
        assert os.getpgid(process.pid) == process.pid != os.getpgid(0)


def test_waiting_for_a_free_process_ends_after_the_given_time() -> None:
    with Judge(seconds=30) as judge:
        assert judge.same("1+x", "x+1")
        asking = threading.Thread(target=judge.compare, args=(ENDLESS, "5"))
        asking.start()
        while judge._idle:
            pass
        finding = judge.compare("2+y", "y+2", wait_s=0)
        assert (finding.equal, finding.waited) == (False, True)
        assert judge.compare("x+1", "1+x", wait_s=0).equal  # a known result needs no process
        judge.close()
        asking.join(10)
        assert not asking.is_alive()
        assert not judge.same("2+y", "y+2")
    assert all(worker._process is None for worker in judge._workers)


@pytest.mark.skipif(sys.platform != "linux", reason="the processor time of another process is known on Linux only")
@pytest.mark.parametrize("clock", Clock)
def test_time_a_process_is_stopped_counts_by_the_wall_clock_but_not_by_the_cpu_clock(clock: Clock) -> None:
    with Judge(seconds=5, clock=clock) as judge:
        assert judge.same("1+x", "x+1")
        judge.seconds = 1.0
        process = judge._workers[0]._process
        assert process is not None
        os.kill(process.pid, signal.SIGSTOP)
        findings = []
        asking = threading.Thread(target=lambda: findings.append(judge.compare("2+y", "y+2")))
        begun = time.monotonic()
        asking.start()
        while time.monotonic() < begun + 1.2:  # as long as a busy machine might keep it waiting
            asking.join(0.1)
        with suppress(ProcessLookupError):  # it was killed
            os.kill(process.pid, signal.SIGCONT)
        asking.join()
        (finding,) = findings
        assert (finding.equal, finding.killed) == ((True, False) if clock is Clock.CPU else (False, True))


def test_an_endless_comparison_is_killed_after_its_processor_time() -> None:
    with Judge(seconds=0.5, clock=Clock.CPU) as judge:
        assert judge.compare(ENDLESS, "5").killed


@pytest.fixture
def many_open_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2048:
        pytest.skip("needs 2,048 open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    opened: list[int] = []
    try:
        while not opened or opened[-1] < 1100:  # beyond what `select` can wait for
            opened.append(os.open(os.devnull, os.O_RDONLY))
        yield
    finally:
        for descriptor in opened:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_open_files")
def test_expressions_are_compared_while_many_files_are_open() -> None:
    with Judge(seconds=5) as judge:
        finding = judge.compare("1+x", "x+1")
        assert (finding.equal, finding.waited) == (True, False)


@pytest.mark.parametrize("is_started", [False, True])
def test_a_process_that_cannot_be_asked_is_replaced(is_started: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bool:
        raise OSError("too many open files")

    with Judge(seconds=5) as judge:
        if is_started:
            assert judge.same("y+2", "2+y")
        (worker,) = judge._workers
        with monkeypatch.context() as patched:
            patched.setattr(judge_module, "is_ready", fail)
            finding = judge.compare("1+x", "x+1")
            assert (finding.equal, finding.waited, finding.killed) == (False, True, False)
            assert worker._process is None
        assert judge.same("1+x", "x+1")
        assert judge.killed == 0


def test_without_descriptors_for_a_process_the_pair_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("too many open files")

    with Judge(seconds=5) as judge:
        with monkeypatch.context() as patched:
            patched.setattr(subprocess, "Popen", fail)
            assert judge.compare("1+x", "x+1").waited
        assert judge.same("1+x", "x+1")


def test_a_process_that_was_killed_from_outside_is_replaced() -> None:
    with Judge(seconds=5) as judge:
        assert judge.same("y+2", "2+y")
        (worker,) = judge._workers
        process = worker._process
        assert process is not None
        process.kill()
        process.wait()
        assert judge.same("1+x", "x+1")
