"""OpenTelemetry tracing: a span for each episode, round and upstream request, exported to a collector.

Tracing is on if OTEL_EXPORTER_OTLP_ENDPOINT is set and the extra `otel` is installed. Otherwise OpenTelemetry is not
imported. Spans hold numbers and names, never texts of clients or models. Trace headers are sent to the upstream, so
that vLLM's own spans (`--otlp-traces-endpoint`) belong to the same trace.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import Counter
from collections.abc import Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from controllers import Action
from discovery.errors import install_hint
from proxy.telemetry.metrics import Metrics, controller_label
from proxy.types import Call, Plan
from proxy.upstream_observer import ObservedRequest, UpstreamObserver

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span


class RequestResult(Protocol):
    """The result of a request with one prompt or several."""

    @property
    def finish_reasons(self) -> list[str]:
        """Finish reason of each text."""

    @property
    def usage(self) -> Mapping[str, Any]:
        """OpenAI's `usage` object."""

    @property
    def tts(self) -> Mapping[str, Any]:
        """The `tts` object of the response."""


R = TypeVar("R", bound=RequestResult)

logger = logging.getLogger(__name__)

SERVICE: Final = "autotts-proxy"
OPERATIONS: Final = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/responses": "chat",  # as the conventions say; `openai.api.type` tells them apart
    "/v1/embeddings": "embeddings",
}
"""Operation names of paths in the semantic conventions for generative AI."""
API_TYPES: Final = {"/v1/chat/completions": "chat_completions", "/v1/responses": "responses"}


class NoopTracer:
    """Tracer that records nothing, and the interface of all tracers."""

    def continue_trace(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Continue the trace that a request's headers name, in the current task."""

    def plan(self, _: str, model: str, leases: ExitStack, work: Coroutine[Any, Any, Plan]) -> Coroutine[Any, Any, Plan]:
        """Await `work`, which plans an episode on `model`, within a new span for the episode.

        The span stays current in the task and ends when `leases` is closed.
        """
        return work

    def episode(self, _: Plan, work: Coroutine[Any, Any, R]) -> Coroutine[Any, Any, R]:
        """Await `work`, which serves a planned episode, within the span of its plan."""
        return work

    def round(self, _: Sequence[Action]) -> AbstractContextManager[object]:
        """Return a span for the execution of a round."""
        return nullcontext()

    def generation(self, model: str, call: Call) -> AbstractContextManager[object]:
        """Return a span for a generation request to the upstream."""
        return nullcontext()

    def request(self, method: str, path: str) -> ObservedRequest | None:
        """Start a span for another upstream request. Return its headers and a callback that ends it, or None."""
        return None

    def headers(self) -> Mapping[str, str]:
        """Return the headers that make the receiver's spans children of the current span."""
        return {}

    async def close(self) -> None:
        """Export the remaining spans."""


class OtelTracer(NoopTracer):
    """Tracer over an OpenTelemetry tracer provider."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry import context, trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer(SERVICE)
        self._kinds = trace.SpanKind
        self._failed = trace.Status(trace.StatusCode.ERROR)
        self._attach = context.attach
        self._extract = TraceContextTextMapPropagator().extract
        self._inject = TraceContextTextMapPropagator().inject
        self._set_span = trace.set_span_in_context
        self._use_span = trace.use_span
        self._current_span = trace.get_current_span

    def continue_trace(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        sent = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers if name.startswith(b"trace")}
        if sent:
            self._attach(self._extract(sent))

    async def plan(self, path: str, model: str, leases: ExitStack, work: Coroutine[Any, Any, Plan]) -> Plan:
        name = OPERATIONS[path]
        attributes = {**conventional_attributes(name, model), "url.path": path}
        if path in API_TYPES:
            attributes["openai.api.type"] = API_TYPES[path]
        try:
            span = self._tracer.start_span(f"{name} {model}", kind=self._kinds.SERVER, attributes=attributes)
            leases.callback(span.end)
            self._attach(self._set_span(span))
            with self._failing(span):
                plan = await work
        finally:
            work.close()
        span.set_attributes(
            {
                "gen_ai.response.id": plan.request_id,
                "autotts.beta": plan.beta.value,
                "autotts.controller": controller_label(plan.controller),
            }
        )
        return plan

    async def episode(self, plan: Plan, work: Coroutine[Any, Any, R]) -> R:
        span = self._current_span()
        try:
            with self._failing(span):
                reply = await work
        finally:
            work.close()
        span.set_attributes(
            {
                "gen_ai.response.model": plan.prompt.model,
                "gen_ai.response.finish_reasons": reply.finish_reasons,
                "gen_ai.usage.input_tokens": reply.usage["prompt_tokens"],
                "gen_ai.usage.output_tokens": reply.usage["completion_tokens"],
                "autotts.stop": reply.tts["stop"],
                "autotts.branches": reply.tts["branches"],
                "autotts.rounds": reply.tts["rounds"],
                **{
                    f"autotts.{name}": value
                    for name in ("agreement", "confidence", "flagged")
                    if (value := reply.tts.get(name)) is not None
                },
            }
        )
        return reply

    def round(self, actions: Sequence[Action]) -> AbstractContextManager[object]:
        attributes = {
            f"autotts.actions.{verb.name.lower()}": n for verb, n in Counter(action.verb for action in actions).items()
        }
        return self._span("round", self._kinds.INTERNAL, attributes)

    @contextmanager
    def generation(self, model: str, call: Call) -> Iterator[None]:
        attributes = {
            **conventional_attributes("text_completion", model),
            "gen_ai.request.max_tokens": call.max_tokens,
            "gen_ai.request.choice.count": len(call.outputs),
        }
        with self._span(f"text_completion {model}", self._kinds.CLIENT, attributes) as span:
            try:
                yield
            finally:
                span.set_attributes(
                    {
                        "gen_ai.usage.input_tokens": call.prompt_tokens,
                        "gen_ai.usage.output_tokens": sum(len(output.ids) for output in call.outputs),
                    }
                )

    def request(self, method: str, path: str) -> ObservedRequest | None:
        operation = OPERATIONS.get(path)
        attributes = {
            "http.request.method": method,
            "url.path": path,
            **(conventional_attributes(operation) if operation else {}),
        }
        span = self._tracer.start_span(operation or f"{method} {path}", kind=self._kinds.CLIENT, attributes=attributes)

        def end(status: int | None, error: BaseException | None) -> None:
            if status is not None:
                span.set_attribute("http.response.status_code", status)
            if error is not None:
                self._mark_failed(span, type(error).__name__)
            elif status is not None and status >= HTTPStatus.BAD_REQUEST:
                self._mark_failed(span, str(status))
            span.end()

        return ObservedRequest(end, self._headers_of(span))

    def headers(self) -> Mapping[str, str]:
        return self._headers_of(self._current_span())

    async def close(self) -> None:
        await asyncio.to_thread(self._provider.shutdown)

    def _headers_of(self, span: Span) -> Mapping[str, str]:
        headers: dict[str, str] = {}
        self._inject(headers, self._set_span(span))
        return headers

    @contextmanager
    def _span(self, name: str, kind: Any, attributes: dict[str, Any]) -> Iterator[Span]:
        """Open a span. An exception marks it as failed by its type, because its message may hold a client's text."""
        span = self._tracer.start_span(name, kind=kind, attributes=attributes)
        within = self._use_span(span, end_on_exit=True, record_exception=False, set_status_on_exception=False)
        with within, self._failing(span):
            yield span

    @contextmanager
    def _failing(self, span: Span) -> Iterator[None]:
        """Mark `span` as failed if the body raises."""
        try:
            yield
        except BaseException as error:
            self._mark_failed(span, type(error).__name__)
            raise

    def _mark_failed(self, span: Span, kind: str) -> None:
        span.set_attribute("error.type", kind)
        span.set_status(self._failed)


def conventional_attributes(operation: str, model: str | None = None) -> dict[str, Any]:
    """Return the attributes that the conventions require for an operation."""
    attributes = {"gen_ai.operation.name": operation, "gen_ai.provider.name": "vllm"}
    return attributes if model is None else {**attributes, "gen_ai.request.model": model}


class TelemetryObserver(UpstreamObserver):
    """Records upstream requests in metrics and spans."""

    def __init__(self, metrics: Metrics, tracer: NoopTracer) -> None:
        self._metrics = metrics
        self._tracer = tracer

    @contextmanager
    def generation(self, model: str, call: Call) -> Iterator[None]:
        with self._metrics.upstream_request(model), self._tracer.generation(model, call):
            yield

    def passed_through(self, model: str, status: int | None, error: BaseException | None) -> None:
        self._metrics.count_passed_through(model, status, error)

    def round(self, actions: Sequence[Action]) -> AbstractContextManager[object]:
        return self._tracer.round(actions)

    def request(self, method: str, path: str) -> ObservedRequest | None:
        return self._tracer.request(method, path)

    def headers(self) -> Mapping[str, str]:
        return self._tracer.headers()


def is_exported(signal: str) -> bool:
    """Return whether OpenTelemetry's environment variables ask for the export of `TRACES` or `METRICS`."""
    names = (f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    is_disabled = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    exporters = (os.environ.get(f"OTEL_{signal}_EXPORTER") or "otlp").split(",")
    is_otlp = "otlp" in map(str.strip, exporters)
    return any(os.environ.get(name) for name in names) and is_otlp and not is_disabled


def service_name() -> str:
    """Return the name under which OpenTelemetry knows this proxy."""
    return os.environ.get("OTEL_SERVICE_NAME") or SERVICE


def create_tracer() -> NoopTracer:
    """Return the tracer that OpenTelemetry's environment variables configure."""
    if not is_exported("TRACES"):
        return NoopTracer()
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        logger.warning("tracing is off: %s is not installed; run %s", error.name, install_hint("otel"))
        return NoopTracer()
    resource = Resource.create({"service.name": service_name()})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return OtelTracer(provider)
