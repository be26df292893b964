"""Pool of worker processes that score controllers on recordings, which are mapped into memory once per search."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property, lru_cache
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType
from typing import Self

from controllers.loading import Spec
from discovery.data.mapped_recordings import load_mapped, write_mapped
from discovery.data.recordings import Cell, Recording
from discovery.errors import EngineError, RecordingsNotFound
from discovery.evaluation.afs import Anchor, Curve, chain_anchor, curves
from discovery.evaluation.replay_jobs import Job, JobResult, ReplayRules, run_job
from discovery.evaluation.scores import Score, gather_scores

DIED = "a worker process died"


@dataclass(frozen=True)
class TrialSettings:
    """How a controller is tried: the values of β, the questions of each cell, and the branch orders."""

    betas: Sequence[float]
    shuffles: range
    every: int = 1  # use every n-th question


class TrialPool:
    """Pool of worker processes on the recordings of some cells. Leaving its context ends the processes."""

    def __init__(
        self, cells: Mapping[Cell, Sequence[Recording]], rules: ReplayRules, workers: int | None = None
    ) -> None:
        if not cells:
            raise RecordingsNotFound("no recordings to try controllers on")
        self.cells = cells
        self.rules = rules
        self._workers = workers or len(os.sched_getaffinity(0))

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="autotts-")
        self._mapped = {
            cell: write_mapped(recordings, Path(self._folder.name, str(number)))
            for number, (cell, recordings) in enumerate(self.cells.items())
        }
        context = get_context("forkserver")
        context.set_forkserver_preload(["discovery.search.trial_pool"])
        self._pool = ProcessPoolExecutor(self._workers, mp_context=context)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._folder.cleanup()

    def anchors(self, trial: TrialSettings) -> Mapping[Cell, Anchor]:
        """Return the single-chain anchor of each cell, over the questions of a trial."""
        return {cell: chain_anchor(recordings[:: trial.every]) for cell, recordings in self.cells.items()}

    def submit(self, spec: Spec, trial: TrialSettings, rules: ReplayRules | None = None) -> PendingTrial:
        """Start trying a controller; the result is waited for when it is read. Raises EngineError."""
        cells = [cell for cell in self.cells for _ in trial.betas]
        jobs = [Job(spec, beta, cell, trial.shuffles) for cell in self.cells for beta in trial.betas]
        try:
            waiting = [
                self._pool.submit(_play, job, self._mapped[cell], trial.every, rules or self.rules)
                for job, cell in zip(jobs, cells, strict=True)
            ]
        except BrokenProcessPool:
            raise EngineError(DIED) from None
        return PendingTrial(jobs, waiting, self.anchors(trial))

    def measure(self, spec: Spec, trial: TrialSettings, rules: ReplayRules | None = None) -> list[Curve]:
        """Try a controller and return its curves, one per cell. Raises EngineError, SandboxUnavailable."""
        return self.submit(spec, trial, rules).curves()


class PendingTrial:
    """A trial that may still be running."""

    def __init__(
        self, jobs: Sequence[Job], waiting: Sequence[Future[JobResult]], anchors: Mapping[Cell, Anchor]
    ) -> None:
        self._jobs = jobs
        self._waiting = waiting
        self._anchors = anchors

    @cached_property
    def scores(self) -> list[Score]:
        """The scores, one per cell and β. Waits for the trial. Raises EngineError, SandboxUnavailable."""
        try:
            return list(
                gather_scores((job, future.result()) for job, future in zip(self._jobs, self._waiting, strict=True))
            )
        except BrokenProcessPool:
            raise EngineError(DIED) from None

    def curves(self) -> list[Curve]:
        """Return the scores as curves, one per cell. Waits for the trial. Raises EngineError, SandboxUnavailable."""
        return curves(self.scores, self._anchors)


def _play(job: Job, path: Path, every: int, rules: ReplayRules) -> JobResult:
    return run_job(job, _recordings(path)[::every], rules)


@lru_cache(maxsize=64)
def _recordings(path: Path) -> list[Recording]:
    return load_mapped(path)


def describe_failures(all_scores: Iterable[Score]) -> str:
    """Return the number of failed episodes and the first one's message; empty if none failed."""
    failed = [failure for score in all_scores for failure in score.failures]
    return f"{len(failed)} episodes failed: {failed[0].message}" if failed else ""
