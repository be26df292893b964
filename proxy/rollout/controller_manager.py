"""Choose the controller of each request, and remove controllers that fail, cost too much or do worse.

A controller that fails three times in five minutes, or costs far more than its calibration, is quarantined. A canary
that does worse than the champion is rolled back.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, Final

from controllers import ControllerError, MachineDisturbed, SandboxUnavailable, State, UnknownController
from controllers.builtin import BUILT_IN, find
from controllers.loading import Spec, discovered, parse_spec
from controllers.rollout_state import RolloutStage, RolloutState
from controllers.sandbox.proof import SandboxLevel
from discovery.evaluation.calibration import Calibrations
from discovery.promotion.registry import ChangeCause, Registry
from proxy.rollout.canary_test import CanaryFailure, CanaryTest, EpisodeOutcome
from proxy.rollout.cost_test import CostTest
from proxy.rollout.failure_counter import QUARANTINED, FailureCounter, fallback_reason
from proxy.rollout.sandboxes import Sandboxes
from proxy.rollout.shadow import DecidedEpisode, compare_decisions
from proxy.rollout.stages import RolloutStages, StageAssignment
from proxy.rollout.timed_controller import timed
from proxy.settings import Settings
from proxy.telemetry.metrics import Metrics, controller_label
from proxy.types import ChosenController

logger = logging.getLogger(__name__)

STOPPED: Final = "the controller has been quarantined"
"""Error message for episodes whose controller is stopped."""
SHADOWS: Final = 2
"""Maximum number of episodes that a shadow compares concurrently. Episodes beyond that are skipped."""


class ControllerManager:
    """The controllers of one proxy."""

    def __init__(self, settings: Settings, metrics: Metrics, calibrations: Calibrations = MappingProxyType({})) -> None:
        self.default = parse_spec(settings.controller)
        self.stages = RolloutStages(
            None if settings.registry is None else Registry(settings.registry), self.default, settings.registry_poll_s
        )
        self.sandboxes = Sandboxes(
            metrics, decision_s=settings.decision_s, allow_unsandboxed=settings.allow_unsandboxed
        )
        self.quarantined: set[str] = set()  # digests
        self.metrics = metrics
        self._shipped = {name: parse_spec(name) for name in discovered()}  # discovered controllers of this project
        self._pool_size = settings.sandbox_pool
        self._failures = FailureCounter()
        self._assigned = self.stages.current  # as of the last call of _follow_stages
        self._canary_test = CanaryTest()
        self._cost_test = CostTest(calibrations)
        self._shadow_tasks: set[asyncio.Task[None]] = set()
        self._registry_tasks: set[asyncio.Task[None]] = set()

    async def choose(self, name: str | None, request_id: str) -> ChosenController:
        """Return the controller of a request. `name` is the one that the request names. Raises UnknownController."""
        if await self.stages.refresh():
            self._follow_stages()
        return self.stages.current.choose(request_id) if name is None else ChosenController(self.find(name), None)

    def find(self, name: str) -> Spec:
        """Return the controller that a request names. Raises UnknownController."""
        now = self.stages.current
        staged = {spec.name: spec for spec in (self.default, now.canary, now.champion) if spec is not None}
        known = {**self._shipped, **staged}
        if name in known:
            return known[name]
        try:
            find(name)
        except UnknownController as error:
            if name.partition("@")[0] in BUILT_IN:
                raise
            foreign = [spec.name for spec in known.values() if spec.is_foreign]
            raise UnknownController(", ".join([str(error), *foreign])) from None
        return Spec(name)

    async def open(self) -> None:
        """Check the sandbox, read the rollout stages, and start processes for the controllers in use."""
        await self.sandboxes.check()
        await self.stages.refresh()
        self._follow_stages()

    async def close(self) -> None:
        """Write pending changes to the registry, then end every sandbox process."""
        for task in self._shadow_tasks:
            task.cancel()
        await asyncio.gather(*self._shadow_tasks, *self._registry_tasks, return_exceptions=True)
        await self.sandboxes.close()

    # Observe

    def record_failure(self, spec: Spec, error: ControllerError) -> None:
        """Count a failure of a controller, and quarantine it after too many."""
        reason = self._failures.record(spec.digest, error)
        if reason is not None and spec.digest not in self.quarantined:
            logger.error(
                "controller %s (%s) is quarantined: %s; requests get another controller",
                *(spec.name, spec.digest[:12], reason),
            )
            self._quarantine(spec, reason)

    def record_episode(self, choice: ChosenController, outcome: EpisodeOutcome) -> None:
        """Record the outcome of an episode. Rolls the canary back once it has proved worse than the champion."""
        spec, stage = choice
        if stage is None:
            return
        self.metrics.stage_requests.labels(stage, controller_label(spec.name)).inc()
        canary = self._assigned.canary
        if canary is None or self._assigned.at(stage) != spec:  # no canary, or the stages changed meanwhile
            return
        failure = self._canary_test.observe(stage, outcome)
        if failure is not None:
            self._roll_back(canary, failure)

    def record_cost(self, spec: Spec, model: str, tenant: str, beta: float, tokens: int, state: State) -> None:
        """Record the cost of an episode. Quarantines a controller from a file that costs far too much."""
        evidence = self._cost_test.observe(spec, model, tenant, beta, tokens, state)
        if evidence is None or spec.digest in self.quarantined:
            return
        logger.log(
            logging.ERROR if evidence.is_proven else logging.WARNING,
            "controller %s (%s) on model %s: %s%s",
            *(spec.name, spec.digest[:12], model, evidence),
            "; it is quarantined" if evidence.is_proven and spec.is_foreign else "",
        )
        self.metrics.overspending.labels(controller_label(spec.name)).set(1)
        if evidence.is_proven and spec.is_foreign:  # the operator has to replace a built-in controller
            self._quarantine(spec, str(evidence))

    def record_feedback(self, stage: RolloutStage, digest: str, satisfied: bool) -> None:
        """Record whether a client was satisfied. Rolls the canary back once it has proved worse than the champion."""
        canary, decided = self._assigned.canary, self._assigned.at(stage)
        if canary is None or decided is None or decided.digest != digest:
            return
        failure = self._canary_test.record_feedback(stage, satisfied)
        if failure is not None:
            self._roll_back(canary, failure)

    def compare_shadow(self, episode: DecidedEpisode) -> None:
        """Compare the shadow's decisions with the champion's in an ended episode, off the request path."""
        spec = self.stages.current.shadow
        if spec is None or spec.digest in self.quarantined or self.sandboxes.level is not SandboxLevel.SEALED:
            return
        if len(self._shadow_tasks) >= SHADOWS:
            self.metrics.shadow_agreement.labels(spec.name, "skipped").inc()
            return
        _start(self._shadow_tasks, self._compare_shadow(spec, episode))

    async def _compare_shadow(self, spec: Spec, episode: DecidedEpisode) -> None:
        agreement = self.metrics.shadow_agreement
        seconds = self.metrics.decision_seconds.labels(controller_label(spec.name))
        try:
            async with self.sandboxes.controller(spec, episode.beta) as controller:
                await compare_decisions(
                    timed(controller, seconds),
                    episode,
                    lambda agreed: agreement.labels(spec.name, str(agreed).lower()).inc(),
                )
        except SandboxUnavailable:
            self.sandboxes.update_level()
        except MachineDisturbed as error:
            agreement.labels(spec.name, "skipped").inc()
            logger.warning("shadow %s could not decide: %s", spec.name, error)
        except ControllerError as error:
            agreement.labels(spec.name, "failed").inc()
            logger.warning("shadow %s failed (%s): %s", spec.name, fallback_reason(error), error)
            self.record_failure(spec, error)

    # Change

    def _quarantine(self, spec: Spec, reason: str) -> None:
        self.quarantined.add(spec.digest)
        self.metrics.quarantined.labels(spec.name).set(1)
        self.sandboxes.stop(spec.digest, STOPPED)
        now = self.stages.current
        if self.stages.registry is None or spec.digest not in {staged.digest for staged in _foreign(now)}:
            return
        if now.canary is not None and now.canary.digest == spec.digest:
            self.metrics.rollbacks.labels(QUARANTINED).inc()
        cause = ChangeCause("proxy", reason, datetime.now(UTC))
        self._change(now.quarantine(spec.digest), lambda registry: registry.quarantine(spec.digest, cause))

    def _roll_back(self, canary: Spec, failure: CanaryFailure) -> None:
        self.metrics.rollbacks.labels(failure.metric).inc()
        reason = f"{failure.metric}: e-value {failure.e_value:.0f} after {failure.pairs} pairs"
        logger.error(
            "canary %s (%s) is rolled back: %s; %s serves all requests",
            *(canary.name, canary.digest[:12], reason, self._assigned.champion.name),
        )
        cause = ChangeCause("watcher", reason, datetime.now(UTC))
        without = self.stages.current.without(canary.digest)
        self._change(without, lambda registry: registry.drop_canary(canary.digest, cause))

    def _change(self, assignment: StageAssignment, change: Callable[[Registry], RolloutState]) -> None:
        """Apply an assignment here at once, and write it to the registry in the background."""
        self.stages.current = assignment
        self._follow_stages()
        _start(self._registry_tasks, self.stages.change(change))

    def _follow_stages(self) -> None:
        """Update quarantines, the canary test and the process pools to match the current stages."""
        before, now = self._assigned, self.stages.current
        self._assigned = now
        if (before.champion, before.canary) != (now.champion, now.canary):
            self._canary_test = CanaryTest()
        for digest in before.quarantined - now.quarantined:  # lifted by an operator
            self.quarantined.discard(digest)
            self._failures.forget(digest)
            self._cost_test.forget(digest)
        self.quarantined |= now.quarantined
        sizes = {spec.digest: self._pool_size for spec in _foreign(now)}
        for spec in _foreign(now):
            self.metrics.quarantined.labels(spec.name).set(spec.digest in self.quarantined)
            self.sandboxes.pool(spec)
        if now.shadow is not None:
            sizes[now.shadow.digest] = min(SHADOWS, self._pool_size)
        self.sandboxes.resize(sizes, dict.fromkeys(self.quarantined, STOPPED))


def _foreign(assignment: StageAssignment) -> list[Spec]:
    """Return the controllers at a stage that come from files."""
    return [spec for stage in RolloutStage if (spec := assignment.at(stage)) is not None and spec.is_foreign]


def _start(tasks: set[asyncio.Task[None]], work: Coroutine[Any, Any, None]) -> None:
    """Start a task and keep it in `tasks` until it is done."""
    task = asyncio.create_task(work)
    tasks.add(task)
    task.add_done_callback(tasks.discard)
