"""Bad input: the right status, OpenAI's error form, the thing named, and nothing left running."""

from __future__ import annotations

import json
from typing import Any

import pytest

from proxy.dial import Source, resolve, split_alias
from proxy.errors import BadRequest
from tests.fakes import MODEL
from tests.proxy.conftest import Proxy

NOT_BETAS = ["nan", "1e400", "1_000", "１", "", " ", "-0.1", "1.1", "inf", "0x1", "1,0", "0.5,0.6", "5e-1", "+0.5", "."]


def check_error(reply: Any, status: int, got: int, *, param: str | None = None, code: str | None = None) -> None:
    assert got == status, reply
    assert set(reply) == {"error"}
    assert set(reply["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in json.dumps(reply)
    if param:
        assert reply["error"]["param"] == param
    if code:
        assert reply["error"]["code"] == code


@pytest.mark.parametrize("beta", NOT_BETAS)
def test_header_betas_that_are_none(beta: str) -> None:
    with pytest.raises(BadRequest, match=r"0 to 1") as caught:
        resolve([beta], body=None, effort=None, alias=None, model="m", default=None)
    assert caught.value.param == "x-tts-beta"


@pytest.mark.parametrize("beta", ["0", "1", "0.5", "1.0", ".25", "0.", "000.5"])
def test_header_betas_that_are_fine(beta: str) -> None:
    turned = resolve([beta], body=None, effort=None, alias=None, model="m", default=None)
    assert turned is not None
    assert turned.beta == float(beta)


@pytest.mark.parametrize("beta", ["nan", "1e400", "1_000", "１".encode().decode("latin-1"), "2"])
async def test_bad_headers_reach_nothing(proxy: Proxy, beta: str) -> None:
    status, _, reply = await proxy.ask(beta)
    check_error(reply, 400, status, param="x-tts-beta", code="bad_beta")
    assert proxy.backend.requests == []
    assert await proxy.metric("autotts_requests_total", outcome="refused") == 1


async def test_a_header_given_twice_is_refused(proxy: Proxy) -> None:
    headers = [("x-tts-beta", "0.5"), ("x-tts-beta", "0.5")]
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
    async with proxy.http.post(f"{proxy.url}/v1/chat/completions", json=body, headers=headers) as response:
        check_error(await response.json(), 400, response.status, param="x-tts-beta", code="bad_beta")


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"tts": {"beta": 1.5}}, "tts.beta", "bad_beta"),
        ({"tts": {"beta": "0.5"}}, "tts.beta", "bad_beta"),
        ({"tts": {"beta": True}}, "tts.beta", "bad_beta"),
        ({"tts": {"betta": 1}}, "tts.betta", None),
        ({"tts": {"controller": "cmcc"}}, "tts.controller", "unknown_controller"),
        ({"tts": {"max_total_tokens": 0}}, "tts.max_total_tokens", None),
        ({"tts": {"deadline_s": -1}}, "tts.deadline_s", None),
        ({"tts": {"answer": "essay"}}, "tts.answer", None),
        ({"tts": 5}, "tts", None),
        ({"messages": "hi"}, "messages", None),
        ({"model": f"{MODEL}@nan"}, "model", "bad_beta"),
        ({"temperature": -1}, "temperature", None),
        ({"max_tokens": 0}, "max_tokens", None),
        ({"max_tokens": 1.5}, "max_tokens", None),
        ({"stop": ["a"] * 5}, "stop", None),
        ({"stop": 5}, "stop", None),
        ({"repetition_penalty": 0}, "repetition_penalty", None),
        ({"messages": [{"role": "user", "content": "x" * 3000}]}, "messages", "context_length_exceeded"),
    ],
)
async def test_bad_fields_are_named(proxy: Proxy, fields: dict[str, Any], param: str, code: str | None) -> None:
    status, headers, reply = await proxy.ask("0.5", **fields)
    check_error(reply, 400, status, param=param, code=code)
    assert "x-request-id" in headers
    assert proxy.backend.generated == 0


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"null", b"\xff", b'{"messages": [{"role": "user"}], "temperature": NaN}', b"[" * 100_000]
)
async def test_bodies_that_are_no_request(proxy: Proxy, raw: bytes) -> None:
    status, _, reply = await proxy.ask("0.5", raw=raw)
    check_error(reply, 400, status, code="bad_json")


async def test_numbers_out_of_range_are_no_beta(proxy: Proxy) -> None:
    raw = b'{"messages": [{"role": "user", "content": "hi"}], "tts": {"beta": 1e400}}'
    status, _, reply = await proxy.ask(None, raw=raw)
    check_error(reply, 400, status)


async def test_a_body_too_large_is_refused(proxy: Proxy) -> None:
    status, _, reply = await proxy.ask("0.5", raw=b" " * (9 * 2**20))
    check_error(reply, 413, status, code="body_too_large")


async def test_unknown_models_are_told_the_known(proxy: Proxy) -> None:
    for model in ("nope", "nope@0.5"):
        status, _, reply = await proxy.ask(None, model=model)
        check_error(reply, 404, status, param="model", code="model_not_found")
        assert MODEL in reply["error"]["message"]


async def test_unknown_paths_and_methods(proxy: Proxy) -> None:
    async with proxy.http.get(f"{proxy.url}/v1/nothing") as response:
        check_error(await response.json(), 404, response.status, code="not_found")
    async with proxy.http.get(f"{proxy.url}/v1/chat/completions") as response:
        check_error(await response.json(), 405, response.status)
        assert response.headers["allow"] == "POST"


def test_where_beta_comes_from_first_present_wins() -> None:
    def source(**given: Any) -> tuple[float, Source] | None:
        ways = {"body": None, "effort": None, "alias": None, "model": "m", "default": None} | given
        turned = resolve(ways.pop("headers", []), **ways)
        return None if turned is None else (turned.beta, turned.source)

    everything: dict[str, Any] = {"headers": ["0.1"], "body": 0.2, "effort": "high", "alias": 0.4, "default": 0.5}
    for way, expected in [
        ("headers", (0.1, Source.HEADER)),
        ("body", (0.2, Source.BODY)),
        ("effort", (0.75, Source.EFFORT)),
        ("alias", (0.4, Source.ALIAS)),
        ("default", (0.5, Source.DEFAULT)),
    ]:
        assert source(**everything) == expected
        del everything[way]
    assert source() is None
    assert source(effort="high", model="openai/gpt-oss-20b") is None
    assert source(effort="weird") is None


def test_aliases() -> None:
    assert split_alias("a@b@0.5") == ("a@b", 0.5)
    assert split_alias("plain") == ("plain", None)
    with pytest.raises(BadRequest):
        split_alias("m@high")
