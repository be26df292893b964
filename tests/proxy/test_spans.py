"""Spans: an episode, its rounds in it, generations in those, as OpenTelemetry names them; no text, nothing when off."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import aiohttp
import pytest

pytest.importorskip("opentelemetry.sdk", reason="the extra `otel` is not installed; `make test` installs it")

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from proxy import spans
from proxy.server import running
from proxy.settings import load
from tests.fakes import FakeVLLM
from tests.proxy.conftest import SMALL

PROMPT = "what nobody may read"
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    kept = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(kept))
    monkeypatch.setattr(spans, "make", lambda: spans.OpenSpans(provider))
    yield kept
    provider.shutdown()


async def ask(backend: FakeVLLM, **fields: object) -> tuple[int, dict[str, object]]:
    body = {"model": "fake-model", "messages": [{"role": "user", "content": PROMPT}], **fields}
    headers = {"x-tts-beta": "0.5", "traceparent": PARENT}
    async with (
        running(load(upstream=backend.url, **SMALL)) as url,
        aiohttp.ClientSession() as http,
        http.post(f"{url}/v1/chat/completions", json=body, headers=headers) as response,
    ):
        return response.status, await response.json()


def within(span: ReadableSpan, parents: list[ReadableSpan]) -> bool:
    return span.parent is not None and span.parent.span_id in {one.context.span_id for one in parents}


async def test_an_episode_holds_rounds_and_those_generations(backend: FakeVLLM, exporter: InMemorySpanExporter) -> None:
    status, reply = await ask(backend, tts={"controller": "parallel_probe"})
    assert status == 200
    finished = list(exporter.get_finished_spans())
    (episode,) = [span for span in finished if span.name == "chat fake-model"]
    rounds = [span for span in finished if span.name == "round"]
    generations = [span for span in finished if span.name == "text_completion fake-model"]
    assert len(finished) == 1 + len(rounds) + len(generations)
    assert all(within(span, [episode]) for span in rounds)
    assert all(within(span, [episode, *rounds]) for span in generations)
    assert episode.parent is not None
    assert f"{episode.parent.trace_id:032x}-{episode.parent.span_id:016x}" in PARENT
    about, usage, tts = dict(episode.attributes or {}), reply["usage"], reply["tts"]
    assert isinstance(usage, dict)
    assert isinstance(tts, dict)
    assert about["gen_ai.request.model"] == "fake-model"
    assert about["gen_ai.response.id"] == reply["id"]
    assert about["gen_ai.usage.output_tokens"] == usage["completion_tokens"]
    assert about["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert (about["autotts.stop"], about["autotts.rounds"]) == (tts["stop"], tts["rounds"])
    bought = [dict(span.attributes or {})["gen_ai.usage.output_tokens"] for span in generations]
    assert sum(n for n in bought if isinstance(n, int)) == usage["completion_tokens"]


@pytest.mark.parametrize("fault", ["echo", "cut"])
async def test_a_failure_is_told_by_its_type(backend: FakeVLLM, exporter: InMemorySpanExporter, fault: str) -> None:
    backend.fault = fault
    status, _ = await ask(backend)
    assert status >= 400
    failed = [span for span in exporter.get_finished_spans() if not span.status.is_ok]
    assert {span.name.split()[0] for span in failed} == {"chat", "text_completion", "round"}
    assert all(str(dict(span.attributes or {})["error.type"]).startswith("Upstream") for span in failed[:1])
    told = "".join(span.to_json() for span in exporter.get_finished_spans())
    assert PROMPT not in told
    assert not any(span.events for span in exporter.get_finished_spans())


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_off_it_imports_nothing(variables: dict[str, str]) -> None:
    code = (
        "import sys, proxy.app; from proxy import spans; made = spans.make(); assert type(made) is spans.Spans, made;"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]"
    )
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


async def test_a_collector_is_what_turns_them_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    made = spans.make()
    assert isinstance(made, spans.OpenSpans)
    await made.close()


def test_without_the_extra_it_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    assert type(spans.make()) is spans.Spans
    assert "pip install 'autotts-proxy[otel]'" in caplog.text
