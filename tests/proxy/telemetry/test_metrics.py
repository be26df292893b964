"""What Prometheus is told of requests: by whom, how they ended, what they cost, and what voting would have."""

from __future__ import annotations

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from proxy.environment.live_environment import LiveEnvironment
from proxy.episode.episode_metrics import estimate_saved_tokens
from proxy.requests.beta import EFFORTS
from proxy.server import running
from proxy.settings import load
from proxy.telemetry.metrics import controller_label
from proxy.types import ALIAS_BETAS, BetaSource, EffectiveBeta, EnvironmentLimits, LiveBranch, Prompt
from proxy.upstream import health_monitor
from proxy.upstream.client import UpstreamClient
from tests.proxy.conftest import SMALL, Proxy

MODEL = "fake-model"


async def series(proxy: Proxy) -> set[tuple[str, frozenset[tuple[str, str]]]]:
    """Every series there is, histograms by their counts."""
    async with proxy.http.get(f"{proxy.url}/metrics") as response:
        families = list(text_string_to_metric_families(await response.text()))
    return {
        (sample.name, frozenset(sample.labels.items()))
        for family in families
        for sample in family.samples
        if not sample.name.endswith(("_bucket", "_created"))
    }


async def test_an_episode_is_counted_every_way(proxy: Proxy) -> None:
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


async def test_a_stream_begins_before_it_ends(proxy: Proxy) -> None:
    stream = await proxy.openai.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "hi"}], stream=True, extra_headers={"x-tts-beta": "0.5"}
    )
    assert [chunk async for chunk in stream]
    about = {"path": "/v1/chat/completions", "applied": "true", "streamed": "true"}
    first = await proxy.metric("autotts_first_byte_seconds_sum", **about)
    assert 0 < first < await proxy.metric("autotts_response_seconds_sum", **about)


async def test_voting_is_what_savings_are_measured_by(proxy: Proxy) -> None:
    _, _, body = await proxy.ask(tts={"controller": "sc@3", "answer": "boxed"})
    by = {"model": MODEL, "controller": "self_consistency"}
    spent = body["tts"]["tokens"]["total"]
    assert await proxy.metric("autotts_saved_tokens_estimate_total", **by) == pytest.approx(64 * spent / 3 - spent)
    assert await proxy.metric("autotts_overspent_tokens_estimate_total", **by) == 0
    assert await proxy.metric("autotts_agreement_sum", **by) == pytest.approx(max(body["tts"]["votes"].values()) / 3)


async def test_savings_are_an_estimate_from_branches_that_ended(proxy: Proxy) -> None:
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
def test_a_beta_is_counted_under_the_nearest_alias(beta: float, bucket: str) -> None:
    assert EffectiveBeta(beta, BetaSource.HEADER).bucket == bucket


def test_every_alias_and_effort_has_a_bucket_of_its_own() -> None:
    for beta in (*ALIAS_BETAS, *EFFORTS.values()):
        assert float(EffectiveBeta(beta, BetaSource.EFFORT).bucket) == beta


async def test_a_quarter_is_counted_as_a_quarter(proxy: Proxy) -> None:
    _, _, body = await proxy.ask(None, model=f"{MODEL}@0.25")
    assert await proxy.metric("autotts_tokens_total", beta="0.25") == body["tts"]["tokens"]["total"]


async def test_no_client_makes_a_series(proxy: Proxy) -> None:
    async def ask(number: int) -> None:
        asked = (f"asc@{number + 1}", f"nobody{number}")
        for controller in asked:
            await proxy.ask(tts={"controller": controller})
        await proxy.ask(model=f"model{number}")
        await proxy.ask(beta="0.5", model=f"{MODEL}@0.{number}")
        await proxy.ask(beta=f"0.{number}{number}")
        async with proxy.http.get(f"{proxy.url}/made/up/{number}") as response:
            assert response.status == 404

    for number in range(10):  # every β there is
        await ask(number)
    known = await series(proxy)
    for number in range(10, 20):
        await ask(number)
    labels = {value for _, pairs in await series(proxy) - known for _, value in pairs}
    assert not {value for value in labels if any(part in value for part in ("@", "nobody", "model1", "made"))}
    assert await proxy.metric("autotts_requests_total", controller="asc") == 20
    assert await proxy.metric("autotts_response_seconds_count", path="other") == 20
    assert (controller_label("sc@9"), controller_label("cmc")) == ("self_consistency", "cmc")


@pytest.mark.parametrize(("fault", "outcome"), [("cut", "nonsense"), ("refuse", "refused")])
async def test_the_upstreams_failures_are_told_apart(proxy: Proxy, fault: str, outcome: str) -> None:
    proxy.backend.fault = fault
    await proxy.ask()
    assert await proxy.metric("autotts_upstream_requests_total", model=MODEL, outcome=outcome) > 0
    assert await proxy.metric("autotts_requests_total", outcome="failed") == 1


async def test_the_upstreams_health_is_known_to_nobodys_asking(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health_monitor, "EVERY_S", 0.01)
    async with running(load(upstream=proxy.backend.url, **SMALL)) as url, aiohttp.ClientSession() as http:
        other = proxy._replace(url=url, http=http)
        for well in (True, False, True):
            proxy.backend.is_well = well
            while await other.metric("autotts_upstream_up") != well:
                pass


async def test_losses_and_rollbacks_are_there_before_they_happen(proxy: Proxy) -> None:
    names = {(name, dict(labels).get("reason")) for name, labels in await series(proxy)}
    assert {("autotts_recorder_lost_total", "full"), ("autotts_rollbacks_total", "quarantined")} <= names
