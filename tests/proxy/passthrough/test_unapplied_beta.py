"""A β that is set but not applied is counted, logged and reported, or the request is refused."""

from __future__ import annotations

import json
import logging
from typing import Any

import aiohttp
import pytest
from starlette.responses import Response

from proxy.passthrough.unapplied_beta import MAX_HELD_BYTES, _MemberInserter, with_tts_member
from proxy.server import running
from proxy.settings import load
from tests.fakes import MODEL, FakeVLLM, RawUpstream
from tests.proxy.conftest import SMALL, Proxy

NAME = "autotts_beta_not_applied_total"
GUIDED: dict[str, Any] = {"guided_regex": "a+"}
MESSAGES = [{"role": "user", "content": "hi"}]


async def test_an_unapplied_beta_is_counted_by_reason_and_source(proxy: Proxy) -> None:
    await proxy.ask("0.5", **GUIDED)
    await proxy.ask(None, **GUIDED, model=f"{MODEL}@0.5")
    await proxy.ask("0.5", n=2)
    by = {"model": MODEL, "reason": "structured_output"}
    assert await proxy.metric(NAME, **by, source="header") == 1
    assert await proxy.metric(NAME, **by, source="model_alias") == 1
    assert await proxy.metric(NAME, reason="n") == 1
    await proxy.ask(None, n=2)
    await proxy.ask("0")
    assert await proxy.metric(NAME) == 3  # neither requests without β nor those with an applied β are counted


async def test_the_first_unapplied_beta_for_each_reason_is_logged(
    proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "proxy.passthrough.unapplied_beta"):
        for _ in range(3):
            await proxy.ask("0.5", **GUIDED)
        await proxy.ask("0.25", n=2)
        await proxy.ask(None, n=2)
    lines = [record.getMessage() for record in caplog.records if record.name == "proxy.passthrough.unapplied_beta"]
    assert lines == [
        f"β {beta} (header) was not applied to a request for model {MODEL} (reason: {reason}); "
        "further ones are counted, not logged"
        for beta, reason in ((0.5, "structured_output"), (0.25, "n"))
    ]


async def test_the_access_log_has_the_reason_of_an_unapplied_beta(
    proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "proxy.access"):
        await proxy.ask("0.5", **GUIDED)
    facts: Any = [record.facts for record in caplog.records if hasattr(record, "facts")][-1]
    assert (facts["applied"], facts["reason"]) == ("false", "structured_output")


async def test_with_required_set_a_request_whose_beta_cannot_be_applied_gets_400(backend: FakeVLLM) -> None:
    async with (
        running(load(upstream=backend.url, required=True, beta=0.5, **SMALL)) as url,
        aiohttp.ClientSession() as http,
    ):
        proxy = Proxy(backend, url, http, None)  # type: ignore[arg-type]
        for beta in ("0.5", None):
            status, _, reply = await proxy.ask(beta, **GUIDED)
            error = reply["error"]
            assert (status, error["code"], error["param"]) == (400, "tts_not_applicable", "guided_regex")
            assert error["message"] == (
                "a controller cannot serve this request (structured_output) and the server's AUTOTTS_REQUIRED is set; "
                "leave out guided_regex, or set tts.required to false"
            )
        assert not backend.requests
        status, headers, _ = await proxy.ask("0.5", **GUIDED, tts={"required": False})
        assert (status, headers["x-tts-reason"]) == (200, "structured_output")
        status, headers, _ = await proxy.ask(None, temperature=0)  # greedy, so the default β is not applied
        assert (status, headers["x-tts-reason"]) == (200, "temperature")
        status, headers, _ = await proxy.ask("0")
        assert (status, headers["x-tts-applied"]) == (200, "true")


async def test_with_required_set_a_request_without_beta_is_forwarded(backend: FakeVLLM) -> None:
    async with running(load(upstream=backend.url, required=True, **SMALL)) as url, aiohttp.ClientSession() as http:
        proxy = Proxy(backend, url, http, None)  # type: ignore[arg-type]
        status, headers, _ = await proxy.ask(None, **GUIDED)
        assert (status, headers["x-tts-reason"]) == (200, "no_beta")


async def test_a_reply_to_a_request_with_tts_reports_the_unapplied_beta(proxy: Proxy) -> None:
    _, _, reply = await proxy.ask(None, **GUIDED, tts={"beta": 0.5})
    assert reply["tts"] == {
        "applied": False,
        "reason": "structured_output",
        "field": "guided_regex",
        "beta_asked": 0.5,
        "beta_source": "body",
    }
    assert reply["id"] == "upstream"
    _, _, reply = await proxy.ask(None, tts={"controller": "asc"})
    assert (reply["tts"]["reason"], reply["tts"]["field"], reply["tts"]["beta_asked"]) == ("no_beta", None, None)
    _, _, reply = await proxy.ask("0.5", **GUIDED)
    assert "tts" not in reply


EVENTS = [b": ping\n\nda", b'ta: {"id":"x","choices":[]}\n\ndata: {"id"', b':"y"}\n\ndata: [DONE]\n\n']
NAMED = [b'event: response.created\ndata: {"type":"response.created"}\n\n', b'event: e\ndata: {"type":"e"}\n\n']


@pytest.mark.parametrize(
    ("path", "pieces", "media", "expected"),
    [
        ("chat/completions", EVENTS, "text/event-stream", b': ping\n\ndata: {TTS,"id":"x","choices":[]}\n\n'),
        (
            "responses",
            NAMED,
            "text/event-stream",
            b'event: response.created\ndata: {TTS,"type":"response.created"}\n\n',
        ),
        ("chat/completions", [b' { "id"', b": 1}"], "application/json", b' { TTS,"id": 1}'),
        ("chat/completions", [b"{}"], "application/json", b"{TTS}"),
        ("chat/completions", [b"hello"], "text/plain", b"hello"),
        ("chat/completions", [b"[1", b"]"], "application/json", b"[1]"),
    ],
)
async def test_the_inserted_tts_member_leaves_all_other_bytes_unchanged(
    path: str, pieces: list[bytes], media: str, expected: bytes
) -> None:
    async with (
        RawUpstream(pieces, content_type=media).serve() as upstream,
        running(load(upstream=upstream.url, **SMALL)) as url,
        aiohttp.ClientSession() as http,
    ):
        body = {"model": MODEL, "messages": MESSAGES, "input": "hi", "tts": {"beta": 0.5}}
        body |= {"tools": [{"type": "x"}], "functions": [{"name": "x"}]}
        async with http.post(f"{url}/v1/{path}", json=body) as response:
            raw = await response.read()
        member = raw[raw.find(b'"tts"') : raw.find(b"}", raw.find(b'"tts"')) + 1] or b"TTS"
        upstream_body = b"".join(pieces)
        kept = raw.replace(member + b",", b"", 1) if member + b"," in raw else raw.replace(member, b"", 1)
        assert kept == upstream_body
        assert raw.replace(member, b"TTS", 1).startswith(expected)
        if b"TTS" in expected:
            assert json.loads(b"{" + member + b"}")["tts"]["reason"] == "tools"


def test_a_body_without_a_json_object_is_held_up_to_a_limit_only() -> None:
    inserter = _MemberInserter({"applied": False}, is_stream=False)
    assert inserter.take(b" " * MAX_HELD_BYTES) == b""
    assert inserter.take(b" x") == b" " * MAX_HELD_BYTES + b" x"
    assert inserter.take(b'{"a": 1}') == b'{"a": 1}'


def test_an_error_reply_gets_no_tts_member() -> None:
    response = Response(b'{"error": {}}', 400, media_type="application/json")
    assert with_tts_member(response, {"applied": False}) is response
    assert response.body == b'{"error": {}}'
