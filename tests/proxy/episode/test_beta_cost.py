"""Calibration: the curve of what β costs, and `tts.target_tokens`, which sets β by its cost."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from openai import AsyncOpenAI

from controllers.loading import Spec
from discovery.evaluation.calibration import (
    Arm,
    BetaMap,
    Calibration,
    CalibrationPoint,
    SingleChain,
    write_calibrations,
)
from proxy.app import create_app
from proxy.errors import BadRequest, SettingsError
from proxy.requests.beta import resolve
from proxy.server import running
from proxy.settings import load
from proxy.types import BetaSource
from tests.fakes import MODEL, FakeVLLM
from tests.proxy.conftest import SMALL, Proxy
from tests.proxy.requests.test_bad_input import check_error


def calibrated(controller: str = "cmc") -> Calibration:
    """Return a calibration of 1,000 tokens at β = 0 and 5,000 at β = 1."""
    points = tuple(
        CalibrationPoint(at, 1000 + 4000 * at, None, None, 50, None, None, 0, None) for at in (0.0, 0.5, 1.0)
    )
    return Calibration(
        controller, Spec(controller).digest, points, SingleChain(400, 45), True, BetaMap(Arm.CONTROLLER, 1.0)
    )


@pytest_asyncio.fixture
async def calibrated_proxy(backend: FakeVLLM, tmp_path: Path) -> AsyncIterator[Proxy]:
    """A proxy with a calibration of its model."""
    write_calibrations({MODEL: calibrated()}, tmp_path / "calibration.json")
    settings = load(upstream=backend.url, calibration=tmp_path / "calibration.json", **SMALL)
    async with (
        running(settings) as url,
        aiohttp.ClientSession() as http,
        AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as openai,
    ):
        yield Proxy(backend, url, http, openai)


async def curve(proxy: Proxy, **query: str) -> tuple[int, Any]:
    async with proxy.http.get(f"{proxy.url}/v1/tts/curve", params=query) as response:
        return response.status, await response.json()


@pytest.mark.parametrize("query", [{}, {"model": MODEL}, {"model": f"{MODEL}@0.5"}])
async def test_the_calibration_curve_of_a_model_is_returned(calibrated_proxy: Proxy, query: dict[str, str]) -> None:
    assert await curve(calibrated_proxy, **query) == (200, {"model": MODEL, **calibrated().as_json()})


async def test_a_missing_calibration_curve_is_404(proxy: Proxy, calibrated_proxy: Proxy) -> None:
    status, reply = await curve(proxy, model=MODEL)
    check_error(reply, 404, status, param="model", code="no_calibration")
    status, reply = await curve(calibrated_proxy, model="another")
    check_error(reply, 404, status, param="model", code="model_not_found")


@pytest.mark.parametrize(("target", "beta"), [(1, 0), (1000, 0), (2000, 0.25), (4000, 0.75), (10**6, 1)])
async def test_target_tokens_set_beta(calibrated_proxy: Proxy, target: int, beta: float) -> None:
    status, headers, reply = await calibrated_proxy.ask(None, tts={"target_tokens": target})
    assert status == 200, reply
    assert float(headers["x-tts-beta"]) == beta == reply["tts"]["beta"]
    assert headers["x-tts-beta-source"] == reply["tts"]["beta_source"] == "target_tokens"


@pytest.mark.parametrize(
    ("best", "controller", "beta"),
    [
        (BetaMap(Arm.CONTROLLER, 1.0), "cmc", "0.8"),
        (BetaMap(Arm.CONTROLLER, 0.5), "cmc", "0.5"),
        (BetaMap(Arm.SINGLE, 0.0), "single", "0"),
    ],
)
async def test_the_default_beta_is_limited_to_where_it_pays(
    backend: FakeVLLM, tmp_path: Path, best: BetaMap, controller: str, beta: str
) -> None:
    write_calibrations({MODEL: replace(calibrated(), map=best, pays=False)}, tmp_path / "calibration.json")
    settings = load(upstream=backend.url, beta=0.8, calibration=tmp_path / "calibration.json", **SMALL)
    async with running(settings) as url, aiohttp.ClientSession() as http:
        unused = AsyncOpenAI(base_url=f"{url}/v1", api_key="unused")
        proxy = Proxy(backend, url, http, unused)
        _, headers, _ = await proxy.ask(None)
        assert (headers["x-tts-controller"], headers["x-tts-beta"]) == (controller, beta)
        for beta_header, named in (("0.8", None), (None, "esc")):  # what a client sets is not limited
            _, headers, _ = await proxy.ask(beta_header, tts={} if named is None else {"controller": named})
            assert headers["x-tts-controller"] == (named or "cmc")
        await unused.close()


async def test_the_header_wins_over_target_tokens(calibrated_proxy: Proxy, proxy: Proxy) -> None:
    for server in (calibrated_proxy, proxy):  # without a calibration too, as it is not needed
        status, headers, _ = await server.ask("1", tts={"target_tokens": 1000})
        assert (status, headers["x-tts-beta"], headers["x-tts-beta-source"]) == (200, "1", "header")


async def test_target_tokens_win_over_effort_and_alias(calibrated_proxy: Proxy) -> None:
    fields: dict[str, Any] = {"model": f"{MODEL}@1", "reasoning_effort": "high", "tts": {"target_tokens": 1000}}
    _, headers, _ = await calibrated_proxy.ask(None, **fields)
    assert (headers["x-tts-beta"], headers["x-tts-beta-source"]) == ("0", "target_tokens")


@pytest.mark.parametrize(
    ("tts", "param", "code"),
    [
        ({"target_tokens": 1000, "beta": 0.5}, "tts.target_tokens", "bad_beta"),
        ({"target_tokens": 0}, "tts.target_tokens", None),
        ({"target_tokens": "1000"}, "tts.target_tokens", None),
        ({"target_tokens": 1.5}, "tts.target_tokens", None),
        ({"target_tokens": 1000, "controller": "single"}, "tts.target_tokens", "no_calibration"),
    ],
)
async def test_bad_target_tokens_are_refused(
    calibrated_proxy: Proxy, tts: dict[str, Any], param: str, code: str | None
) -> None:
    status, _, reply = await calibrated_proxy.ask(None, tts=tts)
    check_error(reply, 400, status, param=param, code=code)
    assert calibrated_proxy.backend.requests == []


async def test_target_tokens_without_a_calibration_are_refused(proxy: Proxy) -> None:
    status, _, reply = await proxy.ask(None, tts={"target_tokens": 1000})
    check_error(reply, 400, status, param="tts.target_tokens", code="no_calibration")
    assert "no calibration for model 'fake-model'" in reply["error"]["message"]


async def test_a_calibration_of_another_controller_is_not_used(backend: FakeVLLM, tmp_path: Path) -> None:
    write_calibrations({MODEL: calibrated("asc")}, tmp_path / "calibration.json")
    settings = load(upstream=backend.url, calibration=tmp_path / "calibration.json", **SMALL)
    async with running(settings) as url, aiohttp.ClientSession() as http, AsyncOpenAI(api_key="unused") as openai:
        proxy = Proxy(backend, url, http, openai)
        status, _, reply = await proxy.ask(None, tts={"target_tokens": 1000})
        check_error(reply, 400, status, param="tts.target_tokens", code="no_calibration")
        assert "calibrated for asc, but cmc serves" in reply["error"]["message"]
        status, _, reply = await proxy.ask(None, tts={"target_tokens": 1000, "controller": "asc"})
        assert (status, reply["tts"]["controller"]) == (200, "asc")


def test_the_target_beta_is_computed_only_if_it_is_used() -> None:
    def never() -> float:
        raise BadRequest("computed")

    options: dict[str, Any] = {"effort": None, "alias": None, "model": "m", "default": None, "target": never}
    beta = resolve(["0.5"], body=None, **options)
    assert beta is not None
    assert beta.source is BetaSource.HEADER
    with pytest.raises(BadRequest, match="computed"):
        resolve([], body=None, **options)


@pytest.mark.parametrize("text", [None, "{", '{"m": {"controller": "cmc"}}'])
def test_a_bad_calibration_file_is_a_settings_error(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "calibration.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SettingsError, match=f"calibration: {path}"):
        create_app(load(upstream="http://127.0.0.1:1", calibration=path))


async def test_a_calibration_may_hold_several_controllers(backend: FakeVLLM, tmp_path: Path) -> None:
    cheap = replace(calibrated("asc"), points=(CalibrationPoint(0, 10, None, None, 50, None, None, 0, None),) * 1)
    write_calibrations({MODEL: replace(cheap, others=(calibrated("cmc"),))}, tmp_path / "calibration.json")
    settings = load(upstream=backend.url, calibration=tmp_path / "calibration.json", **SMALL)
    async with running(settings) as url, aiohttp.ClientSession() as http:
        unused = AsyncOpenAI(base_url=f"{url}/v1", api_key="unused")
        proxy = Proxy(backend, url, http, unused)
        assert (await curve(proxy, model=MODEL))[1]["controller"] == "asc"
        assert (await curve(proxy, model=MODEL, controller="cmc"))[1]["points"] == calibrated().as_json()["points"]
        status, reply = await curve(proxy, model=MODEL, controller="esc")
        check_error(reply, 404, status, param="controller", code="no_calibration")
        assert "was calibrated for asc, cmc, not 'esc'" in reply["error"]["message"]
        for named, beta in ((None, 0.5), ("cmc", 0.5), ("asc", 0.0)):
            tts = {"target_tokens": 3000} | ({} if named is None else {"controller": named})
            _, headers, _ = await proxy.ask(None, tts=tts)
            assert float(headers["x-tts-beta"]) == beta
