"""What Prometheus is told of an episode that is over."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from controllers import Probed, Round, State, Stop
from proxy.environment.live_environment import LiveEnvironment
from proxy.telemetry.metrics import Metrics, controller_label
from proxy.types import Plan, Reply


def count_episode(
    metrics: Metrics,
    plan: Plan,
    environment: LiveEnvironment,
    state: State,
    rounds: Sequence[Round],
    reply: Reply | None,
    outcome: str,
) -> None:
    """Count an episode that ended as `outcome`: answered, failed, disconnected or, because the proxy ends, draining;
    `reply` is None unless answered."""
    model, controller = plan.prompt.model, controller_label(plan.controller)
    by_beta = (model, controller, plan.beta.bucket)
    metrics.requests.labels(model, controller, outcome).inc()
    metrics.episode_stops.labels(model, controller, state.stop or outcome).inc()
    kinds = reply.tokens if reply is not None else {"aborted": environment.meter.billed}
    for kind, tokens in kinds.items():
        metrics.tokens.labels(*by_beta, kind).inc(tokens)
    metrics.unseen_tokens.labels(model).inc(environment.meter.most_unseen)
    metrics.branches.labels(*by_beta).inc(len(environment.branches))
    metrics.rounds.labels(*by_beta).inc(state.rounds)
    metrics.chain_lengths.observe(model, plan.limits.interval, environment.branches)
    answered = Counter(fact.label is not None for one in rounds for fact in one.facts if isinstance(fact, Probed))
    for gave, times in answered.items():
        metrics.probe_answers.labels(model, controller, str(gave).lower()).inc(times)
    if reply is None:
        return
    metrics.request_seconds.labels(model, controller).observe(time.monotonic() - plan.started)
    if state.stop is not Stop.ANSWERED:
        return
    votes = sum(state.votes.values())
    if state.answer is not None and votes > 1:
        metrics.agreement.labels(model, controller).observe(state.votes.get(state.answer, 0) / votes)
    saved = estimate_saved_tokens(environment, plan.limits.max_branches, sum(reply.tokens.values()))
    if saved is not None and not plan.records_all:
        metrics.tokens_saved.labels(*by_beta).inc(max(0.0, saved))  # both series exist, so that one can be subtracted
        metrics.tokens_overspent.labels(*by_beta).inc(max(0.0, -saved))


def estimate_saved_tokens(environment: LiveEnvironment, width: int, spent: int) -> float | None:
    """An estimate of what self-consistency with `width` chains would have cost more than `spent`.

    Its chains are taken to be as long as these branches are on average that came to their ends, though those are the
    shorter ones: the estimate is low rather than high. None if there is none.
    """
    lengths = [len(branch.ids) for branch in environment.branches if branch.finish == "stop"]
    return width * sum(lengths) / len(lengths) - spent if lengths else None
