"""Components that the endpoints share, built once per app."""

from __future__ import annotations

import aiohttp

from discovery.evaluation.calibration import Calibrations
from discovery.store.usage.reader import UsageReader
from proxy.admission.auth import Authenticator
from proxy.admission.load_shedding import LoadShedding
from proxy.admission.request_slot import RequestSlots
from proxy.admission.shared_limits import create_limits
from proxy.api.beta_defaults import BetaDefaults
from proxy.api.model_directory import ModelDirectory
from proxy.environment.answer_reader import GraderPool
from proxy.errors import UpstreamError
from proxy.http.origins import PageGuard
from proxy.http.request_body import BodyReader
from proxy.passthrough.request_ids import RecentRequests
from proxy.passthrough.unapplied_beta import UnappliedBeta
from proxy.recording.episode_log import EpisodeLog
from proxy.recording.template_drift import TemplateDrift
from proxy.rollout.controller_manager import ControllerManager
from proxy.settings import Settings
from proxy.telemetry import otel_metrics, tracing
from proxy.telemetry.metrics import Metrics
from proxy.telemetry.worker_metrics import WorkerMetrics, WorkerPlace
from proxy.upstream.circuit_breaker import BreakerState
from proxy.upstream.fleet.factory import create_upstream
from proxy.upstream.health_monitor import HealthMonitor


class Service:
    """Components of one app: the upstream client, settings, metrics, limits, controllers and records."""

    def __init__(
        self,
        settings: Settings,
        session: aiohttp.ClientSession,
        calibrations: Calibrations,
        authenticator: Authenticator,
        place: WorkerPlace | None = None,
    ) -> None:
        self.settings = settings
        self.authenticator = authenticator
        self.metrics = Metrics()
        self.worker_metrics = WorkerMetrics(self.metrics, place)
        self.tracer = otel_metrics.with_metrics(tracing.create_tracer())
        engine = self.engine = create_upstream(
            settings,
            session,
            self.metrics,
            observer=tracing.TelemetryObserver(self.metrics, self.tracer),
            on_event=self._count_upstream_event,
        )
        self.health_monitor = HealthMonitor(lambda: engine.addresses, self._check_upstream, self.metrics)
        self.unapplied = UnappliedBeta(self.metrics, is_required=settings.required)
        self.grading = GraderPool(self.metrics)
        self.controllers = ControllerManager(settings, self.metrics, calibrations)
        self.drift = TemplateDrift(engine, settings, self.metrics)
        self.guard = PageGuard(settings)
        self.bodies = BodyReader(settings.max_body_bytes, settings.max_bodies_bytes)
        self.limits = create_limits(settings, self.metrics)
        self.request_slots = RequestSlots(settings, self.metrics, self.limits)
        self.episode_log = EpisodeLog(engine, settings, self.metrics, self.request_slots, self.drift)
        self.usage = UsageReader(settings.store) if self.episode_log.writer.is_on and settings.store else None
        self.load_shedding = LoadShedding(engine, settings, self.metrics)
        self.recent = RecentRequests()
        self.models = ModelDirectory(engine, settings.model)
        self.betas = BetaDefaults(settings.beta, calibrations, self.controllers.champion)
        self.served: list[str] = []  # ids of models, as of the latest health check
        self._bind_gauges()

    def _bind_gauges(self) -> None:
        """Bind the gauges that are computed when Prometheus reads them."""
        engine, keyring = self.engine, self.authenticator.keyring
        self.metrics.branches_in_flight.set_function(lambda: engine.branches_in_flight)
        self.metrics.calls_waiting.set_function(lambda: engine.calls_waiting)
        self.metrics.upstream_circuit_open.set_function(lambda: engine.circuit_breaker != BreakerState.CLOSED.value)
        if keyring is not None:
            self.metrics.keys_broken.set_function(lambda: keyring.is_broken)

    def _count_upstream_event(self, event: str) -> None:
        """Count an upstream event, and schedule a check of the chat templates: the upstream may have been replaced."""
        self.metrics.upstream_events.labels(event).inc()
        self.drift.report_upstream_failure()

    async def _check_upstream(self) -> bool:
        """Check whether the upstream is healthy and serves a model, and return the result."""
        try:
            is_healthy = await self.engine.is_healthy()
            self.served = [model.id for model in await self.engine.models(is_check=True)] if is_healthy else []
        except UpstreamError:
            self.served = []
        return bool(self.served)
