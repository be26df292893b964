"""What Prometheus sees. Labels are few by construction: served models, controllers, β to one decimal, kinds."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_BY_DIAL = ("model", "controller", "beta")


class Metrics:
    """One app's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "autotts_requests", "Requests by outcome.", ("model", "controller", "outcome"), registry=self.registry
        )
        self.tokens = Counter(
            "autotts_tokens", "Tokens by what they were spent on.", (*_BY_DIAL, "kind"), registry=self.registry
        )
        self.branches = Counter("autotts_branches", "Branches opened.", _BY_DIAL, registry=self.registry)
        self.rounds = Counter("autotts_rounds", "Rounds carried out.", _BY_DIAL, registry=self.registry)
        self.stops = Counter(
            "autotts_stops", "Episodes by why they ended.", ("model", "controller", "reason"), registry=self.registry
        )
        self.seconds = Histogram(
            "autotts_request_seconds",
            "Seconds from request to reply, of requests a controller served.",
            ("model", "controller"),
            buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600),
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
        self.slow = Counter(
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
        self.recorded = Counter(
            "autotts_recorder_records",
            "Records by what became of them: stored; spilled to a file while the store was away; recovered from there.",
            ("outcome",),
            registry=self.registry,
        )
        self.lost = Counter(
            "autotts_recorder_lost", "Records that are lost, by why. Alarm on any.", ("reason",), registry=self.registry
        )
        self.recorder_queue = Gauge(
            "autotts_recorder_queue", "Records that wait in memory to be written.", registry=self.registry
        )
        self.spill_bytes = Gauge(
            "autotts_recorder_spill_bytes",
            "Bytes of records that wait in a file for the store.",
            registry=self.registry,
        )
        self.store_up = Gauge("autotts_recorder_store_up", "Whether the store takes records.", registry=self.registry)
        self.finished = Counter(
            "autotts_recordings",
            "Episodes drawn to be run to their ends, by what came of it: recorded, failed, skipped.",
            ("outcome",),
            registry=self.registry,
        )
        self.recording_tokens = Counter(
            "autotts_recording_tokens",
            "Tokens spent on running episodes to their ends after their answers.",
            ("model",),
            registry=self.registry,
        )
        self.feedback = Counter("autotts_feedback", "Feedback by its kind.", ("kind",), registry=self.registry)
        self.drift = Gauge(
            "autotts_recording_drift",
            "How many of chat template, probe template and interval are not what the latest recordings were made with.",
            ("model",),
            registry=self.registry,
        )
        self.in_flight = Gauge("autotts_episodes_in_flight", "Episodes running now.", registry=self.registry)
        self.upstream_up = Gauge("autotts_upstream_up", "Whether the upstream was well.", registry=self.registry)

    def page(self) -> bytes:
        """The exposition page."""
        return generate_latest(self.registry)
