"""Run the chosen controller in one episode, with a fallback to the baseline if it fails.

The baseline continues from the state that the failed controller left, so no work is lost.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from controllers import (
    ControllerError,
    Environment,
    MachineDisturbed,
    Round,
    SandboxUnavailable,
    State,
    Stop,
    run_episode,
)
from controllers.builtin import BASELINE, create
from controllers.rollout_state import RolloutStage
from proxy.rollout.canary_test import EpisodeOutcome
from proxy.rollout.controller_manager import ControllerManager
from proxy.rollout.failure_counter import BLAMELESS, DISTURBED, QUARANTINED, UNSEALED, fallback_reason
from proxy.rollout.shadow import DecidedEpisode
from proxy.rollout.timed_controller import timed
from proxy.telemetry.metrics import controller_label
from proxy.types import ChosenController

logger = logging.getLogger(__name__)


class ControllerRunner:
    """Runs one episode with the chosen controller or, if that fails or may not run, with the baseline.

    `on_round` is called after each round.
    """

    def __init__(
        self, manager: ControllerManager, choice: ChosenController, on_round: Callable[[], None] | None = None
    ) -> None:
        self.fallback: str | None = None  # reason why the baseline decides; None if it does not
        self.level = manager.sandboxes.level_for(choice.spec)
        self.rounds: list[Round] = []  # as they were executed
        self.decided = 0  # rounds that the controller decided, before any fallback
        self._manager = manager
        self._choice = choice
        self._on_round = on_round
        self._has_shadow = False  # whether a shadow is to be compared with this episode
        self._beta = 0.0  # of the episode, once it runs

    async def run(self, beta: float, environment: Environment, state: State) -> None:
        """Run an episode to its end.

        Raises ControllerError if the baseline fails too, and whatever `environment` raises.
        """
        spec, manager, self._beta = self._choice.spec, self._manager, beta
        decision_seconds = manager.metrics.decision_seconds
        if spec.digest in manager.quarantined:
            self.fallback = QUARANTINED
        else:
            is_champion = self._choice.stage is RolloutStage.CHAMPION
            self._has_shadow = is_champion and manager.stages.current.shadow is not None
            try:
                async with manager.sandboxes.controller(spec, beta) as controller:
                    seconds = decision_seconds.labels(controller_label(spec.name))
                    await run_episode(timed(controller, seconds), environment, state, self._record)
                return
            except SandboxUnavailable:
                manager.sandboxes.update_level()
                self.fallback = UNSEALED
            except MachineDisturbed as error:
                self.fallback = QUARANTINED if spec.digest in manager.quarantined else DISTURBED
                logger.warning("controller %s could not decide (%s): %s", spec.name, self.fallback, error)
            except ControllerError as error:
                if spec.name == BASELINE:
                    raise
                self.fallback = fallback_reason(error)
                logger.warning("controller %s failed (%s): %s", spec.name, self.fallback, error)
                manager.record_failure(spec, error)
        manager.metrics.fallbacks.labels(controller_label(spec.name), self.fallback).inc()
        seconds = decision_seconds.labels(controller_label(BASELINE))
        await run_episode(timed(create(BASELINE, beta), seconds), environment, state, self._record)

    def end(self, state: State, tokens: int, model: str, tenant: str) -> None:
        """Record the outcome and cost of the episode, also if its client disconnected."""
        stop = state.stop
        if self.fallback is None:
            self._manager.record_cost(self._choice.spec, model, tenant, self._beta, tokens, state)
        if self.fallback not in BLAMELESS:
            failed = self.fallback is not None or stop is Stop.CONTROLLER_ERROR
            self._manager.record_episode(self._choice, EpisodeOutcome(tokens, failed, stop is Stop.ANSWERED))
        if self._has_shadow and self.decided:
            self._manager.compare_shadow(DecidedEpisode(self._beta, state.limits, self.rounds[: self.decided]))

    def _record(self, _: State, executed: Round) -> None:
        self.rounds.append(Round(tuple(executed.actions), executed.facts))
        if self.fallback is None:
            self.decided += 1
        if self._on_round is not None:
            self._on_round()
