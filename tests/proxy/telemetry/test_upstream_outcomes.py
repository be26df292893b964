"""Outcomes of generation requests to the upstream, those that are passed through included."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from itertools import repeat
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from proxy.errors import DeadlinePassed, UpstreamCircuitOpen, UpstreamDisconnected, UpstreamRefused
from proxy.server import running
from proxy.settings import load
from proxy.telemetry.metrics import Metrics
from proxy.telemetry.upstream_outcome import outcome_of_response
from proxy.upstream.circuit_breaker import FAILURES
from tests.fakes import ASSISTANT, MODEL, FakeVLLM
from tests.proxy.conftest import SMALL, Proxy

NAME = "autotts_upstream_requests_total"
TEXT = [ord(char) for char in ASSISTANT]


async def complete(proxy: Proxy, **fields: Any) -> int:
    """Send a completion that passes through. Return its status, after its body."""
    body = {"model": MODEL, "prompt": TEXT, "max_tokens": 5, **fields}
    async with proxy.http.post(f"{proxy.url}/v1/completions", json=body) as response:
        await response.read()
        return response.status


@pytest.mark.parametrize(
    ("status", "error", "outcome"),
    [
        (200, None, "done"),
        (304, None, "done"),
        (400, None, "refused"),
        (422, None, "refused"),
        (401, None, "failed"),
        (429, None, "failed"),
        (500, None, "failed"),
        (200, UpstreamDisconnected("x"), "broken"),
        (None, UpstreamCircuitOpen("x", after=1), "ejected"),
        (200, asyncio.CancelledError(), "aborted"),
        (None, asyncio.CancelledError(), "aborted"),
    ],
)
def test_a_passed_through_request_has_an_outcome(status: int | None, error: BaseException | None, outcome: str) -> None:
    assert outcome_of_response(status, error) == outcome


def test_a_failure_is_counted_once() -> None:
    metrics = Metrics()

    def count(outcome: str) -> float:
        pages = (metrics.registry.get_sample_value(NAME, {"model": it, "outcome": outcome}) for it in (MODEL, ""))
        return sum(value or 0 for value in pages)

    refused = UpstreamRefused(HTTPStatus.SERVICE_UNAVAILABLE, "x")
    with pytest.raises(UpstreamRefused), metrics.upstream_request(MODEL):
        raise refused
    metrics.count_early_failure(refused)
    assert count("failed") == 1
    broken = UpstreamDisconnected("x")
    metrics.count_passed_through(MODEL, None, broken)
    metrics.count_early_failure(broken)
    assert count("broken") == 1
    metrics.count_early_failure(UpstreamDisconnected("x"))
    assert count("broken") == 2
    metrics.count_early_failure(DeadlinePassed("x"))
    assert count("timeout") == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fault", "outcome"), [("", "done"), ("drop", "broken"), ("broken", "failed"), ("refuse", "refused")]
)
async def test_passed_through_requests_are_counted(proxy: Proxy, fault: str, outcome: str, stream: bool) -> None:
    proxy.backend.fault = fault
    await complete(proxy, stream=stream)
    assert await proxy.metric(NAME, model=MODEL, outcome=outcome) == 1
    assert await proxy.metric(NAME) == 1


class DyingVLLM(FakeVLLM):
    """A fake vLLM whose connection breaks in the middle of every completion."""

    async def _generate(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b'data: {"choices": []}\n\n')
        if request.transport is not None:
            request.transport.abort()
        return response


async def test_a_passed_through_request_whose_connection_breaks_is_counted_as_broken(proxy: Proxy) -> None:
    async with DyingVLLM().serve() as dying, running(load(upstream=dying.url, **SMALL)) as url:
        other = proxy._replace(url=url)
        with pytest.raises(aiohttp.ClientError):
            await complete(other, stream=True)
        assert await other.metric(NAME, model=MODEL, outcome="broken") == 1
        assert await other.metric(NAME) == 1


async def test_a_passed_through_request_that_the_client_leaves_is_counted_as_aborted(proxy: Proxy) -> None:
    proxy.backend.fault = "hang"
    body = {"model": MODEL, "prompt": TEXT, "max_tokens": 5, "stream": True}
    async with proxy.http.post(f"{proxy.url}/v1/completions", json=body) as response:
        await response.content.readany()
    for _ in repeat(None):
        if await proxy.metric(NAME, outcome="aborted"):
            break
    assert await proxy.metric(NAME) == 1


async def test_other_endpoints_are_not_counted_as_generations(proxy: Proxy) -> None:
    async with proxy.http.post(f"{proxy.url}/tokenize", json={"model": MODEL, "prompt": "x"}) as response:
        assert response.status == 200
    assert await proxy.metric(NAME) == 0


async def test_requests_that_the_open_breaker_refuses_are_counted_with_and_without_beta(proxy: Proxy) -> None:
    assert (await proxy.ask("0"))[0] == 200  # the models are known now
    proxy.backend.fault = "broken"
    status = 500
    while status == 500:
        status = await complete(proxy)
    assert status == 503
    assert await proxy.metric(NAME, outcome="failed") >= FAILURES
    before = await proxy.metric(NAME, outcome="ejected")
    assert await complete(proxy) == 503
    assert (await proxy.ask("0.5"))[2]["error"]["code"] == "upstream_ejected"
    assert await proxy.metric(NAME, outcome="ejected") == before + 2


async def test_requests_without_a_connection_are_counted_before_the_models_are_known() -> None:
    async with running(load(upstream="http://127.0.0.1:9", **SMALL)) as url, aiohttp.ClientSession() as http:
        for path in ("/v1/chat/completions", "/v1/messages"):
            body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
            async with http.post(url + path, json=body) as response:
                assert response.status == 502
                assert (await response.json())["error"]["code"] == "upstream_unreachable"
        async with http.post(f"{url}/v1/embeddings", json={"model": f"{MODEL}@1", "input": "x"}) as response:
            assert response.status == 502
        async with http.get(f"{url}/metrics") as response:
            page = await response.text()
    assert f'\n{NAME}{{model="",outcome="unreachable"}} 2.0\n' in page
