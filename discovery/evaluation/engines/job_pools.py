"""Pools of workers that run replay jobs, and the pool of processes of this machine."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, TypeVar

from discovery.data.mapped_recordings import load_mapped, write_mapped
from discovery.data.recordings import Recording
from discovery.errors import WorkerDied
from discovery.evaluation.replay_jobs import Job, JobResult, ReplayRules, run_job
from discovery.worker_pool import cores, make_worker_pool, translate_errors

K = TypeVar("K")

Submit = Callable[[Job, ReplayRules, int], Future[JobResult]]
"""Starts a job on every n-th of the shared recordings. The future raises the errors of `run_job`, and EngineError.

Starting raises EngineError.
"""


class JobPool(Protocol):
    """Workers that run jobs on recordings they share. They run within the pool's context."""

    @property
    def workers(self) -> int:
        """Number of jobs that run at the same time."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None: ...

    def share(self, recordings: Sequence[Recording]) -> Submit:
        """Make recordings known to all workers, without a copy for each, and return the function that starts jobs."""


class ProcessJobPool:
    """Pool of processes of this machine, which map the recordings into memory."""

    def __init__(self, workers: int | None = None, kept: int = 2) -> None:
        self.workers = workers or cores()
        self._kept = kept  # sets of recordings that a worker keeps loaded
        self._numbers = itertools.count()

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="autotts-")
        self._pool = make_worker_pool(self.workers, [__name__])
        self._pool.submit(os.getpid)  # the first worker starts while the first recordings are read
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._folder.cleanup()

    def share(self, recordings: Sequence[Recording]) -> Submit:
        """Write the recordings to a file, and return the function that starts jobs on them."""
        return partial(self._submit, write_mapped(recordings, Path(self._folder.name, str(next(self._numbers)))))

    def _submit(self, path: Path, job: Job, rules: ReplayRules, every: int) -> Future[JobResult]:
        try:
            future = self._pool.submit(_run_mapped, job, path, rules, every, self._kept)
        except BrokenProcessPool:
            raise WorkerDied("a worker process died") from None
        return translate_errors(future, _explain)


def _explain(error: BaseException) -> BaseException:
    return WorkerDied("a worker process died") if isinstance(error, BrokenProcessPool) else error


def _run_mapped(job: Job, path: Path, rules: ReplayRules, every: int, kept: int) -> JobResult:
    return run_job(job, keep_loaded(path, load_mapped, kept)[::every], rules)


_loaded: OrderedDict[object, Sequence[Recording]] = OrderedDict()


def keep_loaded(key: K, load: Callable[[K], Sequence[Recording]], most: int) -> Sequence[Recording]:
    """Return the recordings that `load` returns for `key`. The `most` latest stay loaded."""
    if key not in _loaded:
        _loaded[key] = load(key)
    _loaded.move_to_end(key)
    while len(_loaded) > most:
        _loaded.popitem(last=False)
    return _loaded[key]
