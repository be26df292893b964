"""Fleets with a real vLLM: calls that break off are continued there, and a scripted upstream serves another model."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from deploy.embedded import SERVED_MODEL_NAME
from deploy.embedded.task import held_back
from proxy.environment.live_environment import LiveEnvironment
from proxy.server import running
from proxy.settings import load
from proxy.telemetry.metrics import Metrics
from proxy.types import EnvironmentLimits, LiveBranch, Prompt
from proxy.upstream.client import UpstreamClient
from proxy.upstream.fleet.fleet import Fleet
from proxy.upstream.fleet.fleet_client import FleetClient
from proxy.upstream.fleet.replica import Replica
from proxy.upstream_observer import UpstreamObserver
from tests.fakes import MODEL, FakeVLLM, listening
from tests.proxy.conftest import SMALL
from tests.proxy.upstream.fleet.conftest import scripted

pytestmark = pytest.mark.vllm

TOKENS = 120


class BreakingRelay:
    """A server in front of a real vLLM that breaks the connection after the first `events` events of a completion."""

    def __init__(self, upstream: str, http: aiohttp.ClientSession, events: int) -> None:
        self._upstream, self._http, self._events = upstream, http, events
        self.broken = 0
        self.url = ""

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[BreakingRelay]:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._relay)
        async with listening(app) as self.url:
            yield self

    async def _relay(self, request: web.Request) -> web.StreamResponse:
        headers = {"content-type": "application/json"}
        sent = self._http.request(
            request.method, f"{self._upstream}{request.path}", data=await request.read(), headers=headers
        )
        async with sent as answer:
            if request.path != "/v1/completions":
                return web.Response(body=await answer.read(), status=answer.status, headers=headers)
            response = web.StreamResponse(headers={"content-type": "text/event-stream"})
            await response.prepare(request)
            events = 0
            async for line in answer.content:
                await response.write(line)
                events += line.startswith(b"data: ")
                if events == self._events and request.transport is not None:
                    self.broken += 1
                    request.transport.close()  # what was written is still sent
                    break
            return response


def greedy(**sampling: Any) -> dict[str, Any]:
    return {"temperature": 0.0, "skip_special_tokens": False, **sampling}


@pytest.mark.parametrize(
    ("events", "sampling"),
    [
        pytest.param(1, greedy(), id="after the first token"),
        pytest.param(3, greedy(), id="in the middle"),
        pytest.param(3, greedy(stop=["a text that never comes"]), id="while text is held back for a stop string"),
    ],
)
async def test_another_replica_continues_a_branch_as_if_nothing_had_happened(
    vllm: str, events: int, sampling: dict[str, Any]
) -> None:
    async with AsyncExitStack() as stack:
        http = await stack.enter_async_context(aiohttp.ClientSession())
        relay = await stack.enter_async_context(BreakingRelay(vllm, http, events).serve())
        direct = UpstreamClient(vllm, http)
        question = {"role": "user", "content": held_back(1)[0].question}
        ids = await direct.tokenise_chat({"model": SERVED_MODEL_NAME, "messages": [question]})
        prompt = Prompt(SERVED_MODEL_NAME, ids, "", {})

        async def generate(engine: Any) -> tuple[list[int], str, LiveEnvironment]:
            world = LiveEnvironment(engine, prompt, EnvironmentLimits(32, 1000, 8))
            world.branches.append(LiveBranch())
            output = await world.extend(0, [], TOKENS, sampling)
            return output.ids, output.text, world

        members = [Replica(UpstreamClient(url, http)) for url in (relay.url, vllm)]
        client = FleetClient(Fleet(members, 1, Metrics()), UpstreamObserver(), 60)
        stack.push_async_callback(client.close)
        keys = (bytes([number]) for number in range(256))
        key = next(key for key in keys if client._fleet.choose(SERVED_MODEL_NAME, key) is members[0])
        expected_ids, expected_text, _ = await generate(direct)
        ids_again, text_again, world = await generate(client.route(SERVED_MODEL_NAME, lambda: key))
        assert relay.broken == 1
        assert (ids_again, text_again) == (expected_ids, expected_text)
        assert (world.meter.generated_tokens, world.meter.aborted_tokens) == (len(expected_ids), 0)
        assert world.meter.requests == 2


async def test_one_proxy_serves_a_real_and_a_scripted_model(vllm: str, tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        gone = await stack.enter_async_context(AsyncExitStack())
        fake: FakeVLLM = await gone.enter_async_context(scripted().serve())
        http = await stack.enter_async_context(aiohttp.ClientSession())
        file = tmp_path / "models.toml"
        file.write_text(f'"{SERVED_MODEL_NAME}" = "{vllm}"\n"{MODEL}" = "{fake.url}"\n')
        settings = load(**{**SMALL, "upstream": str(file), "read_timeout_s": 60, "interval": 32})
        url = await stack.enter_async_context(running(settings))

        async def ask(model: str) -> tuple[int, Any]:
            body = {"model": model, "messages": [{"role": "user", "content": held_back(1)[0].question}]}
            async with http.post(f"{url}/v1/chat/completions", json=body, headers={"x-tts-beta": "0.3"}) as response:
                return response.status, await response.json()

        async with http.get(f"{url}/v1/models") as response:
            listed = [card["id"] for card in (await response.json())["data"] if "@" not in card["id"]]
        assert listed == [SERVED_MODEL_NAME, MODEL]
        for model in listed:
            status, body = await ask(model)
            assert (status, body["model"]) == (200, model), body
            assert body["tts"]["tokens"]["total"] > 0
        await gone.aclose()
        status, body = await ask(MODEL)
        assert (status, body["error"]["type"]) == (502, "upstream_error")
        assert fake.url in body["error"]["message"]
        assert (await ask(SERVED_MODEL_NAME))[0] == 200
        async with http.get(f"{url}/ready") as response:
            assert response.status == 200
