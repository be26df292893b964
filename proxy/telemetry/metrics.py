"""Prometheus metrics. The class attributes of `Metrics` are the table of all metrics.

Every label has few values: served models, controllers, the alias nearest to β, and fixed kinds. Those of models and
controllers that serve no longer are removed after a while (`retirement.py`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from controllers.builtin import ALIASES
from proxy.errors import DeadlinePassed, UpstreamError
from proxy.telemetry.chain_lengths import ChainLengths
from proxy.telemetry.metric_row import M, MetricRow
from proxy.telemetry.upstream_outcome import outcome_of_failure, outcome_of_response
from proxy.types import CanaryMetric

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_BY_BETA: Final = ("model", "controller", "beta")
_BY_RESPONSE: Final = ("path", "applied", "streamed")
_SECONDS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


def controller_label(controller: str) -> str:
    """Return a controller's name as a label. `asc@40` becomes `asc`, because clients may send any number."""
    plain = controller.partition("@")[0]
    return ALIASES.get(plain, plain)


class Metrics:
    """The metrics of one app, in a registry of their own."""

    requests = MetricRow(
        Counter,
        "autotts_requests",
        "Requests by outcome: answered, passed_through, failed, disconnected, draining (cut by a shutdown), denied "
        "(401, 403), refused (other 4xx). 429, and 503 without shared limits, count in autotts_refusals_total only.",
        ("model", "controller", "outcome"),
    )
    tokens = MetricRow(
        Counter,
        "autotts_tokens",
        "Tokens by what they were spent on. Forwarded requests count as passed_through, or as "
        "passed_through_estimated (by the events of a stream) if the reply reports no usage.",
        (*_BY_BETA, "kind"),
    )
    key_tokens = MetricRow(
        Counter,
        "autotts_key_tokens",
        "With `AUTOTTS_KEY_METRICS`, tokens by the name of the key, by kind: generated and prompt (of requests that "
        "controllers served), passed_through and passed_through_prompt (where the reply reports its usage).",
        ("key", "kind"),
    )
    branches = MetricRow(Counter, "autotts_branches", "Branches opened.", _BY_BETA)
    rounds = MetricRow(Counter, "autotts_rounds", "Rounds executed.", _BY_BETA)
    probe_answers = MetricRow(
        Counter,
        "autotts_probe_answers",
        "Probes, by whether they gave an answer: true or false.",
        ("model", "controller", "answered"),
    )
    answer_limits = MetricRow(
        Counter,
        "autotts_answer_limits",
        "Answers compared only as text, or not read, because a limit was reached: judge_episode or judge_tenant "
        "(seconds of math-verify), judge_busy (no free process), pattern_episode (CPU time of a pattern).",
        ("limit",),
        initial=("judge_episode", "judge_tenant", "judge_busy", "pattern_episode"),
    )
    agreement = MetricRow(
        Histogram,
        "autotts_agreement",
        "Share of the votes for the winning answer, in answered episodes with at least two votes.",
        ("model", "controller"),
        buckets=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99, 1),
    )
    low_agreement = MetricRow(
        Counter,
        "autotts_low_agreement",
        "Replies with a smaller share of the votes than min_agreement, by what followed: answered (nothing), flagged, "
        "escalated (continuing at a larger β gave enough) or escalated_flagged (it did not).",
        ("model", "controller", "outcome"),
    )
    judge_calls = MetricRow(
        Counter,
        "autotts_judge_calls",
        "Requests whose replies the model compares, by outcome: chosen, unreadable (it named none), failed (upstream "
        "error), no_room (under the cap or in the context), late (deadline), skipped (the episode had ended early). "
        "Unless chosen, word overlap decided.",
        ("model", "outcome"),
    )
    beta_not_applied = MetricRow(
        Counter,
        "autotts_beta_not_applied",
        "Requests with β that were forwarded without a controller, by reason and by where β was set.",
        ("model", "reason", "source"),
    )
    tokens_saved = MetricRow(
        Counter,
        "autotts_saved_tokens_estimate",
        "Estimated tokens that episodes cost less than self-consistency with max_branches chains, each as long as the "
        "mean of the episode's finished branches. Counts answered episodes with a finished branch.",
        _BY_BETA,
    )
    tokens_overspent = MetricRow(
        Counter,
        "autotts_overspent_tokens_estimate",
        "Estimated tokens that episodes cost more than self-consistency with max_branches chains.",
        _BY_BETA,
    )
    episode_stops = MetricRow(Counter, "autotts_stops", "Episodes by stop reason.", ("model", "controller", "reason"))
    request_seconds = MetricRow(
        Histogram,
        "autotts_request_seconds",
        "Seconds from request to reply, for requests served by a controller.",
        ("model", "controller"),
        buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600),
    )
    first_byte_seconds = MetricRow(
        Histogram,
        "autotts_first_byte_seconds",
        "Seconds from request to the first byte of the response body. A stream starts before its controller does.",
        _BY_RESPONSE,
        buckets=_SECONDS,
    )
    response_seconds = MetricRow(
        Histogram,
        "autotts_response_seconds",
        "Seconds from request to the last byte of the response, for all requests.",
        _BY_RESPONSE,
        buckets=_SECONDS,
    )
    decision_seconds = MetricRow(
        Histogram,
        "autotts_decision_seconds",
        "Seconds that a controller took to decide one round.",
        ("controller",),
        buckets=(1e-5, 1e-4, 1e-3, 5e-3, 1e-2, 5e-2, 0.25, 1),
    )
    fallbacks = MetricRow(
        Counter,
        "autotts_fallbacks",
        "Episodes in which the baseline took over, by the reason why the controller did not decide.",
        ("controller", "reason"),
    )
    slow_decisions = MetricRow(
        Counter,
        "autotts_sandbox_slow_decisions",
        "Decisions of sandboxed controllers that took longer than 50 ms.",
        ("controller",),
    )
    quarantined = MetricRow(
        Gauge, "autotts_controller_quarantined", "Whether a controller is quarantined: 1 or 0.", ("controller",)
    )
    overspending = MetricRow(
        Gauge,
        "autotts_controller_overspending",
        "Set to 1 when a controller costs far more than its calibration.",
        ("controller",),
    )
    stage_requests = MetricRow(
        Counter,
        "autotts_stage_requests",
        "Requests that named no controller, by the rollout stage that served them on a model.",
        ("model", "stage", "controller"),
    )
    shadow_agreement = MetricRow(
        Counter,
        "autotts_shadow_agreement",
        "Rounds of the champion, by whether the shadow would have decided the same: true, false or failed. An "
        "episode's rounds after the first difference are not counted. Episodes that the shadow had no time to compare "
        "count as skipped.",
        ("controller", "agreed"),
    )
    registry_version = MetricRow(
        Gauge, "autotts_registry_version", "Version of the registry that this process follows; 0 without changes."
    )
    registry_unreadable = MetricRow(
        Gauge, "autotts_registry_unreadable", "Whether the registry or a part cannot be read now: 1 or 0. Alert on 1."
    )
    rollbacks = MetricRow(
        Counter,
        "autotts_rollbacks",
        "Canaries that were rolled back automatically, by reason.",
        ("reason",),
        initial=(*CanaryMetric, "quarantined"),
    )
    sandbox_level = MetricRow(
        Gauge,
        "autotts_sandbox_level",
        "How controllers from files run: 2 sandboxed, 1 not sandboxed, 0 refused.",
    )
    records = MetricRow(
        Counter,
        "autotts_recorder_records",
        "Records by outcome: stored, spilled (to a file while the store is unavailable), recovered (from that file).",
        ("outcome",),
    )
    records_lost = MetricRow(
        Counter,
        "autotts_recorder_lost",
        "Lost records by reason. Alert on any.",
        ("reason",),
        initial=("full", "unwritable", "closed", "damaged"),
    )
    recorder_queue = MetricRow(Gauge, "autotts_recorder_queue", "Records in memory that are not written yet.")
    recorder_queue_limit = MetricRow(
        Gauge, "autotts_recorder_queue_limit", "Maximum number of records in memory; 0 if recording is off."
    )
    spill_bytes = MetricRow(Gauge, "autotts_recorder_spill_bytes", "Bytes of records in files that wait for the store.")
    store_up = MetricRow(Gauge, "autotts_recorder_store_up", "Whether the store accepts records: 1 or 0.")
    recordings = MetricRow(
        Counter,
        "autotts_recordings",
        "Episodes sampled for recording, whose branches are completed in the background, by outcome: recorded, failed, "
        "skipped.",
        ("outcome",),
    )
    unseen_tokens = MetricRow(
        Counter,
        "autotts_unseen_tokens",
        "Upper bound on tokens that requests had generated but not delivered when they were cut. They are not charged "
        "to any budget. vLLM generates a few more until it notices.",
        ("model",),
    )
    recording_tokens = MetricRow(
        Counter,
        "autotts_recording_tokens",
        "Tokens spent on completing branches for recordings, after the answer was sent.",
        ("model",),
    )
    feedback = MetricRow(
        Counter,
        "autotts_feedback",
        "Feedback, by kind and by whether the client was satisfied: true, false or unknown.",
        ("kind", "content"),
    )
    recording_drift = MetricRow(
        Gauge,
        "autotts_recording_drift",
        "How many of model, chat template, probe template, interval and branch temperature differ from the latest "
        "recordings.",
        ("model",),
    )
    refusals = MetricRow(Counter, "autotts_refusals", "Requests refused for lack of capacity, by reason.", ("reason",))
    connections_cut = MetricRow(
        Counter,
        "autotts_connections_cut",
        "Client connections closed by the server: slow (the request took too long), unread (the response was not "
        "read), evicted (to make room for another), refused (too many are open).",
        ("reason",),
        initial=("slow", "unread", "evicted", "refused"),
    )
    limits_away = MetricRow(
        Gauge,
        "autotts_limits_away",
        "Whether the shared limits (`AUTOTTS_LIMITS`) cannot be reached now: 1 or 0. Alert on 1.",
    )
    limits_seconds = MetricRow(
        Histogram,
        "autotts_limits_seconds",
        "Seconds that a call of the shared limits took, by script: reserve, enter, settle, renew, usage, ping.",
        ("script",),
        buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1),
    )
    keys_broken = MetricRow(
        Gauge,
        "autotts_keys_broken",
        "Whether the key file is invalid now, so that the previous keys stay in use: 1 or 0. Alert on 1.",
    )
    queue = MetricRow(
        Gauge,
        "autotts_queue",
        "Requests that wait for a request slot, by kind: episode, passed (forwarded requests).",
        ("kind",),
    )
    load_factor = MetricRow(Gauge, "autotts_load_factor", "Factor applied to β under load; 1 without load shedding.")
    episodes_in_flight = MetricRow(Gauge, "autotts_episodes_in_flight", "Episodes that are running.")
    branches_in_flight = MetricRow(Gauge, "autotts_branches_in_flight", "Branches that the upstream is generating.")
    calls_waiting = MetricRow(Gauge, "autotts_calls_waiting", "Calls to the upstream that wait for free branch slots.")
    signals = MetricRow(
        Counter,
        "autotts_signals",
        "Facts of episodes that need signals of confidence, by signal: intervals, probes; and by whether it was known.",
        ("signal", "known"),
    )
    upstream_events = MetricRow(
        Counter,
        "autotts_upstream_events",
        "Events of the upstream client: retried (a request was sent again), ejected (the circuit breaker opened).",
        ("event",),
    )
    upstream_up = MetricRow(
        Gauge, "autotts_upstream_up", "Whether the latest health check of the upstream passed: 1 or 0."
    )
    upstream_circuit_open = MetricRow(
        Gauge,
        "autotts_upstream_circuit_open",
        "Whether the circuit breaker refuses requests: 1 or 0. With several upstreams, whether all of theirs do.",
    )
    upstream_requests = MetricRow(
        Counter,
        "autotts_upstream_requests",
        "Generation requests to the upstream, for controllers and passed through, by outcome: done, aborted, "
        "unreachable, timeout, broken (the connection), nonsense (an invalid reply), refused (an invalid request), "
        "ejected (the circuit breaker is open), failed. Requests that fail in a call before their first generation "
        "count too, with an empty model.",
        ("model", "outcome"),
    )
    upstream_seconds = MetricRow(
        Histogram,
        "autotts_upstream_seconds",
        "Seconds that the upstream took, for completed generation requests of controllers.",
        ("model",),
        buckets=_SECONDS,
    )

    replica_up = MetricRow(
        Gauge,
        "autotts_replica_up",
        "Whether the latest health check of a replica passed, if there are several upstreams: 1 or 0.",
        ("replica",),
    )
    replica_circuit_open = MetricRow(
        Gauge,
        "autotts_replica_circuit_open",
        "Whether a replica's circuit breaker refuses requests: 1 or 0.",
        ("replica",),
    )
    replica_branches = MetricRow(
        Gauge,
        "autotts_replica_branches",
        "Branches that a replica generates or that wait for it; a request passed through counts as one.",
        ("replica",),
    )
    replica_moves = MetricRow(
        Counter,
        "autotts_replica_moves",
        "Calls that left a replica for another, or were not sent there, by reason: spilled (too much load), failed.",
        ("replica", "reason"),
    )

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.chain_lengths = ChainLengths()
        for name, row in vars(Metrics).items():
            if isinstance(row, MetricRow):
                self.__dict__[name] = row.create(self.registry)
        self.children: dict[tuple[object, ...], Any] = {}

    def child(self, metric: M, *values: str) -> M:
        """Return a metric's child for label values, like `labels` but faster.

        Only `LabelSets` removes it. Callers use it at once, because what is counted on a removed child is lost.
        """
        key = (metric, *values)
        child: M | None = self.children.get(key)
        if child is None:
            child = self.children[key] = metric.labels(*values)
        return child

    @contextmanager
    def upstream_request(self, model: str) -> Iterator[None]:
        """Count and time one generation request to the upstream."""
        started, outcome = time.perf_counter(), "aborted"
        try:
            yield
            outcome = "done"
            self.upstream_seconds.labels(model).observe(time.perf_counter() - started)
        except UpstreamError as error:
            outcome = outcome_of_failure(error)
            error.is_upstream_counted = True
            raise
        finally:
            self.upstream_requests.labels(model, outcome).inc()

    def count_key_tokens(self, key: str, kind: str, tokens: int) -> None:
        """Count tokens of a configured key. With 0 tokens, its series is shown if it was not."""
        self.child(self.key_tokens, key, kind).inc(tokens)

    def count_passed_through(self, model: str, status: int | None, error: BaseException | None) -> None:
        """Count one generation request that was passed through to the upstream."""
        if isinstance(error, UpstreamError):
            error.is_upstream_counted = True
        self.child(self.upstream_requests, model, outcome_of_response(status, error)).inc()

    def count_early_failure(self, error: UpstreamError) -> None:
        """Count a generation request that failed with `error`, unless a request to the upstream was counted for it."""
        if not (error.is_upstream_counted or isinstance(error, DeadlinePassed)):
            self.upstream_requests.labels("", outcome_of_failure(error)).inc()

    def exposition(self) -> bytes:
        """Return all metrics in the Prometheus text format."""
        return generate_latest(self.registry)
