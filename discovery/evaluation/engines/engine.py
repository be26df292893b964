"""Engines that run evaluation jobs: this process, a pool of processes, or Ray. All give the same results."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from enum import StrEnum
from itertools import islice
from typing import Final, NamedTuple

from discovery.data.recordings import Recording
from discovery.errors import EngineError, WorkerDied
from discovery.evaluation.engines.job_pools import JobPool, ProcessJobPool
from discovery.evaluation.engines.ray_jobs import RayJobPool
from discovery.evaluation.replay_jobs import Job, JobResult, ReplayRules, run_job


class EngineName(StrEnum):
    """Values of `--engine`."""

    LOCAL = "local"
    PROCESS = "process"
    RAY = "ray"


class RecordingBatch(NamedTuple):
    """Recordings, and the jobs to run on them."""

    recordings: Sequence[Recording]
    jobs: Sequence[Job]


Engine = Callable[[Iterable[RecordingBatch], ReplayRules], Iterator[tuple[Job, JobResult]]]
"""Runs batches and yields the results in the order of the jobs. It reads at most one batch ahead.

Closing the iterator stops jobs that have not run yet.
"""


READ_AHEAD: Final = 64
"""Least number of jobs submitted before the first result is awaited."""
PER_WORKER: Final = 4
"""Jobs submitted ahead per worker, if that is more."""


def make_engine(name: EngineName, workers: int | None = None, address: str | None = None) -> Engine:
    """Return the engine called `name`. Engines other than the local one use `workers`, by default one per core.

    Ray runs jobs on the workers of the cluster at `address`, if one is given.
    """
    if name is EngineName.LOCAL:
        return _local
    return lambda batches, rules: _pooled(batches, rules, make_job_pool(name, workers, address))


def make_job_pool(name: EngineName, workers: int | None = None, address: str | None = None, kept: int = 2) -> JobPool:
    """Return the pool of an engine that is not local. Its workers keep so many sets of recordings loaded."""
    return RayJobPool(address, workers, kept) if name is EngineName.RAY else ProcessJobPool(workers, kept)


def _local(batches: Iterable[RecordingBatch], rules: ReplayRules) -> Iterator[tuple[Job, JobResult]]:
    for batch in batches:
        for job in batch.jobs:
            yield job, run_job(job, batch.recordings, rules)


def _pooled(batches: Iterable[RecordingBatch], rules: ReplayRules, pool: JobPool) -> Iterator[tuple[Job, JobResult]]:
    """Run jobs in a pool of workers."""
    with pool:
        submitted = (
            (submit(job, rules, 1), job)
            for batch in batches
            for submit in [pool.share(batch.recordings)]
            for job in batch.jobs
        )
        try:
            yield from _in_order(submitted, max(READ_AHEAD, PER_WORKER * pool.workers))
        except WorkerDied as error:
            raise EngineError(f"{error}; run with --engine local to see at which controller") from None


def _in_order(submitted: Iterator[tuple[Future[JobResult], Job]], ahead: int) -> Iterator[tuple[Job, JobResult]]:
    """Yield results in the order of submission, with up to `ahead` jobs running or waiting."""
    waiting = deque(islice(submitted, ahead))
    while waiting:
        future, job = waiting.popleft()
        yield job, future.result()
        waiting.extend(islice(submitted, 1))
