"""OpenTelemetry: a span for each episode, round and generation, sent to a collector where one is named.

Unless OTEL_EXPORTER_OTLP_ENDPOINT is set and the extra `otel` installed this imports nothing and costs nothing. Spans
hold numbers and names, never what a client or a model has written.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import Counter
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Final

from controllers import Action
from proxy.engine import Call, Watcher
from proxy.metrics import Metrics, family

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

    from proxy.chat import Plan
    from proxy.reply import Reply

logger = logging.getLogger(__name__)

ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
SERVICE: Final = "autotts-proxy"


class Spans:
    """None."""

    def arrive(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """What the task does from here on is part of the trace that a request's headers name."""

    def episode(self, _: Plan, work: Coroutine[Any, Any, Reply]) -> Coroutine[Any, Any, Reply]:
        """`work`, which serves a request, within a span."""
        return work

    def round(self, _: Sequence[Action]) -> AbstractContextManager[object]:
        """A span for carrying out a round."""
        return nullcontext()

    def generation(self, model: str, call: Call) -> AbstractContextManager[object]:
        """A span for a request to the upstream."""
        return nullcontext()

    async def close(self) -> None:
        """Send what has not been sent."""


class OpenSpans(Spans):
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

    def arrive(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        told = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers if name.startswith(b"trace")}
        if told:
            self._attach(self._extract(told))

    async def episode(self, plan: Plan, work: Coroutine[Any, Any, Reply]) -> Reply:
        about = {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": "vllm",
            "gen_ai.request.model": plan.prompt.model,
            "gen_ai.response.id": plan.request_id,
            "autotts.beta": plan.dial.beta,
            "autotts.controller": family(plan.controller),
        }
        try:
            with self._span(f"chat {plan.prompt.model}", self._kinds.SERVER, about) as span:
                reply = await work
                span.set_attributes(
                    {
                        "gen_ai.response.model": plan.prompt.model,
                        "gen_ai.response.finish_reasons": [reply.message.finish_reason],
                        "gen_ai.usage.input_tokens": reply.usage["prompt_tokens"],
                        "gen_ai.usage.output_tokens": reply.usage["completion_tokens"],
                        "autotts.stop": reply.tts["stop"],
                        "autotts.branches": reply.tts["branches"],
                        "autotts.rounds": reply.tts["rounds"],
                    }
                )
                return reply
        finally:
            work.close()

    def round(self, actions: Sequence[Action]) -> AbstractContextManager[object]:
        about = {f"autotts.actions.{verb.name.lower()}": n for verb, n in Counter(one.verb for one in actions).items()}
        return self._span("round", self._kinds.INTERNAL, about)

    @contextmanager
    def generation(self, model: str, call: Call) -> Iterator[None]:
        about = {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.provider.name": "vllm",
            "gen_ai.request.model": model,
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

    async def close(self) -> None:
        await asyncio.to_thread(self._provider.shutdown)

    @contextmanager
    def _span(self, name: str, kind: Any, about: dict[str, Any]) -> Iterator[Span]:
        """A span, failed if what is within fails. Of an error it holds the type: its words may be a client's."""
        with self._tracer.start_as_current_span(
            name, kind=kind, attributes=about, record_exception=False, set_status_on_exception=False
        ) as span:
            try:
                yield span
            except BaseException as error:
                span.set_attribute("error.type", type(error).__name__)
                span.set_status(self._failed)
                raise


class Observer(Watcher):
    """Tells metrics and spans what the upstream is asked."""

    def __init__(self, metrics: Metrics, spans: Spans) -> None:
        self._metrics = metrics
        self._spans = spans

    @contextmanager
    def generation(self, model: str, call: Call) -> Iterator[None]:
        with self._metrics.upstream(model), self._spans.generation(model, call):
            yield

    def round(self, actions: Sequence[Action]) -> AbstractContextManager[object]:
        return self._spans.round(actions)


def make() -> Spans:
    """Spans as OpenTelemetry's variables would have them."""
    named = any(os.environ.get(name) for name in ENDPOINTS)
    disabled = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    if not named or disabled or os.environ.get("OTEL_TRACES_EXPORTER", "otlp") != "otlp":
        return Spans()
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        logger.warning("no spans are sent: %s is not installed; pip install 'autotts-proxy[otel]'", error.name)
        return Spans()
    name = os.environ.get("OTEL_SERVICE_NAME") or SERVICE
    provider = TracerProvider(resource=Resource.create({"service.name": name}), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return OpenSpans(provider)
