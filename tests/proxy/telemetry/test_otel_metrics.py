"""OpenTelemetry metrics: requests and upstream requests are measured under conventional names and without text."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

pytest.importorskip("opentelemetry.sdk", reason="the extra `otel` is not installed; `make test` installs it")

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from proxy.telemetry import otel_metrics, tracing
from tests.fakes import MODEL, FakeVLLM
from tests.proxy.telemetry.test_tracing import PROMPT, ask, collector

DURATION, CALLED, TOKENS = (
    "gen_ai.server.request.duration",
    "gen_ai.client.operation.duration",
    "gen_ai.client.token.usage",
)


class Measured(NamedTuple):
    """One series of a histogram."""

    number: int
    total: float
    bounds: tuple[float, ...]
    about: dict[str, Any]


class Reader:
    """Metrics that the proxy has recorded."""

    def __init__(self, reader: InMemoryMetricReader) -> None:
        self._reader = reader

    def read(self) -> dict[str, list[Measured]]:
        data = self._reader.get_metrics_data()
        if data is None:
            return {}
        return {
            metric.name: [
                Measured(point.count, point.sum, tuple(point.explicit_bounds), dict(point.attributes))  # type: ignore[union-attr,arg-type]
                for point in metric.data.data_points
            ]
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    """Return the recorded metrics. The proxy shuts its provider down, so they are read before it ends."""
    inner = InMemoryMetricReader()
    provider = MeterProvider([inner], shutdown_on_exit=False)
    monkeypatch.setattr(provider, "shutdown", lambda: None)
    monkeypatch.setattr(otel_metrics, "with_metrics", lambda spans: otel_metrics.MeteringTracer(spans, provider))
    yield Reader(inner)
    monkeypatch.undo()
    provider.shutdown()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_and_its_upstream_requests_are_measured(
    backend: FakeVLLM, reader: Reader, stream: bool
) -> None:
    status, reply = await ask(backend, tts={"controller": "parallel_probe"}, stream=stream)
    assert status == 200
    found = reader.read()
    assert set(found) == {DURATION, CALLED, TOKENS}
    (served,), (called,) = found[DURATION], found[CALLED]
    about = {"gen_ai.provider.name": "vllm", "gen_ai.request.model": MODEL}
    assert served.about == {**about, "gen_ai.operation.name": "chat"}
    assert called.about == {**about, "gen_ai.operation.name": "text_completion"}
    assert served.number == 1
    assert called.number == len(backend.requests) > 1
    assert served.bounds == called.bounds == pytest.approx(tuple(0.01 * 2**n for n in range(14)))
    tokens = {each.about["gen_ai.token.type"]: each for each in found[TOKENS]}
    assert tokens["output"].number == tokens["input"].number == called.number
    assert tokens["output"].bounds == tuple(4**n for n in range(14))
    if not stream:
        usage = reply["usage"]
        assert isinstance(usage, dict)
        assert tokens["output"].total == usage["completion_tokens"]
    assert tokens["input"].total > 0


async def test_failures_are_measured_with_the_type_of_the_error_only(backend: FakeVLLM, reader: Reader) -> None:
    backend.fault = "cut"
    status, _ = await ask(backend)
    assert status >= 400
    found = reader.read()
    (served,) = found[DURATION]
    assert served.about["error.type"].startswith("Upstream")
    assert all("error.type" in each.about for each in found[CALLED])
    assert PROMPT not in repr(found)


async def test_a_passed_through_request_is_not_measured(backend: FakeVLLM, reader: Reader) -> None:
    assert (await ask(backend, beta=None))[0] == 200
    assert reader.read() == {}


async def test_metrics_are_exported_to_the_collector(backend: FakeVLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Export over OTLP/HTTP with the real exporter to a receiver that parses protobuf."""
    answer = ExportMetricsServiceResponse().SerializeToString()
    async with collector("/v1/metrics", ExportMetricsServiceRequest.FromString, answer) as (url, received):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
        assert (await ask(backend))[0] == 200  # closing the tracer exports what is left
    resources = [sent for request in received for sent in request.resource_metrics]
    names = {metric.name for sent in resources for scope in sent.scope_metrics for metric in scope.metrics}
    assert names == {DURATION, CALLED, TOKENS}
    assert {item.value.string_value for item in resources[0].resource.attributes if item.key == "service.name"} == {
        tracing.SERVICE
    }
    assert PROMPT.encode() not in b"".join(request.SerializeToString() for request in received)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:1"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_METRICS_EXPORTER": "none"},
    ],
)
def test_metrics_are_off_unless_a_collector_is_named(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    spans = tracing.NoopTracer()
    assert otel_metrics.with_metrics(spans) is spans


@pytest.mark.parametrize(("exporters", "is_exported"), [("", True), ("console, otlp", True), ("none", False)])
def test_an_empty_list_of_exporters_is_the_default(
    exporters: str, is_exported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    for signal in ("TRACES", "METRICS"):
        monkeypatch.setenv(f"OTEL_{signal}_EXPORTER", exporters)
        assert tracing.is_exported(signal) is is_exported


def test_metrics_without_the_otel_extra_log_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.metric_exporter", None)
    spans = tracing.NoopTracer()
    assert otel_metrics.with_metrics(spans) is spans
    assert "pip install '.[otel]' in a checkout" in caplog.text
