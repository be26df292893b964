"""API keys from a file and a variable, the access level of every route, and tenants that outlive their keys."""

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
from proxy.admission.auth import Access, Authenticator, Caller, check_host
from proxy.api.routes import ROUTES
from proxy.app import create_app
from proxy.errors import Forbidden, SettingsError
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
    """Replace the file by one with `lines`, so that the change is noticed."""
    fresh = path.with_suffix(".new")
    fresh.write_text("\n".join(lines) + "\n")
    os.replace(fresh, path)


def bearer(token: str | None) -> dict[str, str]:
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
    headers = bearer(token) | ({} if beta is None else {"x-tts-beta": beta})
    async with http.post(f"{url}/v1/chat/completions", json=body, headers=headers) as response:
        return response.status, response.headers, await response.json(content_type=None)


# Routes


HASH = "a" * 64


def test_every_route_of_the_app_is_in_the_route_table_with_an_access_level(backend_free_app: Any) -> None:
    routes = [route for route in backend_free_app.routes if route.path != "/ui"]  # it has a table of its own
    served = {(route.path, method) for route in routes for method in (route.methods or {""}) - {"HEAD"}}
    assert served == {(route.path, route.method) for route in ROUTES}
    assert len(ROUTES) == len(served)
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
async def test_each_route_admits_callers_with_its_access_level_and_refuses_all_others(
    url: str, http: aiohttp.ClientSession, route: Any
) -> None:
    levels = {None: 0, "nobody's": 0, ALICE: 1, ROOT: 2, BOSS: 2}
    needed = [Access.ANYONE, Access.CLIENT, Access.ADMIN].index(route.access)
    for token, level in levels.items():
        async with http.request(route.method, url + route.path, data=b"{}", headers=bearer(token)) as response:
            refused = response.status in (401, 403)
            assert refused == (level < needed), (token, response.status)
            if refused:
                assert response.status == (401 if level == 0 else 403)
                error = (await response.json())["error"]
                assert error["code"] == ("invalid_api_key" if level == 0 else "admin_only")
                assert error["type"] == ("invalid_request_error" if level == 0 else "permission_error")
                assert response.headers.get("www-authenticate") == ("Bearer" if level == 0 else None)


async def test_paths_without_a_route_return_404_even_for_an_admin(url: str, http: aiohttp.ClientSession) -> None:
    for path in ("/redoc", "/docs/redoc.standalone.js", "/v1/load_lora_adapter", "/v1/files"):
        async with http.get(url + path, headers=bearer(BOSS)) as response:
            assert response.status == 404


@pytest.mark.process
async def test_the_openai_client_raises_authentication_error_for_a_wrong_key(url: str) -> None:
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as openai:
        with pytest.raises(AuthenticationError) as caught:
            await openai.models.list()
    assert caught.value.code == "invalid_api_key"


async def test_admin_keys_may_name_an_admin_only_controller_and_client_keys_may_not(
    url: str, http: aiohttp.ClientSession
) -> None:
    assert (await ask(http, url, ROOT, tts={"controller": "everything"}))[0] == 200
    status, _, reply = await ask(http, url, ALICE, tts={"controller": "everything"})
    assert (status, reply["error"]["code"]) == (403, "admin_only")
    assert "send an admin key" in reply["error"]["message"]


# Tenants


async def test_a_tenant_cannot_look_up_the_request_of_another_tenant(url: str, http: aiohttp.ClientSession) -> None:
    _, headers, _ = await ask(http, url, ALICE)
    request_url = f"{url}/v1/tts/requests/{headers['x-request-id']}"
    statuses = {}
    for token in (ALICE, BOB, ROOT, BOSS):
        for _ in range(200):
            async with http.get(request_url, headers=bearer(token)) as response:
                statuses[token] = response.status
            if statuses[token] == 200 or token == BOB:
                break
    assert statuses == {ALICE: 200, BOB: 404, ROOT: 200, BOSS: 200}


async def test_a_key_has_its_own_default_beta(backend: FakeVLLM, tmp_path: Path, http: aiohttp.ClientSession) -> None:
    path = tmp_path / "keys.toml"
    alice = api_keys.key_file_entry("alice", ALICE).replace(" }", ", beta = 0.25 }")
    write(path, alice, api_keys.key_file_entry("bob", BOB))
    async with running(load(upstream=backend.url, keys=path, admin_key=BOSS, beta=0.75, **SMALL)) as url:
        for token, beta, expected in ((ALICE, None, "0.25"), (BOB, None, "0.75"), (ALICE, "1", "1")):
            _, headers, _ = await ask(http, url, token, beta)
            source = "default" if beta is None else "header"
            assert (headers["x-tts-beta"], headers["x-tts-beta-source"]) == (expected, source)
        _, headers, _ = await ask(http, url, ALICE, None, model="fake-model@0.5")
        assert headers["x-tts-beta"] == "0.5"
        async with http.get(f"{url}/v1/tts/keys", headers=bearer(BOSS)) as response:
            keys = (await response.json())["keys"]
        assert {name: key["beta"] for name, key in keys.items()} == {"alice": 0.25, "bob": None}


async def test_a_replaced_key_is_rejected_and_its_tenant_keeps_its_requests(
    url: str, http: aiohttp.ClientSession, file: Path
) -> None:
    _, headers, _ = await ask(http, url, ALICE)
    write(file, f'alice = {{ sha256 = ["{api_keys.hash_key(ALICE)}", "{api_keys.hash_key("fresh")}"] }}')
    assert (await ask(http, url, ALICE))[0] == 200
    assert (await ask(http, url, "fresh"))[0] == 200
    assert (await ask(http, url, BOB))[0] == 401
    write(file, api_keys.key_file_entry("alice", "fresh"))
    assert (await ask(http, url, ALICE))[0] == 401
    feedback = {"request_id": headers["x-request-id"], "correct": True}
    async with http.post(f"{url}/v1/tts/feedback", json=feedback, headers=bearer("fresh")) as response:
        assert response.status in (200, 202)


async def test_each_tenant_sends_its_own_cache_salt_upstream(
    url: str, http: aiohttp.ClientSession, backend: FakeVLLM
) -> None:
    salts = {}
    for token in (ALICE, BOB, BOSS):
        backend.requests.clear()
        assert (await ask(http, url, token, "0.5", tts={"controller": "parallel_probe"}))[0] == 200
        assert (await ask(http, url, token, None, cache_salt="bob's, guessed"))[0] == 200
        async with http.post(
            f"{url}/v1/completions", json={"prompt": [[60]], "max_tokens": 2}, headers=bearer(token)
        ) as response:
            assert response.status == 200
            await response.read()
        assert len(backend.requests) > 4
        (salts[token],) = {request.get("cache_salt") for request in backend.requests}
    assert len(set(salts.values())) == 3
    assert all(salt and len(salt) == 64 for salt in salts.values())


async def test_without_configured_keys_no_cache_salt_is_sent_and_any_token_is_accepted(backend: FakeVLLM) -> None:
    async with running(load(upstream=backend.url, **SMALL)) as url, aiohttp.ClientSession() as http:
        assert (await ask(http, url, None))[0] == 200
        assert (await ask(http, url, "whatever"))[0] == 200
    assert all("cache_salt" not in request for request in backend.requests)


def test_cache_salts_are_derived_from_the_cache_secret(file: Path) -> None:
    def salt(secret: str | None) -> str | None:
        callers = Authenticator(load(keys=file, cache_secret=secret))
        return callers._salt("tenant")

    assert salt("one") == salt("one") != salt("two")
    assert salt(None) != salt(None)


# The file


@pytest.mark.parametrize(
    ("text", "expected_text"),
    [
        ("alice = {", "line 1: invalid TOML"),
        ("# mine\n\nalice = 3\n", 'line 3: alice: entry: write NAME = { sha256 = "HASH" }'),
        (
            f'x = {{ sha256 = "{HASH}" }}\nx = {{ sha256 = "{HASH}" }}',
            "line 2: x occurs twice; for an old",
        ),
        (f'[x]\nsha256 = "{HASH}"\n[x]\n', "line 3: x occurs twice; for an old"),
        (
            f'x = {{ sha256 = "{HASH}", beta = 3, tokens = 0, admin = "yes", token = 1 }}',
            "line 1: x: admin: it must be true or false, without quotes; "
            "beta: it must be less than or equal to 1, not 3; "
            "tokens: it must be greater than or equal to 1, not 0; token: there is no such field; did you mean tokens?",
        ),
        (
            f'x = {{ sha256 = "{HASH}" }}\ny = {{ sha256 = "short" }}',
            "line 2: y: sha256: it must be the 64 hex",
        ),
        (f'[x]\nsha256 = "{HASH}"\n\n[y]\nsha512 = "1"', "line 4: y: sha256: it is missing"),
        (f'x = {{ sha256 = "{HASH}", tokens = 0 }}', "line 1: x: tokens"),
        (f'"x y" = {{ sha256 = "{HASH}" }}', "line 1: x y: invalid name"),
        (f'x = {{ sha256 = "{HASH}" }}\ny = {{ sha256 = "{HASH}" }}', "line 2: y: same key as x"),
    ],
)
def test_an_error_in_a_key_file_names_the_line_and_the_field(tmp_path: Path, text: str, expected_text: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        api_keys.read_key_file(path)
    assert f"keys: {path}, {expected_text}" in str(caught.value)


def test_a_key_written_in_place_of_its_hash_is_not_in_the_error(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    for text in (f'alice = {{ sha256 = "{ALICE}" }}', f'alice = {{ tokens = "{ALICE}" }}', f'[a.a]\n[a.a]\n"{ALICE}"'):
        path.write_text(text)
        with pytest.raises(SettingsError) as caught:
            api_keys.read_key_file(path)
        assert ALICE not in str(caught.value)


def test_a_key_file_that_may_not_be_read_says_who_must_read_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(SettingsError, match="Permission denied; let the proxy's user read it"):
        api_keys.read_key_file(tmp_path / "keys.toml")


def test_a_key_file_may_be_json_and_its_errors_name_the_line(tmp_path: Path) -> None:
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
def test_a_key_file_that_becomes_invalid_keeps_the_previous_keys_and_logs_one_error(
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
            key = ring.find(token)
            assert key is not None
            assert key.name == name
    assert [str(file) in record.getMessage() for record in caplog.records] == [True]
    assert ring.is_broken
    write(file, api_keys.key_file_entry("carol", "carols"))
    assert not ring.is_broken
    assert ring.find(ALICE) is None
    assert ring.find("carols") is not None


def test_an_admin_key_that_a_client_has_is_refused_at_start(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(f'bob = {{ sha256 = "{api_keys.hash_key("sesame")}" }}\n')
    with pytest.raises(SettingsError, match="admin_key: the same key as that of the client bob; give each its own"):
        Authenticator(load(keys=path, admin_key="sesame"))
    path.write_text(f'root = {{ sha256 = "{api_keys.hash_key("sesame")}", admin = true }}\n')
    Authenticator(load(keys=path, admin_key="sesame"))


def test_a_key_file_without_keys_is_refused_at_start(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text("# none yet\n")
    with pytest.raises(SettingsError, match=r"keys\.toml: no keys; add a line that `autotts keys new"):
        Authenticator(load(keys=path))


async def test_clients_stay_admitted_while_the_key_file_is_rewritten_in_place(
    url: str, http: aiohttp.ClientSession, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_keys, "SETTLE_S", 3600.0)  # however slowly this test writes
    lines = [
        api_keys.key_file_entry("alice", ALICE),
        api_keys.key_file_entry("bob", BOB),
        api_keys.key_file_entry("root", ROOT, admin=True),
    ]
    with file.open("w") as opened:  # empty from here on
        for written in range(len(lines) + 1):
            opened.flush()
            assert (await ask(http, url, BOB))[0] == 200, written
            page = await (await http.get(f"{url}/metrics", headers=bearer(ROOT))).text()
            assert f"autotts_keys_broken {float(written < len(lines))}" in page
            if written < len(lines):
                opened.write(lines[written] + "\n")


def test_keys_missing_from_the_file_are_removed_once_it_has_settled(file: Path) -> None:
    ring = api_keys.Keyring(file)
    file.write_text(api_keys.key_file_entry("alice", ALICE) + "\n" + api_keys.key_file_entry("carol", "carols") + "\n")
    assert (ring.find(BOB) is not None, ring.find("carols")) == (True, None)
    old = time.time_ns() - int(api_keys.SETTLE_S * 1e9)
    os.utime(file, ns=(old, old))
    assert (ring.find(BOB), ring.find("carols") is not None) == (None, True)
    given = (("alice", ALICE), ("carol", "carols"), ("dave", "d"))
    file.write_text("".join(api_keys.key_file_entry(name, token) + "\n" for name, token in given))
    assert ring.find("d") is not None  # no key is missing, so the reader does not wait


def test_a_key_file_that_changes_while_it_is_read_is_read_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_the_keys_variable_is_parsed_as_names_with_hashes() -> None:
    text = f"\n {pair('alice', ALICE)}, {pair('alice', 'fresh')}\n{pair('bob', BOB)},\n"
    alice, bob = api_keys.parse_key_list(text)
    assert (alice.name, alice.hashes) == ("alice", (api_keys.hash_key(ALICE), api_keys.hash_key("fresh")))
    assert (bob.name, bob.is_admin, set(bob.caps)) == ("bob", False, {None})


@pytest.mark.parametrize(
    ("text", "expected_text"),
    [
        (ALICE, "entry 1: expected NAME=HASH"),
        (f"{pair('bob', BOB)},alice={ALICE}", "entry 2: expected NAME=HASH"),
        (f"{ALICE}={ALICE}", "entry 1: expected NAME=HASH"),
        (f"{pair('bob', BOB)}\n{pair('alice', BOB)}", "entry 2: same key as an earlier"),
    ],
)
def test_an_error_in_the_keys_variable_names_the_entry_and_shows_no_key(text: str, expected_text: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Authenticator(load(client_keys=text))
    assert str(caught.value).startswith(f"{api_keys.KEYS_VARIABLE}: {expected_text}")
    assert ALICE not in str(caught.value)


async def test_keys_from_the_variable_and_the_file_are_both_accepted(
    backend: FakeVLLM, http: aiohttp.ClientSession, file: Path
) -> None:
    alone = load(upstream=backend.url, client_keys=pair("carol", "carols"), **SMALL)
    both = load(upstream=backend.url, client_keys=pair("carol", "carols"), keys=file, **SMALL)
    for settings, alices in ((alone, 401), (both, 200)):
        async with running(settings) as url:
            statuses = [(await ask(http, url, token))[0] for token in ("carols", ALICE, "nobody's", None)]
        assert statuses == [200, alices, 401, 401]


def test_reloading_the_key_file_keeps_the_keys_of_the_variable(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    ring = api_keys.Keyring(file, api_keys.parse_key_list(pair("carol", "carols")))
    write(file, api_keys.key_file_entry("dave", "daves"))
    assert [ring.find(token) is not None for token in ("carols", "daves", ALICE)] == [True, True, False]
    for line in (api_keys.key_file_entry("carol", "another"), api_keys.key_file_entry("eve", "carols")):
        write(file, line)
        caplog.clear()
        assert ring.find("daves") is not None
        assert f"is also in {api_keys.KEYS_VARIABLE}; remove one of them; keeping the previous keys" in caplog.text


def test_an_unknown_limit_in_a_key_file_suggests_and_lists_the_known_fields(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(api_keys.key_file_entry("alice", "secret").replace(" }", ", token_per_minute = 5 }"))
    with pytest.raises(SettingsError) as caught:
        api_keys.read_key_file(path)
    expected_text = (
        "alice: token_per_minute: there is no such field; did you mean tokens_per_minute? known fields: sha256, "
    )
    assert expected_text in str(caught.value)


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize(
    ("limits", "expected_text"),
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
def test_a_key_limit_too_small_for_one_interval_is_warned_of_when_the_file_is_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, limits: str, expected_text: str | None
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
    warnings = warned(caplog)
    assert len(warnings) == (expected_text is not None)
    assert expected_text is None or expected_text in warnings[0]
    assert str(path) in warnings[0] if warnings else True


@pytest.mark.parametrize(("shares", "is_warned"), [({}, True), ({"limits": "redis://127.0.0.1:1"}, False)])
def test_a_key_limit_too_small_once_it_is_divided_among_workers_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, shares: dict[str, str], is_warned: bool
) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(api_keys.key_file_entry("alice", "secret").replace(" }", ", tokens_per_minute = 4000 }"))
    Authenticator(load(upstream="http://127.0.0.1:1", keys=path, workers=8, **shares))
    expected_text = "alice: tokens_per_minute = 500 in each of 8 workers is less than"
    assert [expected_text in warning for warning in warned(caplog)] == [True] * is_warned


def test_a_server_limit_too_small_for_one_interval_is_warned_of_at_start(caplog: pytest.LogCaptureFixture) -> None:
    Authenticator(load(upstream="http://127.0.0.1:1", max_total_tokens=700))
    (line,) = warned(caplog)
    assert line.startswith("the server's limit tokens = 700 is less than the approximately 781")


@pytest.mark.process
def test_the_keys_variable_is_masked_by_config_show_and_allows_a_public_host() -> None:
    given = {"AUTOTTS_CLIENT_KEYS": pair("carol", "carols"), "AUTOTTS_UPSTREAM": "http://127.0.0.1:1"}
    done = autotts("config", "show", "--json", **given)
    setting = json.loads(done.stdout)["client_keys"]
    assert (setting["value"], setting["source"]) == ("********", "environment")
    assert api_keys.hash_key("carols") not in done.stdout
    done = autotts("config", "check", "--host", "0.0.0.0", **given)
    assert done.returncode == 0, done.stderr
    assert "AUTOTTS_CLIENT_KEYS" not in done.stdout


# The command line


@pytest.mark.process
def test_keys_new_prints_the_key_to_stderr_and_its_file_entry_to_stdout(tmp_path: Path) -> None:
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
    assert "priority" in listed
    assert alice.tenant in listed
    assert boss.tenant in listed


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "example.org"])
def test_a_public_host_requires_keys_or_allow_anonymous(host: str, file: Path) -> None:
    with pytest.raises(SettingsError, match="no API keys are configured"):
        check_host(load(host=host))
    check_host(load(host=host, keys=file))
    check_host(load(host=host, client_keys=pair("alice", ALICE)))
    check_host(load(host=host, allow_anonymous=True))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "::1", "localhost"])
def test_a_loopback_host_needs_no_keys(host: str) -> None:
    check_host(load(host=host))


@pytest.mark.process
def test_serve_on_a_public_host_without_keys_exits_with_a_one_line_error() -> None:
    done = autotts("serve", "--host", "0.0.0.0", "--upstream", "http://127.0.0.1:1")
    assert (done.returncode, done.stderr.strip().count("\n")) == (2, 0)
    assert "host 0.0.0.0 is reachable from other machines and no API keys are configured" in done.stderr
    done = autotts("serve", "--upstream", "http://127.0.0.1:1", "--port", "0", AUTOTTS_KEYS="/nowhere/keys.toml")
    assert (done.returncode, done.stderr.strip().count("\n")) == (2, 0)
    assert "keys: /nowhere/keys.toml: No such file or directory; set AUTOTTS_KEYS to your key file, or" in done.stderr


# On a real vLLM


@pytest.mark.vllm
async def test_a_tenant_gets_no_prefix_cache_hit_from_the_prompt_of_another(vllm: str, file: Path) -> None:
    question = "Say which of these it is, please: " + "one or another, " * 12

    async def cached(url: str, http: aiohttp.ClientSession, token: str) -> int:
        body = {"model": "autotts-tiny", "messages": [{"role": "user", "content": question}]}
        headers = bearer(token) | {"x-tts-beta": "0"}
        async with http.post(f"{url}/v1/chat/completions", json=body, headers=headers) as response:
            assert response.status == 200
            details = (await response.json())["usage"]["prompt_tokens_details"]
            return 0 if details is None else int(details["cached_tokens"])  # vLLM may say nothing if nothing was cached

    async with running(load(upstream=vllm, keys=file, **EMBEDDED)) as url, aiohttp.ClientSession() as http:
        assert await cached(url, http, ALICE) == 0
        assert await cached(url, http, ALICE) > 0
        assert await cached(url, http, BOB) == 0
        assert await cached(url, http, BOB) > 0


@pytest.mark.vllm
async def test_the_load_of_a_real_vllm_is_read(vllm: str) -> None:
    async with aiohttp.ClientSession() as http:
        pressure = await UpstreamClient(vllm, http).read_load()
    assert pressure.waiting is not None
    assert pressure.waiting >= 0
    assert pressure.cache is not None
    assert 0 <= pressure.cache <= 1


@pytest.mark.parametrize("path", ["/version", "/tokenizer_info", "/ping"])
async def test_get_endpoints_of_the_upstream_are_served_to_a_key(
    backend: FakeVLLM, http: aiohttp.ClientSession, url: str, path: str
) -> None:
    async with http.get(url + path, headers=bearer(ALICE)) as response:
        assert response.status < 500


@pytest.mark.parametrize(
    ("has_keys", "is_admin", "advice"),
    [
        (False, False, "start the proxy with AUTOTTS_ADMIN_KEY"),
        (True, False, "start the proxy with AUTOTTS_ADMIN_KEY, or add `admin = true` to a key of its key file"),
        (True, True, "send an admin key as the bearer token"),
    ],
)
def test_a_refusal_of_an_admin_route_says_how_to_get_an_admin_key(
    tmp_path: Path, has_keys: bool, is_admin: bool, advice: str
) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(api_keys.key_file_entry("alice", ALICE, admin=is_admin))
    callers = Authenticator(load(upstream="http://127.0.0.1:1", keys=file if has_keys else None))
    with pytest.raises(Forbidden, match=f"/v1/tts/keys is for admins only; {advice}$"):
        callers.require_admin(Caller("tenant", False), "/v1/tts/keys")
