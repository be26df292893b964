"""OpenTelemetry metrics under the names of the semantic conventions for generative AI, exported to a collector.

They are on if OTEL_EXPORTER_OTLP_ENDPOINT is set, the extra `otel` is installed, and OTEL_METRICS_EXPORTER is not
`none`. The proxy is a server to its clients (`gen_ai.server.*`) and a client of its upstream (`gen_ai.client.*`).
Prometheus gets the proxy's own metrics in any case, which say more.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

from controllers import Action
from discovery.errors import install_hint
from proxy.telemetry.tracing import (
    OPERATIONS,
    SERVICE,
    NoopTracer,
    R,
    conventional_attributes,
    is_exported,
    service_name,
)
from proxy.types import Call, Plan
from proxy.upstream_observer import ObservedRequest

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics import MeterProvider

logger = logging.getLogger(__name__)

SECONDS: Final = [0.01 * 2**power for power in range(14)]
"""Upper bounds of buckets for durations, as the conventions name them."""
TOKENS: Final = [4**power for power in range(14)]
"""Upper bounds of buckets for tokens, as the conventions name them."""


class MeteringTracer(NoopTracer):
    """Tracer that measures requests and upstream requests, and lets another tracer make the spans."""

    def __init__(self, spans: NoopTracer, provider: MeterProvider) -> None:
        meter = provider.get_meter(SERVICE)
        self._spans = spans
        self._provider = provider
        self._served = meter.create_histogram(
            "gen_ai.server.request.duration",
            unit="s",
            description="Seconds from a request to the end of its response.",
            explicit_bucket_boundaries_advisory=SECONDS,
        )
        self._called = meter.create_histogram(
            "gen_ai.client.operation.duration",
            unit="s",
            description="Seconds that a generation request to the upstream took.",
            explicit_bucket_boundaries_advisory=SECONDS,
        )
        self._tokens = meter.create_histogram(
            "gen_ai.client.token.usage",
            unit="{token}",
            description="Tokens of the prompt and of all outputs of a generation request to the upstream.",
            explicit_bucket_boundaries_advisory=TOKENS,
        )
        self._request: ContextVar[dict[str, Any] | None] = ContextVar("attributes of the request", default=None)

    def continue_trace(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        self._spans.continue_trace(headers)

    async def plan(self, path: str, model: str, leases: ExitStack, work: Coroutine[Any, Any, Plan]) -> Plan:
        started, about = time.perf_counter(), conventional_attributes(OPERATIONS[path], model)
        leases.callback(lambda: self._served.record(time.perf_counter() - started, about))
        self._request.set(about)
        with _naming_errors(about):
            return await self._spans.plan(path, model, leases, work)

    async def episode(self, plan: Plan, work: Coroutine[Any, Any, R]) -> R:
        with _naming_errors(self._request.get() or {}):
            return await self._spans.episode(plan, work)

    def round(self, actions: Sequence[Action]) -> AbstractContextManager[object]:
        return self._spans.round(actions)

    @contextmanager
    def generation(self, model: str, call: Call) -> Iterator[None]:
        started, about = time.perf_counter(), conventional_attributes("text_completion", model)
        try:
            with self._spans.generation(model, call), _naming_errors(about):
                yield
        finally:
            self._called.record(time.perf_counter() - started, about)
            usage = conventional_attributes("text_completion", model)
            generated = sum(len(output.ids) for output in call.outputs)
            self._tokens.record(call.prompt_tokens, {**usage, "gen_ai.token.type": "input"})
            self._tokens.record(generated, {**usage, "gen_ai.token.type": "output"})

    def request(self, method: str, path: str) -> ObservedRequest | None:
        return self._spans.request(method, path)

    def headers(self) -> Mapping[str, str]:
        return self._spans.headers()

    async def close(self) -> None:
        await asyncio.gather(self._spans.close(), asyncio.to_thread(self._provider.shutdown))


@contextmanager
def _naming_errors(about: dict[str, Any]) -> Iterator[None]:
    """Add the type of an exception of the body to attributes. Its message may hold a client's text."""
    try:
        yield
    except BaseException as error:
        about["error.type"] = type(error).__name__
        raise


def with_metrics(tracer: NoopTracer) -> NoopTracer:
    """Return a tracer that also exports metrics, if OpenTelemetry's environment variables ask for it."""
    if not is_exported("METRICS"):
        return tracer
    try:
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
        from opentelemetry.sdk.resources import Resource
    except ImportError as error:
        logger.warning("metrics are not exported: %s is missing; run %s", error.name, install_hint("otel"))
        return tracer
    resource = Resource.create({"service.name": service_name()})
    reader = PeriodicExportingMetricReader(OTLPMetricExporter())
    return MeteringTracer(tracer, MeterProvider([reader], resource=resource, shutdown_on_exit=False))
