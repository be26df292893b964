"""Pool of threads in which the kernel tries policies. It gives the outcomes that the runner gives for their files."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Final, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from controllers.dial import MOST_CHAINS
from controllers.loading import Spec
from discovery.data.recordings import Cell, Recording
from discovery.evaluation.replay_jobs import OUTCOME_COLUMNS, Job, JobResult, ReplayRules
from discovery.search.explorers import Candidate
from discovery.search.explorers.classics import CLASSICS
from discovery.search.explorers.controller_writer import emit
from discovery.search.explorers.genome import Genome
from discovery.search.kernel.cell_records import CellRecords, branch_orders, cell_records
from discovery.search.kernel.episode import play
from discovery.search.kernel.policies import is_playable, policy_records, wave_records
from discovery.search.kernel.records import CHAIN, EPISODE, PLACE, POLICY, Records
from discovery.search.kernel.vote_tables import vote_tables
from discovery.search.kernel.waves import play_waves
from discovery.search.trial_pool import PendingTrial, TrialAnchors, TrialSettings
from discovery.worker_pool import cores

REFERENCE: Final = "adaptive_consistency"
MOST_WAVES: Final = MOST_CHAINS.bit_length()
"""Most waves of an episode of it: each is twice as large as the one before."""


class PlayedCell(NamedTuple):
    """Results of some policies on a cell."""

    outcomes: NDArray[np.int64]  # (policies, columns, shuffles, questions)
    answers: NDArray[np.int64]  # (policies, shuffles, questions) number of the answer in its recording; -1 for none


class KernelCell:
    """Recordings of one cell, ready for the kernel. Raises BranchCensored if one is not complete."""

    def __init__(self, recordings: Sequence[Recording], rules: ReplayRules) -> None:
        self._recordings = recordings
        self._records: CellRecords = cell_records(recordings, rules)
        self._answers = max(len(recording.answers) for recording in recordings)
        self._orders: dict[range, NDArray[np.int64]] = {}

    def orders(self, shuffles: range) -> NDArray[np.int64]:
        """Return the orders of branches under some shuffles; they are computed once."""
        if shuffles not in self._orders:
            self._orders[shuffles] = branch_orders(self._recordings, shuffles)
        return self._orders[shuffles]

    def play(self, policies: Records, shuffles: range, every: int = 1) -> PlayedCell:
        """Play every n-th question under all policies and shuffles. Several threads may do so at the same time."""
        played = self._blank(len(policies), shuffles, every)
        play(policies, *self._records, vote_tables(), every, self.orders(shuffles), *self._workspace(), *played)
        return played

    def play_waves(self, waves: Records, shuffles: range, every: int = 1) -> PlayedCell:
        """Play every n-th question with `adaptive_consistency` under all shuffles."""
        played = self._blank(len(waves), shuffles, every)
        decisions = np.zeros((MOST_WAVES, *[MOST_CHAINS + 1] * 3), np.int8)
        plain, orders = np.zeros(1, POLICY), self.orders(shuffles)
        play_waves(waves, plain, *self._records, every, orders, *self._workspace(), decisions, *played)
        return played

    def _blank(self, policies: int, shuffles: range, every: int) -> PlayedCell:
        episodes = len(shuffles), len(self._recordings[::every])
        return PlayedCell(
            np.zeros((policies, len(OUTCOME_COLUMNS), *episodes), np.int64), np.zeros((policies, *episodes), np.int64)
        )

    def _workspace(self) -> tuple[Records, Records, Records]:
        return np.zeros(1, EPISODE), np.zeros(MOST_CHAINS, CHAIN), np.zeros(self._answers, PLACE)


class Kernel(ABC):
    """Workers in which the kernel tries policies on the recordings of some cells."""

    def submit(self, spec: Spec, genome: Genome, trial: TrialSettings) -> PendingTrial:
        """Start trying a playable genome, whose controller file is `spec`."""
        return self._submit(spec, trial, policy_records(genome, trial.betas), KernelCell.play)

    def submit_reference(self, trial: TrialSettings) -> PendingTrial:
        """Start trying `adaptive_consistency`."""
        return self._submit(Spec(REFERENCE), trial, wave_records(trial.betas), KernelCell.play_waves)

    @abstractmethod
    def _submit(
        self, spec: Spec, trial: TrialSettings, numbers: Records, play: Callable[..., PlayedCell]
    ) -> PendingTrial:
        """Start trying a policy, one record for each value of β, on every cell."""


class KernelPool(Kernel):
    """Pool of threads on the recordings of some cells. Leaving its context ends the threads."""

    def __init__(
        self, cells: Mapping[Cell, Sequence[Recording]], rules: ReplayRules, workers: int | None = None
    ) -> None:
        self._cells = {cell: KernelCell(recordings, rules) for cell, recordings in cells.items()}
        self._anchors = TrialAnchors(cells)
        self._workers = workers or cores()

    def __enter__(self) -> Self:
        self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="kernel")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _submit(
        self, spec: Spec, trial: TrialSettings, numbers: Records, play: Callable[..., PlayedCell]
    ) -> PendingTrial:
        jobs = [Job(spec, beta, cell, trial.shuffles) for cell in self._cells for beta in trial.betas]
        waiting = [
            self._pool.submit(play_timed, play, own, numbers[at : at + 1], trial)
            for own in self._cells.values()
            for at in range(len(trial.betas))
        ]
        return PendingTrial(jobs, waiting, self._anchors.of(trial))


class KernelRunner:
    """The kernel on the search split and on synthetic recordings, as the cascade uses it."""

    def __init__(self, arena: Kernel, probes: Kernel) -> None:
        self.arena = arena
        self.probes = probes
        self._playable: dict[str, bool] = {}  # by digest

    def compile(self) -> None:
        """Compile the kernel, or read it from the cache on disk, so that no time limit of the search includes it."""
        genome, trial = CLASSICS[0], TrialSettings((0.0,), range(1))
        for pending in (
            self.probes.submit(Spec("classic", emit(genome)), genome, trial),
            self.probes.submit_reference(trial),
        ):
            list(pending.scores)

    def plays(self, candidate: Candidate) -> bool:
        """Return whether a candidate is the unchanged file of a genome that the kernel can play."""
        if candidate.digest not in self._playable:
            genome = candidate.genome
            self._playable[candidate.digest] = is_playable(genome) and emit(genome) == candidate.source
        return self._playable[candidate.digest]


def play_timed(play: Callable[..., PlayedCell], cell: KernelCell, numbers: Records, trial: TrialSettings) -> JobResult:
    """Play one policy in a trial on a cell."""
    began = time.perf_counter()
    played = play(cell, numbers, trial.shuffles, trial.every)
    return JobResult(played.outcomes[0], [], time.perf_counter() - began)
