"""Update the Prometheus metrics for an ended episode."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from controllers import Probed, Round, State, Stop
from controllers.signals import Signal
from proxy.environment.episode_environment import EpisodeEnvironment
from proxy.episode.agreement import low_agreement_outcome
from proxy.telemetry.metrics import Metrics, controller_label
from proxy.types import Plan, Reply


def count_episode(
    metrics: Metrics,
    plan: Plan,
    environment: EpisodeEnvironment,
    state: State,
    rounds: Sequence[Round],
    reply: Reply | None,
    outcome: str,
    stop: str,
) -> None:
    """Count an ended episode. `outcome` is answered, failed, disconnected, or draining (cut by a shutdown).

    `reply` is None unless the outcome is "answered". `stop` is the stop reason, as it is recorded.
    """
    model, controller = plan.prompt.model, controller_label(plan.controller)
    by_beta = (model, controller, plan.beta.bucket)
    metrics.requests.labels(model, controller, outcome).inc()
    metrics.episode_stops.labels(model, controller, stop).inc()
    bill = reply.tokens if reply is not None else {"aborted": environment.meter.billed}
    for purpose, tokens in bill.items():
        metrics.tokens.labels(*by_beta, purpose).inc(tokens)
    metrics.unseen_tokens.labels(model).inc(environment.meter.max_unseen_tokens)
    metrics.branches.labels(*by_beta).inc(len(environment.branches))
    metrics.rounds.labels(*by_beta).inc(state.rounds)
    if plan.reply is None:  # replies with tool calls or JSON are short, whatever the interval
        metrics.chain_lengths.observe(model, plan.limits.interval, environment.branches)
    probes = Counter(fact.label is not None for done in rounds for fact in done.facts if isinstance(fact, Probed))
    for has_answer, count in probes.items():
        metrics.probe_answers.labels(model, controller, str(has_answer).lower()).inc(count)
    if plan.signals:
        _count_signals(metrics, plan.signals, rounds)
    if reply is None:
        return
    rule = plan.agreement_rule
    if rule is not None and (low := low_agreement_outcome(rule, reply.tts)) is not None:
        metrics.low_agreement.labels(model, controller, low).inc()
    if (judged := reply.tts.get("judge")) is not None:
        metrics.judge_calls.labels(model, judged).inc()
    metrics.request_seconds.labels(model, controller).observe(time.monotonic() - plan.started)
    if state.stop is not Stop.ANSWERED:
        return
    votes = sum(state.votes.values())
    if state.answer is not None and votes > 1 and (plan.reply is None or plan.reply.has_votes):
        metrics.agreement.labels(model, controller).observe(state.votes.get(state.answer, 0) / votes)
    saved = estimate_saved_tokens(environment, plan.limits.max_branches, sum(reply.tokens.values()))
    if saved is not None and not plan.records_all:
        metrics.tokens_saved.labels(*by_beta).inc(max(0.0, saved))  # a counter cannot decrease, so there are two
        metrics.tokens_overspent.labels(*by_beta).inc(max(0.0, -saved))


def _count_signals(metrics: Metrics, signals: frozenset[Signal], rounds: Sequence[Round]) -> None:
    """Count facts that could have a signal: advances by tokens, and probes with an answer."""
    for fact in (fact for executed in rounds for fact in executed.facts):
        is_probe = isinstance(fact, Probed)
        signal = Signal.PROBES if is_probe else Signal.INTERVALS
        if signal in signals and fact.tokens and not (is_probe and fact.label is None):
            metrics.signals.labels(signal, str(fact.confidence is not None).lower()).inc()


def estimate_saved_tokens(environment: EpisodeEnvironment, width: int, spent: int) -> float | None:
    """Return an estimate of the tokens that self-consistency with `width` chains would have cost beyond `spent`.

    Chains are assumed to be as long as the finished branches on average. Shorter branches finish more often, so the
    estimate tends to be too low. The result is None if no branch has finished.
    """
    lengths = [len(branch.ids) for branch in environment.branches if branch.finish == "stop"]
    return width * sum(lengths) / len(lengths) - spent if lengths else None
