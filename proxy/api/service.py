"""Components that the endpoints share, built once per app."""

from __future__ import annotations

import aiohttp

from discovery.evaluation.calibration import Calibrations
from discovery.store.usage.reader import UsageReader
from proxy.admission.auth import Authenticator
from proxy.admission.load_shedding import LoadShedding
from proxy.admission.request_slot import RequestSlots
from proxy.admission.shared_limits import create_limits
from proxy.admission.usage_tally import KEY_KINDS
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
from proxy.telemetry.label_sets import LabelSets
from proxy.telemetry.metrics import Metrics
from proxy.telemetry.retirement import Retirement, RetirementTask
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
        self.bodies = BodyReader(
            settings.max_body_bytes, settings.max_bodies_bytes, self.metrics.refusals.labels("bodies_full").inc
        )
        self.limits = create_limits(settings, self.metrics)
        self.request_slots = RequestSlots(settings, self.metrics, self.limits)
        self.episode_log = EpisodeLog(engine, settings, self.metrics, self.request_slots, self.drift)
        self.usage = UsageReader(settings.store) if self.episode_log.writer.is_on and settings.store else None
        self.load_shedding = LoadShedding(engine, settings, self.metrics)
        self.recent = RecentRequests()
        self.models = ModelDirectory(engine, settings.model)
        self.betas = BetaDefaults(settings.beta, calibrations, self.controllers.champion)
        self.served: list[str] = []  # ids of models, as of the latest health check
        self._model_labels = LabelSets(self.metrics, "model")
        self._retired_models = Retirement(settings.retired_metrics_s)
        self._key_labels = LabelSets(self.metrics, "key")
        self._retired_keys = Retirement(settings.retired_metrics_s)
        self.retirement = RetirementTask(
            settings.retired_metrics_s,
            self.controllers.forget_retired,
            self._forget_retired_models,
            self._forget_removed_keys,
            self._show_keys,
        )
        self._bind_gauges()
        self._show_keys()

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

    def _forget_retired_models(self) -> None:
        """Remove what is kept of models that the upstream serves no longer."""
        if not self.served:
            return  # the upstream is away, and its models may come back with it
        known = self._model_labels.values().union(self.metrics.chain_lengths.models, self.unapplied.models)
        retired = self._retired_models.retired(known, {"", *self.served})  # empty: requests that name no model
        self._model_labels.remove(retired)
        for model in retired:
            self.metrics.chain_lengths.forget(model)
            self.unapplied.forget(model)
            self.controllers.forget_model(model)

    def _show_keys(self) -> None:
        """Show the series of every key from 0 on, because Prometheus' `increase` leaves out the first value of each."""
        if self.settings.key_metrics and (keyring := self.authenticator.keyring) is not None:
            for key in keyring.keys:
                for kind in KEY_KINDS:
                    self.metrics.count_key_tokens(key.name, kind, 0)

    def _forget_removed_keys(self) -> None:
        """Remove the sums and metrics of keys that have been removed from the key file."""
        if (keyring := self.authenticator.keyring) is not None:
            names = {key.name for key in keyring.keys}
            self.request_slots.tally.keep(names)
            self._key_labels.remove(self._retired_keys.retired(self._key_labels.values(), names))

    async def _check_upstream(self) -> bool:
        """Check whether the upstream is healthy and serves a model, and return the result."""
        try:
            is_healthy = await self.engine.is_healthy()
            self.served = [model.id for model in await self.engine.models(is_check=True)] if is_healthy else []
        except UpstreamError:
            self.served = []
        return bool(self.served)
