"""Pool of Ray workers that run replay jobs. Recordings are put once into Ray's object store.

Nodes map what is in their store into memory, so no task carries recordings. Ray runs a job again whose worker or node
was lost. Files of traces are returned with the result, because nodes need not share folders.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from discovery.data.atomic_files import atomic_write
from discovery.data.recordings import Recording
from discovery.errors import TraceError
from discovery.evaluation.engines.job_pools import Submit, keep_loaded
from discovery.evaluation.replay_jobs import Job, JobResult, ReplayRules, run_job
from discovery.ray_cluster import RETRIES, check_code, code_digest, future_of, ray_connection
from discovery.worker_pool import cores


class _TaskResult(NamedTuple):
    """Result of a job and the files of its traces, by their paths below the folder of traces."""

    result: JobResult
    traces: dict[Path, bytes]


class RayJobPool:
    """Pool of the workers of the Ray cluster at `address`, or of so many workers of a local one."""

    def __init__(self, address: str | None, workers: int | None = None, kept: int = 2) -> None:
        self.workers = workers or cores()
        self._address = address
        self._kept = kept  # sets of recordings that a worker keeps loaded

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.workers = stack.enter_context(ray_connection(self._address, self.workers))
            import ray

            self._task: Any = ray.remote(_run_shared).options(max_retries=RETRIES)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def share(self, recordings: Sequence[Recording]) -> Submit:
        """Put the recordings into the object store, and return the function that starts jobs on them."""
        import ray

        return RaySubmit(self._task, ray.put(list(recordings)), self._kept)


class RaySubmit:
    """Starts jobs on recordings that are in Ray's object store, under `reference`."""

    def __init__(self, task: Any, reference: Any, kept: int) -> None:
        self.reference = reference
        self._task = task
        self._kept = kept

    def __call__(self, job: Job, rules: ReplayRules, every: int) -> Future[JobResult]:
        """Start a job on every n-th of the recordings."""
        future = future_of(self._task.remote(code_digest(), job, [self.reference], rules, every, self._kept))
        result: Future[JobResult] = Future()
        future.add_done_callback(partial(_receive, result, rules.traces))
        return result


def _run_shared(digest: str, job: Job, shared: Sequence[Any], rules: ReplayRules, every: int, kept: int) -> _TaskResult:
    """Run a job in a task. `shared` holds one reference, in a list so that Ray does not load it for every task."""
    import ray

    check_code(digest)
    recordings = keep_loaded(shared[0], ray.get, kept)[::every]
    if rules.traces is None:
        return _TaskResult(run_job(job, recordings, rules), {})
    with tempfile.TemporaryDirectory(prefix="autotts-") as name:
        folder = Path(name)
        result = run_job(job, recordings, replace(rules, traces=folder))
        written = [path for path in folder.rglob("*") if path.is_file()]
        return _TaskResult(result, {path.relative_to(folder): path.read_bytes() for path in written})


def _receive(result: Future[JobResult], folder: Path | None, ended: Future[_TaskResult]) -> None:
    """Write the traces of a task that has ended, and set the result, as a copy that leaves the object store."""
    if ended.cancelled():
        result.cancel()
        return
    try:
        played, traces = ended.result()
        if folder is not None:
            _write_traces(folder, traces)
        result.set_result(replace(played, outcomes=played.outcomes.copy()))
    except BaseException as error:  # whatever it is, it belongs to the reader of the result, not to this thread
        result.set_exception(error)


def _write_traces(folder: Path, traces: dict[Path, bytes]) -> None:
    """Write files of traces below `folder`. Raises FileWriteError and TraceError."""
    for path, content in traces.items():
        target = folder / path
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TraceError(f"{target.parent}: {error.strerror}") from None
        with atomic_write(target) as file:
            file.write(content)
