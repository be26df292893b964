"""Ray workers in which the kernel tries policies on recordings that a pool of trials has put into the object store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from controllers.loading import Spec
from discovery.data.recordings import Recording
from discovery.errors import EngineError
from discovery.evaluation.engines import RaySubmit
from discovery.evaluation.replay_jobs import Job, JobResult, ReplayRules
from discovery.ray_cluster import RETRIES, check_code, code_digest, future_of
from discovery.search.kernel.kernel_pool import Kernel, KernelCell, PlayedCell, play_timed
from discovery.search.kernel.records import Records
from discovery.search.trial_pool import KEPT_CELLS, PendingTrial, TrialAnchors, TrialPool, TrialSettings


class RayKernel(Kernel):
    """The kernel in the workers of a pool of trials on Ray, on the same recordings. Every worker compiles it."""

    def __init__(self, trials: TrialPool, rules: ReplayRules) -> None:
        import ray

        self._references = {cell: _reference(submit) for cell, submit in trials.shared.items()}
        self._anchors = TrialAnchors(trials.cells)
        self._rules = rules
        self._task: Any = ray.remote(max_retries=RETRIES)(_play_all)

    def _submit(
        self, spec: Spec, trial: TrialSettings, numbers: Records, play: Callable[..., PlayedCell]
    ) -> PendingTrial:
        """Start a task for each cell, which plays all values of β."""
        jobs, waiting = [], []
        for cell, reference in self._references.items():
            jobs += [Job(spec, beta, cell, trial.shuffles) for beta in trial.betas]
            task = self._task.options(num_returns=len(trial.betas))
            results = task.remote(code_digest(), [reference], self._rules, play, numbers, trial)
            waiting += [future_of(result) for result in (results if len(trial.betas) > 1 else [results])]
        return PendingTrial(jobs, waiting, self._anchors.of(trial))


def _reference(submit: object) -> Any:
    if not isinstance(submit, RaySubmit):
        raise EngineError("the kernel can only use Ray's workers on trials that run there")
    return submit.reference


def _play_all(
    digest: str,
    shared: Sequence[Any],
    rules: ReplayRules,
    play: Callable[..., PlayedCell],
    numbers: Records,
    trial: TrialSettings,
) -> list[JobResult] | JobResult:
    """Play a policy at all values of β in a task. A single result is not in a list, as Ray wants it."""
    check_code(digest)
    cell, numbers = _cell(shared[0], rules), numbers.copy()  # Ray makes arrays read-only, which would be compiled anew
    results = [play_timed(play, cell, numbers[at : at + 1], trial) for at in range(len(trial.betas))]
    return results if len(results) > 1 else results[0]


@lru_cache(maxsize=KEPT_CELLS)
def _cell(reference: Any, rules: ReplayRules) -> KernelCell:
    import ray

    recordings: Sequence[Recording] = ray.get(reference)
    return KernelCell(recordings, rules)
