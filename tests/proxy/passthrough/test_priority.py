"""Keys that may order their requests: the field `priority`, and the headers of inference gateways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import aiohttp
import pytest

from proxy.admission import api_keys
from proxy.errors import SettingsError
from proxy.gateway_headers import MAX_CHARS, NAMES
from proxy.server import running
from proxy.settings import load
from tests.chat_fake import ChatVLLM, ScriptedReply
from tests.fakes import MODEL, FakeVLLM
from tests.proxy.conftest import SMALL

URGENT, PLAIN, BOSS = "sk-autotts-urgent", "sk-autotts-plain", "sesame"
SENT = dict(zip(NAMES, ("interactive", "team a"), strict=True))


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    file = tmp_path / "keys.toml"
    urgent = f'urgent = {{ sha256 = "{api_keys.hash_key(URGENT)}", priority = true }}'
    file.write_text(f"{urgent}\n{api_keys.key_file_entry('plain', PLAIN)}\n")
    return file


async def ask(url: str, key: str, beta: str | None, headers: dict[str, str], **fields: Any) -> tuple[int, Any]:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], **fields}
    given = {"authorization": f"Bearer {key}", **headers, **({} if beta is None else {"x-tts-beta": beta})}
    async with (
        aiohttp.ClientSession() as http,
        http.post(f"{url}/v1/chat/completions", json=body, headers=given) as response,
    ):
        return response.status, await response.json()


@pytest.mark.parametrize("beta", [None, "0.5"])
@pytest.mark.parametrize(("key", "arrives"), [(URGENT, True), (BOSS, True), (PLAIN, False)])
async def test_headers_of_gateways_reach_the_upstream_with_every_call_of_keys_that_may_set_them(
    backend: FakeVLLM, keys: Path, beta: str | None, key: str, arrives: bool
) -> None:
    async with running(load(upstream=backend.url, keys=keys, admin_key=BOSS, **SMALL)) as url:
        assert (await ask(url, key, beta, SENT))[0] == 200
        calls = len(backend.headers)
        assert (await ask(url, key, beta, {}))[0] == 200
    assert calls > 0
    for number, headers in enumerate(backend.headers):
        lower = {name.lower(): value for name, value in headers.items()}
        assert {name: lower[name] for name in NAMES if name in lower} == (SENT if arrives and number < calls else {})


@pytest.mark.parametrize("value", ["x" * (MAX_CHARS + 1), "é"])
async def test_other_values_are_refused(backend: FakeVLLM, keys: Path, value: str) -> None:
    async with running(load(upstream=backend.url, keys=keys, **SMALL)) as url:
        status, reply = await ask(url, URGENT, None, {NAMES[0]: value})
        assert (status, reply["error"]["param"], reply["error"]["code"]) == (400, NAMES[0], "bad_header")
        assert (await ask(url, PLAIN, None, {NAMES[0]: value}))[0] == 200  # it is dropped


async def test_priority_needs_a_key_that_allows_it(backend: FakeVLLM, keys: Path) -> None:
    async with running(load(upstream=backend.url, keys=keys, admin_key=BOSS, **SMALL)) as url:
        status, reply = await ask(url, PLAIN, None, {}, priority=-5)
        assert (status, reply["error"]["code"]) == (403, "admin_only")
        assert "a key with `priority = true`" in reply["error"]["message"]
        assert (await ask(url, URGENT, None, {}, priority=-5))[0] == 200
        assert backend.requests[-1]["priority"] == -5
        status, reply = await ask(url, URGENT, None, {}, priority=-5, kv_transfer_params={"a": 1})
        assert (status, reply["error"]["param"]) == (403, "kv_transfer_params")


@pytest.mark.parametrize("key", [URGENT, BOSS])
@pytest.mark.parametrize("controller", ["self_consistency@3", "parallel_probe@3"])
async def test_all_calls_of_a_controlled_request_have_its_priority(
    backend: FakeVLLM, keys: Path, key: str, controller: str
) -> None:
    tts = {"controller": controller, "answer": "boxed"}
    async with running(load(upstream=backend.url, keys=keys, admin_key=BOSS, **SMALL)) as url:
        for priority in (-5, "7"):
            status, reply = await ask(url, key, "1", {}, priority=priority, tts=tts)
            assert (status, reply["tts"]["branches"]) == (200, 3)
            assert {request["priority"] for request in backend.requests} == {int(priority)}
            backend.requests.clear()
        for fields in ({}, {"priority": 0}, {"priority": None}):
            assert (await ask(url, key, "1", {}, tts=tts, **fields))[0] == 200
            assert not any("priority" in request for request in backend.requests)


@pytest.mark.parametrize("path", ["chat/completions", "responses"])
async def test_whole_replies_of_a_controlled_request_have_its_priority(keys: Path, path: str) -> None:
    asked = "messages" if path.startswith("chat") else "input"
    body = {
        "model": MODEL,
        asked: [{"role": "user", "content": "What is 3 + 4? Answer in JSON."}],
        "priority": -5,
        "tts": {"beta": 1, "controller": "self_consistency@3"},
    }
    schema = {"name": "sum", "schema": {"type": "object"}}
    if asked == "input":
        body["text"] = {"format": {"type": "json_schema", **schema}}
    else:
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    async with (
        ChatVLLM([ScriptedReply('{"sum": 7}')]).serve() as backend,
        running(load(upstream=backend.url, keys=keys, **SMALL)) as url,
        aiohttp.ClientSession(headers={"authorization": f"Bearer {URGENT}"}) as http,
        http.post(f"{url}/v1/{path}", json=body) as response,
    ):
        assert (response.status, response.headers["x-tts-applied"]) == (200, "true")
        assert [request["priority"] for request in backend.requests] == [-5] * 3


async def test_a_controlled_request_needs_a_key_that_allows_its_priority(backend: FakeVLLM, keys: Path) -> None:
    async with running(load(upstream=backend.url, keys=keys, **SMALL)) as url:
        status, reply = await ask(url, PLAIN, "0.5", {}, priority=-5)
        assert (status, reply["error"]["code"], reply["error"]["param"]) == (403, "admin_only", "priority")
        assert (await ask(url, PLAIN, "0.5", {}, priority=0))[0] == 200
        assert not any("priority" in request for request in backend.requests)


@pytest.mark.parametrize("priority", ["soon", 2**63, 0.5, [1]])
async def test_the_priority_of_a_controlled_request_is_checked(backend: FakeVLLM, keys: Path, priority: Any) -> None:
    async with running(load(upstream=backend.url, keys=keys, **SMALL)) as url:
        status, reply = await ask(url, URGENT, "0.5", {}, priority=priority)
        assert (status, reply["error"]["param"]) == (400, "priority")
        assert "must be an integer of 64 bits, such as -5" in reply["error"]["message"]
        assert backend.requests == []


def test_the_flag_must_be_a_boolean(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(f'a = {{ sha256 = "{api_keys.hash_key(PLAIN)}", priority = 1 }}\n')
    with pytest.raises(SettingsError, match=r"a: priority: it must be true or false"):
        api_keys.read_key_file(file)
