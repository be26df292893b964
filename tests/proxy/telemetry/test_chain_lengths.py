"""An interval too long for the chains of a model is detected from traffic and logged once with a better one."""

from __future__ import annotations

import logging

import pytest
from openai import AsyncOpenAI

from deploy.embedded import SERVED_MODEL_NAME
from proxy.server import running
from proxy.settings import EMBEDDED, load
from proxy.telemetry.chain_lengths import MIN_EPISODES, ChainLengths, suggested_interval
from proxy.types import LiveBranch
from tests.fakes import MODEL, FakeVLLM, chain
from tests.proxy.conftest import INTERVAL, SMALL, Proxy, backend, proxy

__all__ = ["backend", "proxy"]  # fixtures


def branches(*lengths: int, finish: str | None = "stop") -> list[LiveBranch]:
    return [LiveBranch(ids=[1] * length, finish=finish) for length in lengths]


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "proxy.telemetry.chain_lengths"]


def test_the_shipped_interval_of_the_embedded_model_is_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    shipped = int(EMBEDDED["interval"])
    lengths = ChainLengths()
    for _ in range(MIN_EPISODES):
        lengths.observe(SERVED_MODEL_NAME, shipped, branches(80, 85))
    assert not warnings_of(caplog)
    lengths.observe(SERVED_MODEL_NAME, 2 * shipped, branches(80, 85))
    assert len(warnings_of(caplog)) == 1


def test_chains_short_for_the_interval_are_warned_of_once_with_a_better_interval(
    caplog: pytest.LogCaptureFixture,
) -> None:
    lengths = ChainLengths()
    for _ in range(MIN_EPISODES - 1):
        lengths.observe("m", 512, branches(400, 410, 390))
    lengths.observe("m", 512, branches())
    assert not warnings_of(caplog)  # twenty questions are needed, however many chains they have
    for _ in range(3):
        lengths.observe("m", 512, branches(400, 410))
    (line,) = warnings_of(caplog)
    assert line.startswith("m: chains have 400 tokens (median of the latest 20 requests) and the interval has 512, ")
    assert line.endswith(
        "only 0.8 times per chain, too late to prune or to open some; set AUTOTTS_INTERVAL=48 for this model"
    )
    for _ in range(MIN_EPISODES):
        lengths.observe("n", 512, branches(400))
    assert len(warnings_of(caplog)) == 2


@pytest.mark.parametrize(
    ("interval", "lengths", "finish"),
    [
        (512, [1536] * 50, "stop"),
        (32, [230] * 50, "stop"),  # the embedded model
        (16, [20] * 50, "stop"),  # no smaller one is suggested
        (512, [2000] * 50, None),  # cut, but long enough to tell
        (512, [400] * 50, "length"),  # by the request's own limit
        (512, [400] * 50, None),
        (512, [400] * 20 + [3000] * 60, "stop"),
    ],
)
def test_chains_that_are_long_enough_or_cut_by_a_limit_are_not_warned_of(
    caplog: pytest.LogCaptureFixture, interval: int, lengths: list[int], finish: str | None
) -> None:
    seen = ChainLengths()
    for length in lengths[::-1]:
        seen.observe("m", interval, branches(length, finish=finish))
    assert not warnings_of(caplog)


@pytest.mark.parametrize(("tokens", "interval"), [(30, 16), (230, 32), (400, 48), (4096, 512), (10_000, 1248)])
def test_the_suggested_interval_is_about_an_eighth_of_a_chain(tokens: int, interval: int) -> None:
    assert suggested_interval(tokens) == interval


async def test_the_proxy_warns_of_short_chains_seen_in_its_traffic(
    proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    settings = load(upstream=proxy.backend.url, **{**SMALL, "interval": 512})
    async with running(settings) as url:
        for _ in range(MIN_EPISODES):
            await proxy._replace(url=url).ask("0.5", tts={"controller": "sc@2", "answer": "boxed"})
    (line,) = warnings_of(caplog)
    assert line.startswith(f"{MODEL}: chains have ")


async def test_long_reasoning_is_streamed_in_pieces_of_at_most_400_characters() -> None:
    async with (
        FakeVLLM([chain("7", 1500)], INTERVAL).serve() as long,
        running(load(upstream=long.url, **SMALL)) as url,
        AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client,
    ):
        asked = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
        extra = {"tts": {"beta": 0, "controller": "single", "answer": "boxed"}}
        complete = await client.chat.completions.create(**asked, extra_body=extra)  # type: ignore[call-overload]
        chunks = await client.chat.completions.create(**asked, stream=True, extra_body=extra)  # type: ignore[call-overload]
        pieces = [chunk.choices[0].delta.model_extra.get("reasoning", "") async for chunk in chunks]
    pieces = [piece for piece in pieces if piece]
    assert max(map(len, pieces)) == 400
    assert "".join(pieces) == complete.choices[0].message.model_extra["reasoning"]
    assert len(pieces) >= 3
