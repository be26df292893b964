"""Who decides for a request: a built-in controller here, one from a file in a sealed process, or the baseline instead.

A controller that fails costs its client nothing: the baseline goes on from the state it left. One that fails three
times in five minutes is not asked again. A canary that does worse than the champion is rolled back.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, Final

from controllers import (
    Action,
    Boundary,
    BoundaryViolation,
    Controller,
    ControllerError,
    Environment,
    IllegalAction,
    MachineDisturbed,
    Round,
    SandboxUnavailable,
    State,
    Stop,
    UnknownController,
    run_episode,
)
from controllers.builtin import BASELINE, BUILT_IN, create, find
from controllers.episode import RemoteController
from controllers.loading import Spec, discovered, make, parse_spec
from controllers.rollout_state import RolloutStage, RolloutState
from controllers.sandbox.controller import SandboxedController
from controllers.sandbox.proof import Proof, SandboxLevel
from controllers.sandbox.spawner import spawner
from discovery.evaluation.calibration import Calibrations
from discovery.promotion.registry import ChangeCause, Registry
from proxy.rollout.canary_test import CanaryFailure, CanaryTest, EpisodeOutcome
from proxy.rollout.cost_test import CostTest
from proxy.rollout.sandbox_pool import RETIRED, SandboxPool
from proxy.rollout.shadow import DecidedEpisode, compare
from proxy.rollout.stages import RolloutStages, StageAssignment
from proxy.settings import Settings
from proxy.telemetry.metrics import Metrics, controller_label
from proxy.types import ChosenController

logger = logging.getLogger(__name__)

FAILURES: Final = 3
WINDOW_S: Final = 300.0
"""So many failures in so many seconds quarantine a controller."""
RAISED, ILLEGAL, UNSEALED, QUARANTINED = "raised", "illegal", "unsealed", "quarantined"
DISTURBED = "disturbed"
"""Why the baseline decides, besides the boundaries of a sandbox."""
BLAMELESS: Final = frozenset({UNSEALED, DISTURBED})
"""Reasons that are the machine's fault, not the controller's."""
SUDDEN: Final = frozenset({Boundary.LATE, Boundary.DEAD})
"""Boundaries one event may have several processes cross at once."""
STOPPED: Final = "the controller has been quarantined"
ENDERS: Final = 2
"""Threads in which sealed processes are ended."""
SHADOWS: Final = 2
"""Episodes a shadow goes through at a time; those that end meanwhile it does not see."""


class ControllerManager:
    """The controllers of one proxy."""

    def __init__(self, settings: Settings, metrics: Metrics, calibrations: Calibrations = MappingProxyType({})) -> None:
        self.default = parse_spec(settings.controller)
        self._shipped = {name: parse_spec(name) for name in discovered()}  # controllers from files of this project
        self.stages = RolloutStages(
            None if settings.registry is None else Registry(settings.registry), self.default, settings.registry_poll_s
        )
        self.quarantined: set[str] = set()  # digests
        self.metrics = metrics
        self._settings = settings
        self._pools: dict[str, SandboxPool] = {}  # of controllers from files, by digest
        self._enders = ThreadPoolExecutor(ENDERS, thread_name_prefix="sandbox-end")
        self._failures: dict[str, deque[float]] = {}  # by digest: when, by the monotonic clock
        self._proof = Proof()
        self._lineup = self.stages.current  # as the pools and the watch know it
        self._watch = CanaryTest()
        self._spending = CostTest(calibrations)
        self._shadowing: set[asyncio.Task[None]] = set()
        self._changing: set[asyncio.Task[None]] = set()  # the registry

    @property
    def level(self) -> SandboxLevel:
        """How controllers from files are held."""
        if self._settings.allow_unsandboxed:
            return SandboxLevel.OPEN
        return SandboxLevel.SEALED if self._proof.sealed else SandboxLevel.REFUSED

    @property
    def lacking(self) -> str | None:
        """What keeps controllers from being sealed; None if nothing does."""
        return self._proof.lacking

    def isolation_of(self, spec: Spec) -> SandboxLevel:
        """How one controller is held."""
        return self.level if spec.is_foreign else SandboxLevel.TRUSTED

    async def choose(self, name: str | None, request_id: str) -> ChosenController:
        """Who decides for a request that names `name`, or nobody. Raises UnknownController."""
        if await self.stages.refresh():
            self._restage()
        return self.stages.current.choose(request_id) if name is None else ChosenController(self.find(name), None)

    def find(self, name: str) -> Spec:
        """The controller a request names. Raises UnknownController."""
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
        """Find out whether controllers can be sealed, say so, and get those ready that may be asked."""
        if spawner().proof is None:
            await asyncio.to_thread(spawner().check)
        self.update_sandbox_level()
        await self.stages.refresh()
        self._restage()

    async def close(self) -> None:
        """End every sealed process, once the registry knows what it is to."""
        for task in self._shadowing:
            task.cancel()
        await asyncio.gather(*self._shadowing, *self._changing, return_exceptions=True)
        for pool in self._pools.values():
            pool.stop("the server is shutting down")
            await pool.close()
        self._enders.shutdown(wait=False)

    def runner(self, choice: ChosenController) -> ControllerRunner:
        """Who decides in an episode for which `choice` was made."""
        return ControllerRunner(self, choice)

    @asynccontextmanager
    async def controller(self, spec: Spec, beta: float) -> AsyncIterator[Controller | RemoteController]:
        """A fresh controller for one episode. Raises ControllerError, SandboxUnavailable or MachineDisturbed."""
        if self.isolation_of(spec) is not SandboxLevel.SEALED or not spec.is_foreign:
            if self.isolation_of(spec) is SandboxLevel.REFUSED:
                raise SandboxUnavailable(f"{spec.name}: controllers cannot be sealed here: {self.lacking}")
            yield make(spec, beta)
            return
        pool = self._pool(spec)
        worker = await pool.take()
        try:
            yield SandboxedController(worker, beta)
        finally:
            if worker.slow:
                self.metrics.slow_decisions.labels(spec.name).inc(worker.slow)
            pool.end(worker)

    def record_failure(self, spec: Spec, error: ControllerError) -> None:
        """Count a failure of a controller, and quarantine it after too many.

        Processes that were late or died while decisions of theirs were under way at the same time may all have met one
        event, so together they count once: such a failure counts if its decision began after the last counted failure.
        """
        now = time.monotonic()
        failures = self._failures.setdefault(spec.digest, deque(maxlen=FAILURES))
        if failures and _asked(error, now) <= failures[-1] < now:
            return
        failures.append(now)
        if spec.digest not in self.quarantined and len(failures) == FAILURES and now - failures[0] <= WINDOW_S:
            words = f"{FAILURES} failures in {now - failures[0]:.0f} s"
            logger.error(
                "controller %s (%s) is quarantined: %s; it is not asked any more",
                *(spec.name, spec.digest[:12], words),
            )
            self._quarantine(spec, words)

    def record_episode(self, choice: ChosenController, outcome: EpisodeOutcome) -> None:
        """Take notice of how an episode ended; a canary that has done too badly by now is none any more."""
        spec, stage = choice
        if stage is None:
            return
        self.metrics.stage_requests.labels(stage, controller_label(spec.name)).inc()
        canary = self._lineup.canary
        if canary is None or self._lineup.at(stage) != spec:  # nothing to compare, or it began before a change
            return
        verdict = self._watch.observe(stage, outcome)
        if verdict is not None:
            self._roll_back(canary, verdict)

    def record_cost(self, spec: Spec, model: str, tenant: str, beta: float, tokens: int, state: State) -> None:
        """Take notice of what an episode cost; a controller from a file that costs far too much is quarantined."""
        found = self._spending.observe(spec, model, tenant, beta, tokens, state)
        if found is None or spec.digest in self.quarantined:
            return
        logger.log(
            logging.ERROR if found.is_proven else logging.WARNING,
            "controller %s (%s) on model %s: %s%s",
            *(spec.name, spec.digest[:12], model, found),
            "; it is quarantined" if found.is_proven and spec.is_foreign else "",
        )
        self.metrics.overspending.labels(controller_label(spec.name)).set(1)
        if found.is_proven and spec.is_foreign:  # one that came with the program is the operator's to replace
            self._quarantine(spec, str(found))

    def record_feedback(self, stage: RolloutStage, digest: str, content: bool) -> None:
        """Take notice of what a client says of an answer; a canary whose clients are not content is none any more."""
        canary, decided = self._lineup.canary, self._lineup.at(stage)
        if canary is None or decided is None or decided.digest != digest:
            return
        verdict = self._watch.record_feedback(stage, content)
        if verdict is not None:
            self._roll_back(canary, verdict)

    def shadow(self, played: DecidedEpisode) -> None:
        """Find out, off the request's path, how the shadow would have played an episode of the champion's."""
        spec = self.stages.current.shadow
        if spec is None or spec.digest in self.quarantined or self.level is not SandboxLevel.SEALED:
            return
        if len(self._shadowing) >= SHADOWS:
            self.metrics.shadow_agreement.labels(spec.name, "skipped").inc()
            return
        _track(self._shadowing, self._shadow(spec, played))

    async def _shadow(self, spec: Spec, played: DecidedEpisode) -> None:
        agreement = self.metrics.shadow_agreement
        try:
            async with self.controller(spec, played.beta) as controller:
                timed = self.timed(spec, controller)
                await compare(timed, played, lambda agreed: agreement.labels(spec.name, str(agreed).lower()).inc())
        except SandboxUnavailable:
            self.update_sandbox_level()
        except MachineDisturbed as error:
            agreement.labels(spec.name, "skipped").inc()
            logger.warning("shadow %s could not decide: %s", spec.name, error)
        except ControllerError as error:
            agreement.labels(spec.name, "failed").inc()
            logger.warning("shadow %s failed (%s): %s", spec.name, _reason(error), error)
            self.record_failure(spec, error)

    # What changes

    def _quarantine(self, spec: Spec, words: str) -> None:
        self.quarantined.add(spec.digest)
        self.metrics.quarantined.labels(spec.name).set(1)
        if spec.digest in self._pools:
            self._pools[spec.digest].stop(STOPPED)
        now = self.stages.current
        if self.stages.registry is None or spec.digest not in {one.digest for one in _foreign(now)}:
            return
        if now.canary is not None and now.canary.digest == spec.digest:
            self.metrics.rollbacks.labels(QUARANTINED).inc()
        by = ChangeCause("proxy", words, datetime.now(UTC))
        self._change(now.quarantine(spec.digest), lambda registry: registry.quarantine(spec.digest, by))

    def _roll_back(self, canary: Spec, verdict: CanaryFailure) -> None:
        self.metrics.rollbacks.labels(verdict.quality).inc()
        words = f"{verdict.quality}: e-value {verdict.wealth:.0f} after {verdict.pairs} pairs"
        logger.error(
            "canary %s (%s) is rolled back: %s; %s decides alone",
            *(canary.name, canary.digest[:12], words, self._lineup.champion.name),
        )
        by = ChangeCause("watcher", words, datetime.now(UTC))
        without = self.stages.current.without(canary.digest)
        self._change(without, lambda registry: registry.drop_canary(canary.digest, by))

    def _change(self, lineup: StageAssignment, move: Callable[[Registry], RolloutState]) -> None:
        """Another line-up: here at once, in the registry as soon as it can be."""
        self.stages.current = lineup
        self._restage()
        _track(self._changing, self.stages.change(move))

    def _restage(self) -> None:
        """Follow the line-up: who is quarantined, whom the watch watches, and whose processes are ready."""
        before, now = self._lineup, self.stages.current
        self._lineup = now
        if (before.champion, before.canary) != (now.champion, now.canary):
            self._watch = CanaryTest()
        for digest in before.quarantined - now.quarantined:  # lifted
            self.quarantined.discard(digest)
            self._failures.pop(digest, None)
            self._spending.forget(digest)
        self.quarantined |= now.quarantined
        sizes = {spec.digest: self._settings.sandbox_pool for spec in _foreign(now)}
        for spec in _foreign(now):
            self.metrics.quarantined.labels(spec.name).set(spec.digest in self.quarantined)
            self._pool(spec)
        if now.shadow is not None:
            sizes[now.shadow.digest] = min(SHADOWS, self._settings.sandbox_pool)
        for digest, pool in self._pools.items():
            if digest in self.quarantined:
                pool.stop(STOPPED)
            else:
                pool.keep(sizes.get(digest, RETIRED) if self.level is SandboxLevel.SEALED else RETIRED)

    def _pool(self, spec: Spec) -> SandboxPool:
        if spec.digest not in self._pools:
            self._pools[spec.digest] = SandboxPool(spec, RETIRED, self._settings.decision_s, self._enders)
        return self._pools[spec.digest]

    def update_sandbox_level(self) -> None:
        """Take notice of the latest proof, and say how controllers from files are held now."""
        self._proof = spawner().proof or self._proof
        self.metrics.sandbox_level.set(self.level.rank)
        if self.level is SandboxLevel.OPEN:
            logger.error(
                "NOT SANDBOXED: controllers from files run with all of this process's rights, its keys included"
            )
        elif self.level is SandboxLevel.REFUSED:
            logger.error("controllers from files are refused, baselines serve: %s", self.lacking)

    def timed(self, spec: Spec, controller: Controller | RemoteController) -> Controller | RemoteController:
        """The same controller, its decisions measured."""
        seconds = self.metrics.decision_seconds.labels(controller_label(spec.name))
        later = getattr(controller, "decide_later", None)
        return _Timed(controller, seconds) if later is None else _TimedRemote(later, seconds)  # type: ignore[arg-type]


class ControllerRunner:
    """Who decides in one episode: the controller that was chosen and, where that fails or may not run, the baseline."""

    def __init__(self, casting: ControllerManager, choice: ChosenController) -> None:
        self.fallback: str | None = None  # why the baseline decides, if it does
        self.level = casting.isolation_of(choice.spec)
        self._casting = casting
        self._choice = choice
        self.rounds: list[Round] = []  # as they were carried out
        self.decided = 0  # how many of them the controller decided, before the baseline took over
        self.on_round: Callable[[], None] | None = None  # told when one has been
        self._played: DecidedEpisode | None = None  # what a shadow is to be shown, if there is one
        self._beta = 0.0  # of the episode, once it runs

    async def run(self, beta: float, environment: Environment, state: State) -> None:
        """Run an episode to its end.

        Raises ControllerError if the baseline fails too, and whatever `environment` raises.
        """
        spec, casting, self._beta = self._choice.spec, self._casting, beta
        if spec.digest in casting.quarantined:
            self.fallback = QUARANTINED
        else:
            if self._choice.stage is RolloutStage.CHAMPION and casting.stages.current.shadow is not None:
                self._played = DecidedEpisode(beta, state.limits, ())
            try:
                async with casting.controller(spec, beta) as controller:
                    await run_episode(casting.timed(spec, controller), environment, state, self._keep)
                return
            except SandboxUnavailable:
                casting.update_sandbox_level()
                self.fallback = UNSEALED
            except MachineDisturbed as error:
                self.fallback = QUARANTINED if spec.digest in casting.quarantined else DISTURBED
                logger.warning("controller %s could not decide (%s): %s", spec.name, self.fallback, error)
            except ControllerError as error:
                if spec.name == BASELINE:
                    raise
                self.fallback = _reason(error)
                logger.warning("controller %s failed (%s): %s", spec.name, self.fallback, error)
                casting.record_failure(spec, error)
        casting.metrics.fallbacks.labels(controller_label(spec.name), self.fallback).inc()
        await run_episode(casting.timed(Spec(BASELINE), create(BASELINE, beta)), environment, state, self._keep)

    def end(self, state: State, tokens: int, model: str, tenant: str) -> None:
        """The episode is over, for a reason of its own or because its client left, and has cost so much."""
        stop = state.stop
        if self.fallback is None:
            self._casting.record_cost(self._choice.spec, model, tenant, self._beta, tokens, state)
        if self.fallback not in BLAMELESS:
            failed = self.fallback is not None or stop is Stop.CONTROLLER_ERROR
            self._casting.record_episode(self._choice, EpisodeOutcome(tokens, failed, stop is Stop.ANSWERED))
        if self._played is not None and self.decided:
            self._casting.shadow(self._played._replace(rounds=self.rounds[: self.decided]))

    def _keep(self, _: State, played: Round) -> None:
        self.rounds.append(Round(tuple(played.actions), played.facts))
        if self.fallback is None:
            self.decided += 1
        if self.on_round is not None:
            self.on_round()


class _Timed:
    """A controller whose decisions are timed."""

    def __init__(self, controller: Controller, seconds: Any) -> None:
        self._controller = controller
        self._seconds = seconds

    def decide(self, state: State) -> Sequence[Action]:
        with self._seconds.time():
            return self._controller.decide(state)


class _TimedRemote:
    """The same of one that lives elsewhere."""

    def __init__(self, later: Callable[[State], Awaitable[Sequence[Action]]], seconds: Any) -> None:
        self._later = later
        self._seconds = seconds

    async def decide_later(self, state: State) -> Sequence[Action]:
        with self._seconds.time():
            return await self._later(state)


def _foreign(lineup: StageAssignment) -> list[Spec]:
    """Those at a stage that come from files."""
    return [spec for stage in RolloutStage if (spec := lineup.at(stage)) is not None and spec.is_foreign]


def _track(tasks: set[asyncio.Task[None]], work: Coroutine[Any, Any, None]) -> None:
    """Start some work, and keep it until it is done."""
    task = asyncio.create_task(work)
    tasks.add(task)
    task.add_done_callback(tasks.discard)


def _asked(error: ControllerError, now: float) -> float:
    """When the decision began in which a process was late or died; of another failure that is `now`."""
    if isinstance(error, BoundaryViolation) and error.boundary in SUDDEN and error.asked is not None:
        return error.asked
    return now


def _reason(error: ControllerError) -> Boundary | str:
    if isinstance(error, BoundaryViolation):
        return error.boundary
    return ILLEGAL if isinstance(error, IllegalAction) else RAISED
