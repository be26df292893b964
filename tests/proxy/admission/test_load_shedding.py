"""β is reduced under load of the upstream, and replies report the reduced value."""

from __future__ import annotations

from typing import Any

import aiohttp
import pytest

from proxy.admission.load_shedding import Watermarks, parse_watermarks
from proxy.errors import SettingsError
from proxy.server import running
from proxy.settings import load
from proxy.types import BetaSource, EffectiveBeta
from tests.fakes import FakeVLLM
from tests.proxy.admission.test_api_keys import ask
from tests.proxy.conftest import SMALL


@pytest.mark.parametrize(
    ("reading", "share"), [(None, 0), (0, 0), (4, 0), (11, 0.25), (18, 0.5), (32, 1), (1000, 1), (1e300, 1)]
)
def test_the_load_share_grows_linearly_between_the_watermarks(reading: float | None, share: float) -> None:
    marks = parse_watermarks("4:32")
    assert marks is not None
    assert marks.share(reading) == pytest.approx(share)


def test_equal_watermarks_make_a_step() -> None:
    assert [Watermarks(4, 4).share(reading) for reading in (4, 4.1)] == [0, 1]
    assert parse_watermarks(None) is None


@pytest.mark.parametrize("text", ["4", "32:4", "a:b", "4:", "-1:4", "4:32:64", "nan:4"])
def test_invalid_watermarks_are_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="load_waiting"):
        load(load_waiting=text)


def test_a_beta_scaled_by_load_reports_its_source_and_the_requested_value() -> None:
    assert EffectiveBeta(0.8, BetaSource.HEADER).scaled(1.0) == EffectiveBeta(0.8, BetaSource.HEADER)
    shrunk = EffectiveBeta(0.8, BetaSource.HEADER).scaled(0.5)
    assert (shrunk.value, shrunk.requested, shrunk.source_text) == (0.4, 0.8, "header, load")
    assert EffectiveBeta(0.8, BetaSource.DEFAULT).scaled(0.5).source_text == "load"
    assert not EffectiveBeta(0.8, BetaSource.DEFAULT).scaled(0.5).is_from_client


async def asked(backend: FakeVLLM, settings: dict[str, Any], beta: str | None = "0.8", **fields: Any) -> Any:
    """Start a proxy, send a request and return (β, its source, β asked, load factor, branches)."""
    async with running(load(upstream=backend.url, **SMALL, **settings)) as url, aiohttp.ClientSession() as http:
        status, headers, reply = await ask(http, url, None, beta, **fields)
        assert status == 200
        async with http.get(f"{url}/metrics") as response:
            page = await response.text()
        factor = float(page.partition("\nautotts_load_factor ")[2].partition("\n")[0])
        applied = headers["x-tts-beta"], headers["x-tts-beta-source"]
        assert applied == (f"{reply['tts']['beta']:g}", reply["tts"]["beta_source"])
        return *applied, reply["tts"].get("beta_asked"), factor, reply["tts"]["branches"]


@pytest.mark.parametrize(
    ("queued", "cache", "expected_beta"),
    [
        (0, 0.0, ("0.8", "header", None, 1.0)),
        (4, 0.8, ("0.8", "header", None, 1.0)),
        (18, 0.0, ("0.5", "header, load", 0.8, 0.625)),
        (0, 0.875, ("0.5", "header, load", 0.8, 0.625)),
        (18, 0.99, ("0.2", "header, load", 0.8, 0.25)),
    ],
)
async def test_beta_is_scaled_by_the_worse_of_queue_and_cache_load(
    backend: FakeVLLM, queued: int, cache: float, expected_beta: tuple[str, str, float | None, float]
) -> None:
    backend.queued, backend.cache = queued, cache
    actual = await asked(backend, {"load_waiting": "4:32", "load_cache": "0.8:0.95"})
    assert actual[:3] == expected_beta[:3]
    assert actual[3] == pytest.approx(expected_beta[3])


async def test_a_beta_reduced_by_load_opens_fewer_branches(backend: FakeVLLM) -> None:
    body: dict[str, Any] = {"tts": {"controller": "self_consistency"}}
    calm = await asked(backend, {"load_waiting": "4:32"}, **body)
    backend.queued = 99
    busy = await asked(backend, {"load_waiting": "4:32"}, **body)
    assert busy[4] < calm[4] / 2


async def test_load_scales_the_default_beta_but_not_a_required_one(backend: FakeVLLM) -> None:
    backend.queued = 99
    settings = {"load_waiting": "4:32", "load_factor": 0.5, "beta": 0.8}
    assert (await asked(backend, settings, None))[:3] == ("0.4", "load", 0.8)
    assert (await asked(backend, settings, None, tts={"required": True}))[:3] == ("0.8", "default", None)


async def test_without_watermarks_beta_is_unchanged_and_upstream_load_is_not_read(backend: FakeVLLM) -> None:
    backend.queued = 99
    assert (await asked(backend, {}))[:4] == ("0.8", "header", None, 1.0)
    assert not backend.looked.is_set()


async def test_an_upstream_without_load_metrics_leaves_beta_unchanged(backend: FakeVLLM, monkeypatch: Any) -> None:
    backend.queued = 99
    monkeypatch.setattr("proxy.upstream.load_metrics.WAITING_GAUGE", ("vllm:something_else{",))
    assert (await asked(backend, {"load_waiting": "4:32"}))[:4] == ("0.8", "header", None, 1.0)
