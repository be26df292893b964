"""Run the episode of a planned request, compose its reply, and update the metrics and the record."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Final

from controllers import ControllerError, State, Stop
from discovery.data.recordings import RecordedBranch
from proxy.environment.answer_reader import GraderPool
from proxy.environment.episode_environment import EpisodeEnvironment
from proxy.environment.live_environment import LiveEnvironment, SentBytesExceeded
from proxy.environment.reply_environment import ReplyEnvironment
from proxy.environment.votability_check import BranchesTruncated, NotVotable
from proxy.episode.episode_metrics import count_episode
from proxy.episode.progress import RoundReport
from proxy.episode.reply import compose_reply, deadline_error
from proxy.episode.whole_reply import compose_whole_reply
from proxy.errors import ApiError, DeadlinePassed, UpstreamError
from proxy.http import graceful_shutdown
from proxy.recording.episode_log import EpisodeLog
from proxy.recording.interval_probes import IntervalProbes
from proxy.recording.reply_recordings import recorded_replies
from proxy.rollout.controller_manager import ControllerManager
from proxy.rollout.controller_runner import ControllerRunner
from proxy.telemetry.metrics import Metrics, controller_label
from proxy.types import Model, Plan, Reply
from proxy.upstream.fleet.interface import Upstream

logger = logging.getLogger(__name__)

COMPOSE_S: Final = 2.0
"""Seconds after the deadline in which a reply may still be composed. After that the text so far is returned."""
_REPLIED: Final = frozenset({Stop.ANSWERED, Stop.MAX_TOKENS, Stop.NOT_VOTABLE})
"""Stop reasons of episodes that a reply follows, unless the client disconnects or composing it fails."""


async def serve_request(
    engine: Upstream,
    graders: GraderPool,
    controllers: ControllerManager,
    metrics: Metrics,
    episode_log: EpisodeLog,
    plan: Plan,
    on_progress: Callable[[RoundReport], None] | None = None,
    on_ended: Callable[[int, str | None], None] | None = None,
    on_capped: Callable[[], None] | None = None,
) -> Reply:
    """Run the episode, compose its reply and record it.

    `on_progress` is called after each round. `on_ended` is called once, however the episode ends, with the tokens spent
    and why it stopped (None if the upstream refused the request, so that there was no episode). `on_capped` is called
    if the token cap of the request ends the episode. Raises ApiError if nothing was generated, or if the server shuts
    down first. Cancelling it aborts all requests to the upstream, whose tokens are counted.
    """
    routed = engine.route(plan.prompt.model, lambda: plan.affinity, plan.request_id)
    environment = _open_environment(routed, graders, plan)
    state = State(plan.limits)
    on_round = None if on_progress is None else lambda: on_progress(RoundReport(environment, state))
    runner = ControllerRunner(controllers, plan.choice, plan.prompt.model, on_round, plan.agreement_rule)
    reply: Reply | None = None
    outcome = "failed"
    try:
        with metrics.episodes_in_flight.track_inprogress():
            failure = await _run(runner, plan, environment, state)
            recorded: Sequence[RecordedBranch] = ()
            if plan.records_all and isinstance(environment, LiveEnvironment):
                probes = IntervalProbes(environment, plan.limits)
                failure = await _probe_intervals(plan, environment, state, probes) or failure
                recorded = await probes.branches()
            elif plan.records_all and isinstance(environment, ReplyEnvironment):
                environment.salvage()
                recorded = await recorded_replies(environment)
            if on_capped is not None and state.stop is Stop.MAX_TOKENS and environment.cutoff is None:
                on_capped()
            composed = await _compose(runner, plan, environment, state, failure, recorded)
            if plan.records_all:
                await episode_log.drift.confirm(plan, plan.started)
        reply, outcome = composed, "answered"
        return reply
    except asyncio.CancelledError:
        if not graceful_shutdown.is_cut_by_shutdown():
            outcome = "disconnected"
            raise
        outcome, error = "draining", graceful_shutdown.shutting_down_error()
        error.spent, error.is_counted = environment.meter.billed, True
        raise error from None
    except ApiError as error:
        error.spent, error.is_counted = environment.meter.billed, True
        if _is_invalid_request(error):
            outcome = "refused"
        raise
    finally:
        if reply is None:
            environment.salvage()
        stop = _stop_reason(state, reply, outcome)
        if on_ended is not None:
            on_ended(environment.meter.billed, None if outcome == "refused" else stop)
        if outcome == "refused":  # like requests that the proxy refuses itself: no episode took place
            metrics.requests.labels(plan.prompt.model, controller_label(plan.controller), outcome).inc()
        else:
            count_episode(metrics, plan, environment, state, runner.measured_rounds, reply, outcome, stop)
            has_answered = state.stop is Stop.ANSWERED and outcome != "failed"
            runner.end(state, environment.meter.billed, plan.provenance.tenant, has_answered=has_answered)
            episode_log.record(plan, runner, environment, state, reply, stop)


def record_unstarted(
    engine: Upstream, graders: GraderPool, controllers: ControllerManager, episode_log: EpisodeLog, plan: Plan
) -> None:
    """Record a planned request whose deadline passed before its turn came, so that nothing was generated."""
    environment = _open_environment(engine.route(plan.prompt.model, lambda: plan.affinity), graders, plan)
    state = State(plan.limits)
    state.end(Stop.DEADLINE)
    runner = ControllerRunner(controllers, plan.choice, plan.prompt.model, None, plan.agreement_rule)
    episode_log.record(plan, runner, environment, state, None, Stop.DEADLINE)


def _stop_reason(state: State, reply: Reply | None, outcome: str) -> str:
    """Return why a request ended. Without a reply it is the outcome, unless the episode says what failed."""
    if state.stop is None or (reply is None and (outcome != "failed" or state.stop in _REPLIED)):
        return outcome
    return str(state.stop)


def _is_invalid_request(error: ApiError) -> bool:
    """Return whether the upstream refused a request as invalid before it generated anything."""
    return isinstance(error, UpstreamError) and error.is_request_at_fault and not error.spent


def _open_environment(engine: Upstream, graders: GraderPool, plan: Plan) -> LiveEnvironment | ReplyEnvironment:
    """Return the environment of a planned request."""
    grader = graders.grader(plan.provenance.tenant)
    if plan.reply is not None:
        model = Model(plan.prompt.model, plan.max_length)
        return ReplyEnvironment(
            engine,
            model,
            plan.prompt,
            plan.reply,
            plan.environment_limits,
            grader,
            keeps_all_branches=plan.records_all,
        )
    return LiveEnvironment(
        engine,
        plan.prompt,
        plan.environment_limits,
        grader,
        keeps_all_branches=plan.records_all or plan.ignores_eos,
        signals=plan.signals,
    )


async def _run(
    runner: ControllerRunner, plan: Plan, environment: LiveEnvironment | ReplyEnvironment, state: State
) -> UpstreamError | None:
    """Run the episode until the controller or a limit ends it. Return the upstream's error if it failed, or None.

    Afterwards nothing runs at the upstream, and all tokens are billed.
    """
    try:
        return await _run_controller(runner, plan, environment, state)
    finally:
        if isinstance(environment, ReplyEnvironment):
            await environment.close()


async def _run_controller(
    runner: ControllerRunner, plan: Plan, environment: EpisodeEnvironment, state: State
) -> UpstreamError | None:
    try:
        async with asyncio.timeout(plan.remaining_s):
            await runner.run(plan.beta.value, environment, state)
        if not plan.records_all and _is_all_truncated(environment, state):
            environment.record_cutoff("all_cut")
            state.stop = Stop.MAX_TOKENS
    except TimeoutError:
        environment.salvage()
        state.end(Stop.DEADLINE)
    except BranchesTruncated:
        environment.salvage()
        environment.record_cutoff("cut_short")
        state.end(Stop.MAX_TOKENS)
    except NotVotable:
        environment.salvage()
        state.end(Stop.NOT_VOTABLE)
    except SentBytesExceeded:
        logger.warning("%s: ended early, having sent the upstream more than AUTOTTS_MAX_SENT_BYTES", plan.request_id)
        environment.salvage()
        environment.record_cutoff("sent_too_much")
        state.end(Stop.MAX_TOKENS)
    except ControllerError as error:
        logger.warning("%s: controller %s failed: %s", plan.request_id, plan.controller, error)
        state.end(Stop.CONTROLLER_ERROR)
    except UpstreamError as error:
        level = logging.INFO if error.is_request_at_fault else logging.WARNING
        logger.log(level, "%s: %s", plan.request_id, error.logged)
        environment.salvage()
        state.end(Stop.UPSTREAM_ERROR)
        return error
    return None


def _is_all_truncated(environment: EpisodeEnvironment, state: State) -> bool:
    """Return whether the episode has no answer because the token limit cut every branch that was not pruned."""
    if state.stop is not Stop.ANSWERED or state.answer is not None or state.votes:
        return False
    branches = zip(environment.branches, state.branches, strict=False)
    reasons = {live.finish for live, known in branches if live.finish is not None or not known.pruned}
    return reasons == {"length"}


async def _probe_intervals(
    plan: Plan, environment: LiveEnvironment, state: State, probes: IntervalProbes
) -> UpstreamError | None:
    """Probe the finished branches of a recording. Return the upstream's error if it failed, or None."""
    stop, failure = state.stop, None
    try:
        async with asyncio.timeout(plan.remaining_s):
            if not await probes.run():
                stop = Stop.MAX_TOKENS
    except TimeoutError:
        stop = Stop.DEADLINE
    except UpstreamError as error:
        logger.warning("%s: %s", plan.request_id, error.logged)
        stop, failure = Stop.UPSTREAM_ERROR, error
    environment.discard_in_flight()
    if state.stop is Stop.ANSWERED:
        state.stop = stop
    return failure


async def _compose(
    runner: ControllerRunner,
    plan: Plan,
    environment: LiveEnvironment | ReplyEnvironment,
    state: State,
    failure: UpstreamError | None,
    recorded: Sequence[RecordedBranch],
) -> Reply:
    """Return the reply. Raises `failure`, or another ApiError, if nothing was generated that can answer.

    Replies that ended in the round that failed can answer, though no fact has revealed them.
    """
    if failure is not None and state.answer is None and not state.finished:
        is_recorded = any(branch.complete for branch in recorded)
        if not is_recorded and not any(branch.finish == "stop" for branch in environment.branches):
            raise failure
    if not environment.branches:
        raise deadline_error()
    remaining_s = plan.remaining_s
    timeout_s = None if remaining_s is None else max(0.0, remaining_s) + COMPOSE_S
    if isinstance(environment, ReplyEnvironment):
        return await compose_whole_reply(
            plan, environment, state, recorded, runner.fallback, runner.escalated_beta, timeout_s
        )
    try:
        return await compose_reply(
            plan, environment, state, recorded, runner.fallback, runner.escalated_beta, timeout_s
        )
    except UpstreamError as error:
        if state.stop in _REPLIED:
            state.stop = Stop.DEADLINE if isinstance(error, DeadlinePassed) else Stop.UPSTREAM_ERROR
        raise failure or error from None
