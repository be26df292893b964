"""Who may call what: keys from a file, the app's table of routes held to its word, tenants that outlive their keys."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from openai import AsyncOpenAI, AuthenticationError

from proxy.admission import api_keys
from proxy.admission.auth import Access, Authenticator, check_host
from proxy.api.routes import ROUTES
from proxy.app import create_app
from proxy.errors import SettingsError
from proxy.server import running
from proxy.settings import EMBEDDED, load
from proxy.upstream.client import UpstreamClient
from tests.fakes import FakeVLLM
from tests.proxy.conftest import SMALL
from tests.proxy.test_cli import autotts

ALICE, BOB, ROOT, BOSS = "sk-autotts-alice", "sk-autotts-bob", "sk-autotts-root", "sesame"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.toml"
    write(
        path,
        api_keys.key_file_entry("alice", ALICE),
        api_keys.key_file_entry("bob", BOB),
        api_keys.key_file_entry("root", ROOT, admin=True),
    )
    return path


def write(path: Path, *lines: str) -> None:
    """Put `lines` into a file so that it is seen to be another."""
    fresh = path.with_suffix(".new")
    fresh.write_text("\n".join(lines) + "\n")
    os.replace(fresh, path)


def told(token: str | None) -> dict[str, str]:
    return {} if token is None else {"authorization": f"Bearer {token}"}


@pytest_asyncio.fixture
async def url(backend: FakeVLLM, file: Path, tmp_path: Path) -> AsyncIterator[str]:
    settings = load(
        upstream=backend.url, keys=file, admin_key=BOSS, store=tmp_path / "s.db", record_fraction=0.0, **SMALL
    )
    async with running(settings) as at:
        yield at


@pytest_asyncio.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


async def ask(
    http: aiohttp.ClientSession, url: str, token: str | None, beta: str | None = "0", **fields: Any
) -> tuple[int, Any, Any]:
    body = {"model": "fake-model", "messages": [{"role": "user", "content": "hi"}], **fields}
    headers = told(token) | ({} if beta is None else {"x-tts-beta": beta})
    async with http.post(f"{url}/v1/chat/completions", json=body, headers=headers) as response:
        return response.status, response.headers, await response.json(content_type=None)


# Routes


HASH = "a" * 64


def test_every_route_of_the_app_declares_who_may_call_it(backend_free_app: Any) -> None:
    there = {(route.path, method) for route in backend_free_app.routes for method in (route.methods or {""}) - {"HEAD"}}
    assert there == {(route.path, route.method) for route in ROUTES}
    assert len(ROUTES) == len(there)
    assert {route.path for route in ROUTES if route.access is Access.ANYONE} == {
        "/health",
        "/ready",
        "/openapi.json",
        "/docs",
        "/docs/{asset}",
    }


@pytest.fixture
def backend_free_app() -> Any:
    return create_app(load(upstream="http://127.0.0.1:1"))


@pytest.mark.process
@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
async def test_every_route_lets_in_whom_it_says_and_nobody_else(
    url: str, http: aiohttp.ClientSession, route: Any
) -> None:
    levels = {None: 0, "nobody's": 0, ALICE: 1, ROOT: 2, BOSS: 2}
    needed = [Access.ANYONE, Access.CLIENT, Access.ADMIN].index(route.access)
    for token, level in levels.items():
        async with http.request(route.method, url + route.path, data=b"{}", headers=told(token)) as response:
            refused = response.status in (401, 403)
            assert refused == (level < needed), (token, response.status)
            if refused:
                assert response.status == (401 if level == 0 else 403)
                error = (await response.json())["error"]
                assert error["code"] == ("invalid_api_key" if level == 0 else "admin_only")
                assert error["type"] == ("invalid_request_error" if level == 0 else "permission_error")
                assert response.headers.get("www-authenticate") == ("Bearer" if level == 0 else None)


async def test_what_is_not_there_is_not_there_for_anybody(url: str, http: aiohttp.ClientSession) -> None:
    for path in ("/redoc", "/docs/redoc.standalone.js", "/v1/load_lora_adapter", "/v1/files"):
        async with http.get(url + path, headers=told(BOSS)) as response:
            assert response.status == 404


@pytest.mark.process
async def test_openais_client_knows_the_refusal(url: str) -> None:
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as openai:
        with pytest.raises(AuthenticationError) as caught:
            await openai.models.list()
    assert caught.value.code == "invalid_api_key"


async def test_admins_of_the_file_name_any_controller_and_clients_do_not(url: str, http: aiohttp.ClientSession) -> None:
    assert (await ask(http, url, ROOT, tts={"controller": "everything"}))[0] == 200
    status, _, reply = await ask(http, url, ALICE, tts={"controller": "everything"})
    assert (status, reply["error"]["code"]) == (403, "admin_only")
    assert "send an admin key" in reply["error"]["message"]


# Tenants


async def test_what_one_tenant_asked_another_does_not_see(url: str, http: aiohttp.ClientSession) -> None:
    _, headers, _ = await ask(http, url, ALICE)
    asked = f"{url}/v1/tts/requests/{headers['x-request-id']}"
    statuses = {}
    for token in (ALICE, BOB, ROOT, BOSS):
        for _ in range(200):
            async with http.get(asked, headers=told(token)) as response:
                statuses[token] = response.status
            if statuses[token] == 200 or token == BOB:
                break
    assert statuses == {ALICE: 200, BOB: 404, ROOT: 200, BOSS: 200}


async def test_a_new_key_keeps_the_tenant_and_the_old_one_is_out(
    url: str, http: aiohttp.ClientSession, file: Path
) -> None:
    _, headers, _ = await ask(http, url, ALICE)
    write(file, f'alice = {{ sha256 = ["{api_keys.hash_key(ALICE)}", "{api_keys.hash_key("fresh")}"] }}')
    assert (await ask(http, url, ALICE))[0] == 200
    assert (await ask(http, url, "fresh"))[0] == 200
    assert (await ask(http, url, BOB))[0] == 401
    write(file, api_keys.key_file_entry("alice", "fresh"))
    assert (await ask(http, url, ALICE))[0] == 401
    said = {"request_id": headers["x-request-id"], "correct": True}
    async with http.post(f"{url}/v1/tts/feedback", json=said, headers=told("fresh")) as response:
        assert response.status in (200, 202)


async def test_each_tenant_has_its_part_of_the_prefix_cache(
    url: str, http: aiohttp.ClientSession, backend: FakeVLLM
) -> None:
    salts = {}
    for token in (ALICE, BOB, BOSS):
        backend.requests.clear()
        assert (await ask(http, url, token, "0.5", tts={"controller": "parallel_probe"}))[0] == 200
        assert (await ask(http, url, token, None, cache_salt="bob's, guessed"))[0] == 200
        async with http.post(
            f"{url}/v1/completions", json={"prompt": [[60]], "max_tokens": 2}, headers=told(token)
        ) as response:
            assert response.status == 200
            await response.read()
        assert len(backend.requests) > 4
        (salts[token],) = {request.get("cache_salt") for request in backend.requests}
    assert len(set(salts.values())) == 3
    assert all(salt and len(salt) == 64 for salt in salts.values())


async def test_without_a_file_nothing_is_salted_and_every_token_is_a_tenant(backend: FakeVLLM) -> None:
    async with running(load(upstream=backend.url, **SMALL)) as url, aiohttp.ClientSession() as http:
        assert (await ask(http, url, None))[0] == 200
        assert (await ask(http, url, "whatever"))[0] == 200
    assert all("cache_salt" not in request for request in backend.requests)


def test_salts_follow_from_the_secret(file: Path) -> None:
    def salt(secret: str | None) -> str | None:
        callers = Authenticator(load(keys=file, cache_secret=secret))
        return callers._salt("tenant")

    assert salt("one") == salt("one") != salt("two")
    assert salt(None) != salt(None)


# The file


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("alice = {", "line 1: invalid TOML"),
        ("# mine\n\nalice = 3\n", "line 3: alice: entry: Input should be a valid dictionary"),
        (f'x = {{ sha256 = "{HASH}" }}\ny = {{ sha256 = "short" }}', "line 2: y: sha256"),
        (f'[x]\nsha256 = "{HASH}"\n\n[y]\nsha512 = "1"', "line 4: y: sha256: Field required"),
        (f'x = {{ sha256 = "{HASH}", tokens = 0 }}', "line 1: x: tokens"),
        (f'"x y" = {{ sha256 = "{HASH}" }}', "line 1: x y: invalid name"),
        (f'x = {{ sha256 = "{HASH}" }}\ny = {{ sha256 = "{HASH}" }}', "line 2: y: same key as x"),
    ],
)
def test_what_is_wrong_with_a_file_is_told_by_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        api_keys.read_key_file(path)
    assert f"keys: {path}, {words}" in str(caught.value)


def test_a_key_put_where_its_hash_belongs_is_not_repeated(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(f'alice = {{ sha256 = "{ALICE}" }}')
    with pytest.raises(SettingsError) as caught:
        api_keys.read_key_file(path)
    assert ALICE not in str(caught.value)


def test_json_will_do(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"alice": {"sha256": api_keys.hash_key(ALICE), "episodes": 2, "tokens_per_minute": 9}}))
    (key,) = api_keys.read_key_file(path)
    assert (key.name, key.caps.episodes, key.caps.tokens_per_minute, key.is_admin) == ("alice", 2, 9, False)
    path.write_text('{\n"alice": {"sha256": "x"}}')
    with pytest.raises(SettingsError, match="line 2: alice"):
        api_keys.read_key_file(path)
    path.write_text('{\n"alice": }')
    with pytest.raises(SettingsError, match="line 2: "):
        api_keys.read_key_file(path)


HARMS = {
    "broken": b"alice = {{",
    "not UTF-8": b"\xff\xfe",
    "empty": b"",
    "without keys": b"# alice = 1\n",
    "gone": None,
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_file_that_breaks_changes_nothing_and_is_complained_of_once(
    file: Path, caplog: pytest.LogCaptureFixture, harm: str
) -> None:
    ring = api_keys.Keyring(file)
    assert not ring.is_broken
    content = HARMS[harm]
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    with caplog.at_level(logging.ERROR):
        for token, name in ((ALICE, "alice"), (BOB, "bob")):
            found = ring.find(token)
            assert found is not None
            assert found.name == name
    assert [str(file) in record.getMessage() for record in caplog.records] == [True]
    assert ring.is_broken
    write(file, api_keys.key_file_entry("carol", "carols"))
    assert not ring.is_broken
    assert ring.find(ALICE) is None
    assert ring.find("carols") is not None


def test_a_file_without_keys_does_not_start(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text("# none yet\n")
    with pytest.raises(SettingsError, match=r"keys\.toml: no keys; add a line that `autotts keys new"):
        Authenticator(load(keys=path))


async def test_a_file_that_is_rewritten_in_place_never_locks_its_clients_out(
    url: str, http: aiohttp.ClientSession, file: Path
) -> None:
    lines = [
        api_keys.key_file_entry("alice", ALICE),
        api_keys.key_file_entry("bob", BOB),
        api_keys.key_file_entry("root", ROOT, admin=True),
    ]
    with file.open("w") as opened:  # empty from here on
        for written in range(len(lines) + 1):
            opened.flush()
            assert (await ask(http, url, BOB))[0] == 200, written
            page = await (await http.get(f"{url}/metrics", headers=told(ROOT))).text()
            assert f"autotts_keys_broken {float(written < len(lines))}" in page
            if written < len(lines):
                opened.write(lines[written] + "\n")


def test_keys_missing_from_a_file_are_removed_once_it_stands_still(file: Path) -> None:
    ring = api_keys.Keyring(file)
    file.write_text(api_keys.key_file_entry("alice", ALICE) + "\n" + api_keys.key_file_entry("carol", "carols") + "\n")
    assert (ring.find(BOB) is not None, ring.find("carols")) == (True, None)
    old = time.time_ns() - int(api_keys.SETTLE_S * 1e9)
    os.utime(file, ns=(old, old))
    assert (ring.find(BOB), ring.find("carols") is not None) == (None, True)
    given = (("alice", ALICE), ("carol", "carols"), ("dave", "d"))
    file.write_text("".join(api_keys.key_file_entry(name, token) + "\n" for name, token in given))
    assert ring.find("d") is not None  # nothing is missing, so nothing is waited for


def test_a_file_that_changes_while_it_is_read_is_read_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ring = api_keys.Keyring(file)
    everybody = {"alice": ALICE, "bob": BOB, "root": ROOT, "eve": "eves"}
    write(file, api_keys.key_file_entry("carol", "carols"))
    read = api_keys.read_key_file

    def slow(path: Path) -> Any:
        taken = read(path)
        write(file, *(api_keys.key_file_entry(name, token) for name, token in everybody.items()))
        return taken

    monkeypatch.setattr(api_keys, "read_key_file", slow)
    assert ring.find("carols") is None
    monkeypatch.undo()
    assert ring.find("eves") is not None


# The variable


def pair(name: str, token: str) -> str:
    return f"{name}={api_keys.hash_key(token)}"


def test_a_variable_holds_names_and_hashes() -> None:
    text = f"\n {pair('alice', ALICE)}, {pair('alice', 'fresh')}\n{pair('bob', BOB)},\n"
    alice, bob = api_keys.parse_key_list(text)
    assert (alice.name, alice.hashes) == ("alice", (api_keys.hash_key(ALICE), api_keys.hash_key("fresh")))
    assert (bob.name, bob.is_admin, set(bob.caps)) == ("bob", False, {None})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (ALICE, "entry 1: expected NAME=HASH"),
        (f"{pair('bob', BOB)},alice={ALICE}", "entry 2: expected NAME=HASH"),
        (f"{ALICE}={ALICE}", "entry 1: expected NAME=HASH"),
        (f"{pair('bob', BOB)}\n{pair('alice', BOB)}", "entry 2: same key as an earlier"),
    ],
)
def test_what_is_wrong_with_a_variable_is_told_without_what_it_holds(text: str, words: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Authenticator(load(client_keys=text))
    assert str(caught.value).startswith(f"{api_keys.KEYS_VARIABLE}: {words}")
    assert ALICE not in str(caught.value)


async def test_keys_of_a_variable_let_in_beside_those_of_a_file(
    backend: FakeVLLM, http: aiohttp.ClientSession, file: Path
) -> None:
    alone = load(upstream=backend.url, client_keys=pair("carol", "carols"), **SMALL)
    both = load(upstream=backend.url, client_keys=pair("carol", "carols"), keys=file, **SMALL)
    for settings, alices in ((alone, 401), (both, 200)):
        async with running(settings) as url:
            statuses = [(await ask(http, url, token))[0] for token in ("carols", ALICE, "nobody's", None)]
        assert statuses == [200, alices, 401, 401]


def test_the_file_is_read_anew_and_the_variable_stays(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = api_keys.Keyring(file, api_keys.parse_key_list(pair("carol", "carols")))
    write(file, api_keys.key_file_entry("dave", "daves"))
    assert [found.find(token) is not None for token in ("carols", "daves", ALICE)] == [True, True, False]
    for line in (api_keys.key_file_entry("carol", "another"), api_keys.key_file_entry("eve", "carols")):
        write(file, line)
        caplog.clear()
        assert found.find("daves") is not None
        assert f"is also in {api_keys.KEYS_VARIABLE}; remove one of them; keeping the previous keys" in caplog.text


def test_an_unknown_limit_lists_those_there_are(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(api_keys.key_file_entry("alice", "secret").replace(" }", ", token_per_minute = 5 }"))
    with pytest.raises(SettingsError) as caught:
        api_keys.read_key_file(path)
    words = "alice: token_per_minute: there is no such field; did you mean tokens_per_minute? known fields: sha256, "
    assert words in str(caught.value)


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (
            "tokens = 750",
            "alice: tokens = 750 is less than the approximately 781 tokens that one interval and",
        ),
        ("tokens_per_minute = 750", "alice: tokens_per_minute = 750 is less than"),
        ("tokens_per_minute = 3000", "alice: a quarter of tokens_per_minute = 3000, the cap of requests that set no"),
        ("tokens = 800", None),
        ("tokens_per_minute = 4000", None),
        ("tokens_per_minute = 3000, tokens = 800", None),
        ("branches = 1", None),
    ],
)
def test_a_limit_that_leaves_no_room_is_warned_of_when_the_file_is_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, limits: str, words: str | None
) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(api_keys.key_file_entry("alice", "secret"))
    callers = Authenticator(load(upstream="http://127.0.0.1:1", keys=path))
    assert not warned(caplog)
    path.write_text(api_keys.key_file_entry("alice", "secret").replace(" }", f", {limits} }}"))
    assert callers.keyring is not None
    for _ in range(2):
        (key,) = callers.keyring.keys
    assert key.name == "alice"
    told = warned(caplog)
    assert len(told) == (words is not None)
    assert words is None or words in told[0]
    assert str(path) in told[0] if told else True


def test_so_is_the_servers_own(caplog: pytest.LogCaptureFixture) -> None:
    Authenticator(load(upstream="http://127.0.0.1:1", max_total_tokens=700))
    (line,) = warned(caplog)
    assert line.startswith("the server's limit tokens = 700 is less than the approximately 781")


@pytest.mark.process
def test_a_variable_is_shown_masked_and_counts_as_keys() -> None:
    given = {"AUTOTTS_CLIENT_KEYS": pair("carol", "carols"), "AUTOTTS_UPSTREAM": "http://127.0.0.1:1"}
    done = autotts("config", "show", "--json", **given)
    told = json.loads(done.stdout)["client_keys"]
    assert (told["value"], told["source"]) == ("********", "environment")
    assert api_keys.hash_key("carols") not in done.stdout
    done = autotts("config", "check", "--host", "0.0.0.0", **given)
    assert done.returncode == 0, done.stderr
    assert "AUTOTTS_CLIENT_KEYS" not in done.stdout


# The command line


@pytest.mark.process
def test_a_key_is_shown_once_and_its_line_is_for_the_file(tmp_path: Path) -> None:
    done = autotts("keys", "new", "alice")
    token, line = done.stderr.strip(), done.stdout
    assert done.returncode == 0
    assert token.startswith(api_keys.KEY_PREFIX)
    assert token not in line
    path = tmp_path / "keys.toml"
    path.write_text(line + autotts("keys", "new", "boss", "--admin").stdout)
    alice, boss = api_keys.read_key_file(path)
    assert alice.hashes == (api_keys.hash_key(token),)
    assert (alice.is_admin, boss.is_admin) == (False, True)
    listed = autotts("keys", "list", str(path)).stdout
    assert alice.tenant in listed
    assert boss.tenant in listed


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "example.org"])
def test_strangers_are_not_let_in_unasked(host: str, file: Path) -> None:
    with pytest.raises(SettingsError, match="no API keys are configured"):
        check_host(load(host=host))
    check_host(load(host=host, keys=file))
    check_host(load(host=host, client_keys=pair("alice", ALICE)))
    check_host(load(host=host, allow_anonymous=True))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "::1", "localhost"])
def test_loopback_needs_no_keys(host: str) -> None:
    check_host(load(host=host))


@pytest.mark.process
def test_serving_the_world_without_keys_is_refused_in_one_line() -> None:
    done = autotts("serve", "--host", "0.0.0.0", "--upstream", "http://127.0.0.1:1")
    assert (done.returncode, done.stderr.strip().count("\n")) == (2, 0)
    assert "host 0.0.0.0 is reachable from other machines and no API keys are configured" in done.stderr
    done = autotts("serve", "--upstream", "http://127.0.0.1:1", AUTOTTS_KEYS="/nowhere/keys.toml")
    assert (done.returncode, done.stderr.strip().count("\n")) == (2, 0)
    assert "keys: /nowhere/keys.toml: No such file" in done.stderr


# On a real vLLM


@pytest.mark.vllm
async def test_no_tenant_finds_what_another_has_left_in_vllms_cache(vllm: str, file: Path) -> None:
    question = "Say which of these it is, please: " + "one or another, " * 12

    async def cached(url: str, http: aiohttp.ClientSession, token: str) -> int:
        body = {"model": "autotts-tiny", "messages": [{"role": "user", "content": question}]}
        headers = told(token) | {"x-tts-beta": "0"}
        async with http.post(f"{url}/v1/chat/completions", json=body, headers=headers) as response:
            assert response.status == 200
            return int((await response.json())["usage"]["prompt_tokens_details"]["cached_tokens"])

    async with running(load(upstream=vllm, keys=file, **EMBEDDED)) as url, aiohttp.ClientSession() as http:
        assert await cached(url, http, ALICE) == 0
        assert await cached(url, http, ALICE) > 0
        assert await cached(url, http, BOB) == 0
        assert await cached(url, http, BOB) > 0


@pytest.mark.vllm
async def test_vllm_says_how_busy_it_is(vllm: str) -> None:
    async with aiohttp.ClientSession() as http:
        pressure = await UpstreamClient(vllm, http).read_load()
    assert pressure.waiting is not None
    assert pressure.waiting >= 0
    assert pressure.cache is not None
    assert 0 <= pressure.cache <= 1


@pytest.mark.parametrize("path", ["/version", "/tokenizer_info", "/ping"])
async def test_what_has_no_body_is_read_with_a_key(
    backend: FakeVLLM, http: aiohttp.ClientSession, url: str, path: str
) -> None:
    async with http.get(url + path, headers=told(ALICE)) as response:
        assert response.status < 500
