"""Evaluation jobs: episodes of controller × β × cell × shuffle, replayed by the same runner that serves requests.

An episode yields a column of integers. Sums of integers do not depend on the process or the order of execution, so all
engines give identical figures.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache, partial
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
from controllers.sandbox.controller import (
    EPISODES_PER_PROCESS,
    Episode,
    SuspendingController,
    run_sandboxed,
)
from controllers.signals import ALL_SIGNALS, Signal
from controllers.voting import own_and_next
from discovery.data.recordings import Cell, Recording
from discovery.data.traces import TraceWriter
from discovery.evaluation.replay import ReplayEnvironment, branch_order
from discovery.evaluation.traced_rounds import RoundColumns, TracedRounds

T = TypeVar("T")

TOKEN_KINDS: Final = ("winner", "agreeing", "losing", "pruned", "probe")
"""Purposes that tokens are spent on, as in `State.ledger`."""
VOTE_COLUMNS: Final = ("votes", "votes_for", "votes_next")
"""Votes that decide an answer, as in `State.deciding_votes`: all, for the answer, and for the strongest other one."""
OUTCOME_COLUMNS: Final = (
    *("right", "failed", "tokens", "rounds", "branches", "critical_path"),
    *TOKEN_KINDS,
    *VOTE_COLUMNS,
)
"""Figures of an episode, all integers; `critical_path` is in tokens."""
SHUFFLES_A_JOB: Final = 10
"""Shuffles per job: small enough for workers to finish together, large enough for overhead not to matter."""
SANDBOXES_PER_JOB: Final = 2
"""Sandbox processes per job: while one decides, the actions of the other are executed."""
EPISODES_PER_AUDIT: Final = 32
"""One in this many episodes, and at least `MIN_AUDITED` per job, is audited: played again, alone in its own process."""
MIN_AUDITED: Final = 4
TRIES: Final = 3
"""Attempts at work that the machine disturbs."""
SUDDEN: Final = frozenset({Boundary.LATE, Boundary.DEAD})
"""Boundaries that are tested again, alone, before a controller is blamed for crossing them."""
COLLECTED_EVERY: Final = 100_000
"""Objects after which Python looks for garbage during a job."""
UNREACHABLE_LIMITS: Final = (1 << 30, 1 << 50)
"""Token limits of a branch and of an episode that are never reached."""


class Sealing(StrEnum):
    """Which controllers decide in a sandbox process."""

    FOREIGN = "foreign"  # controllers from files
    ALL = "all"
    NONE = "none"  # the operator trusts controllers from files


@dataclass(frozen=True, slots=True)
class ReplayRules:
    """Rules for every episode of an evaluation."""

    max_branches: int = 64
    probe_tokens: int | None = None  # cost of a probe; None for the recorded cost
    traces: Path | None = None  # folder that traces are written to
    sealing: Sealing = Sealing.FOREIGN
    signals: frozenset[Signal] = ALL_SIGNALS  # signals that controllers may get, if they declare them
    is_audited: bool = True  # whether some sealed episodes are played again, each alone

    def seal(self, spec: Spec) -> bool:
        """Return whether a controller decides in a sandbox process."""
        return self.sealing is Sealing.ALL or (self.sealing is Sealing.FOREIGN and spec.is_foreign)


class Job(NamedTuple):
    """Some shuffles of one controller at one β over all questions of a cell."""

    spec: Spec
    beta: float
    cell: Cell
    shuffles: range


class EpisodeFailure(NamedTuple):
    """An episode that ended by its controller's fault. It is scored as wrong, at the tokens it had spent."""

    question: int  # position in its cell
    shuffle: int
    message: str


@dataclass(frozen=True)
class JobResult:
    """The result of a job."""

    outcomes: NDArray[np.int64]  # (columns, shuffles, questions)
    failures: list[EpisodeFailure]
    seconds: float  # duration, without loading


class _EpisodeResult(NamedTuple):
    """The result of an episode."""

    column: list[int]  # a figure for each of OUTCOME_COLUMNS
    failure: str | None
    sudden: bool  # whether it failed because its process was late or died
    state: State
    rounds: Sequence[Round]  # empty unless the episode is audited
    traced: TracedRounds | None  # None unless traces are written
    right: bool


def make_jobs(specs: Sequence[Spec], betas: Sequence[float], cell: Cell, shuffles: int) -> list[Job]:
    """Return all jobs of one cell, in the order in which they are reported."""
    cuts = [*range(0, shuffles, SHUFFLES_A_JOB), shuffles]
    return [Job(spec, beta, cell, range(*cut)) for spec in specs for beta in betas for cut in pairwise(cuts)]


def run_job(job: Job, recordings: Sequence[Recording], rules: ReplayRules) -> JobResult:
    """Run every episode of `job`.

    Raises BranchCensored, SandboxUnavailable, TraceError if traces cannot be written, and MachineDisturbed if the
    machine kills or starves sandbox processes at every attempt.
    """
    with _rare_collections():
        return _run_job(job, recordings, rules)


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Let Python look for garbage rarely. Episodes leave none, but all their states live at the same time."""
    before = gc.get_threshold()
    gc.set_threshold(max(before[0], COLLECTED_EVERY), *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _run_job(job: Job, recordings: Sequence[Recording], rules: ReplayRules) -> JobResult:
    began = time.perf_counter()
    columns = None if rules.traces is None else RoundColumns(recordings[0].interval, rules.probe_tokens or 0)
    table = _JobRunner(job, recordings, rules, columns)
    played = retry_disturbed(table.play_sealed) if rules.seal(job.spec) else table.play_here()
    figures: list[list[int]] = []
    failures: list[EpisodeFailure] = []
    for (question, shuffle), outcome in zip(table.episodes, played, strict=True):
        figures.append(outcome.column)
        if outcome.failure is not None:
            failures.append(EpisodeFailure(question, shuffle, outcome.failure))
        if columns is not None and outcome.traced is not None:
            columns.add(outcome.traced, outcome.state, outcome.right)
    if columns is not None and rules.traces is not None:
        writer = TraceWriter(job.spec, job.beta, job.cell, recordings)
        writer.save(rules.traces, job.shuffles, columns.arrays())
    by_episode = np.array(figures, np.int64).reshape(len(job.shuffles), len(recordings), len(OUTCOME_COLUMNS))
    outcomes = np.ascontiguousarray(by_episode.transpose(2, 0, 1))
    return JobResult(outcomes, failures, time.perf_counter() - began)


def retry_disturbed(work: Callable[[], T]) -> T:
    """Do repeatable work, again if the machine disturbed it. Raises MachineDisturbed if all attempts fail."""
    for _ in range(TRIES - 1):
        with suppress(MachineDisturbed):
            return work()
    return work()


class _JobRunner:
    """Plays the episodes of a job: one after the other in this process, or together in sandbox processes."""

    def __init__(
        self, job: Job, recordings: Sequence[Recording], rules: ReplayRules, columns: RoundColumns | None = None
    ) -> None:
        self.episodes = [(question, shuffle) for shuffle in job.shuffles for question in range(len(recordings))]
        self._job = job
        self._recordings = recordings
        self._rules = rules
        self._columns = columns

    def play_here(self) -> Iterator[_EpisodeResult]:
        """Play every episode with the controller in this process, each as it is asked for: none is kept."""
        make_controller = partial(make, self._job.spec, self._job.beta)
        return (run_sync(self._play(make_controller, *episode)) for episode in self.episodes)

    def play_sealed(self) -> list[_EpisodeResult]:
        """Play every episode with the controller in sandbox processes, and audit some.

        An audited episode is played again, alone. If it then decides otherwise, or is late or dies twice, all episodes
        fail, because the controller depends on more than the episode. Which are audited is drawn anew by each call: a
        controller that could compute it would play only these honestly.
        """
        every = range(len(self.episodes))
        drawn = random.SystemRandom()
        count = max(MIN_AUDITED, len(every) // EPISODES_PER_AUDIT) if self._rules.is_audited else 0
        audited = drawn.sample(every, k=min(len(every), count))
        try:
            played = self._play_all(every, set(audited))
            fault = self._audit([at for at in audited if played[at].failure is None], played)
        except ControllerError as error:  # it does not load, or was killed while loading
            return [self._failed(str(error), question) for question, _ in self.episodes]
        if fault is None:
            return played
        return [
            result._replace(failure=result.failure or fault, column=_wrong(result.column), right=False)
            for result in played
        ]

    def _play_all(self, every: Sequence[int], kept: Set[int]) -> list[_EpisodeResult]:
        """Play all episodes; if a process was late or died, play them all again in a single process."""
        episodes = [self._sandboxed_episode(at, keep=at in kept) for at in every]
        try:
            played = self._together(episodes, SANDBOXES_PER_JOB)
        except BoundaryViolation as error:  # while loading
            if error.boundary not in SUDDEN:
                raise
        else:
            if not any(result.sudden for result in played):
                return played
        return self._together(episodes, 1)

    def _audit(self, audited: Sequence[int], played: Sequence[_EpisodeResult]) -> str | None:
        """Play episodes again as live requests would be: each alone in a new process, under a token limit.

        Returns what was different, or None.
        """
        again = self._together(
            [self._sandboxed_episode(at, keep=True, high_limits=True) for at in audited], len(audited), share=1
        )
        for at, second in zip(audited, again, strict=True):
            if second.sudden:
                (second,) = self._together([self._sandboxed_episode(at, keep=True, high_limits=True)], 1, share=1)
            question, shuffle = self.episodes[at]
            where = f"question {question}, shuffle {shuffle}: alone in its process, under a token limit,"
            if second.sudden:
                return f"{where} it failed twice: {second.failure}"
            if second.failure is not None:
                return f"{where} it decided otherwise: {second.failure}"
            actions = (
                [list(played_round.actions) for played_round in result.rounds] for result in (played[at], second)
            )
            if next(actions) != next(actions):
                return f"{where} it decided otherwise"
        return None

    def _together(
        self, episodes: Sequence[Episode[_EpisodeResult]], processes: int, share: int = EPISODES_PER_PROCESS
    ) -> list[_EpisodeResult]:
        """Run episodes in so many new sandbox processes, up to `share` at a time in each."""
        limits = Limits(1, max(self._limits(recording).max_branches for recording in self._recordings))
        return run_sandboxed(self._job.spec, self._job.beta, limits, episodes, processes, share)

    def _sandboxed_episode(self, at: int, keep: bool, high_limits: bool = False) -> Episode[_EpisodeResult]:
        return lambda remote: self._play(lambda: remote, *self.episodes[at], keep, high_limits)

    def _limits(self, recording: Recording, high_limits: bool = False) -> Limits:
        return _limits(
            recording.interval, min(self._rules.max_branches, recording.branches), recording.has_probes, high_limits
        )

    async def _play(
        self,
        make_controller: Callable[[], Controller | RemoteController],
        question: int,
        shuffle: int,
        keep: bool = False,
        high_limits: bool = False,
    ) -> _EpisodeResult:
        """Play one episode.

        With `keep`, keep its rounds even if no traces are written. With `high_limits`, set token limits that are never
        reached instead of none.
        """
        recording = self._recordings[question]
        environment = ReplayEnvironment(
            recording,
            branch_order(recording, shuffle),
            self._rules.probe_tokens,
            self._job.spec.signals & self._rules.signals,
        )
        state = State(self._limits(recording, high_limits))
        rounds: list[Round] = []
        traced = self._begin_trace(recording)
        on_round = None if traced is None else traced.add
        if keep:
            on_round = partial(_keep_round, rounds, on_round)
        failure, sudden = None, False
        try:
            controller = make_controller()
            if isinstance(controller, SuspendingController):
                await controller.rounds(environment, state, on_round)
            else:
                await run_episode(controller, environment, state, on_round)
        except ControllerError as error:
            failure = str(error)
            sudden = isinstance(error, BoundaryViolation) and error.boundary in SUDDEN
            state.end(Stop.CONTROLLER_ERROR)
        right = failure is None and environment.is_right(state.answer)
        ledger, votes = state.ledger(_reply_branch(state)), state.deciding_votes()
        column = [
            right,
            failure is not None,
            state.spent,
            state.rounds,
            state.width,
            environment.critical_path,
            *(ledger[kind] for kind in TOKEN_KINDS),
            sum(votes.values()),
            *own_and_next(votes, state.answer),
        ]
        return _EpisodeResult(column, failure, sudden, state, rounds, traced, right)

    def _begin_trace(self, recording: Recording) -> TracedRounds | None:
        return None if self._columns is None else self._columns.begin(recording.interval)

    def _failed(self, message: str, question: int) -> _EpisodeResult:
        """Return the result of an episode that never began."""
        recording = self._recordings[question]
        state = State(self._limits(recording))
        state.end(Stop.CONTROLLER_ERROR)
        return _EpisodeResult(
            _wrong([0] * len(OUTCOME_COLUMNS)), message, False, state, (), self._begin_trace(recording), False
        )


@lru_cache(maxsize=256)
def _limits(interval: int, branches: int, has_probes: bool, high_limits: bool) -> Limits:
    """Return the limits of an episode. They are the same for many, and are made once."""
    branch, cap = UNREACHABLE_LIMITS if high_limits else (None, None)
    return Limits(interval, branches, branch, max_tokens=cap, has_probes=has_probes, has_pauses=has_probes)


def _keep_round(
    rounds: list[Round], on_round: Callable[[State, Round], None] | None, state: State, played: Round
) -> None:
    """Keep a round, and pass it on to `on_round`."""
    rounds.append(played)
    if on_round is not None:
        on_round(state, played)


def _wrong(column: Sequence[int]) -> list[int]:
    """Return the figures of an episode that counts as failed; the tokens it spent are kept."""
    return [0, 1, *column[2:]]


def _reply_branch(state: State) -> int | None:
    """Return the branch whose text a client would receive: the shortest that finished with the answer."""
    agreeing = [i for i in state.finished if state.branches[i].label == state.answer and state.answer is not None]
    return min(agreeing, key=lambda i: state.branches[i].tokens, default=None)
