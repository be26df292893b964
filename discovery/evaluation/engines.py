"""Engines that run evaluation jobs: this process, a pool of processes, or Ray. All give the same results."""

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


READ_AHEAD = 64
"""Jobs submitted before the first result is awaited."""


def make_engine(name: EngineName, workers: int | None = None) -> Engine:
    """Return the engine called `name`. Engines other than the local one use `workers`, by default one per core."""
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
    """Run jobs in a pool of fresh processes, forked from one that has imported what they need and runs no threads."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["discovery.evaluation.replay_jobs", "discovery.data.mapped_recordings"])
    with tempfile.TemporaryDirectory(prefix="autotts-") as folder:
        pool = ProcessPoolExecutor(workers, mp_context=context)
        pool.submit(os.getpid)  # the first worker starts while the first recordings are read
        try:
            yield from _in_order(
                (pool.submit(_run_mapped, job, path, rules), job)
                for number, batch in enumerate(batches)
                for path in [write_mapped(batch.recordings, Path(folder, str(number)))]
                for job in batch.jobs
            )
        except BrokenProcessPool:
            raise EngineError("a worker process died; run with --engine local to see at which controller") from None
        finally:
            pool.shutdown(cancel_futures=True)


def _run_mapped(job: Job, path: Path, rules: ReplayRules) -> JobResult:
    return run_job(job, load_mapped(path), rules)


def _in_order(submitted: Iterator[tuple[Future[JobResult], Job]]) -> Iterator[tuple[Job, JobResult]]:
    """Yield results in the order of submission, with up to READ_AHEAD jobs running or waiting."""
    waiting = deque(islice(submitted, READ_AHEAD))
    while waiting:
        future, job = waiting.popleft()
        yield job, future.result()
        waiting.extend(islice(submitted, 1))


def _ray(batches: Iterable[RecordingBatch], rules: ReplayRules, workers: int) -> Iterator[tuple[Job, JobResult]]:
    """Run jobs as Ray tasks. Recordings are in Ray's object store, which workers of one machine map into memory."""
    try:
        import ray
    except ImportError:
        raise EngineError("--engine ray needs Ray: pip install 'autotts-proxy[ray]'") from None
    is_own = not ray.is_initialized()
    if is_own:
        ray.init(num_cpus=workers, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    try:
        remote = ray.remote(run_job)
        submitted = (
            (remote.remote(job, recordings, rules).future(), job)
            for batch in batches
            for recordings in [ray.put(list(batch.recordings))]
            for job in batch.jobs
        )
        yield from _in_order(submitted)
    finally:
        if is_own:
            ray.shutdown()
