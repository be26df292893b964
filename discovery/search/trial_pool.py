"""Pool of workers that score controllers on recordings, which they share for the whole search."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Final, Self

from controllers.loading import Spec
from discovery.data.recordings import Cell, Recording
from discovery.errors import RecordingsNotFound
from discovery.evaluation.afs import Anchor, Curve, chain_anchor, curves
from discovery.evaluation.engines import JobPool, ProcessJobPool
from discovery.evaluation.replay_jobs import Job, JobResult, ReplayRules
from discovery.evaluation.scores import Score, gather_scores

KEPT_CELLS: Final = 64
"""Cells whose recordings a worker keeps loaded."""


@dataclass(frozen=True)
class TrialSettings:
    """How a controller is tried: the values of β, the questions of each cell, and the branch orders."""

    betas: Sequence[float]
    shuffles: range
    every: int = 1  # use every n-th question


class TrialAnchors:
    """Single-chain anchors of some cells over the questions of a trial; they are computed once."""

    def __init__(self, cells: Mapping[Cell, Sequence[Recording]]) -> None:
        self._cells = cells
        self._known: dict[int, Mapping[Cell, Anchor]] = {}

    def of(self, trial: TrialSettings) -> Mapping[Cell, Anchor]:
        """Return the anchor of each cell."""
        if trial.every not in self._known:
            self._known[trial.every] = {
                cell: chain_anchor(recordings[:: trial.every]) for cell, recordings in self._cells.items()
            }
        return self._known[trial.every]


def can_be_probed(cells: Mapping[Cell, Sequence[Recording]]) -> bool:
    """Return whether all branches can be probed. Whole replies cannot."""
    return all(recording.has_probes for recordings in cells.values() for recording in recordings)


class TrialPool:
    """Pool of workers on the recordings of some cells. Leaving its context ends them.

    They are the workers of `pool`, by default `workers` processes.
    """

    def __init__(
        self,
        cells: Mapping[Cell, Sequence[Recording]],
        rules: ReplayRules,
        workers: int | None = None,
        pool: JobPool | None = None,
    ) -> None:
        if not cells:
            raise RecordingsNotFound("no recordings to try controllers on")
        self.cells = cells
        self.rules = rules
        self._anchors = TrialAnchors(cells)
        self._pool = pool or ProcessJobPool(workers, KEPT_CELLS)

    @property
    def has_probes(self) -> bool:
        """Whether all branches can be probed."""
        return can_be_probed(self.cells)

    def __enter__(self) -> Self:
        self._pool.__enter__()
        self.shared = {cell: self._pool.share(recordings) for cell, recordings in self.cells.items()}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.__exit__(kind, error, at)

    def submit(
        self, spec: Spec, trial: TrialSettings, rules: ReplayRules | None = None, earlier: PendingTrial | None = None
    ) -> PendingTrial:
        """Start trying a controller; the result is waited for when it is read. Raises EngineError.

        `earlier` is a trial that differs only in that it has fewer branch orders: the others are played and added.
        """
        orders = trial.shuffles if earlier is None else trial.shuffles[earlier.orders :]
        jobs = [Job(spec, beta, cell, orders) for cell in self.cells for beta in trial.betas]
        waiting = [self.shared[job.cell](job, rules or self.rules, trial.every) for job in jobs]
        pending = PendingTrial(jobs, waiting, self._anchors.of(trial))
        return pending if earlier is None else earlier.extended(pending)

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

    @property
    def orders(self) -> int:
        """Number of branch orders."""
        return max(job.shuffles.stop for job in self._jobs)

    def extended(self, further: PendingTrial) -> PendingTrial:
        """Return this trial together with one of the same controller under the branch orders that follow."""
        pairs = [*zip(self._jobs, self._waiting, strict=True), *zip(further._jobs, further._waiting, strict=True)]
        place = {(job.cell, job.beta): at for at, job in enumerate(further._jobs)}
        pairs.sort(key=lambda pair: (place[pair[0].cell, pair[0].beta], pair[0].shuffles.start))
        return PendingTrial([job for job, _ in pairs], [future for _, future in pairs], self._anchors)

    @cached_property
    def scores(self) -> list[Score]:
        """The scores, one per cell and β. Waits for the trial. Raises EngineError, SandboxUnavailable."""
        return list(
            gather_scores((job, future.result()) for job, future in zip(self._jobs, self._waiting, strict=True))
        )

    def curves(self) -> list[Curve]:
        """Return the scores as curves, one per cell. Waits for the trial. Raises EngineError, SandboxUnavailable."""
        return curves(self.scores, self._anchors)


def describe_failures(all_scores: Iterable[Score]) -> str:
    """Return the number of failed episodes and the first one's message; empty if none failed."""
    failed = [failure for score in all_scores for failure in score.failures]
    return f"{len(failed)} episodes failed: {failed[0].message}" if failed else ""


def recording_width_warnings(cells: Mapping[Cell, Sequence[Recording]], max_branches: int) -> list[str]:
    """Return a line for each cell whose recordings have fewer branches than controllers may open."""
    recorded = {cell: min(recording.branches for recording in recordings) for cell, recordings in cells.items()}
    return [
        f"{' '.join(cell)}: only {branches} branches are recorded, {max_branches} are allowed: "
        f"candidates that open more are scored with {branches}"
        for cell, branches in recorded.items()
        if branches < max_branches
    ]
