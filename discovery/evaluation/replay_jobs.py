"""Controllers scored on recordings: controller × β × cell × shuffle, each episode run by the one runner.

What comes out of an episode is a column of whole numbers, so sums, and all that is made of them, do not depend on who
ran it or in which order: engines agree to the bit.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence, Set
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from controllers import (
    Boundary,
    BoundaryViolation,
    Controller,
    ControllerError,
    Limits,
    MachineDisturbed,
    Round,
    State,
    Stop,
    run_episode,
    run_sync,
)
from controllers.episode import RemoteController
from controllers.loading import Spec, make
from controllers.sandbox.controller import EPISODES_PER_PROCESS, Episode, run_together
from controllers.sandbox.deadline import Clock
from controllers.sandbox.handle import SandboxHandle
from controllers.sandbox.spawner import spawner
from discovery.data.recordings import Cell, Recording
from discovery.data.traces import TraceWriter
from discovery.evaluation.replay import ReplayEnvironment, branch_order

T = TypeVar("T")

TOKEN_KINDS: Final = ("winner", "agreeing", "losing", "pruned", "probe")
"""What tokens are spent on, as in `State.ledger`."""
OUTCOME_COLUMNS: Final = ("right", "failed", "tokens", "rounds", "branches", "critical_path", *TOKEN_KINDS)
"""What is known of an episode, all whole numbers; `critical_path` in tokens."""
SHUFFLES_A_JOB: Final = 10
"""Few enough for two workers to end together, enough for the rest not to matter."""
SANDBOXES_PER_JOB: Final = 2
"""Sealed children that play a job: while one decides, what the other has decided is carried out."""
AUDITED: Final = 32
"""One episode of so many, and LEAST a job, is played again, alone in a child of its own."""
LEAST: Final = 4
TRIES: Final = 3
"""Times work is begun that the machine disturbs."""
SUDDEN: Final = frozenset({Boundary.LATE, Boundary.DEAD})
"""Boundaries that are crossed again, alone, before anybody is accused of it."""
FAR: Final = (1 << 30, 1 << 50)
"""Tokens of a branch, and of an episode, that are never reached."""


class Sealing(StrEnum):
    """Which controllers decide in a sealed process."""

    FOREIGN = "foreign"  # those from files
    ALL = "all"
    NONE = "none"  # an operator's word that those from files may do what he may


@dataclass(frozen=True, slots=True)
class ReplayRules:
    """What holds for every episode of an evaluation."""

    max_branches: int = 64
    probe_tokens: int | None = None  # what a probe costs; None for what was recorded
    traces: Path | None = None  # folder that traces are written to
    sealing: Sealing = Sealing.FOREIGN

    def seal(self, spec: Spec) -> bool:
        """Whether a controller is to decide in a sealed process."""
        return self.sealing is Sealing.ALL or (self.sealing is Sealing.FOREIGN and spec.is_foreign)


class Job(NamedTuple):
    """Some shuffles of one controller at one β over all questions of a cell."""

    spec: Spec
    beta: float
    cell: Cell
    shuffles: range


class EpisodeFailure(NamedTuple):
    """An episode that ended by its controller's fault. It is scored: wrong, at the tokens it had spent."""

    question: int  # position in its cell
    shuffle: int
    message: str


@dataclass(frozen=True)
class JobResult:
    """What came of a job."""

    outcomes: NDArray[np.int64]  # (columns, shuffles, questions)
    failures: list[EpisodeFailure]
    seconds: float  # it took, loading left out


class _EpisodeResult(NamedTuple):
    """What came of an episode."""

    column: list[int]  # a figure for each of COLUMNS
    failure: str | None
    sudden: bool  # it failed because its process was late or died
    state: State
    rounds: Sequence[Round]  # none unless traces are wanted, or another episode is to be held against it
    right: bool


def make_jobs(specs: Sequence[Spec], betas: Sequence[float], cell: Cell, shuffles: int) -> list[Job]:
    """All work on one cell, in the order in which it is reported."""
    cuts = [*range(0, shuffles, SHUFFLES_A_JOB), shuffles]
    return [Job(spec, beta, cell, range(*cut)) for spec in specs for beta in betas for cut in pairwise(cuts)]


def run_job(job: Job, recordings: Sequence[Recording], rules: ReplayRules) -> JobResult:
    """Run every episode of `job`.

    Raises Censored, SandboxUnavailable, MachineDisturbed if every attempt is disturbed (the machine ends sealed
    processes or gives them no time), and TraceError if traces cannot be written.
    """
    began = time.perf_counter()
    table = _JobRunner(job, recordings, rules)
    played = retry_disturbed(table.play_sealed) if rules.seal(job.spec) else table.play_here()
    outcomes = np.zeros((len(OUTCOME_COLUMNS), len(job.shuffles), len(recordings)), np.int64)
    failures: list[EpisodeFailure] = []
    for (question, shuffle), outcome in zip(table.episodes, played, strict=True):
        outcomes[:, shuffle - job.shuffles.start, question] = outcome.column
        if outcome.failure is not None:
            failures.append(EpisodeFailure(question, shuffle, outcome.failure))
    if rules.traces is not None:
        tracer = TraceWriter(job.spec, job.beta, job.cell, recordings)
        for outcome in played:
            tracer.add(outcome.state, outcome.rounds, outcome.right)
        tracer.save(rules.traces, job.shuffles)
    return JobResult(outcomes, failures, time.perf_counter() - began)


def retry_disturbed(work: Callable[[], T]) -> T:
    """Do `work`, repeated where the machine disturbs it. Raises MachineDisturbed if every attempt is disturbed."""
    for _ in range(TRIES - 1):
        with suppress(MachineDisturbed):
            return work()
    return work()


class _JobRunner:
    """The episodes of a job, and how they are played: one after the other here, or together in sealed children."""

    def __init__(self, job: Job, recordings: Sequence[Recording], rules: ReplayRules) -> None:
        self.episodes = [(question, shuffle) for shuffle in job.shuffles for question in range(len(recordings))]
        self._job = job
        self._recordings = recordings
        self._rules = rules

    def play_here(self) -> list[_EpisodeResult]:
        """Every episode, the controller in this process."""
        make_one = partial(make, self._job.spec, self._job.beta)
        return [run_sync(self._play(make_one, *episode)) for episode in self.episodes]

    def play_sealed(self) -> list[_EpisodeResult]:
        """Every episode, the controller in sealed children, and some again. One that then decides otherwise has failed
        them all: what it does depends on more than the episode. So has one that then is late or dies, twice."""
        every = range(len(self.episodes))
        drawn = random.Random(f"{self._job.spec.digest} {self._job.beta} {self._job.shuffles}")
        audited = drawn.sample(every, k=min(len(every), max(LEAST, len(every) // AUDITED)))
        try:
            played = self._play_all(every, set(audited))
            fault = self._audit([at for at in audited if played[at].failure is None], played)
        except ControllerError as error:  # it does not load, or had to be killed as it did
            return [self._failed(str(error), question) for question, _ in self.episodes]
        if fault is None:
            return played
        return [one._replace(failure=one.failure or fault, column=_wrong(one.column), right=False) for one in played]

    def _play_all(self, every: Sequence[int], kept: Set[int]) -> list[_EpisodeResult]:
        """Play all episodes; and once more, with nothing beside them, if a process was late or died."""
        episodes = [self._seated(at, keep=at in kept) for at in every]
        try:
            played = self._together(episodes, SANDBOXES_PER_JOB)
        except BoundaryViolation as error:  # as it loaded
            if error.boundary not in SUDDEN:
                raise
        else:
            if not any(one.sudden for one in played):
                return played
        return self._together(episodes, 1)

    def _audit(self, audited: Sequence[int], played: Sequence[_EpisodeResult]) -> str | None:
        """Play episodes again as live requests would be: each alone in a new child, under a cap. What was different."""
        again = self._together([self._seated(at, keep=True, far=True) for at in audited], len(audited), share=1)
        for at, second in zip(audited, again, strict=True):
            if second.sudden:
                (second,) = self._together([self._seated(at, keep=True, far=True)], 1, share=1)
            question, shuffle = self.episodes[at]
            where = f"question {question}, shuffle {shuffle}: alone in its process, under a cap,"
            if second.sudden:
                return f"{where} it failed twice: {second.failure}"
            if second.failure is not None:
                return f"{where} it decided otherwise: {second.failure}"
            actions = ([list(one.actions) for one in outcome.rounds] for outcome in (played[at], second))
            if next(actions) != next(actions):
                return f"{where} it decided otherwise"
        return None

    def _together(
        self, episodes: Sequence[Episode[_EpisodeResult]], children: int, share: int = EPISODES_PER_PROCESS
    ) -> list[_EpisodeResult]:
        limits = Limits(1, max(self._limits(recording).max_branches for recording in self._recordings))
        with ExitStack() as stack:
            workers: list[SandboxHandle] = []
            for _ in range(children):
                worker = spawner().spawn(clock=Clock.CPU)
                stack.callback(worker.close)
                worker.load(self._job.spec)
                workers.append(worker)
            return run_together(workers, self._job.beta, limits, episodes, share)

    def _seated(self, at: int, keep: bool, far: bool = False) -> Episode[_EpisodeResult]:
        return lambda remote: self._play(lambda: remote, *self.episodes[at], keep, far)

    def _limits(self, recording: Recording, far: bool = False) -> Limits:
        branch, cap = FAR if far else (None, None)
        return Limits(recording.interval, min(self._rules.max_branches, recording.branches), branch, max_tokens=cap)

    async def _play(
        self,
        make_one: Callable[[], Controller | RemoteController],
        question: int,
        shuffle: int,
        keep: bool = False,
        far: bool = False,
    ) -> _EpisodeResult:
        """One episode; `keep` its rounds even if no traces are wanted, put a cap `far` away rather than nowhere."""
        recording = self._recordings[question]
        environment = ReplayEnvironment(recording, branch_order(recording, shuffle), self._rules.probe_tokens)
        state = State(self._limits(recording, far))
        rounds: list[Round] = []
        on_round = (lambda _, played: rounds.append(played)) if keep or self._rules.traces is not None else None
        failure, sudden = None, False
        try:
            await run_episode(make_one(), environment, state, on_round)
        except ControllerError as error:
            failure = str(error)
            sudden = isinstance(error, BoundaryViolation) and error.boundary in SUDDEN
            state.end(Stop.CONTROLLER_ERROR)
        right = failure is None and environment.is_right(state.answer)
        ledger = state.ledger(_spokesman(state))
        column = [
            right,
            failure is not None,
            state.spent,
            state.rounds,
            state.width,
            environment.critical_path,
            *(ledger[kind] for kind in TOKEN_KINDS),
        ]
        return _EpisodeResult(column, failure, sudden, state, rounds, right)

    def _failed(self, why: str, question: int) -> _EpisodeResult:
        """An episode that never began."""
        state = State(self._limits(self._recordings[question]))
        state.end(Stop.CONTROLLER_ERROR)
        return _EpisodeResult(_wrong([0] * len(OUTCOME_COLUMNS)), why, False, state, (), False)


def _wrong(column: Sequence[int]) -> list[int]:
    """The figures of an episode that counts as failed; what it spent stands."""
    return [0, 1, *column[2:]]


def _spokesman(state: State) -> int | None:
    """The branch whose text a client would read: the shortest that finished with the answer."""
    agreeing = [i for i in state.finished if state.branches[i].label == state.answer and state.answer is not None]
    return min(agreeing, key=lambda i: state.branches[i].tokens, default=None)
