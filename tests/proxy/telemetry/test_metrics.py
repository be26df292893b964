"""Metrics of requests: controller, outcome, cost, and the estimated cost of plain voting."""

from __future__ import annotations

import aiohttp
import pytest
from prometheus_client import Histogram
from prometheus_client.parser import text_string_to_metric_families

from proxy.environment.live_environment import LiveEnvironment
from proxy.episode.episode_metrics import estimate_saved_tokens
from proxy.requests.beta import EFFORTS
from proxy.server import running
from proxy.settings import load
from proxy.telemetry.metrics import Metrics, controller_label
from proxy.types import ALIAS_BETAS, BetaSource, EffectiveBeta, EnvironmentLimits, LiveBranch, Prompt
from proxy.upstream import health_monitor
from proxy.upstream.client import UpstreamClient
from tests.proxy.conftest import SMALL, Proxy

MODEL = "fake-model"

EXPORTED = (
    "autotts_requests counter model controller outcome",
    "autotts_tokens counter model controller beta kind",
    "autotts_key_tokens counter key kind",
    "autotts_branches counter model controller beta",
    "autotts_rounds counter model controller beta",
    "autotts_probe_answers counter model controller answered",
    "autotts_answer_limits counter limit",
    "autotts_agreement histogram model controller",
    "autotts_low_agreement counter model controller outcome",
    "autotts_judge_calls counter model outcome",
    "autotts_beta_not_applied counter model reason source",
    "autotts_saved_tokens_estimate counter model controller beta",
    "autotts_overspent_tokens_estimate counter model controller beta",
    "autotts_stops counter model controller reason",
    "autotts_request_seconds histogram model controller",
    "autotts_first_byte_seconds histogram path applied streamed",
    "autotts_response_seconds histogram path applied streamed",
    "autotts_decision_seconds histogram controller",
    "autotts_fallbacks counter controller reason",
    "autotts_sandbox_slow_decisions counter controller",
    "autotts_controller_quarantined gauge controller",
    "autotts_controller_overspending gauge controller",
    "autotts_stage_requests counter model stage controller",
    "autotts_shadow_agreement counter controller agreed",
    "autotts_registry_version gauge",
    "autotts_registry_unreadable gauge",
    "autotts_rollbacks counter reason",
    "autotts_sandbox_level gauge",
    "autotts_recorder_records counter outcome",
    "autotts_recorder_lost counter reason",
    "autotts_recorder_queue gauge",
    "autotts_recorder_queue_limit gauge",
    "autotts_recorder_spill_bytes gauge",
    "autotts_recorder_store_up gauge",
    "autotts_recordings counter outcome",
    "autotts_unseen_tokens counter model",
    "autotts_recording_tokens counter model",
    "autotts_feedback counter kind content",
    "autotts_recording_drift gauge model",
    "autotts_refusals counter reason",
    "autotts_connections_cut counter reason",
    "autotts_limits_away gauge",
    "autotts_limits_seconds histogram script",
    "autotts_keys_broken gauge",
    "autotts_queue gauge kind",
    "autotts_load_factor gauge",
    "autotts_episodes_in_flight gauge",
    "autotts_branches_in_flight gauge",
    "autotts_calls_waiting gauge",
    "autotts_signals counter signal known",
    "autotts_upstream_events counter event",
    "autotts_upstream_up gauge",
    "autotts_upstream_circuit_open gauge",
    "autotts_upstream_requests counter model outcome",
    "autotts_upstream_seconds histogram model",
    "autotts_replica_up gauge replica",
    "autotts_replica_circuit_open gauge replica",
    "autotts_replica_branches gauge replica",
    "autotts_replica_moves counter replica reason",
)
"""Name, type and labels of every metric. Dashboards and alerts of users depend on them."""
BUCKETS = {
    "autotts_agreement": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99, 1),
    "autotts_request_seconds": (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600),
    "autotts_first_byte_seconds": (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600),
    "autotts_response_seconds": (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600),
    "autotts_decision_seconds": (1e-05, 0.0001, 0.001, 0.005, 0.01, 0.05, 0.25, 1),
    "autotts_limits_seconds": (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1),
    "autotts_upstream_seconds": (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600),
}


async def series(proxy: Proxy) -> set[tuple[str, frozenset[tuple[str, str]]]]:
    """Return every series; histograms by their sums and counts."""
    async with proxy.http.get(f"{proxy.url}/metrics") as response:
        families = list(text_string_to_metric_families(await response.text()))
    return {
        (sample.name, frozenset(sample.labels.items()))
        for family in families
        for sample in family.samples
        if not sample.name.endswith(("_bucket", "_created"))
    }


def test_names_types_and_labels_of_metrics_are_unchanged() -> None:
    metrics = Metrics()
    attributes = [vars(metrics)[name] for name, row in vars(Metrics).items() if hasattr(row, "create")]
    rows = [" ".join([metric._name, metric._type, *metric._labelnames]) for metric in attributes]
    assert rows == list(EXPORTED)
    exported = [family.name for family in metrics.registry.collect()]
    assert exported == [row.split()[0] for row in EXPORTED]


def test_buckets_of_histograms_are_unchanged() -> None:
    metrics = Metrics()
    kept = {
        metric._name: tuple(metric._kwargs["buckets"])
        for metric in vars(metrics).values()
        if isinstance(metric, Histogram)
    }
    assert kept == BUCKETS


def test_series_with_fixed_labels_start_at_zero() -> None:
    page = Metrics().exposition().decode()
    for line in (
        'autotts_recorder_lost_total{reason="full"} 0.0',
        'autotts_connections_cut_total{reason="evicted"} 0.0',
        'autotts_rollbacks_total{reason="quarantined"} 0.0',
        'autotts_answer_limits_total{limit="judge_busy"} 0.0',
    ):
        assert line in page


def test_a_metric_used_on_the_class_raises_attribute_error() -> None:
    with pytest.raises(AttributeError, match="autotts_requests belongs to an instance of Metrics"):
        Metrics.requests.labels("m", "c", "answered")
    assert Metrics().requests is not Metrics().requests


async def test_an_episode_is_counted_in_each_of_its_metrics(proxy: Proxy) -> None:
    status, _, body = await proxy.ask(tts={"controller": "parallel_probe"})
    assert status == 200
    by = {"model": MODEL, "controller": "parallel_probe"}
    assert await proxy.metric("autotts_requests_total", outcome="answered", **by) == 1
    assert await proxy.metric("autotts_stops_total", reason="answered", **by) == 1
    assert await proxy.metric("autotts_tokens_total", beta="0.5", **by) == body["tts"]["tokens"]["total"]
    assert await proxy.metric("autotts_probe_answers_total", answered="true", **by) > 0
    assert await proxy.metric("autotts_request_seconds_count", **by) == 1
    assert await proxy.metric("autotts_upstream_requests_total", model=MODEL, outcome="done") > 0
    assert await proxy.metric("autotts_upstream_seconds_count", model=MODEL) > 0
    about = {"path": "/v1/chat/completions", "applied": "true", "streamed": "false"}
    assert await proxy.metric("autotts_first_byte_seconds_count", **about) == 1
    assert await proxy.metric("autotts_response_seconds_count", **about) == 1


async def test_the_first_byte_of_a_stream_is_measured_before_its_end(proxy: Proxy) -> None:
    stream = await proxy.openai.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "hi"}], stream=True, extra_headers={"x-tts-beta": "0.5"}
    )
    assert [chunk async for chunk in stream]
    about = {"path": "/v1/chat/completions", "applied": "true", "streamed": "true"}
    first = await proxy.metric("autotts_first_byte_seconds_sum", **about)
    assert 0 < first < await proxy.metric("autotts_response_seconds_sum", **about)


async def test_saved_tokens_are_estimated_against_voting_with_all_branches(proxy: Proxy) -> None:
    _, _, body = await proxy.ask(tts={"controller": "sc@3", "answer": "boxed"})
    by = {"model": MODEL, "controller": "self_consistency"}
    spent = body["tts"]["tokens"]["total"]
    assert await proxy.metric("autotts_saved_tokens_estimate_total", **by) == pytest.approx(64 * spent / 3 - spent)
    assert await proxy.metric("autotts_overspent_tokens_estimate_total", **by) == 0
    assert await proxy.metric("autotts_agreement_sum", **by) == pytest.approx(max(body["tts"]["votes"].values()) / 3)


async def test_saved_tokens_are_estimated_from_branches_that_ended(proxy: Proxy) -> None:
    environment = LiveEnvironment(
        UpstreamClient(proxy.url, proxy.http), Prompt(MODEL, [1], "", {}), EnvironmentLimits(10, 100, 5)
    )
    assert estimate_saved_tokens(environment, 4, 10) is None
    environment.branches += [
        LiveBranch(ids=[1] * 30, finish="stop"),
        LiveBranch(ids=[1] * 10, finish="stop"),
        LiveBranch(ids=[1] * 99, finish="length"),
    ]
    assert estimate_saved_tokens(environment, 4, 50) == 30
    assert estimate_saved_tokens(environment, 4, 139) == -59


@pytest.mark.parametrize(
    ("beta", "bucket"),
    [(0, "0"), (0.1, "0"), (0.125, "0.25"), (0.25, "0.25"), (0.3, "0.25"), (0.5, "0.5"), (0.75, "0.75"), (1, "1")],
)
def test_a_beta_is_counted_in_the_bucket_of_the_nearest_alias(beta: float, bucket: str) -> None:
    assert EffectiveBeta(beta, BetaSource.HEADER).bucket == bucket


def test_every_alias_and_effort_has_its_own_beta_bucket() -> None:
    for beta in (*ALIAS_BETAS, *EFFORTS.values()):
        assert float(EffectiveBeta(beta, BetaSource.EFFORT).bucket) == beta


async def test_a_request_for_the_quarter_alias_is_counted_under_beta_0_25(proxy: Proxy) -> None:
    _, _, body = await proxy.ask(None, model=f"{MODEL}@0.25")
    assert await proxy.metric("autotts_tokens_total", beta="0.25") == body["tts"]["tokens"]["total"]


async def test_values_chosen_by_clients_create_no_new_series(proxy: Proxy) -> None:
    async def ask(number: int) -> None:
        controllers = (f"asc@{number + 1}", f"nobody{number}")
        for controller in controllers:
            await proxy.ask(tts={"controller": controller})
        await proxy.ask(model=f"model{number}")
        await proxy.ask(beta="0.5", model=f"{MODEL}@0.{number}")
        await proxy.ask(beta=f"0.{number}{number}")
        async with proxy.http.get(f"{proxy.url}/made/up/{number}") as response:
            assert response.status == 404

    for number in range(10):  # every bucket of β occurs
        await ask(number)
    known = await series(proxy)
    for number in range(10, 20):
        await ask(number)
    labels = {value for _, pairs in await series(proxy) - known for _, value in pairs}
    assert not {value for value in labels if any(part in value for part in ("@", "nobody", "model1", "made"))}
    assert await proxy.metric("autotts_requests_total", controller="asc") == 20
    assert await proxy.metric("autotts_response_seconds_count", path="other") == 20
    assert (controller_label("sc@9"), controller_label("cmc")) == ("self_consistency", "cmc")


@pytest.mark.parametrize(
    ("fault", "of_upstream", "outcome"),
    [
        ("cut", "broken", "failed"),
        ("lie", "nonsense", "failed"),
        ("unavailable", "failed", "failed"),
        ("refuse", "refused", "refused"),
    ],
)
async def test_upstream_failures_are_counted_by_kind(proxy: Proxy, fault: str, of_upstream: str, outcome: str) -> None:
    proxy.backend.fault = fault
    await proxy.ask()
    assert await proxy.metric("autotts_upstream_requests_total", model=MODEL, outcome=of_upstream) > 0
    assert await proxy.metric("autotts_requests_total", outcome=outcome) == 1
    assert await proxy.metric("autotts_requests_total") == 1
    assert await proxy.metric("autotts_stops_total") == (outcome == "failed")


async def test_upstream_health_is_measured_without_any_request(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health_monitor, "CHECK_INTERVAL_S", 0.01)
    async with running(load(upstream=proxy.backend.url, **SMALL)) as url, aiohttp.ClientSession() as http:
        other = proxy._replace(url=url, http=http)
        for well in (True, False, True):
            proxy.backend.is_well = well
            while await other.metric("autotts_upstream_up") != well:
                pass


async def test_loss_and_rollback_series_are_exported_before_any_event(proxy: Proxy) -> None:
    names = {(name, dict(labels).get("reason")) for name, labels in await series(proxy)}
    assert {("autotts_recorder_lost_total", "full"), ("autotts_rollbacks_total", "quarantined")} <= names
