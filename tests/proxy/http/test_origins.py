"""A proxy without keys refuses requests of unknown web pages and accepts those of other clients."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from proxy.admission.api_keys import hash_key
from proxy.errors import ApiError, SettingsError
from proxy.http.origins import PageGuard, hostname, is_json, is_loopback
from proxy.server import running
from proxy.settings import load
from tests.fakes import MODEL, FakeVLLM
from tests.proxy.conftest import SMALL, Proxy

BODY: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
JSON = "application/json"


@asynccontextmanager
async def serving(backend: FakeVLLM, **settings: Any) -> AsyncIterator[str]:
    given: dict[str, Any] = {**SMALL, **settings}
    async with running(load(upstream=backend.url, **given)) as url:
        yield url


async def chat(url: str, **headers: str) -> tuple[int, Any, Any]:
    """Send a chat request and return (status, headers, JSON)."""
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    async with (
        aiohttp.ClientSession() as http,
        http.post(f"{url}/v1/chat/completions", json=BODY, headers={"content-type": JSON, **sent}) as response,
    ):
        return response.status, response.headers, await response.json(content_type=None)


async def test_an_unknown_host_name_is_refused_and_the_error_names_the_settings(backend: FakeVLLM) -> None:
    async with serving(backend) as url:
        status, _, reply = await chat(url, host="evil.example:8400")
        assert (status, reply["error"]["code"], reply["error"]["param"]) == (403, "host_not_allowed", "host")
        assert "'evil.example:8400'; add it to AUTOTTS_ALLOWED_HOSTS, or set AUTOTTS_KEYS" in reply["error"]["message"]
        for host in ("localhost:8400", "LOCALHOST", "a.localhost:1", "127.0.0.1", "[::1]:8400", "192.168.1.4:8400"):
            assert (await chat(url, host=host))[0] == 200, host
        async with aiohttp.ClientSession() as http:
            for path, expected in (("/health", 200), ("/ready", 200), ("/metrics", 403), ("/v1/models", 403)):
                async with http.get(url + path, headers={"host": "evil.example"}) as response:
                    assert response.status == expected, path
    assert len(backend.requests) == 6


async def test_requests_with_a_foreign_origin_are_refused(backend: FakeVLLM) -> None:
    async with serving(backend) as url:
        for origin in ("https://evil.example", "null", "file://", "http://localhost.evil.example", "evil", ""):
            status, _, reply = await chat(url, origin=origin)
            assert (status, reply["error"]["code"]) == (403, "origin_not_allowed"), origin
            assert "AUTOTTS_ALLOWED_ORIGINS" in reply["error"]["message"]
        assert backend.requests == []
        for origin in (url, "http://localhost:3000", "https://127.0.0.1:1"):
            assert (await chat(url, origin=origin))[0] == 200, origin


@pytest.mark.parametrize("sent", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
async def test_content_types_that_a_web_form_can_send_are_refused(backend: FakeVLLM, sent: str) -> None:
    async with serving(backend) as url:
        for path in ("chat/completions", "embeddings", "tts/feedback"):
            async with (
                aiohttp.ClientSession(skip_auto_headers=["content-type"]) as http,
                http.post(f"{url}/v1/{path}", data=b"{}", headers={"content-type": sent} if sent else {}) as response,
            ):
                reply = await response.json()
            assert (response.status, reply["error"]["code"]) == (415, "unsupported_media_type")
            assert reply["error"]["message"].startswith(f"the content type is {sent or 'not given'}; send app")
        assert (await chat(url, content_type="application/json; charset=utf-8"))[0] == 200
        assert (await chat(url, content_type="application/vnd.api+json"))[0] == 200


async def test_with_keys_host_origin_and_content_type_are_not_checked(backend: FakeVLLM) -> None:
    async with serving(backend, client_keys=f"a={hash_key('secret')}") as url:
        odd = {"host": "tts.example", "origin": "https://evil.example", "content_type": "text/plain"}
        assert (await chat(url, **odd))[0] == 401
        assert (await chat(url, **odd, authorization="Bearer secret"))[0] == 200


def refusal(guard: PageGuard, method: str = "GET", **headers: str) -> str | None:
    """Return the error code if the guard refuses the request, else None."""
    try:
        guard.check(method, [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()])
    except ApiError as error:
        return error.code
    return None


@pytest.mark.parametrize(
    ("settings", "headers", "expected"),
    [
        ({"allowed_hosts": "tts.example"}, {"host": "tts.example:80"}, None),
        ({"allowed_hosts": " TTS.example , b"}, {"host": "tts.EXAMPLE"}, None),
        ({"allowed_hosts": "tts.example"}, {"host": "tts.example."}, None),
        ({"allowed_hosts": "tts.example"}, {"host": "a.tts.example"}, "host_not_allowed"),
        ({"allowed_hosts": "*.internal"}, {"host": "a.b.internal:1"}, None),
        ({"allowed_hosts": "*.internal"}, {"host": "internal"}, "host_not_allowed"),
        ({"allowed_hosts": "*.internal"}, {"host": "evilinternal"}, "host_not_allowed"),
        ({"allowed_hosts": "*"}, {"host": "anything"}, None),
        ({"host": "0.0.0.0", "allow_anonymous": True}, {"host": "service-name:8400"}, None),
        ({"host": "0.0.0.0", "allow_anonymous": True}, {"host": "a", "origin": "http://b"}, "origin_not_allowed"),
        ({"host": "0.0.0.0", "allow_anonymous": True}, {"host": "a:1", "origin": "http://a:1"}, None),
        ({"host": "0.0.0.0", "allow_anonymous": True, "allowed_hosts": "a"}, {"host": "b"}, "host_not_allowed"),
        ({"host": "127.0.0.1", "allow_anonymous": True}, {"host": "b"}, "host_not_allowed"),
        ({"allowed_hosts": "a"}, {"host": "a", "origin": "https://a"}, None),
        ({"allowed_hosts": "a"}, {"host": "a:443", "origin": "https://a"}, None),
        ({"allowed_hosts": "a"}, {"host": "a:8400", "origin": "https://a"}, "origin_not_allowed"),
        ({"allowed_origins": "https://app.example"}, {"host": "localhost", "origin": "https://app.example"}, None),
        ({"allowed_origins": "https://app.example"}, {"host": "localhost", "origin": "null"}, "origin_not_allowed"),
        ({"allowed_origins": "*"}, {"host": "localhost", "origin": "null"}, None),
        (
            {"allowed_origins": "chrome-extension://abc"},
            {"host": "localhost", "origin": "chrome-extension://abc"},
            None,
        ),
        ({}, {"host": "[::1"}, "host_not_allowed"),
        ({}, {}, "host_not_allowed"),
    ],
)
def test_the_page_guard_accepts_allowed_hosts_and_origins_only(
    settings: dict[str, Any], headers: dict[str, str], expected: str | None
) -> None:
    assert refusal(PageGuard(load(upstream="http://127.0.0.1:1", **settings)), **headers) == expected


def test_host_names_loopback_addresses_and_json_types_are_recognised() -> None:
    assert [hostname(place) for place in ("A:1", "[::1]:2", "a.", "a@b:1", "[")] == ["a", "::1", "a", "b", ""]
    assert [is_loopback(name) for name in ("localhost", "127.1.2.3", "::1", "0.0.0.0", "local", "")] == [True] * 3 + [
        False
    ] * 3
    assert is_json(b"Application/JSON ;charset=utf-8")
    assert is_json(b"application/problem+json")
    assert not is_json(b"text/json")


@pytest.mark.parametrize(
    "given", [{"allowed_origins": "app.example"}, {"allowed_origins": "https://a/b"}, {"allowed_hosts": "http://a"}]
)
def test_invalid_allowed_hosts_and_origins_are_refused_at_start(given: dict[str, str]) -> None:
    with pytest.raises(SettingsError, match=next(iter(given))):
        load(**given)


# CORS

PAGE = "https://app.example"
PREFLIGHT = {
    "origin": PAGE,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-tts-beta",
}


@pytest.mark.parametrize("has_keys", [True, False])
async def test_preflight_requests_are_answered_with_and_without_keys(backend: FakeVLLM, has_keys: bool) -> None:
    keys = {"client_keys": f"a={hash_key('secret')}"} if has_keys else {}
    async with (
        serving(backend, allowed_origins=PAGE, **keys) as url,
        aiohttp.ClientSession() as http,
    ):
        async with http.options(f"{url}/v1/chat/completions", headers=PREFLIGHT) as response:
            assert response.status == 200
            assert response.headers["access-control-allow-origin"] == PAGE
            assert "POST" in response.headers["access-control-allow-methods"]
            assert response.headers["access-control-allow-headers"] == PREFLIGHT["access-control-request-headers"]
        foreign = {**PREFLIGHT, "origin": "https://evil.example"}
        async with http.options(f"{url}/v1/chat/completions", headers=foreign) as response:
            assert "access-control-allow-origin" not in response.headers
        status, headers, _ = await chat(url, origin=PAGE, authorization="Bearer secret")
        assert (status, headers["access-control-allow-origin"]) == (200, PAGE)
        assert "x-tts-applied" in headers["access-control-expose-headers"].lower()
        assert "access-control-allow-credentials" not in headers
        if has_keys:
            status, headers, _ = await chat(url, origin=PAGE, authorization="Bearer wrong")
            assert (status, headers["access-control-allow-origin"]) == (401, PAGE)  # the page can read why


async def test_without_allowed_origins_no_cors_headers_are_sent(proxy: Proxy) -> None:
    async with proxy.http.options(f"{proxy.url}/v1/chat/completions", headers=PREFLIGHT) as response:
        assert response.status == 405
    status, headers, _ = await chat(proxy.url, origin="http://localhost:3000")
    assert status == 200
    assert not [name for name in headers if name.lower().startswith("access-control")]
