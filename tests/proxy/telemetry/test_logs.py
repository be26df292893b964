"""Log lines: JSON or plain, with the id of the request they are about and without secrets."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from rich.console import Console

from proxy.admission.api_keys import key_file_entry
from proxy.server import running
from proxy.settings import Settings, load
from proxy.telemetry.logs import ACCESS_LOGGER, MASK, configure_logging, request_id
from tests.fakes import MODEL, Chain, FakeVLLM, RawUpstream
from tests.proxy.conftest import SMALL
from tests.proxy.recording.test_episode_log import until

SECRET = "sesame-open"


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Restore pytest's root logger after a test."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers.clear()
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger(ACCESS_LOGGER).setLevel(logging.NOTSET)


def logged(settings: Settings) -> io.StringIO:
    written = io.StringIO()
    configure_logging(settings, Console(file=written, width=300))
    return written


def lines(written: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in written.getvalue().splitlines()]


async def test_every_log_line_of_a_request_has_its_id_and_no_secret(backend: FakeVLLM) -> None:
    settings = load(upstream=backend.url, admin_key=SECRET, log="json", **SMALL)
    backend.fault = "echo"
    written = logged(settings)
    prompt = "what nobody may read"
    body = {"model": "fake-model", "messages": [{"role": "user", "content": prompt}]}
    headers = {"x-tts-beta": "0.5", "authorization": f"Bearer {SECRET}"}
    async with running(settings) as url, aiohttp.ClientSession() as http:
        async with http.post(f"{url}/v1/chat/completions", json=body, headers=headers) as response:
            assert response.status >= 400
            named = response.headers["x-request-id"]
        async with http.get(f"{url}/v1/{SECRET}?key={SECRET}") as response:
            assert response.status == 404
    about = [line for line in lines(written) if line.get("request_id") == named]
    assert [line["level"] for line in about] == ["info", "info"]  # why it was refused, and its access line
    *_, access = about
    assert (access["logger"], access["message"]) == (ACCESS_LOGGER, f"POST /v1/chat/completions {access['status']}")
    assert {"seconds", "first_byte_s", "complete", "applied"} <= access.keys()
    assert [line["path"] for line in lines(written) if line["logger"] == ACCESS_LOGGER][-1] == "other"
    assert prompt not in written.getvalue()
    assert SECRET not in written.getvalue()


async def test_the_access_log_names_the_key_and_the_code_of_the_error(backend: FakeVLLM, tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text(key_file_entry("ada", SECRET).replace(" }", ", tokens = 400 }"))
    settings = load(upstream=backend.url, keys=keys, log="json", **SMALL)
    written = logged(settings)
    body: dict[str, Any] = {"model": "fake-model", "messages": [{"role": "user", "content": "x"}]}
    tried: list[tuple[dict[str, Any], str]] = [
        ({"tts": {"beta": 0.5}}, SECRET),
        ({"max_tokens": 9000}, SECRET),
        ({}, "unknown"),
    ]
    async with running(settings) as url, aiohttp.ClientSession() as http:
        for more, token in tried:
            headers = {"authorization": f"Bearer {token}"}
            async with http.post(f"{url}/v1/chat/completions", json=body | more, headers=headers) as response:
                await response.read()
        async with http.get(f"{url}/v1/tts/keys", headers={"authorization": f"Bearer {SECRET}"}) as response:
            assert response.status == 403
    served, refused, unknown, forbidden = (line for line in lines(written) if line["logger"] == ACCESS_LOGGER)
    assert (served["status"], served["key"], served["beta"]) == (200, "ada", 0.5)
    assert isinstance(served["tokens"], int)
    assert (refused["status"], refused["key"], refused["code"]) == (400, "ada", "cap_too_small")
    assert (unknown["status"], unknown["code"], "key" in unknown) == (401, "invalid_api_key", False)
    assert (forbidden["key"], forbidden["code"]) == ("ada", "admin_only")


async def test_the_access_log_has_the_tokens_of_forwarded_requests(backend: FakeVLLM) -> None:
    settings = load(upstream=backend.url, log="json", **SMALL)
    written = logged(settings)
    backend.chains = [Chain("t" * 300)]
    body = {"model": MODEL, "prompt": [ord("t")], "max_tokens": 40, "n": 2, "stream": True}
    async with running(settings) as url, aiohttp.ClientSession() as http:
        async with http.post(f"{url}/v1/completions", json=body) as response:
            await response.read()
        async with http.get(f"{url}/v1/models") as response:
            await response.read()
    streamed, models = (line for line in lines(written) if line["logger"] == ACCESS_LOGGER)
    assert (streamed["applied"], streamed["tokens"]) == ("false", 80)
    assert "tokens" not in models
    raw = RawUpstream(
        [json.dumps({"usage": {"prompt_tokens": 9, "completion_tokens": 42, "total_tokens": 51}}).encode()]
    )
    written = logged(settings)
    async with raw.serve() as upstream, running(load(upstream=upstream.url)) as url, aiohttp.ClientSession() as http:
        chat = {"model": MODEL, "messages": [{"role": "user", "content": "x"}]}
        async with http.post(f"{url}/v1/chat/completions", json=chat) as response:
            await response.read()
    (whole,) = (line for line in lines(written) if line["logger"] == ACCESS_LOGGER)
    assert whole["tokens"] == 42


def test_secrets_are_masked_in_json_and_plain_logs() -> None:
    for form in ("json", "plain"):
        settings = load(upstream=f"http://me:{SECRET}@127.0.0.1:1", admin_key="another one", log=form)
        written = logged(settings)
        logging.getLogger("proxy.some").error("upstream %s with %s", settings.upstream, "another one")
        assert SECRET not in written.getvalue()
        assert "another one" not in written.getvalue()
        assert written.getvalue().count(MASK) == 2


def test_passwords_of_several_upstreams_are_masked(tmp_path: Path) -> None:
    file = tmp_path / "models.toml"
    file.write_text(f'm = ["http://a:1", "http://me:{SECRET}@b:1"]')
    for upstream in (f"http://a:1,http://me:{SECRET}@b:1", str(file)):
        written = logged(load(upstream=upstream))
        logging.getLogger("proxy.some").error("connected with %s", SECRET)
        assert f"connected with {MASK}" in written.getvalue()


def test_plain_log_lines_name_their_request_once() -> None:
    written = logged(load(upstream="http://127.0.0.1:1"))
    token = request_id.set("req-1")
    try:
        logging.getLogger("proxy.some").warning("it broke")
        logging.getLogger("proxy.some").warning("req-1: it broke again")
        logging.getLogger(ACCESS_LOGGER).info("GET / 200")
    finally:
        request_id.reset(token)
    assert "req-1: it broke" in written.getvalue()
    assert written.getvalue().count("req-1") == 2
    assert "GET" not in written.getvalue()


def test_log_lines_written_to_a_file_are_not_wrapped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # makes rich take a file for a terminal
    with (tmp_path / "log").open("w") as file:
        configure_logging(load(upstream="http://127.0.0.1:1"), Console(file=file))
        logging.getLogger("proxy.some").warning("word " * 100 + "end")
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} WARNING proxy\.some: (word ){100}end", line)


def test_a_plain_log_line_has_the_request_id_after_the_logger() -> None:
    written = logged(load(upstream="http://127.0.0.1:1"))
    token = request_id.set("req-1")
    try:
        logging.getLogger("proxy.some").warning("it broke")
    finally:
        request_id.reset(token)
    assert written.getvalue().endswith("WARNING proxy.some: req-1: it broke\n")


def test_an_exception_is_logged_by_type_and_place_without_its_message() -> None:
    written = logged(load(upstream="http://127.0.0.1:1", log="json"))
    try:
        raise ValueError("what a client wrote")
    except ValueError:
        logging.getLogger("proxy.some").exception("it broke")
    (line,) = lines(written)
    assert (line["error"], line["message"]) == ("ValueError", "it broke")
    assert "test_an_exception_is_logged_by_type_and_place_without_its_message" in line["at"][-1]
    assert "wrote" not in written.getvalue()


def access_lines(written: io.StringIO) -> list[dict[str, Any]]:
    return [line for line in lines(written) if line["logger"] == ACCESS_LOGGER]


async def ask(http: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> None:
    """Send a request and read its response. Cancelling it closes the connection, even once the response has begun."""
    async with http.post(url, json=body) as response:
        await response.read()


VOTED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"prompt": "hi<assistant>"},
    "/v1/responses": {"input": "hi"},
}


@pytest.mark.parametrize("path", VOTED)
async def test_the_access_log_has_the_cost_of_voted_streams(backend: FakeVLLM, path: str) -> None:
    settings = load(upstream=backend.url, log="json", **SMALL)
    written = logged(settings)
    body = {"model": MODEL, "stream": True, "tts": {"beta": 0.5}, **VOTED[path]}
    async with running(settings) as url, aiohttp.ClientSession() as http, http.post(url + path, json=body) as response:
        events = await response.text()
    (line,) = access_lines(written)
    (tokens,) = {int(total) for total in re.findall(r'"tokens":\{"total":(\d+)', events)}
    assert (line["tokens"], line["stop"], line["applied"]) == (tokens, "answered", "true")
    assert (line["controller"], line["beta"]) == ("cmc", 0.5)


async def test_the_access_log_has_the_cost_of_several_prompts(backend: FakeVLLM) -> None:
    settings = load(upstream=backend.url, log="json", **SMALL)
    written = logged(settings)
    body = {"model": MODEL, "stream": True, "tts": {"beta": 0.5}, "prompt": ["hi<assistant>", "ho<assistant>"]}
    totals: list[int] = []
    async with running(settings) as url, aiohttp.ClientSession() as http:
        for stream in (True, False):
            async with http.post(f"{url}/v1/completions", json={**body, "stream": stream}) as response:
                totals.append(max(map(int, re.findall(r'"total":\s?(\d+)', await response.text()))))
    assert [line["tokens"] for line in access_lines(written)] == totals
    assert {line["stop"] for line in access_lines(written)} == {"answered"}


@pytest.mark.parametrize("stream", [True, False])
async def test_the_access_log_has_the_cost_of_a_request_whose_client_disconnects(
    backend: FakeVLLM, stream: bool
) -> None:
    settings = load(upstream=backend.url, log="json", **SMALL)
    written = logged(settings)
    backend.fault = "hang"
    body = {"model": MODEL, "stream": stream, "tts": {"beta": 0.5}, **VOTED["/v1/chat/completions"]}
    async with running(settings) as url:
        async with aiohttp.ClientSession() as http:
            asking = asyncio.create_task(ask(http, f"{url}/v1/chat/completions", body))
            await backend.hanging.wait()
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

        async def is_logged() -> bool:
            return bool(access_lines(written))

        await until(is_logged)
        async with aiohttp.ClientSession() as http, http.get(f"{url}/metrics") as response:
            page = await response.text()
    (line,) = access_lines(written)
    assert line["status"] == (200 if stream else 499)
    (aborted,) = re.findall(r'autotts_tokens_total{.*kind="aborted".*} (\S+)', page)
    assert line["tokens"] == float(aborted)
    assert (line["stop"], line["applied"], line["controller"], line["beta"]) == ("disconnected", "true", "cmc", 0.5)


async def test_the_access_log_has_the_cost_of_a_request_that_fails(backend: FakeVLLM) -> None:
    settings = load(upstream=backend.url, log="json", **SMALL)
    written = logged(settings)
    backend.fault = "cut"
    path = "/v1/chat/completions"
    body = {"model": MODEL, "tts": {"beta": 0.5}, **VOTED[path]}
    async with running(settings) as url, aiohttp.ClientSession() as http, http.post(url + path, json=body) as response:
        assert response.status == 502
        spent = int(response.headers["x-tts-tokens"])
    (line,) = access_lines(written)
    assert (line["tokens"], line["stop"], line["applied"]) == (spent, "upstream_error", "true")
    assert (line["controller"], line["beta"]) == ("cmc", 0.5)


async def test_the_access_log_has_the_key_and_code_of_requests_to_unknown_paths(
    backend: FakeVLLM, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text(key_file_entry("ada", SECRET))
    settings = load(upstream=backend.url, keys=keys, log="json", **SMALL)
    written = logged(settings)
    async with running(settings) as url, aiohttp.ClientSession() as http:
        for method, path, token in [
            ("GET", "/v1/nothing", SECRET),
            ("DELETE", "/v1/models", SECRET),
            ("GET", "/v1/nothing", "unknown"),
        ]:
            async with http.request(method, url + path, headers={"authorization": f"Bearer {token}"}) as response:
                await response.read()
    missing, wrong_method, unknown = access_lines(written)
    assert (missing["status"], missing["code"], missing["key"]) == (404, "not_found", "ada")
    assert (wrong_method["status"], wrong_method["code"], wrong_method["key"]) == (405, "method_not_allowed", "ada")
    assert (unknown["code"], "key" in unknown) == ("not_found", False)


async def test_the_access_log_has_the_stop_of_a_request_whose_deadline_passes_in_the_queue(backend: FakeVLLM) -> None:
    settings = load(upstream=backend.url, log="json", max_episodes=1, **SMALL)
    written = logged(settings)
    backend.fault = "hang"
    path = "/v1/chat/completions"
    body = {"model": MODEL, "tts": {"beta": 0.5, "deadline_s": 0.3}, **VOTED[path]}
    async with running(settings) as url, aiohttp.ClientSession() as http:
        first = asyncio.create_task(ask(http, url + path, {**body, "tts": {"beta": 0.5}}))
        await backend.hanging.wait()
        async with http.post(url + path, json=body) as response:
            assert response.status == 504
        (line,) = access_lines(written)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
    assert (line["status"], line["tokens"], line["stop"], line["controller"]) == (504, 0, "deadline", "cmc")
