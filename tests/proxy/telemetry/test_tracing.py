"""OpenTelemetry spans: episodes contain rounds, rounds contain upstream calls, and no span contains text."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import TypeVar

import aiohttp
import pytest
from aiohttp import web

pytest.importorskip("opentelemetry.sdk", reason="the extra `otel` is not installed; `make test` installs it")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from proxy.server import running
from proxy.settings import load
from proxy.telemetry import tracing
from tests.fakes import ASSISTANT, MODEL, FakeVLLM, RawUpstream, listening
from tests.proxy.conftest import SMALL

R = TypeVar("R")

PROMPT = "what nobody may read"
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    kept = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(kept))
    monkeypatch.setattr(tracing, "create_tracer", lambda: tracing.OtelTracer(provider))
    yield kept
    provider.shutdown()


@asynccontextmanager
async def collector(path: str, parse: Callable[[bytes], R], answer: bytes) -> AsyncIterator[tuple[str, list[R]]]:
    """Yield the URL of a collector that takes OTLP over HTTP at a path, and what it has received, parsed."""
    received: list[R] = []

    async def take(request: web.Request) -> web.Response:
        assert request.content_type == "application/x-protobuf"
        received.append(parse(await request.read()))
        return web.Response(body=answer, content_type=request.content_type)

    app = web.Application()
    app.router.add_post(path, take)
    async with listening(app) as url:
        yield url, received


async def ask(
    backend: FakeVLLM, path: str = "/v1/chat/completions", beta: str | None = "0.5", **fields: object
) -> tuple[int, dict[str, object]]:
    put: dict[str, object] = {"messages": [{"role": "user", "content": PROMPT}]}
    if path == "/v1/completions":
        put = {"prompt": [ord(char) for char in PROMPT + ASSISTANT], "max_tokens": 200}
    if path == "/v1/responses":
        put = {"input": PROMPT}
    headers = {"traceparent": PARENT, **({} if beta is None else {"x-tts-beta": beta})}
    async with (
        running(load(upstream=backend.url, **SMALL)) as url,
        aiohttp.ClientSession() as http,
        http.post(url + path, json={"model": MODEL, **put, **fields}, headers=headers) as response,
    ):
        text = await response.text()
        return response.status, json.loads(text) if response.content_type == "application/json" else {"text": text}


def within(span: ReadableSpan, parents: list[ReadableSpan]) -> bool:
    return span.parent is not None and span.parent.span_id in {parent.context.span_id for parent in parents}


def attributes(span: ReadableSpan) -> dict[str, object]:
    return dict(span.attributes or {})


async def test_an_episode_span_contains_round_spans_that_contain_generation_spans(
    backend: FakeVLLM, exporter: InMemorySpanExporter
) -> None:
    status, reply = await ask(backend, tts={"controller": "parallel_probe"})
    assert status == 200
    finished = list(exporter.get_finished_spans())
    (episode,) = [span for span in finished if span.name == "chat fake-model"]
    rounds = [span for span in finished if span.name == "round"]
    generations = [span for span in finished if span.name == "text_completion fake-model"]
    texts = [span for span in finished if span.name in ("POST /tokenize", "POST /detokenize")]
    (models,) = [span for span in finished if span.name == "GET /v1/models"]
    assert len(finished) == 2 + len(rounds) + len(generations) + len(texts)
    assert {span.name for span in texts} == {"POST /tokenize", "POST /detokenize"}
    assert {span.kind for span in (models, *texts, *generations)} == {SpanKind.CLIENT}
    assert all(attributes(span)["http.response.status_code"] == 200 for span in (models, *texts))
    assert all(within(span, [episode]) for span in rounds)
    assert all(within(span, [episode, *rounds]) for span in (*generations, *texts))
    for span in (episode, models):
        assert span.parent is not None
        assert f"{span.parent.trace_id:032x}-{span.parent.span_id:016x}" in PARENT
    about, usage, tts = dict(episode.attributes or {}), reply["usage"], reply["tts"]
    assert isinstance(usage, dict)
    assert isinstance(tts, dict)
    assert about["gen_ai.request.model"] == "fake-model"
    assert about["gen_ai.response.id"] == reply["id"]
    assert about["gen_ai.usage.output_tokens"] == usage["completion_tokens"]
    assert about["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert (about["autotts.stop"], about["autotts.rounds"]) == (tts["stop"], tts["rounds"])
    assert (about["autotts.agreement"], about["autotts.confidence"]) == (tts["agreement"], tts["confidence"])
    bought = [dict(span.attributes or {})["gen_ai.usage.output_tokens"] for span in generations]
    assert sum(n for n in bought if isinstance(n, int)) == usage["completion_tokens"]


async def test_each_upstream_call_carries_the_traceparent_of_its_span(
    backend: FakeVLLM, exporter: InMemorySpanExporter
) -> None:
    """vLLM's own spans then belong to the same trace."""
    for beta in ("0.5", None):
        assert (await ask(backend, "/v1/completions", beta, seed=3))[0] == 200
    parents = [parent for headers in backend.headers if (parent := headers.get("traceparent"))]
    calls = [span for span in exporter.get_finished_spans() if span.name.startswith("text_completion")]
    calls = [span for span in calls if span.kind is SpanKind.CLIENT]
    assert len(calls) > 2
    expected = {f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}-01" for span in calls}
    assert expected <= set(parents)
    assert len(set(parents)) == len(parents)


async def test_without_tracing_no_traceparent_is_sent_upstream(backend: FakeVLLM) -> None:
    for beta in ("0.5", None):
        assert (await ask(backend, "/v1/completions", beta, seed=3))[0] == 200
    assert backend.headers
    assert not any("traceparent" in headers for headers in backend.headers)


@pytest.mark.parametrize("fault", ["echo", "cut"])
async def test_a_failed_episode_marks_its_spans_with_the_error_type_only(
    backend: FakeVLLM, exporter: InMemorySpanExporter, fault: str
) -> None:
    backend.fault = fault
    status, _ = await ask(backend)
    assert status >= 400
    failed = [span for span in exporter.get_finished_spans() if not span.status.is_ok]
    assert {span.name.split()[0] for span in failed} == {"chat", "text_completion", "round"}
    assert [span.kind for span in failed if span.name == "chat fake-model"] == [SpanKind.SERVER]
    assert all(str(dict(span.attributes or {})["error.type"]).startswith("Upstream") for span in failed[:1])
    exported = "".join(span.to_json() for span in exporter.get_finished_spans())
    assert PROMPT not in exported
    assert not any(span.events for span in exporter.get_finished_spans())


@pytest.mark.parametrize(
    ("path", "operation", "api"),
    [
        ("/v1/chat/completions", "chat", "chat_completions"),
        ("/v1/completions", "text_completion", None),
        ("/v1/responses", "chat", "responses"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_an_episode_span_is_named_by_operation_and_model(
    backend: FakeVLLM, exporter: InMemorySpanExporter, path: str, operation: str, api: str | None, stream: bool
) -> None:
    status, reply = await ask(backend, path, stream=stream, tts={"answer": "boxed"})
    assert status == 200, reply
    finished = exporter.get_finished_spans()
    (episode,) = [span for span in finished if span.kind is SpanKind.SERVER]
    about = attributes(episode)
    assert episode.name == f"{operation} fake-model"
    assert (about["gen_ai.operation.name"], about.get("openai.api.type")) == (operation, api)
    assert (about["url.path"], about["autotts.stop"]) == (path, "answered")
    outside = [span.name for span in finished if span.context.trace_id != episode.context.trace_id]
    assert outside == []
    exported = "".join(span.to_json() for span in finished)
    assert PROMPT not in exported


async def test_a_request_that_cannot_be_planned_has_a_failed_episode_span(
    backend: FakeVLLM, exporter: InMemorySpanExporter
) -> None:
    status, _ = await ask(backend, tts={"controller": "nobody"})
    assert status == 400
    (episode,) = [span for span in exporter.get_finished_spans() if span.kind is SpanKind.SERVER]
    assert (episode.status.is_ok, attributes(episode)["error.type"]) == (False, "BadRequest")


@pytest.mark.parametrize(("fault", "status"), [("", 200), ("refuse", 400), ("broken", 500)])
async def test_a_forwarded_request_has_a_client_span_with_its_status(
    backend: FakeVLLM, exporter: InMemorySpanExporter, fault: str, status: int
) -> None:
    backend.fault = fault
    assert (await ask(backend, "/v1/completions", None, stream=not fault))[0] == status
    (span,) = [span for span in exporter.get_finished_spans() if span.name == "text_completion"]
    assert span.kind is SpanKind.CLIENT
    about = attributes(span)
    assert (about["url.path"], about["http.response.status_code"]) == ("/v1/completions", status)
    assert (span.status.is_ok, about.get("error.type")) == (not fault, str(status) if fault else None)
    assert span.parent is not None
    assert f"{span.parent.trace_id:032x}-{span.parent.span_id:016x}" in PARENT
    assert PROMPT not in span.to_json()


async def test_the_span_of_a_forwarded_stream_ends_with_the_response(exporter: InMemorySpanExporter) -> None:
    async with (
        RawUpstream([b"data: 1\n\n", b"data: 2\n\n"], content_type="text/event-stream").serve() as raw,
        running(load(upstream=raw.url, **SMALL)) as url,
        aiohttp.ClientSession() as http,
    ):
        raw.go.clear()
        body = {"model": MODEL, "prompt": "x", "stream": True}
        async with http.post(f"{url}/v1/completions", json=body) as response:
            assert await response.content.readany() == b"data: 1\n\n"
            assert [span.name for span in exporter.get_finished_spans()] == ["GET /v1/models"]
            raw.go.set()
            assert await response.read() == b"data: 2\n\n"
        assert [span.name for span in exporter.get_finished_spans()] == ["GET /v1/models", "text_completion"]


async def test_health_ready_and_metrics_requests_have_no_spans(
    backend: FakeVLLM, exporter: InMemorySpanExporter
) -> None:
    async with running(load(upstream=backend.url, **SMALL)) as url, aiohttp.ClientSession() as http:
        for path in ("/ready", "/health", "/metrics"):
            async with http.get(url + path) as response:
                assert response.status == 200
    assert exporter.get_finished_spans() == ()


@pytest.mark.process
@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_without_a_collector_opentelemetry_is_not_imported(variables: dict[str, str]) -> None:
    """It would also come with optuna, which imports redis, which imports OpenTelemetry's SDK."""
    code = (
        "import sys, proxy.app; from proxy.telemetry import tracing; made = tracing.create_tracer();"
        "assert type(made) is tracing.NoopTracer, made;"
        "assert not [name for name in sys.modules if name.partition('.')[0] in ('opentelemetry', 'optuna', 'redis')]"
    )
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


async def test_setting_a_collector_endpoint_enables_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    made = tracing.create_tracer()
    assert isinstance(made, tracing.OtelTracer)
    await made.close()


async def test_the_spans_of_a_request_are_exported_to_the_collector(
    backend: FakeVLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Export over OTLP/HTTP with the real exporter to a receiver that parses protobuf."""
    answer = ExportTraceServiceResponse().SerializeToString()
    async with collector("/v1/traces", ExportTraceServiceRequest.FromString, answer) as (url, received):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        status, reply = await ask(backend, tts={"controller": "parallel_probe"})  # closing the tracer exports the rest
    assert status == 200
    resources = [sent for request in received for sent in request.resource_spans]
    for resource in resources:
        named = {item.key: item.value.string_value for item in resource.resource.attributes}
        assert named["service.name"] == tracing.SERVICE
    sent = [span for resource in resources for scope in resource.scope_spans for span in scope.spans]
    assert {span.trace_id.hex() for span in sent} == {PARENT.split("-")[1]}
    by_id = {span.span_id.hex(): span for span in sent}
    shape = {
        (span.name, by_id[parent].name if (parent := span.parent_span_id.hex()) in by_id else parent) for span in sent
    }
    assert shape == {
        ("GET /v1/models", PARENT.split("-")[2]),
        ("chat fake-model", PARENT.split("-")[2]),
        ("POST /tokenize", "chat fake-model"),
        ("POST /detokenize", "chat fake-model"),
        ("POST /tokenize", "round"),
        ("round", "chat fake-model"),
        ("text_completion fake-model", "round"),
    } | (shape & {("text_completion fake-model", "chat fake-model")})
    (episode,) = [span for span in sent if span.name == "chat fake-model"]
    about = {item.key: item.value for item in episode.attributes}
    usage = reply["usage"]
    assert isinstance(usage, dict)
    assert about["gen_ai.response.id"].string_value == reply["id"]
    assert about["gen_ai.usage.output_tokens"].int_value == usage["completion_tokens"]
    assert PROMPT.encode() not in b"".join(request.SerializeToString() for request in received)


def test_tracing_without_the_otel_extra_logs_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    assert type(tracing.create_tracer()) is tracing.NoopTracer
    assert "pip install '.[otel]' in a checkout" in caplog.text
