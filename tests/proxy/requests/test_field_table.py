"""Fields of passed-through requests that reach the upstream, and how such requests are counted."""

from __future__ import annotations

import ast
import json
from collections.abc import AsyncIterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from openai import AsyncOpenAI
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

from proxy.errors import Forbidden
from proxy.requests.field_table import ADMINS, FORWARDED, fields_to_drop
from proxy.server import running
from proxy.settings import load
from tests.fakes import RawUpstream
from tests.proxy.conftest import SMALL, Proxy

CHAT = {"model": "fake-model", "messages": [{"role": "user", "content": "q"}]}
KEY = {"authorization": "Bearer admin"}


def fields_of_vllm(endpoint: str) -> set[str]:
    """Return the request fields that vLLM defines in the module of an endpoint. Skip the test without vLLM."""
    vllm = find_spec("vllm")
    if vllm is None or vllm.origin is None:
        pytest.skip("vLLM is not installed")
    module = Path(vllm.origin).parent / "entrypoints" / "openai" / endpoint / "protocol.py"
    requests = ("ChatCompletionRequest", "CompletionRequest", "ResponsesRequest")
    statements = ast.parse(module.read_text()).body
    classes = [node for node in statements if isinstance(node, ast.ClassDef) and node.name in requests]
    members = [member for node in classes for member in node.body if isinstance(member, ast.AnnAssign)]
    return {name for member in members if not (name := ast.unparse(member.target)).startswith("_")}


@pytest.mark.parametrize(
    "params",
    [
        chat_create_params.CompletionCreateParamsBase,
        completion_create_params.CompletionCreateParamsBase,
        response_create_params.ResponseCreateParamsBase,
        embedding_create_params.EmbeddingCreateParams,
    ],
)
def test_every_field_of_the_openai_client_is_forwarded(params: type) -> None:
    missing = set(params.__annotations__) - FORWARDED
    assert len(missing) <= 5, missing  # a newer client may know more than vLLM does


@pytest.mark.parametrize("name", ["chat_completion", "completion", "responses"])
def test_every_field_of_vllm_is_in_a_table(name: str) -> None:
    fields = fields_of_vllm(name)
    assert len(fields) > 20
    assert fields <= FORWARDED | ADMINS.keys()


def test_only_admins_may_send_server_fields() -> None:
    assert not FORWARDED & ADMINS.keys()
    assert not fields_to_drop(dict.fromkeys([*FORWARDED, "tts"], 1), is_admin=False)
    assert not fields_to_drop(dict.fromkeys([*ADMINS, "frobnicate"], 1), is_admin=True)
    assert fields_to_drop({"model": "m", "frobnicate": 1}, is_admin=False) == ["frobnicate"]
    for name, defaults in ADMINS.items():
        with pytest.raises(Forbidden, match=name) as refused:
            fields_to_drop({"model": "m", name: "x"}, is_admin=False)
        assert refused.value.param == name
        for value in (None, [], {}, *defaults):
            assert not fields_to_drop({name: value}, is_admin=False)


@pytest_asyncio.fixture
async def upstream() -> AsyncIterator[RawUpstream]:
    async with RawUpstream([b'{"id": 1}'], content_type="application/json").serve() as made:
        yield made


@pytest_asyncio.fixture
async def proxy(upstream: RawUpstream) -> AsyncIterator[Proxy]:
    async with (
        running(load(upstream=upstream.url, admin_key="admin", **SMALL)) as url,
        aiohttp.ClientSession() as http,
        AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as openai,
    ):
        yield Proxy(upstream, url, http, openai)  # type: ignore[arg-type]  # the tests read only its bytes


async def ask(proxy: Proxy, path: str, body: Any, **headers: str) -> tuple[int, Any]:
    async with proxy.http.post(f"{proxy.url}/v1/{path}", json=body, headers=headers) as response:
        return response.status, await response.json(content_type=None)


@pytest.mark.parametrize(("path", "body"), [("chat/completions", CHAT), ("embeddings", {"model": "m", "input": "x"})])
async def test_fields_a_client_may_not_set_do_not_reach_the_upstream(
    proxy: Proxy, upstream: RawUpstream, path: str, body: dict[str, Any]
) -> None:
    status, reply = await ask(proxy, path, {**body, "priority": -1000})
    assert (status, reply["error"]["param"], reply["error"]["code"]) == (403, "priority", "admin_only")
    assert not upstream.seen
    assert (await ask(proxy, path, {**body, "frobnicate": 1, "user": "me"}))[0] == 200
    assert json.loads(upstream.seen[-1].body) == {**body, "user": "me"}
    assert (await ask(proxy, path, {**body, "priority": -1, "frobnicate": 1}, **KEY))[0] == 200
    assert json.loads(upstream.seen[-1].body) == {**body, "priority": -1, "frobnicate": 1}


async def test_an_alias_works_on_passed_through_endpoints(proxy: Proxy, upstream: RawUpstream) -> None:
    assert (await ask(proxy, "embeddings", {"model": "fake-model@0.5", "input": "x"}))[0] == 200
    assert json.loads(upstream.seen[-1].body) == {"model": "fake-model", "input": "x"}
    status, reply = await ask(proxy, "embeddings", {"model": "nobody@0.5", "input": "x"})
    assert (status, reply["error"]["code"]) == (404, "model_not_found")


async def test_requests_are_counted_by_outcome(proxy: Proxy, upstream: RawUpstream) -> None:
    name = "autotts_requests_total"
    assert (await ask(proxy, "chat/completions", CHAT))[0] == 200
    assert await proxy.metric(name, outcome="passed_through") == 1
    upstream.status = 500
    assert (await ask(proxy, "chat/completions", CHAT))[0] == 500
    assert (await ask(proxy, "chat/completions", {**CHAT, "tts": {"beta": 0.5}}))[0] >= 500  # it cannot be planned
    assert await proxy.metric(name, outcome="failed") == 2
    await upstream.close()
    assert (await ask(proxy, "embeddings", {"model": "m", "input": "x"}))[0] == 502
    assert await proxy.metric(name, outcome="failed") == 3
    assert (await ask(proxy, "embeddings", {"model": "m", "priority": 1}))[0] == 403
    assert await proxy.metric(name, outcome="denied") == 1
    assert await proxy.metric(name, outcome="passed_through") == 1
