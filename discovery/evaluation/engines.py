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

from discovery.data.mapped_file import shelve, take
from discovery.data.recordings import Recording
from discovery.errors import EngineError
from discovery.evaluation.replay_jobs import Job, Played, Rules, play


class EngineName(StrEnum):
    """What `--engine` may be."""

    LOCAL = "local"
    PROCESS = "process"
    RAY = "ray"


class Batch(NamedTuple):
    """Recordings, and the jobs to run on them."""

    recordings: Sequence[Recording]
    jobs: Sequence[Job]


Engine = Callable[[Iterable[Batch], Rules], Iterator[tuple[Job, Played]]]
"""Runs batches as they come and yields each job's outcome in the order of the jobs. One batch is read ahead at most.
Closing the iterator stops what is still to run."""


READ_AHEAD = 64
"""Jobs handed out before the first is waited for."""


def engine_called(name: EngineName, workers: int | None = None) -> Engine:
    """The engine called `name`; `workers` beside the local one are as many as there are cores if not said."""
    if name is EngineName.LOCAL:
        return _local
    count = workers or len(os.sched_getaffinity(0))
    if name is EngineName.PROCESS:
        return lambda batches, rules: _process(batches, rules, count)
    return lambda batches, rules: _ray(batches, rules, count)


def _local(batches: Iterable[Batch], rules: Rules) -> Iterator[tuple[Job, Played]]:
    for batch in batches:
        for job in batch.jobs:
            yield job, play(job, batch.recordings, rules)


def _process(batches: Iterable[Batch], rules: Rules, workers: int) -> Iterator[tuple[Job, Played]]:
    """A pool of fresh processes, forked from one that has imported what they need and runs no threads."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["discovery.evaluation.replay_jobs", "discovery.data.mapped_file"])
    with tempfile.TemporaryDirectory(prefix="autotts-") as folder:
        pool = ProcessPoolExecutor(workers, mp_context=context)
        pool.submit(os.getpid)  # the first worker starts while the first recordings are read
        try:
            yield from _in_order(
                (pool.submit(_play_shelved, job, path, rules), job)
                for number, batch in enumerate(batches)
                for path in [shelve(batch.recordings, Path(folder, str(number)))]
                for job in batch.jobs
            )
        except BrokenProcessPool:
            raise EngineError("a worker process died; --engine local shows at which controller") from None
        finally:
            pool.shutdown(cancel_futures=True)


def _play_shelved(job: Job, path: Path, rules: Rules) -> Played:
    return play(job, take(path), rules)


def _in_order(submitted: Iterator[tuple[Future[Played], Job]]) -> Iterator[tuple[Job, Played]]:
    """Outcomes in the order of submission, READ_AHEAD jobs being under way or waiting."""
    waiting = deque(islice(submitted, READ_AHEAD))
    while waiting:
        future, job = waiting.popleft()
        yield job, future.result()
        waiting.extend(islice(submitted, 1))


def _ray(batches: Iterable[Batch], rules: Rules, workers: int) -> Iterator[tuple[Job, Played]]:
    """Ray tasks; recordings lie in its object store, where workers of one machine map them."""
    try:
        import ray
    except ImportError:
        raise EngineError("--engine ray needs Ray: pip install 'autotts-proxy[ray]'") from None
    ours = not ray.is_initialized()
    if ours:
        ray.init(num_cpus=workers, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    try:
        remote = ray.remote(play)
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
