"""Controllers scored on recordings: controller × β × cell × shuffle, each episode run by the one runner.

What comes out of an episode is a column of whole numbers, so sums, and all that is made of them, do not depend on who
ran it or in which order: engines agree to the bit.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from controllers import ControllerError, Limits, State, Stop, run_episode, run_sync
from controllers.loading import Spec, make
from discovery.recordings import Cell, Recording
from discovery.replay import ReplayEnvironment, shuffled
from discovery.traces import TraceWriter

KINDS: Final = ("winner", "agreeing", "losing", "pruned", "probe")
"""What tokens are spent on, as in `State.ledger`."""
COLUMNS: Final = ("right", "failed", "tokens", "rounds", "branches", "critical_path", *KINDS)
"""What is known of an episode, all whole numbers; `critical_path` in tokens."""
SHUFFLES_A_JOB: Final = 10
"""Few enough for two workers to end together, enough for the rest not to matter."""
PATIENCE_S: Final = 10.0
"""Seconds of processor time an episode of a controller from a file may take before it counts as looping."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What holds for every episode of an evaluation."""

    max_branches: int = 64
    probe_tokens: int | None = None  # what a probe costs; None for what was recorded
    traces: Path | None = None  # folder that traces are written to
    patience_s: float = PATIENCE_S


class Job(NamedTuple):
    """Some shuffles of one controller at one β over all questions of a cell."""

    spec: Spec
    beta: float
    cell: Cell
    shuffles: range


class Failure(NamedTuple):
    """An episode that ended by its controller's fault. It is scored: wrong, at the tokens it had spent."""

    question: int  # position in its cell
    shuffle: int
    message: str


@dataclass(frozen=True)
class Played:
    """What came of a job."""

    outcomes: NDArray[np.int64]  # (columns, shuffles, questions)
    failures: list[Failure]
    seconds: float  # it took, loading left out


class Looping(BaseException):
    """Out of patience. Not an Exception: a controller that catches those must not catch this."""


def jobs(specs: Sequence[Spec], betas: Sequence[float], cell: Cell, shuffles: int) -> list[Job]:
    """All work on one cell, in the order in which it is reported."""
    cuts = [*range(0, shuffles, SHUFFLES_A_JOB), shuffles]
    return [Job(spec, beta, cell, range(*cut)) for spec in specs for beta in betas for cut in pairwise(cuts)]


def play(job: Job, recordings: Sequence[Recording], rules: Rules) -> Played:
    """Run every episode of `job`. Raises Censored, and TraceError if traces cannot be written."""
    began = time.perf_counter()
    tracer = None if rules.traces is None else TraceWriter(job.spec, job.beta, job.cell, recordings)
    outcomes = np.zeros((len(COLUMNS), len(job.shuffles), len(recordings)), np.int64)
    failures: list[Failure] = []
    looped: str | None = None
    with _watch(job.spec) as start:
        for row, shuffle in enumerate(job.shuffles):
            for column, recording in enumerate(recordings):
                if looped is not None:
                    outcomes[1, row, column] = 1
                    failures.append(Failure(column, shuffle, f"not run: {looped}"))
                    continue
                start(rules.patience_s)
                try:
                    outcome, failure = _play(job, recording, shuffle, rules, tracer)
                except Looping:
                    looped = f"an episode took longer than {rules.patience_s:g} s of processor time"
                    outcome, failure = [0, 1] + [0] * (len(COLUMNS) - 2), looped
                finally:
                    start(0)
                outcomes[:, row, column] = outcome
                if failure is not None:
                    failures.append(Failure(column, shuffle, failure))
    if tracer is not None and rules.traces is not None:
        tracer.save(rules.traces, job.shuffles)
    return Played(outcomes, failures, time.perf_counter() - began)


def _play(
    job: Job, recording: Recording, shuffle: int, rules: Rules, tracer: TraceWriter | None
) -> tuple[list[int], str | None]:
    """One episode: its column of numbers, and what its controller did wrong, if anything."""
    order = shuffled(recording.branches, shuffle)
    environment = ReplayEnvironment(recording, order, rules.probe_tokens)
    state = State(Limits(recording.interval, min(rules.max_branches, recording.branches)))
    failure = None
    try:
        controller = make(job.spec, job.beta)
        run_sync(run_episode(controller, environment, state, None if tracer is None else tracer.on_round))
    except ControllerError as error:
        failure = str(error)
        state.end(Stop.CONTROLLER_ERROR)
    right = failure is None and environment.is_right(state.answer)
    ledger = state.ledger(_spokesman(state))
    if tracer is not None:
        tracer.end_episode(state, right)
    return [
        right,
        failure is not None,
        state.spent,
        state.rounds,
        state.width,
        environment.critical_path,
        *(ledger[kind] for kind in KINDS),
    ], failure


def _spokesman(state: State) -> int | None:
    """The branch whose text a client would read: the shortest that finished with the answer."""
    agreeing = [i for i in state.finished if state.branches[i].label == state.answer and state.answer is not None]
    return min(agreeing, key=lambda i: state.branches[i].tokens, default=None)


@contextmanager
def _watch(spec: Spec) -> Iterator[Callable[[float], object]]:
    """Give a function that raises Looping in this thread after so many seconds of processor time, or, by 0, will not.

    Only controllers from files are watched, and only where signals reach: in a main thread.
    """
    if not spec.is_foreign or threading.current_thread() is not threading.main_thread():
        yield lambda seconds: None
        return

    def stop(*_: object) -> None:
        raise Looping

    before = signal.signal(signal.SIGVTALRM, stop)
    try:
        yield lambda seconds: signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
