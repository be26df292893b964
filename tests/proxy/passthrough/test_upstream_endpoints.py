"""Other endpoints of vLLM are forwarded or refused by name, with errors in OpenAI's form."""

from __future__ import annotations

import json
from typing import Any

import aiohttp
import pytest

from proxy.errors import detail
from proxy.passthrough.forward import GET_PATHS, POST_PATHS, UNSERVED_PATHS
from proxy.server import running
from proxy.settings import load
from tests.fakes import MODEL, RawUpstream
from tests.proxy.conftest import SMALL, Proxy

FIELDS = [
    {"type": "missing", "loc": ["body", "prompt"], "msg": "Field required", "input": {}},
    {"type": "missing", "loc": ["body", "messages"], "msg": "Field required"},
]


@pytest.mark.parametrize(
    ("payload", "expected_text"),
    [
        ("Not Found", "Not Found"),
        (FIELDS, "body.prompt: Field required; body.messages: Field required"),
        ([{"msg": "no"}], "no"),
        ({"why": 1}, '{"why": 1}'),
        (["a"], '["a"]'),
    ],
)
def test_a_fastapi_error_detail_is_rendered_as_text(payload: Any, expected_text: str) -> None:
    assert detail(payload) == expected_text


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/chat/completions"])
@pytest.mark.parametrize("limits", [{}, {"max_total_tokens": 500}])
@pytest.mark.parametrize(
    ("status", "payload", "kind", "expected_text"),
    [
        (
            404,
            {"detail": "Not Found"},
            "invalid_request_error",
            "the upstream, or the model that it serves, has no /v1/",
        ),
        (422, {"detail": FIELDS}, "invalid_request_error", "the upstream says: body.prompt: Field required; "),
        (500, {"detail": "it broke"}, "upstream_error", "the upstream says: it broke"),
    ],
)
async def test_fastapi_errors_of_the_upstream_are_returned_in_openais_form(
    path: str, limits: dict[str, int], status: int, payload: Any, kind: str, expected_text: str
) -> None:
    body = json.dumps(payload).encode()
    headers = {"content_type": "application/json", "content_length": str(len(body))}
    async with (
        RawUpstream([body], status, **headers).serve() as upstream,
        running(load(upstream=upstream.url, **limits, **SMALL)) as url,
        aiohttp.ClientSession() as http,
        http.post(url + path, json={"model": MODEL, "messages": [], "input": "x"}) as response,
    ):
        assert (response.status, response.headers["x-tts-applied"]) == (status, "false")
        error = (await response.json())["error"]
    assert (error["type"], error["param"]) == (kind, None)
    assert error["message"].startswith(expected_text)
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "body", [b'{"error": {"message": "no"}, "detail": "x"}', b"{}", b"[1]", b"<html>", b'{"detail', b'{"x": 1}']
)
async def test_upstream_errors_of_other_forms_are_returned_unchanged(body: bytes) -> None:
    headers = {"content_type": "application/json", "content_length": str(len(body))}
    async with (
        RawUpstream([body], 400, **headers).serve() as upstream,
        running(load(upstream=upstream.url, **SMALL)) as url,
        aiohttp.ClientSession() as http,
        http.post(f"{url}/v1/embeddings", json={"model": MODEL, "input": "x"}) as response,
    ):
        assert (response.status, await response.read()) == (400, body)


@pytest.mark.parametrize(
    ("status", "payload", "answered", "expected_text"),
    [
        (404, {"detail": "Not Found"}, 502, "returned 404 for a path that vLLM serves; check that it is vLLM"),
        (422, {"detail": FIELDS}, 422, "body.prompt: Field required; body.messages: Field required"),
        (401, {"error": "Unauthorized"}, 502, "an error message; set AUTOTTS_UPSTREAM_API_KEY to its key"),
        (400, {"detail": "no", "error": "x"}, 502, "returned status 400 without an error message"),
    ],
)
async def test_fastapi_errors_are_read_when_a_controller_serves_the_request(
    status: int, payload: Any, answered: int, expected_text: str
) -> None:
    async with (
        RawUpstream([json.dumps(payload).encode()], status, content_type="application/json").serve() as upstream,
        running(load(upstream=upstream.url, **SMALL)) as url,
        aiohttp.ClientSession() as http,
        http.post(
            f"{url}/v1/chat/completions",
            json={"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "tts": {"beta": 0.5}},
        ) as response,
    ):
        error = (await response.json())["error"]
        assert response.status == answered
    assert expected_text in error["message"]


@pytest.mark.parametrize("path", UNSERVED_PATHS)
async def test_an_unserved_path_returns_404_with_advice(proxy: Proxy, path: str) -> None:
    for method in ("POST", "GET"):
        async with proxy.http.request(method, proxy.url + path, json={}, allow_redirects=False) as response:
            error = (await response.json())["error"]
        assert (response.status, error["code"]) == (404, "not_found")
        assert error["message"] == f"{method} {path} is not served: {UNSERVED_PATHS[path]}"


def test_no_unserved_path_is_also_forwarded() -> None:
    assert not set(UNSERVED_PATHS) & {*POST_PATHS, *GET_PATHS}


@pytest.mark.vllm
async def test_endpoints_of_a_real_vllm_reply_as_if_asked_directly(vllm: str) -> None:
    async with running(load(upstream=vllm, **SMALL)) as url, aiohttp.ClientSession() as http:

        async def asked(base: str, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
            async with http.request(method, base + path, json=body) as response:
                return response.status, await response.read()

        messages = [{"role": "user", "content": "hi"}]
        counted: Any = {"model": "autotts-tiny", "messages": messages, "system": "Be brief, be kind."}
        body: Any
        for method, path, body in (
            ("GET", "/version", None),
            ("GET", "/ping", None),
            ("POST", "/v1/messages/count_tokens", counted),
        ):
            mine = await asked(url, method, path, body)
            assert mine == await asked(vllm, method, path, body)
            assert mine[0] == 200
        for method, path, body in (("GET", "/tokenizer_info", None), ("POST", "/v1/embeddings", {"input": "x"})):
            status, content = await asked(url, method, path, body)
            assert status == 404
            assert json.loads(content)["error"]["message"].endswith(f"has no {path}: Not Found")
