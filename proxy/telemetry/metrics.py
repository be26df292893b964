"""Prometheus metrics. Labels are few by construction: served models, controllers, β by its nearest alias, kinds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from controllers.builtin import ALIAS_BETAS
from proxy.errors import (
    UpstreamCircuitOpen,
    UpstreamError,
    UpstreamProtocolError,
    UpstreamRefused,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from proxy.telemetry.chain_lengths import ChainLengths
from proxy.types import CanaryMetric

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_BY_DIAL = ("model", "controller", "beta")
_SECONDS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

LOST: Final = ("full", "unwritable", "closed", "damaged")
CUT: Final = ("slow", "unread", "evicted", "refused")
ROLLED_BACK: Final = (*CanaryMetric, "quarantined")
"""Reasons that are shown before they happen: Prometheus sees no increase from nothing to one."""

_FAILURES: Final = {
    UpstreamUnreachable: "unreachable",
    UpstreamTimeout: "timeout",
    UpstreamCircuitOpen: "ejected",
    UpstreamProtocolError: "nonsense",
    UpstreamRefused: "refused",
}


def controller_label(controller: str) -> str:
    """A controller's name as a label: `asc@40` is `asc`, for clients may name any number."""
    plain = controller.partition("@")[0]
    return ALIAS_BETAS.get(plain, plain)


class Metrics:
    """One app's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.chain_lengths = ChainLengths()
        self.requests = Counter(
            "autotts_requests", "Requests by outcome.", ("model", "controller", "outcome"), registry=self.registry
        )
        self.tokens = Counter(
            "autotts_tokens",
            "Tokens by what they were spent on; those of requests no controller served: passed_through, or "
            "passed_through_estimated by a stream's events where it tells no usage.",
            (*_BY_DIAL, "kind"),
            registry=self.registry,
        )
        self.branches = Counter("autotts_branches", "Branches opened.", _BY_DIAL, registry=self.registry)
        self.rounds = Counter("autotts_rounds", "Rounds carried out.", _BY_DIAL, registry=self.registry)
        self.probe_answers = Counter(
            "autotts_probe_answers",
            "Probes by whether they gave an answer: true, false.",
            ("model", "controller", "answered"),
            registry=self.registry,
        )
        self.answer_limits = Counter(
            "autotts_answer_limits",
            "Answers that were compared by their form only, or not read, because a limit was reached: judge_episode, "
            "judge_tenant (seconds of math-verify), judge_busy (no process free), pattern_episode (CPU of a pattern).",
            ("limit",),
            registry=self.registry,
        )
        for limit in ("judge_episode", "judge_tenant", "judge_busy", "pattern_episode"):
            self.answer_limits.labels(limit)
        self.agreement = Histogram(
            "autotts_agreement",
            "Share of the votes that the answer had, in episodes that were answered and had two votes or more.",
            ("model", "controller"),
            buckets=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99, 1),
            registry=self.registry,
        )
        self.beta_not_applied = Counter(
            "autotts_beta_not_applied",
            "Requests with a β that passed through, by why no controller served them, and by where β came from.",
            ("model", "reason", "source"),
            registry=self.registry,
        )
        self.tokens_saved = Counter(
            "autotts_saved_tokens_estimate",
            "An estimate: tokens that episodes cost less than self-consistency with max_branches chains of their own "
            "finished branches' mean length. Of answered episodes with a finished branch.",
            _BY_DIAL,
            registry=self.registry,
        )
        self.tokens_overspent = Counter(
            "autotts_overspent_tokens_estimate",
            "The same estimate of those that cost more.",
            _BY_DIAL,
            registry=self.registry,
        )
        self.episode_stops = Counter(
            "autotts_stops", "Episodes by why they ended.", ("model", "controller", "reason"), registry=self.registry
        )
        self.request_seconds = Histogram(
            "autotts_request_seconds",
            "Seconds from request to reply, of requests a controller served.",
            ("model", "controller"),
            buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600),
            registry=self.registry,
        )
        by_response = ("path", "applied", "streamed")
        self.first_byte_seconds = Histogram(
            "autotts_first_byte_seconds",
            "Seconds from request to the first byte of the response's body. A stream begins before its controller.",
            by_response,
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.response_seconds = Histogram(
            "autotts_response_seconds",
            "Seconds from request to the last byte of the response, whoever answered.",
            by_response,
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.decision_seconds = Histogram(
            "autotts_decision_seconds",
            "Seconds a controller took to decide one round.",
            ("controller",),
            buckets=(1e-5, 1e-4, 1e-3, 5e-3, 1e-2, 5e-2, 0.25, 1),
            registry=self.registry,
        )
        self.fallbacks = Counter(
            "autotts_fallbacks",
            "Episodes the baseline decided in, by why the controller did not.",
            ("controller", "reason"),
            registry=self.registry,
        )
        self.slow_decisions = Counter(
            "autotts_sandbox_slow_decisions",
            "Decisions of sealed controllers that took longer than 50 ms.",
            ("controller",),
            registry=self.registry,
        )
        self.quarantined = Gauge(
            "autotts_controller_quarantined",
            "Controllers that are not asked any more.",
            ("controller",),
            registry=self.registry,
        )
        self.overspending = Gauge(
            "autotts_controller_overspending",
            "Controllers that were seen to cost far more than they were calibrated to.",
            ("controller",),
            registry=self.registry,
        )
        self.stage_requests = Counter(
            "autotts_stage_requests",
            "Requests that named no controller, by the stage of the one that was chosen.",
            ("stage", "controller"),
            registry=self.registry,
        )
        self.shadow_agreement = Counter(
            "autotts_shadow_agreement",
            "Rounds of the champion's, by whether the shadow would have played them so: true, false, or it failed. "
            "Episodes it had no time for: skipped.",
            ("controller", "agreed"),
            registry=self.registry,
        )
        self.rollbacks = Counter(
            "autotts_rollbacks", "Canaries that were rolled back unasked, by why.", ("reason",), registry=self.registry
        )
        self.sandbox_level = Gauge(
            "autotts_sandbox_level",
            "How controllers from files are held: 2 sealed, 1 not at all, 0 refused.",
            registry=self.registry,
        )
        self.records = Counter(
            "autotts_recorder_records",
            "Records by what became of them: stored; spilled to a file while the store was away; recovered from there.",
            ("outcome",),
            registry=self.registry,
        )
        self.records_lost = Counter(
            "autotts_recorder_lost", "Records that are lost, by why. Alarm on any.", ("reason",), registry=self.registry
        )
        self.recorder_queue = Gauge(
            "autotts_recorder_queue", "Records that wait in memory to be written.", registry=self.registry
        )
        self.recorder_queue_limit = Gauge(
            "autotts_recorder_queue_limit",
            "Records that may wait in memory; 0 if none is kept.",
            registry=self.registry,
        )
        self.spill_bytes = Gauge(
            "autotts_recorder_spill_bytes",
            "Bytes of records that wait in a file for the store.",
            registry=self.registry,
        )
        self.store_up = Gauge("autotts_recorder_store_up", "Whether the store takes records.", registry=self.registry)
        self.recordings = Counter(
            "autotts_recordings",
            "Episodes drawn to be run to their ends, by what came of it: recorded, failed, skipped.",
            ("outcome",),
            registry=self.registry,
        )
        self.unseen_tokens = Counter(
            "autotts_unseen_tokens",
            "Most tokens that requests which were cut can have generated unseen; nobody is billed for them.",
            ("model",),
            registry=self.registry,
        )
        self.recording_tokens = Counter(
            "autotts_recording_tokens",
            "Tokens spent on running episodes to their ends after their answers.",
            ("model",),
            registry=self.registry,
        )
        self.feedback = Counter(
            "autotts_feedback",
            "Feedback by its kind, and whether its client is content: true, false, unknown.",
            ("kind", "content"),
            registry=self.registry,
        )
        self.recording_drift = Gauge(
            "autotts_recording_drift",
            "How many of model, chat and probe template, interval and temperature are not the latest recordings' own.",
            ("model",),
            registry=self.registry,
        )
        self.refusals = Counter(
            "autotts_refusals", "Requests there was no room for, by why.", ("reason",), registry=self.registry
        )
        self.connections_cut = Counter(
            "autotts_connections_cut",
            "Connections of clients that were given up: slow (the request took too long), unread (the answer was not "
            "read), evicted (to make room for another), refused (there was no room).",
            ("reason",),
            registry=self.registry,
        )
        self.keys_broken = Gauge(
            "autotts_keys_broken",
            "Whether the file of keys cannot be used as it is now, so that the keys before it count. Alarm on it.",
            registry=self.registry,
        )
        self.queue = Gauge(
            "autotts_queue",
            "Requests that wait for their turn, by what serves them.",
            ("kind",),
            registry=self.registry,
        )
        self.load_factor = Gauge(
            "autotts_load_factor", "What the upstream's load leaves of β; 1 is all of it.", registry=self.registry
        )
        self.episodes_in_flight = Gauge("autotts_episodes_in_flight", "Episodes running now.", registry=self.registry)
        self.branches_in_flight = Gauge(
            "autotts_branches_in_flight", "Branches the upstream generates now.", registry=self.registry
        )
        self.calls_waiting = Gauge(
            "autotts_calls_waiting",
            "Calls to the upstream that wait for room among the branches in flight.",
            registry=self.registry,
        )
        self.upstream_events = Counter(
            "autotts_upstream_events",
            "Requests to the upstream that were repeated: retried; that had it left alone for a while: ejected.",
            ("event",),
            registry=self.registry,
        )
        self.upstream_up = Gauge("autotts_upstream_up", "Whether the upstream was well.", registry=self.registry)
        self.upstream_requests = Counter(
            "autotts_upstream_requests",
            "Generations asked of the upstream by what became of them: done, aborted, unreachable, timeout, nonsense, "
            "refused, ejected, failed.",
            ("model", "outcome"),
            registry=self.registry,
        )
        self.upstream_seconds = Histogram(
            "autotts_upstream_seconds",
            "Seconds the upstream took to generate, of requests that were done.",
            ("model",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        for reason in LOST:
            self.records_lost.labels(reason)
        for reason in CUT:
            self.connections_cut.labels(reason)
        for reason in ROLLED_BACK:
            self.rollbacks.labels(reason)

    @contextmanager
    def upstream_request(self, model: str) -> Iterator[None]:
        """Counts and times what is done within: one generation."""
        started, outcome = time.perf_counter(), "aborted"
        try:
            yield
            outcome = "done"
            self.upstream_seconds.labels(model).observe(time.perf_counter() - started)
        except UpstreamError as error:
            outcome = next((name for kind, name in _FAILURES.items() if isinstance(error, kind)), "failed")
            raise
        finally:
            self.upstream_requests.labels(model, outcome).inc()

    def exposition(self) -> bytes:
        """The exposition page."""
        return generate_latest(self.registry)
