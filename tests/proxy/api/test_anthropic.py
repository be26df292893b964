"""Anthropic's API is passed through within the caller's budget, and its own client works unmodified."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from proxy.admission import api_keys
from proxy.server import running
from proxy.settings import EMBEDDED, load
from tests.docs.blocks import fenced_blocks
from tests.fakes import MODEL, FakeVLLM, RawUpstream
from tests.proxy.conftest import SMALL
from tests.readability import ROOT

QUESTION = "Start with 7. 1) Add 5. 2) Halve. 3) Square. 4) Negate. What is the result mod 13?"
ALICE, BOSS = "sk-autotts-alice", "sesame"
HELLO: dict[str, Any] = {"model": MODEL, "max_tokens": 20, "messages": [{"role": "user", "content": "hi"}]}
START = (
    b'event: message_start\ndata: {"type": "message_start", "message": {"id": "m", "usage": {"output_tokens": 1}}}\n\n'
)
TEXT = b'event: content_block_delta\ndata: {"type": "content_block_delta", "delta": {"text": "seven"}}\n\n'
END = b'event: message_delta\ndata: {"type": "message_delta", "delta": {}, "usage": {"output_tokens": 7}}\n\n'
REPLY = json.dumps({"id": "m", "type": "message", "content": [], "usage": {"input_tokens": 3, "output_tokens": 7}})


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    file = tmp_path / "keys.toml"
    limits = "tokens = 400, tokens_per_minute = 1000"
    file.write_text(f'alice = {{ sha256 = "{api_keys.hash_key(ALICE)}", {limits} }}\n')
    return file


@pytest_asyncio.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


async def ask(
    http: aiohttp.ClientSession, url: str, headers: dict[str, str] | None = None, **fields: Any
) -> tuple[int, Any, Any]:
    given = {"x-api-key": ALICE, **(headers or {})}
    async with http.post(f"{url}/v1/messages", json={**HELLO, **fields}, headers=given) as response:
        content = await response.read()
        is_json = response.content_type == "application/json"
        return response.status, response.headers, json.loads(content) if is_json else content


async def spent(http: aiohttp.ClientSession, url: str) -> int:
    async with http.get(f"{url}/v1/tts/keys", headers={"authorization": f"Bearer {BOSS}"}) as response:
        return int((await response.json())["keys"]["alice"]["spent"])


@pytest.mark.parametrize(
    ("pieces", "is_stream", "charged"),
    [([REPLY.encode()], False, 7), ([START, TEXT, END], True, 7), ([START, TEXT], True, 20)],
    ids=["reply", "stream", "cut stream"],
)
async def test_the_reply_is_unchanged_and_charged_by_its_usage_or_its_limit(
    keys: Path, http: aiohttp.ClientSession, pieces: list[bytes], is_stream: bool, charged: int
) -> None:
    kind = "text/event-stream" if is_stream else "application/json"
    async with (
        RawUpstream(pieces, content_type=kind).serve() as upstream,
        running(load(upstream=upstream.url, keys=keys, admin_key=BOSS, **SMALL)) as url,
    ):
        status, headers, reply = await ask(http, url, stream=is_stream)
        assert await spent(http, url) == charged
    assert status == 200
    assert reply == (b"".join(pieces) if is_stream else json.loads(REPLY))
    assert "x-tts-controller" not in headers
    (sent,) = [seen for seen in upstream.seen if seen.path == "/v1/messages"]
    assert {key: value for key, value in json.loads(sent.body).items() if key != "cache_salt"} == {
        **HELLO,
        "stream": is_stream,
    }
    assert not {"x-api-key", "authorization"} & set(sent.headers)


async def test_a_key_is_needed_and_limits_are_those_of_the_key(keys: Path, http: aiohttp.ClientSession) -> None:
    async with (
        RawUpstream([REPLY.encode()], content_type="application/json").serve() as upstream,
        running(load(upstream=upstream.url, keys=keys, admin_key=BOSS, **SMALL)) as url,
    ):
        assert (await ask(http, url, {"x-api-key": "other"}))[0] == 401
        assert (await ask(http, url, {"authorization": "Bearer other"}))[0] == 401
        status, _, reply = await ask(http, url, max_tokens=401)
        assert (status, reply["error"]["param"], reply["error"]["code"]) == (400, "max_tokens", "cap_too_small")
        assert (await ask(http, url, max_tokens=400))[0] == 200
        status, _, reply = await ask(http, url, priority=5)
        assert (status, reply["error"]["param"]) == (403, "priority")
    assert len([seen for seen in upstream.seen if seen.path == "/v1/messages"]) == 1


async def test_beta_is_reported_as_not_applied_or_refused(backend: FakeVLLM, http: aiohttp.ClientSession) -> None:
    async with running(load(upstream=backend.url, required=True, **SMALL)) as url:
        status, _, reply = await ask(http, url, {"x-tts-beta": "0.5"})
        async with http.get(f"{url}/metrics") as response:
            assert "autotts_beta_not_applied_total{" not in await response.text()
    assert (status, reply["error"]["code"]) == (400, "tts_not_applicable")
    assert "use /v1/chat/completions" in reply["error"]["message"]


async def test_an_alias_with_a_beta_names_the_model(http: aiohttp.ClientSession) -> None:
    async with (
        RawUpstream([REPLY.encode()], content_type="application/json").serve() as upstream,
        running(load(upstream=upstream.url, **SMALL)) as url,
    ):
        status, headers, _ = await ask(http, url, model=f"{MODEL}@0.5")
        async with http.get(f"{url}/metrics") as response:
            text = await response.text()
    assert status == 200
    assert (headers["x-tts-applied"], headers["x-tts-reason"]) == ("false", "messages")
    assert f'autotts_beta_not_applied_total{{model="{MODEL}",reason="messages",source="model_alias"}} 1.0' in text
    (sent,) = [seen for seen in upstream.seen if seen.path == "/v1/messages"]
    assert json.loads(sent.body)["model"] == MODEL


@pytest.mark.vllm
async def test_the_client_of_anthropic_gets_messages_of_a_real_vllm(vllm: str, keys: Path) -> None:
    anthropic = pytest.importorskip("anthropic", reason="anthropic comes with vLLM, which is not installed")
    asked = {"model": "autotts-tiny", "max_tokens": 200, "messages": [{"role": "user", "content": QUESTION}]}
    async with running(load(upstream=vllm, keys=keys, admin_key=BOSS, **EMBEDDED)) as url:
        async with anthropic.AsyncAnthropic(base_url=url, api_key=ALICE, max_retries=0) as client:
            reply = await client.messages.create(**asked, extra_body={"temperature": 0})
            async with client.messages.stream(**asked, extra_body={"temperature": 0}) as stream:
                streamed = await stream.get_final_message()
            counted = await client.messages.count_tokens(model="autotts-tiny", messages=asked["messages"])
        first, second = (
            [(part.type, part.to_dict()[part.type]) for part in each.content] for each in (reply, streamed)
        )
        assert first == second
        assert first
        assert reply.usage == streamed.usage
        assert 0 < reply.usage.output_tokens <= 200
        assert counted.input_tokens > 0
        async with aiohttp.ClientSession() as http:
            assert await spent(http, url) == 2 * reply.usage.output_tokens
        async with anthropic.AsyncAnthropic(base_url=url, api_key="other", max_retries=0) as client:
            with pytest.raises(anthropic.AuthenticationError):
                await client.messages.create(**asked)


@pytest.mark.vllm
async def test_the_snippet_of_the_manual_prints_a_reply(vllm: str) -> None:
    pytest.importorskip("anthropic", reason="anthropic comes with vLLM, which is not installed")
    (block,) = [each for each in fenced_blocks(ROOT / "docs" / "clients.md", ROOT) if "anthropic" in each.code]
    async with running(load(upstream=vllm, **EMBEDDED)) as url:
        code = block.code.replace("http://127.0.0.1:8400", url)
        command = [sys.executable, "-c", code]
        done = await asyncio.to_thread(
            subprocess.run, command, capture_output=True, text=True, timeout=120, check=False
        )
    assert done.returncode == 0, done.stderr
    assert "boxed{" in done.stdout
