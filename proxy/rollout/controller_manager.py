"""Choose the controller of each request by its model, and remove controllers that fail, cost too much or do worse.

A controller that fails three times in five minutes, or costs far more than its calibration, is quarantined. A canary
that does worse than the champion is rolled back.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, Final

from controllers import ControllerError, MachineDisturbed, SandboxUnavailable, State, UnknownController
from controllers.builtin import BUILT_IN, find
from controllers.loading import Spec, discovered, parse_spec
from controllers.rollout_state import RolloutStage, RolloutState
from controllers.sandbox.proof import SandboxLevel
from controllers.signals import NO_SIGNALS, Signal
from discovery.answers import AnswerKind, ExtractionMethod
from discovery.evaluation.calibration import Calibrations
from discovery.promotion.registry import ChangeCause, Registry
from discovery.store import DatabaseUrl
from proxy.rollout import canary_test, cost_test
from proxy.rollout.canary_test import CanaryFailure, CanaryTest, EpisodeOutcome
from proxy.rollout.cost_test import CostTest
from proxy.rollout.failure_counter import QUARANTINED, FailureCounter, fallback_reason
from proxy.rollout.registry_watch import RegistryWatch
from proxy.rollout.sandboxes import Sandboxes
from proxy.rollout.shadow import DecidedEpisode, compare_decisions
from proxy.rollout.stages import ModelAssignments, RolloutStages
from proxy.rollout.timed_controller import timed
from proxy.settings import Settings
from proxy.telemetry.label_sets import LabelSets
from proxy.telemetry.metrics import Metrics, controller_label
from proxy.telemetry.retirement import Retirement
from proxy.types import ChosenController

logger = logging.getLogger(__name__)

STOPPED: Final = "the controller has been quarantined"
"""Error message for episodes whose controller is stopped."""
SHADOWS: Final = 2
"""Maximum number of episodes that a shadow compares concurrently. Episodes beyond that are skipped."""
_BUILT_IN: Final = tuple(map(Spec, BUILT_IN))


class ControllerManager:
    """The controllers of one proxy."""

    def __init__(self, settings: Settings, metrics: Metrics, calibrations: Calibrations = MappingProxyType({})) -> None:
        self.default = parse_spec(settings.controller)
        self._for_replies = {
            ExtractionMethod.TOOLS: parse_spec(settings.tools_controller),
            ExtractionMethod.JSON: parse_spec(settings.json_controller),
            ExtractionMethod.SELECT: parse_spec(settings.select_controller),
        }
        self._for_other_replies = parse_spec(settings.reply_controller)
        place, poll_s = settings.registry_place, settings.registry_poll_s
        self.stages = RolloutStages(None if place is None else Registry(place), self.default, poll_s)
        self._watch = (
            RegistryWatch(place, self.stages, poll_s, self._follow_stages) if isinstance(place, DatabaseUrl) else None
        )
        metrics.registry_version.set_function(lambda: self.stages.current.version)
        metrics.registry_unreadable.set_function(lambda: bool(self.stages.problem))
        self.sandboxes = Sandboxes(
            metrics, decision_s=settings.decision_s, allow_unsandboxed=settings.allow_unsandboxed
        )
        self.quarantined: set[str] = set()  # digests
        self._quarantined_labels: dict[str, str] = {}  # by the digest of what this process has quarantined
        self.metrics = metrics
        self._shipped = {name: parse_spec(name) for name in discovered()}  # discovered controllers of this project
        self._pool_size = settings.sandbox_pool
        self._failures = FailureCounter()
        self._assigned = self.stages.current  # as of the last call of _follow_stages
        self._canary_tests: dict[str | None, CanaryTest] = {}  # by the model the canary is set for; None: the default
        self._processes = settings.workers  # each has tests of its own, which share the level
        self._cost_test = CostTest(calibrations, cost_test.ALPHA / self._processes)
        self._shadow_tasks: set[asyncio.Task[None]] = set()
        self._registry_tasks: set[asyncio.Task[None]] = set()
        self._label_sets = LabelSets(metrics, "controller")
        self._retired_labels = Retirement(settings.retired_metrics_s)
        self._retired_digests = Retirement(settings.retired_metrics_s)

    async def refresh(self) -> None:
        """Follow the registry, if it is in a folder and has changed."""
        await self.stages.refresh()
        if self.stages.current is not self._assigned:
            self._follow_stages()

    async def choose(self, name: str | None, request_id: str, model: str) -> ChosenController:
        """Return the controller of a request. `name` is the one that the request names. Raises UnknownController."""
        await self.refresh()
        if name is None:
            return self.stages.current.of(model).choose(request_id)
        return ChosenController(self.find(name, model), None)

    async def choose_for_replies(self, name: str | None, kind: AnswerKind, model: str) -> ChosenController:
        """Return the controller of a request whose branches are whole replies, which has no probes.

        The named controller serves, unless it probes. Otherwise the controller serves that the settings have for this
        kind of request. Raises UnknownController.
        """
        await self.refresh()
        default = self._for_replies.get(kind.method, self._for_other_replies)
        spec = default if name is None else self.find(name, model)
        return ChosenController(default if spec.needs_probes else spec, None)

    def champion(self, model: str) -> Spec:
        """Return the champion of a model."""
        return self.stages.current.of(model).champion

    def find(self, name: str, model: str) -> Spec:
        """Return the controller that a request names. The model's own controllers come first if several have the name.

        Raises UnknownController.
        """
        assignments = (*reversed(list(self.stages.current)), self.stages.current.of(model))
        staged = [
            self.default,
            *(spec for now in assignments for spec in (now.canary, now.champion) if spec is not None),
        ]
        known = {**self._shipped, **{spec.name: spec for spec in staged}}
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

    def signals_for(self, choice: ChosenController, model: str) -> frozenset[Signal]:
        """Return the signals that an episode needs: those of its controller, and of the shadow compared with it."""
        shadow = self._comparable_shadow(model) if choice.stage is RolloutStage.CHAMPION else None
        return choice.spec.signals | (NO_SIGNALS if shadow is None else shadow.signals)

    def _comparable_shadow(self, model: str) -> Spec | None:
        """Return the shadow of a model, if it may run; else None."""
        spec = self.stages.current.of(model).shadow
        if spec is None or spec.digest in self.quarantined or self.sandboxes.level is not SandboxLevel.SEALED:
            return None
        return spec

    async def open(self) -> None:
        """Check the sandbox, read the rollout stages, and start processes for the controllers in use."""
        await self.sandboxes.check()
        await self.stages.refresh()
        self._follow_stages()
        if self._watch is not None:
            await self._watch.start()

    async def close(self) -> None:
        """Write pending changes to the registry, then end every sandbox process."""
        if self._watch is not None:
            await self._watch.close()
        self.stages.close()
        for task in self._shadow_tasks:
            task.cancel()
        await asyncio.gather(*self._shadow_tasks, *self._registry_tasks, return_exceptions=True)
        await self.sandboxes.close()

    # Retire

    @contextmanager
    def serving(self, spec: Spec) -> Iterator[None]:
        """Keep a controller's metrics and other entries while a request uses it, whatever its stage is meanwhile."""
        with self._retired_digests.hold(spec.digest), self._retired_labels.hold(controller_label(spec.name)):
            yield

    def forget_retired(self) -> None:
        """Remove what is kept of controllers that no request has used and could use for `retired_metrics_s` seconds."""
        specs = self._usable()
        lasting = self.stages.current.quarantined  # until an operator lifts it in the registry
        known = self._cost_test.digests.union(
            self._failures.digests, self.sandboxes.digests, self.quarantined - lasting
        )
        for digest in self._retired_digests.retired(known, {spec.digest for spec in specs}):
            self._cost_test.forget(digest)
            self._failures.forget(digest)
            self.sandboxes.forget(digest)
            if digest not in lasting:
                self.quarantined.discard(digest)
                self._quarantined_labels.pop(digest, None)
        labels = {controller_label(spec.name) for spec in specs} | {""}  # empty for requests that none served
        labels |= {label for digest, label in self._quarantined_labels.items() if digest in lasting}  # alerts stand
        self._label_sets.remove(self._retired_labels.retired(self._label_sets.values(), labels))

    def forget_model(self, model: str) -> None:
        """Forget a model that is served no longer."""
        for test in self._canary_tests.values():
            test.forget(model)

    def _usable(self) -> set[Spec]:
        """Return the controllers that a request may name or get, and the shadows. Others may be pinned, as `asc@8`."""
        configured = (self.default, *self._for_replies.values(), self._for_other_replies)
        return _staged(self.stages.current).union(configured, self._shipped.values(), _BUILT_IN)

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

    def record_episode(self, choice: ChosenController, model: str, outcome: EpisodeOutcome) -> None:
        """Record the outcome of an episode. Rolls the canary back once it has proved worse than the champion."""
        spec, stage, _ = choice
        if stage is None:
            return
        self.metrics.stage_requests.labels(model, stage, controller_label(spec.name)).inc()
        test = self._canary_test(model, stage, spec.digest)
        if test is not None and (failure := test.observe(stage, outcome, model)) is not None:
            self._roll_back(model, failure)

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

    def record_feedback(self, stage: RolloutStage, digest: str, model: str, satisfied: bool) -> None:
        """Record whether a client was satisfied. Rolls the canary back once it has proved worse than the champion."""
        test = self._canary_test(model, stage, digest)
        if test is not None and (failure := test.record_feedback(stage, satisfied, model)) is not None:
            self._roll_back(model, failure)

    def _canary_test(self, model: str, stage: RolloutStage, digest: str) -> CanaryTest | None:
        """Return the test of the canary that serves a model; None without a canary, or if the stages have changed."""
        assigned = self._assigned.of(model)
        decided = assigned.at(stage)
        if assigned.canary is None or decided is None or decided.digest != digest:
            return None
        return self._canary_tests.get(assigned.owner(RolloutStage.CANARY))

    def compare_shadow(self, model: str, episode: DecidedEpisode) -> None:
        """Compare the shadow's decisions with the champion's in an ended episode, off the request path."""
        spec = self._comparable_shadow(model)
        if spec is None:
            return
        if len(self._shadow_tasks) >= SHADOWS:
            self.metrics.shadow_agreement.labels(controller_label(spec.name), "skipped").inc()
            return
        _start(self._shadow_tasks, self._compare_shadow(spec, episode))

    async def _compare_shadow(self, spec: Spec, episode: DecidedEpisode) -> None:
        with self.serving(spec):
            await self._count_agreement(spec, episode)

    async def _count_agreement(self, spec: Spec, episode: DecidedEpisode) -> None:
        agreement, label = self.metrics.shadow_agreement, controller_label(spec.name)
        seconds = self.metrics.decision_seconds.labels(label)
        try:
            async with self.sandboxes.controller(spec, episode.beta) as controller:
                await compare_decisions(
                    timed(controller, seconds),
                    spec.signals,
                    episode,
                    lambda agreed: agreement.labels(label, str(agreed).lower()).inc(),
                )
        except SandboxUnavailable:
            self.sandboxes.update_level()
        except MachineDisturbed as error:
            agreement.labels(label, "skipped").inc()
            logger.warning("shadow %s could not decide: %s", spec.name, error)
        except ControllerError as error:
            agreement.labels(label, "failed").inc()
            logger.warning("shadow %s failed (%s): %s", spec.name, fallback_reason(error), error)
            self.record_failure(spec, error)

    # Change

    def _quarantine(self, spec: Spec, reason: str) -> None:
        label = controller_label(spec.name)
        self.quarantined.add(spec.digest)
        self._quarantined_labels[spec.digest] = label
        self.metrics.quarantined.labels(label).set(1)
        self.sandboxes.stop(spec.digest, STOPPED)
        now = self.stages.current
        staged = {each.digest for each in _foreign(now)} | now.installed
        if self.stages.registry is None or spec.digest not in staged:
            return
        for canary, _ in now.canaries.values():
            if canary.digest == spec.digest:
                self.metrics.rollbacks.labels(QUARANTINED).inc()
        cause = ChangeCause("proxy", reason, datetime.now(UTC))
        self._change(now.quarantine(spec.digest), lambda registry: registry.quarantine(spec.digest, cause))

    def _roll_back(self, model: str, failure: CanaryFailure) -> None:
        """Roll back the canary that serves a model, for all models that it is set for."""
        assigned = self._assigned.of(model)
        owner = assigned.owner(RolloutStage.CANARY)
        canary, champion = self._assigned.canaries[owner]
        self.metrics.rollbacks.labels(failure.metric).inc()
        reason = f"{failure.metric}: e-value {failure.e_value:.0f} after {failure.pairs} pairs"
        logger.error(
            "canary %s (%s) is rolled back: %s; %s serves all requests%s",
            *(canary.name, canary.digest[:12], reason, champion.name, "" if owner is None else f" for model {owner}"),
        )
        cause = ChangeCause("watcher", reason, datetime.now(UTC))
        without = self.stages.current.without_canary(owner)
        self._change(without, lambda registry: registry.drop_canary(canary.digest, cause, owner))

    def _change(self, assignments: ModelAssignments, change: Callable[[Registry], RolloutState]) -> None:
        """Apply assignments here at once, and write them to the registry in the background."""
        self.stages.current = assignments
        self._follow_stages()
        _start(self._registry_tasks, self.stages.change(change))

    def _follow_stages(self) -> None:
        """Update quarantines, the canary tests and the process pools to match the current stages."""
        before, now = self._assigned, self.stages.current
        self._assigned = now
        compared, tests = before.canaries, self._canary_tests
        alpha = canary_test.ALPHA / self._processes
        self._canary_tests = {
            owner: tests[owner] if compared.get(owner) == pair else CanaryTest(alpha)
            for owner, pair in now.canaries.items()
        }
        for digest in before.quarantined - now.quarantined:  # lifted by an operator
            self.quarantined.discard(digest)
            self._failures.forget(digest)
            self._cost_test.forget(digest)
        self.quarantined |= now.quarantined
        sizes = {spec.digest: self._pool_size for spec in _foreign(now)}
        self._report_quarantined(before, now)
        for spec in _foreign(now):
            self.sandboxes.pool(spec)
        deciding = {spec.digest for each in now for spec in (each.champion, each.canary) if spec is not None}
        for shadow in (each.shadow for each in now if each.shadow is not None):
            if shadow.digest not in deciding:
                sizes[shadow.digest] = min(SHADOWS, self._pool_size)
        self.sandboxes.resize(sizes, dict.fromkeys(self.quarantined, STOPPED))

    def _report_quarantined(self, before: ModelAssignments, now: ModelAssignments) -> None:
        """Set the metric of every installed controller, and of those that this process has quarantined.

        The latter have it until they are lifted, or a sound controller of the same name comes to a stage. Files of
        several models may have the same name.
        """
        installed = [spec for spec in _staged(now) if spec.is_foreign or spec.digest in now.installed]
        failed = {controller_label(spec.name) for spec in installed if spec.digest in self.quarantined}
        arrived = {controller_label(spec.name) for spec in set(installed) - _staged(before)} - failed
        reported = self._quarantined_labels
        self._quarantined_labels = {
            digest: label for digest, label in reported.items() if digest in self.quarantined and label not in arrived
        }
        failed.update(self._quarantined_labels.values())
        for label in {controller_label(spec.name) for spec in installed}.union(reported.values()):
            self.metrics.quarantined.labels(label).set(label in failed)
        warned = {controller_label(spec.name) for spec in installed if self._cost_test.has_warned(spec.digest)}
        for label in set(reported.values()) - failed - warned:  # what it costs is tested anew
            self.metrics.overspending.labels(label).set(0)


def _staged(assignments: ModelAssignments) -> set[Spec]:
    """Return the controllers at a stage of any model."""
    return {spec for each in assignments for stage in RolloutStage if (spec := each.at(stage)) is not None}


def _foreign(assignments: ModelAssignments) -> list[Spec]:
    """Return the controllers from files at a stage of any model, each once."""
    staged = (each.at(stage) for each in assignments for stage in RolloutStage)
    return list(dict.fromkeys(spec for spec in staged if spec is not None and spec.is_foreign))


def _start(tasks: set[asyncio.Task[None]], work: Coroutine[Any, Any, None]) -> None:
    """Start a task and keep it in `tasks` until it is done."""
    task = asyncio.create_task(work)
    tasks.add(task)
    task.add_done_callback(tasks.discard)
