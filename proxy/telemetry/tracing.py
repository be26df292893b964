"""OpenTelemetry: a span for each episode, round and request to the upstream, sent to a collector where one is named.

Unless OTEL_EXPORTER_OTLP_ENDPOINT is set and the extra `otel` installed this imports nothing and costs nothing. Spans
hold numbers and names, never what a client or a model has written. Where there are spans the upstream is told of them,
so that vLLM's own (`--otlp-traces-endpoint`) belong to the same trace.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import Counter
from collections.abc import Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, TypeVar

from controllers import Action
from proxy.telemetry.metrics import Metrics, controller_label
from proxy.types import Call, ObservedRequest, Plan, RequestResult, UpstreamObserver

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span


R = TypeVar("R", bound=RequestResult)

logger = logging.getLogger(__name__)

ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
SERVICE: Final = "autotts-proxy"
OPERATIONS: Final = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/responses": "chat",  # so the conventions have it; `openai.api.type` tells them apart
    "/v1/embeddings": "embeddings",
}
"""What the conventions for generative AI call the paths they have a name for."""
API_TYPES: Final = {"/v1/chat/completions": "chat_completions", "/v1/responses": "responses"}


class NoopTracer:
    """None."""

    def continue_trace(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """What the task does from here on is part of the trace that a request's headers name."""

    def plan(self, _: str, model: str, held: ExitStack, work: Coroutine[Any, Any, Plan]) -> Coroutine[Any, Any, Plan]:
        """`work`, which plans an episode on `model` for a request to a path, within a span of the episode's.

        The task is within it from then on, until `held` is closed.
        """
        return work

    def episode(self, _: Plan, work: Coroutine[Any, Any, R]) -> Coroutine[Any, Any, R]:
        """Serve what was planned, by awaiting `work`, within the same span."""
        return work

    def round(self, _: Sequence[Action]) -> AbstractContextManager[object]:
        """A span for carrying out a round."""
        return nullcontext()

    def generation(self, model: str, call: Call) -> AbstractContextManager[object]:
        """A span for a request to the upstream that generates."""
        return nullcontext()

    def request(self, method: str, path: str) -> ObservedRequest | None:
        """A span for another request to it, if there is one."""
        return None

    def headers(self) -> Mapping[str, str]:
        """By which spans of whoever is sent them belong to the present one."""
        return {}

    async def close(self) -> None:
        """Send what has not been sent."""


class OtelTracer(NoopTracer):
    """Those of a tracer provider of OpenTelemetry's."""

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
        self._set = trace.set_span_in_context
        self._within = trace.use_span
        self._now = trace.get_current_span

    def continue_trace(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        told = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers if name.startswith(b"trace")}
        if told:
            self._attach(self._extract(told))

    async def plan(self, path: str, model: str, held: ExitStack, work: Coroutine[Any, Any, Plan]) -> Plan:
        name = OPERATIONS[path]
        about = {**_about(name, model), "url.path": path}
        if path in API_TYPES:
            about["openai.api.type"] = API_TYPES[path]
        try:
            span = self._tracer.start_span(f"{name} {model}", kind=self._kinds.SERVER, attributes=about)
            held.callback(span.end)
            self._attach(self._set(span))
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
        span = self._now()
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
            }
        )
        return reply

    def round(self, actions: Sequence[Action]) -> AbstractContextManager[object]:
        about = {f"autotts.actions.{verb.name.lower()}": n for verb, n in Counter(one.verb for one in actions).items()}
        return self._span("round", self._kinds.INTERNAL, about)

    @contextmanager
    def generation(self, model: str, call: Call) -> Iterator[None]:
        about = {
            **_about("text_completion", model),
            "gen_ai.request.max_tokens": call.max_tokens,
            "gen_ai.request.choice.count": len(call.outputs),
        }
        with self._span(f"text_completion {model}", self._kinds.CLIENT, about) as span:
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
        about = {"http.request.method": method, "url.path": path, **(_about(operation) if operation else {})}
        span = self._tracer.start_span(operation or f"{method} {path}", kind=self._kinds.CLIENT, attributes=about)

        def end(status: int | None, error: BaseException | None) -> None:
            if status is not None:
                span.set_attribute("http.response.status_code", status)
            if error is not None:
                self._fail(span, type(error).__name__)
            elif status is not None and status >= HTTPStatus.BAD_REQUEST:
                self._fail(span, str(status))
            span.end()

        return ObservedRequest(end, self._headers_of(span))

    def headers(self) -> Mapping[str, str]:
        return self._headers_of(self._now())

    async def close(self) -> None:
        await asyncio.to_thread(self._provider.shutdown)

    def _headers_of(self, span: Span) -> Mapping[str, str]:
        told: dict[str, str] = {}
        self._inject(told, self._set(span))
        return told

    @contextmanager
    def _span(self, name: str, kind: Any, about: dict[str, Any]) -> Iterator[Span]:
        """A span, failed if what is within fails. Of an error it holds the type: its words may be a client's."""
        span = self._tracer.start_span(name, kind=kind, attributes=about)
        within = self._within(span, end_on_exit=True, record_exception=False, set_status_on_exception=False)
        with within, self._failing(span):
            yield span

    @contextmanager
    def _failing(self, span: Span) -> Iterator[None]:
        """What a span fails with."""
        try:
            yield
        except BaseException as error:
            self._fail(span, type(error).__name__)
            raise

    def _fail(self, span: Span, kind: str) -> None:
        span.set_attribute("error.type", kind)
        span.set_status(self._failed)


def _about(operation: str, model: str | None = None) -> dict[str, Any]:
    """What the conventions have told of an operation."""
    about = {"gen_ai.operation.name": operation, "gen_ai.provider.name": "vllm"}
    return about if model is None else {**about, "gen_ai.request.model": model}


class TelemetryWatcher(UpstreamObserver):
    """Tells metrics and spans what the upstream is asked."""

    def __init__(self, metrics: Metrics, spans: NoopTracer) -> None:
        self._metrics = metrics
        self._spans = spans

    @contextmanager
    def generation(self, model: str, call: Call) -> Iterator[None]:
        with self._metrics.upstream_request(model), self._spans.generation(model, call):
            yield

    def round(self, actions: Sequence[Action]) -> AbstractContextManager[object]:
        return self._spans.round(actions)

    def request(self, method: str, path: str) -> ObservedRequest | None:
        return self._spans.request(method, path)

    def headers(self) -> Mapping[str, str]:
        return self._spans.headers()


def create_tracer() -> NoopTracer:
    """Spans as OpenTelemetry's variables would have them."""
    named = any(os.environ.get(name) for name in ENDPOINTS)
    disabled = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    if not named or disabled or os.environ.get("OTEL_TRACES_EXPORTER", "otlp") != "otlp":
        return NoopTracer()
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        logger.warning("no spans are sent: %s is not installed; pip install 'autotts-proxy[otel]'", error.name)
        return NoopTracer()
    name = os.environ.get("OTEL_SERVICE_NAME") or SERVICE
    provider = TracerProvider(resource=Resource.create({"service.name": name}), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return OtelTracer(provider)
