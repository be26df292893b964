"""Run the chosen controller in one episode, with a fallback to the baseline if it fails.

The baseline continues from the state that the failed controller left, so no work is lost.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from controllers import (
    ControllerError,
    Environment,
    Fact,
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
from proxy.rollout.declared_signals import DeclaredSignals
from proxy.rollout.escalation import AgreementCheck, AnswerHeldBackError
from proxy.rollout.failure_counter import BLAMELESS, DISTURBED, QUARANTINED, UNSEALED, fallback_reason
from proxy.rollout.shadow import DecidedEpisode
from proxy.rollout.timed_controller import timed
from proxy.telemetry.metrics import controller_label
from proxy.types import AgreementRule, ChosenController

logger = logging.getLogger(__name__)


class ControllerRunner:
    """Runs one episode with the chosen controller or, if that fails or may not run, with the baseline.

    If the branches agree less than `rule` asks for, the baseline continues the episode once at the rule's larger β.
    `on_round` is called after each round.
    """

    def __init__(
        self,
        manager: ControllerManager,
        choice: ChosenController,
        model: str,
        on_round: Callable[[], None] | None = None,
        rule: AgreementRule | None = None,
    ) -> None:
        self.fallback: str | None = None  # reason why the baseline decides; None if it does not
        self.level = manager.sandboxes.level_for(choice.spec)
        self.rounds: list[Round] = []  # as they were executed, with the signals that the controller declares
        self.measured_rounds: list[Round] = []  # the same rounds with all signals that were measured
        self.decided = 0  # rounds that the controller decided, before any fallback or escalation
        self.escalated_at: int | None = None  # rounds before it continued at a larger β; None if it did not
        self._manager = manager
        self._choice = choice
        self._model = model
        self._on_round = on_round
        self._rule = rule
        self._has_shadow = False  # whether a shadow is to be compared with this episode
        self._beta = 0.0  # of the episode, once it runs

    async def run(self, beta: float, environment: Environment, state: State) -> None:
        """Run an episode to its end.

        Raises ControllerError if the baseline fails too, and whatever `environment` raises.
        """
        self._beta = beta
        visible = DeclaredSignals(environment, self._choice.spec.signals)
        rule = self._rule

        def record(_: State, executed: Round) -> None:
            self._record(executed, visible.measured)

        if rule is None or rule.escalate_beta is None:
            await self._run_chosen(beta, visible, state, record)
            return
        try:
            await self._run_chosen(beta, AgreementCheck(visible, state, rule), state, record)
        except AnswerHeldBackError:
            self.escalated_at = len(self.rounds)
            await self._run_baseline(rule.escalate_beta, visible, state, record)

    async def _run_chosen(
        self, beta: float, environment: Environment, state: State, record: Callable[[State, Round], None]
    ) -> None:
        """Run with the chosen controller, or with the baseline if that fails or may not run."""
        spec, manager = self._choice.spec, self._manager
        decision_seconds = manager.metrics.decision_seconds
        if spec.digest in manager.quarantined:
            self.fallback = QUARANTINED
        else:
            is_champion = self._choice.stage is RolloutStage.CHAMPION
            self._has_shadow = is_champion and manager.stages.current.of(self._model).shadow is not None
            try:
                async with manager.sandboxes.controller(spec, beta) as controller:
                    seconds = decision_seconds.labels(controller_label(spec.name))
                    await run_episode(timed(controller, seconds), environment, state, record)
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
        await self._run_baseline(beta, environment, state, record)

    async def _run_baseline(
        self, beta: float, environment: Environment, state: State, record: Callable[[State, Round], None]
    ) -> None:
        """Continue with the baseline, from any state."""
        seconds = self._manager.metrics.decision_seconds.labels(controller_label(BASELINE))
        await run_episode(timed(create(BASELINE, beta), seconds), environment, state, record)

    @property
    def escalated_beta(self) -> float | None:
        """The β at which the episode continued; None if it did not."""
        return None if self._rule is None or self.escalated_at is None else self._rule.escalate_beta

    def end(self, state: State, tokens: int, tenant: str, *, has_answered: bool) -> None:
        """Record the outcome and cost of the episode, also if its client disconnected.

        `has_answered` tells whether the controller answered, and the reply did not fail after that.
        """
        is_escalated = self.escalated_at is not None
        if self.fallback is None and not is_escalated:
            self._manager.record_cost(self._choice.spec, self._model, tenant, self._beta, tokens, state)
        if self.fallback not in BLAMELESS:
            failed = self.fallback is not None or state.stop is Stop.CONTROLLER_ERROR
            outcome = EpisodeOutcome(tokens, failed, is_escalated or has_answered)
            self._manager.record_episode(self._choice, self._model, outcome)
        if self._has_shadow and self.decided:
            episode = DecidedEpisode(self._beta, state.limits, self.measured_rounds[: self.decided])
            self._manager.compare_shadow(self._model, episode)

    def _record(self, executed: Round, measured: Sequence[Fact]) -> None:
        actions = tuple(executed.actions)
        self.rounds.append(Round(actions, executed.facts))
        self.measured_rounds.append(Round(actions, measured))
        if self.fallback is None and self.escalated_at is None:
            self.decided += 1
        if self._on_round is not None:
            self._on_round()
