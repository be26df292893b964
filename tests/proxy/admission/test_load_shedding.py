"""What the upstream's load leaves of β, and what is said of it."""

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
def test_between_the_marks_it_grows_evenly(reading: float | None, share: float) -> None:
    marks = parse_watermarks("4:32")
    assert marks is not None
    assert marks.share(reading) == pytest.approx(share)


def test_two_equal_marks_are_a_step() -> None:
    assert [Watermarks(4, 4).share(reading) for reading in (4, 4.1)] == [0, 1]
    assert parse_watermarks(None) is None


@pytest.mark.parametrize("text", ["4", "32:4", "a:b", "4:", "-1:4", "4:32:64", "nan:4"])
def test_marks_that_are_none(text: str) -> None:
    with pytest.raises(SettingsError, match="load_waiting"):
        load(load_waiting=text)


def test_what_is_told_of_the_source() -> None:
    assert EffectiveBeta(0.8, BetaSource.HEADER).scaled(1.0) == EffectiveBeta(0.8, BetaSource.HEADER)
    shrunk = EffectiveBeta(0.8, BetaSource.HEADER).scaled(0.5)
    assert (shrunk.value, shrunk.requested, shrunk.source_text) == (0.4, 0.8, "header, load")
    assert EffectiveBeta(0.8, BetaSource.DEFAULT).scaled(0.5).source_text == "load"
    assert not EffectiveBeta(0.8, BetaSource.DEFAULT).scaled(0.5).is_from_client


async def asked(backend: FakeVLLM, settings: dict[str, Any], beta: str | None = "0.8", **fields: Any) -> Any:
    """β, its source and the branches of a request to a proxy that has just been started."""
    async with running(load(upstream=backend.url, **SMALL, **settings)) as url, aiohttp.ClientSession() as http:
        status, headers, reply = await ask(http, url, None, beta, **fields)
        assert status == 200
        async with http.get(f"{url}/metrics") as response:
            page = await response.text()
        factor = float(page.partition("\nautotts_load_factor ")[2].partition("\n")[0])
        told = headers["x-tts-beta"], headers["x-tts-beta-source"]
        assert told == (f"{reply['tts']['beta']:g}", reply["tts"]["beta_source"])
        return *told, reply["tts"].get("beta_asked"), factor, reply["tts"]["branches"]


@pytest.mark.parametrize(
    ("queued", "cache", "told"),
    [
        (0, 0.0, ("0.8", "header", None, 1.0)),
        (4, 0.8, ("0.8", "header", None, 1.0)),
        (18, 0.0, ("0.5", "header, load", 0.8, 0.625)),
        (0, 0.875, ("0.5", "header, load", 0.8, 0.625)),
        (18, 0.99, ("0.2", "header, load", 0.8, 0.25)),
    ],
)
async def test_the_worse_of_queue_and_cache_decides(
    backend: FakeVLLM, queued: int, cache: float, told: tuple[str, str, float | None, float]
) -> None:
    backend.queued, backend.cache = queued, cache
    got = await asked(backend, {"load_waiting": "4:32", "load_cache": "0.8:0.95"})
    assert got[:3] == told[:3]
    assert got[3] == pytest.approx(told[3])


async def test_a_smaller_beta_is_fewer_branches(backend: FakeVLLM) -> None:
    body: dict[str, Any] = {"tts": {"controller": "self_consistency"}}
    calm = await asked(backend, {"load_waiting": "4:32"}, **body)
    backend.queued = 99
    busy = await asked(backend, {"load_waiting": "4:32"}, **body)
    assert busy[4] < calm[4] / 2


async def test_the_operators_beta_too_but_not_what_is_required(backend: FakeVLLM) -> None:
    backend.queued = 99
    settings = {"load_waiting": "4:32", "load_factor": 0.5, "beta": 0.8}
    assert (await asked(backend, settings, None))[:3] == ("0.4", "load", 0.8)
    assert (await asked(backend, settings, None, tts={"required": True}))[:3] == ("0.8", "default", None)


async def test_it_is_off_unless_marks_are_set_and_nobody_looks(backend: FakeVLLM) -> None:
    backend.queued = 99
    assert (await asked(backend, {}))[:4] == ("0.8", "header", None, 1.0)
    assert not backend.looked.is_set()


async def test_an_upstream_that_does_not_say_leaves_beta_alone(backend: FakeVLLM, monkeypatch: Any) -> None:
    backend.queued = 99
    monkeypatch.setattr("proxy.upstream.load_metrics.WAITING_GAUGE", ("vllm:something_else{",))
    assert (await asked(backend, {"load_waiting": "4:32"}))[:4] == ("0.8", "header", None, 1.0)
