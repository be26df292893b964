"""Who runs the jobs: this process, a pool of processes, or Ray. What comes out is the same."""

from __future__ import annotations

import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from enum import StrEnum
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from discovery.data.mapped_recordings import load_mapped, write_mapped
from discovery.data.recordings import Recording
from discovery.errors import EngineError
from discovery.evaluation.replay_jobs import Job, JobResult, ReplayRules, run_job


class EngineName(StrEnum):
    """What `--engine` may be."""

    LOCAL = "local"
    PROCESS = "process"
    RAY = "ray"


class RecordingBatch(NamedTuple):
    """Recordings, and the jobs to run on them."""

    recordings: Sequence[Recording]
    jobs: Sequence[Job]


Engine = Callable[[Iterable[RecordingBatch], ReplayRules], Iterator[tuple[Job, JobResult]]]
"""Runs batches as they come and yields each job's outcome in the order of the jobs. One batch is read ahead at most.
Closing the iterator stops what is still to run."""


READ_AHEAD = 64
"""Jobs handed out before the first is waited for."""


def make_engine(name: EngineName, workers: int | None = None) -> Engine:
    """The engine called `name`; `workers` beside the local one are as many as there are cores if not said."""
    if name is EngineName.LOCAL:
        return _local
    count = workers or len(os.sched_getaffinity(0))
    if name is EngineName.PROCESS:
        return lambda batches, rules: _process(batches, rules, count)
    return lambda batches, rules: _ray(batches, rules, count)


def _local(batches: Iterable[RecordingBatch], rules: ReplayRules) -> Iterator[tuple[Job, JobResult]]:
    for batch in batches:
        for job in batch.jobs:
            yield job, run_job(job, batch.recordings, rules)


def _process(batches: Iterable[RecordingBatch], rules: ReplayRules, workers: int) -> Iterator[tuple[Job, JobResult]]:
    """A pool of fresh processes, forked from one that has imported what they need and runs no threads."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["discovery.evaluation.replay_jobs", "discovery.data.mapped_recordings"])
    with tempfile.TemporaryDirectory(prefix="autotts-") as folder:
        pool = ProcessPoolExecutor(workers, mp_context=context)
        pool.submit(os.getpid)  # the first worker starts while the first recordings are read
        try:
            yield from _in_order(
                (pool.submit(_play_shelved, job, path, rules), job)
                for number, batch in enumerate(batches)
                for path in [write_mapped(batch.recordings, Path(folder, str(number)))]
                for job in batch.jobs
            )
        except BrokenProcessPool:
            raise EngineError("a worker process died; --engine local shows at which controller") from None
        finally:
            pool.shutdown(cancel_futures=True)


def _play_shelved(job: Job, path: Path, rules: ReplayRules) -> JobResult:
    return run_job(job, load_mapped(path), rules)


def _in_order(submitted: Iterator[tuple[Future[JobResult], Job]]) -> Iterator[tuple[Job, JobResult]]:
    """Outcomes in the order of submission, READ_AHEAD jobs being under way or waiting."""
    waiting = deque(islice(submitted, READ_AHEAD))
    while waiting:
        future, job = waiting.popleft()
        yield job, future.result()
        waiting.extend(islice(submitted, 1))


def _ray(batches: Iterable[RecordingBatch], rules: ReplayRules, workers: int) -> Iterator[tuple[Job, JobResult]]:
    """Ray tasks; recordings lie in its object store, where workers of one machine map them."""
    try:
        import ray
    except ImportError:
        raise EngineError("--engine ray needs Ray: pip install 'autotts-proxy[ray]'") from None
    ours = not ray.is_initialized()
    if ours:
        ray.init(num_cpus=workers, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    try:
        remote = ray.remote(run_job)
        submitted = (
            (remote.remote(job, shelf, rules).future(), job)
            for batch in batches
            for shelf in [ray.put(list(batch.recordings))]
            for job in batch.jobs
        )
        yield from _in_order(submitted)
    finally:
        if ours:
            ray.shutdown()
