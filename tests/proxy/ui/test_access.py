"""Who may see the dashboard: sign-in, sessions, cookies, CSRF tokens, origins and hosts, for every route."""

from __future__ import annotations

import asyncio
import logging
import os
import re
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request

from proxy.admission import api_keys
from proxy.admission.auth import Authenticator
from proxy.app import create_app
from proxy.errors import Forbidden, TooMany, Unauthorised
from proxy.settings import load
from proxy.ui.access import Doorkeeper
from proxy.ui.page import ViewAccess
from proxy.ui.pages.registry import PAGES, UI_ROUTES
from proxy.ui.protection import COOKIE, CSP, HEADERS, check_origin
from proxy.ui.sessions import (
    ALL_FAILURES,
    FAILURES,
    MOST_ADDRESSES,
    MOST_PER_KEY,
    MOST_SESSIONS,
    WINDOW_S,
    CsrfTokens,
    Sessions,
    SignInLimiter,
)
from tests.proxy.conftest import SMALL
from tests.proxy.ui.conftest import ALICE, BOB, BOSS, ROOT, Browser

STATIC = "/ui/static/{hash}/{name:path}"
ROUTE_IDS = [f"{route.method} {route.path}" for route in UI_ROUTES]


class Clock:
    """Clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


# Routes


def ui_paths(app: Any) -> set[tuple[str, str]]:
    """Return path and method of every route of the app's dashboard."""
    (mount,) = [route for route in app.router.routes if getattr(route, "path", "") == "/ui"]
    routes = mount.app._app.router.routes
    return {(route.path, method) for route in routes for method in route.methods - {"HEAD"}}


def test_every_route_of_the_dashboard_is_in_its_route_table() -> None:
    app = create_app(load(upstream="http://127.0.0.1:1"))
    assert ui_paths(app) == {(route.path, route.method) for route in UI_ROUTES} | {(STATIC, "GET")}
    assert len(UI_ROUTES) == len({(route.path, route.method) for route in UI_ROUTES})
    assert {route.path for route in UI_ROUTES if route.access is ViewAccess.ANYONE} == {"/ui/sign-in"}
    assert {page.href for page in PAGES if page.href} <= {route.path for route in UI_ROUTES}


def test_the_dashboard_has_no_routes_when_it_is_off() -> None:
    app = create_app(load(upstream="http://127.0.0.1:1", ui=False))
    assert not [route for route in app.router.routes if getattr(route, "path", "").startswith("/ui")]


@pytest.mark.parametrize("route", UI_ROUTES, ids=ROUTE_IDS)
async def test_each_route_refuses_whoever_lacks_its_access_level(browser: Browser, route: Any) -> None:
    path = route.path.replace("{", "").replace("}", "").replace(":path", "")
    for key, level in ((None, 0), (ALICE, 1)):
        if key is not None:
            assert (await browser.sign_in(key)).status == 303
        needed = [ViewAccess.ANYONE, ViewAccess.VIEWER, ViewAccess.ADMIN].index(route.access)
        if level >= needed:
            continue
        reply = await (browser.get(path) if route.method == "GET" else browser.post(path))
        if level:
            assert reply.status == 403
            assert "admin" in reply.text
        elif path.startswith("/ui/data/"):
            assert reply.status == 401
        else:
            assert (reply.status, reply.headers["location"].partition("?")[0]) == (303, "/ui/sign-in")


@pytest.mark.parametrize(
    "route", [route for route in UI_ROUTES if route.method == "POST"], ids=lambda route: route.path
)
async def test_each_action_refuses_a_post_without_the_csrf_token_of_its_cookie(browser: Browser, route: Any) -> None:
    path = route.path.replace("{", "").replace("}", "").replace(":path", "")
    await browser.sign_in(ROOT)
    for token in ("", "0" * 64, "é"):
        reply = await browser.post(path, {"csrf": token})
        assert reply.status == 403
        assert "reload the page" in reply.text
    assert (await browser.post(path, {"csrf": ""}, headers={"x-csrf-token": "0" * 64})).status == 403
    assert (await browser.get("/ui")).status == 200, "a refused sign-out must not end the session"


# Headers


@pytest.mark.parametrize(
    ("path", "status"),
    [("/ui", 200), ("/ui/sign-in", 303), ("/ui/nowhere", 404), ("/ui/static/0/app.js", 404), ("/ui/sign-out", 405)],
)
async def test_every_response_has_the_security_headers(local: Browser, path: str, status: int) -> None:
    reply = await local.get(path)
    assert reply.status == status
    assert {name: reply.headers.get(name) for name in HEADERS} == HEADERS
    assert reply.headers["cache-control"] == "no-store"
    assert "unsafe" not in CSP


async def test_responses_to_refused_requests_have_the_security_headers_too(browser: Browser) -> None:
    for reply in (await browser.get("/ui"), await browser.post("/ui/sign-in", {"csrf": "wrong"})):
        assert {name: reply.headers.get(name) for name in HEADERS} == HEADERS


async def test_a_failure_of_a_page_shows_no_detail(local: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object, **__: object) -> str:
        raise RuntimeError("secret detail")

    monkeypatch.setattr("proxy.recording.store_writer.StoreWriter.as_json", failing)
    reply = await local.get("/ui")
    assert reply.status == 500
    assert "secret detail" not in reply.text
    assert "its log has the details" in reply.text
    assert reply.headers["content-security-policy"] == CSP


@pytest.mark.parametrize("path", ["/ui/sign-in", "/ui/data/import"])
async def test_a_client_that_leaves_while_it_sends_a_body_is_no_failure(
    local: Browser, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    await local.get("/ui")
    host = local.url.removeprefix("http://")
    head = [f"POST {path} HTTP/1.1", f"host: {host}", f"cookie: {COOKIE}={local.cookie}", "content-length: 99"]
    head.append(
        f"x-csrf-token: {local.csrf}" if "import" in path else "content-type: application/x-www-form-urlencoded"
    )
    _, writer = await asyncio.open_connection(*host.split(":"))
    writer.write("\r\n".join([*head, "", "key="]).encode())
    await writer.drain()
    for _ in range(3):
        await local.get("/ui/sign-in")  # so that the body is being read
    writer.close()
    await writer.wait_closed()
    for _ in range(500):
        if "POST other" in caplog.text:
            break
        await asyncio.sleep(0.01)
    assert "POST other 499" in caplog.text
    assert "unhandled" not in caplog.text


# Sign-in


async def test_without_keys_this_machine_needs_no_sign_in(local: Browser) -> None:
    reply = await local.get("/ui")
    assert reply.status == 200
    assert "no sign-in" in reply.text
    assert (await local.get("/ui/sign-in")).headers["location"] == "/ui"
    refused = await local.post("/ui/sign-out")
    assert refused.status == 403
    assert "AUTOTTS_KEYS" in refused.text


@pytest.mark.parametrize("header", ["x-forwarded-for", "x-forwarded-port", "forwarded", "via", "x-real-ip"])
async def test_without_keys_nobody_gets_in_through_a_gateway(local: Browser, header: str) -> None:
    reply = await local.get("/ui", headers={header: "203.0.113.7"})
    assert reply.headers["location"] == "/ui/sign-in?next=/ui"
    form = await local.get("/ui/sign-in", headers={header: "203.0.113.7"})
    assert "AUTOTTS_ADMIN_KEY" in form.text


async def test_a_proxy_open_to_other_machines_needs_a_sign_in_even_without_keys(backend: Any) -> None:
    settings = load(upstream=backend.url, host="0.0.0.0", allow_anonymous=True, **SMALL)
    assert not Doorkeeper(settings)._is_on_loopback
    assert Doorkeeper(load(upstream=backend.url, **SMALL))._is_on_loopback


@pytest.mark.parametrize(
    ("key", "name", "is_admin"), [(ALICE, "alice", False), (ROOT, "root", True), (BOSS, "admin", True)]
)
async def test_a_key_signs_in_and_the_page_says_who_it_is(
    browser: Browser, key: str, name: str, is_admin: bool
) -> None:
    assert (await browser.sign_in(key)).status == 303
    page = (await browser.get("/ui")).text
    shown = page.partition('<div class="who">')[2].partition("</div>")[0]
    assert name in shown
    assert ("· admin" in shown) == is_admin
    assert key not in page


async def test_an_unknown_key_is_refused_and_sign_in_goes_on_to_the_page_asked_for(browser: Browser) -> None:
    asked = await browser.get("/ui/overview/panels?range=day")
    assert asked.headers["location"] == "/ui/sign-in?next=/ui/overview/panels%3Frange%3Dday"
    refused = await browser.sign_in("sk-autotts-nobody")
    assert refused.status == 401
    assert "Not signed in" in refused.text
    assert "sk-autotts-nobody" not in refused.text
    taken = await browser.post("/ui/sign-in", {"key": ALICE, "next": "/ui/overview/panels?range=day"})
    assert taken.headers["location"] == "/ui/overview/panels?range=day"


@pytest.mark.parametrize(
    "target", ["https://evil.example", "//evil.example", "/ui/../v1", "/ui\\evil", "/uix", "/v1/models", "javascript:1"]
)
async def test_sign_in_sends_the_browser_to_pages_of_the_dashboard_only(browser: Browser, target: str) -> None:
    await browser.get("/ui/sign-in")
    reply = await browser.post("/ui/sign-in", {"key": ALICE, "next": target})
    allowed = target == "/ui/../v1"  # browsers resolve it on this host
    assert reply.headers["location"] == (target if allowed else "/ui")


async def test_the_cookie_is_invisible_to_scripts_and_to_other_sites(browser: Browser) -> None:
    await browser.get("/ui/sign-in")
    before = browser.cookie
    (sent,) = (await browser.post("/ui/sign-in", {"key": ALICE})).cookies
    assert {"HttpOnly", "SameSite=Strict", "Path=/ui", "Max-Age=43200"} <= set(sent.split("; "))
    assert "Secure" not in sent
    assert browser.cookie != before, "signing in must give a new id"
    assert len(browser.cookie) >= 43


@pytest.mark.parametrize(
    "header",
    [{"x-forwarded-proto": "https"}, {"x-forwarded-proto": "https, http"}, {"origin": "https://{host}"}],
)
async def test_the_cookie_is_secure_where_the_browser_uses_https(browser: Browser, header: dict[str, str]) -> None:
    await browser.get("/ui/sign-in")
    host = browser.url.removeprefix("http://")
    headers = {name: value.format(host=host) for name, value in header.items()}
    (sent,) = (await browser.post("/ui/sign-in", {"key": ALICE}, headers=headers)).cookies
    assert "Secure" in sent.split("; ")


async def test_signing_out_ends_the_session_on_the_server(browser: Browser) -> None:
    await browser.sign_in(ALICE)
    old = browser.cookie
    assert (await browser.post("/ui/sign-out")).status == 303
    assert browser.cookie != old
    reply = await browser.get("/ui", headers={"cookie": f"autotts_ui={old}"})
    assert reply.status == 303


async def test_a_revoked_key_ends_its_sessions_and_no_others(browser: Browser, key_file: Path, keyed_url: str) -> None:
    other = Browser(keyed_url)
    try:
        await browser.sign_in(ALICE)
        await other.sign_in(BOB)
        fresh = key_file.with_suffix(".new")
        fresh.write_text(api_keys.key_file_entry("bob", BOB) + "\n")
        os.replace(fresh, key_file)
        assert (await browser.get("/ui")).status == 303
        assert (await other.get("/ui")).status == 200
    finally:
        await other.close()


async def test_failed_attempts_to_sign_in_are_limited(browser: Browser) -> None:
    for _ in range(FAILURES):
        assert (await browser.sign_in("wrong")).status == 401
    reply = await browser.sign_in(ALICE)
    assert reply.status == 429
    assert 0 < int(reply.headers["retry-after"]) <= WINDOW_S + 1
    assert "wait" in reply.text


@pytest.mark.parametrize(
    ("hosts", "is_shared"),
    [
        (("2001:db8::1", "2001:db8::ffff:2"), True),
        (("2001:db8::1", "2001:db8:0:1::1"), False),
        (("::ffff:192.0.2.1", "::ffff:192.0.2.2"), False),
        (("192.0.2.1", "192.0.2.2"), False),
    ],
)
def test_failed_attempts_count_for_a_network_of_ipv6(
    key_file: Path, hosts: tuple[str, str], *, is_shared: bool
) -> None:
    settings = load(upstream="http://127.0.0.1:1", keys=key_file)
    doorkeeper, authenticator = Doorkeeper(settings), Authenticator(settings)

    def attempt(host: str) -> None:
        request = Request({"type": "http", "method": "POST", "headers": [], "client": (host, 1)})
        doorkeeper.sign_in(request, authenticator, "wrong")

    for _ in range(FAILURES):
        with pytest.raises(Unauthorised):
            attempt(hosts[0])
    with pytest.raises(TooMany if is_shared else Unauthorised):
        attempt(hosts[1])


# Other sites


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:1", "http://localhost"])
@pytest.mark.parametrize("method", ["get", "post"])
async def test_requests_of_pages_of_other_origins_are_refused(local: Browser, origin: str, method: str) -> None:
    await local.get("/ui")
    send = local.get if method == "get" else local.post
    reply = await send("/ui" if method == "get" else "/ui/sign-out", headers={"origin": origin})
    assert reply.status == 403
    assert re.search("pages? of", reply.text)


@pytest.mark.parametrize("origin", ["null", "file://", "http://"])
@pytest.mark.parametrize("hosts", [[], [(b"host", b"")]])
def test_a_request_without_a_host_has_no_origin_of_its_own(origin: str, hosts: list[tuple[bytes, bytes]]) -> None:
    headers = [*hosts, (b"origin", origin.encode())]
    with pytest.raises(Forbidden, match="sent this request"):
        check_origin(Request({"type": "http", "method": "POST", "headers": headers}))


@pytest.mark.parametrize("header", [{"host": "rebound.example"}, {"origin": "https://evil.example"}])
async def test_a_refused_page_gets_no_token_and_learns_nothing_of_the_viewer(
    local: Browser, header: dict[str, str]
) -> None:
    await local.get("/ui")
    reply = await local.get("/ui", headers=header)
    assert reply.status == 403
    assert '<meta name="csrf" content="">' in reply.text
    assert "no sign-in" not in reply.text
    assert 'href="/ui/requests"' not in reply.text


async def test_a_form_of_another_site_without_an_origin_is_refused(local: Browser) -> None:
    await local.get("/ui")
    reply = await local.post("/ui/sign-out", headers={"sec-fetch-site": "cross-site"})
    assert reply.status == 403
    assert "cross-site" in reply.text


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
async def test_links_from_other_sites_open_pages_but_their_pages_cannot_load_anything(
    local: Browser, site: str
) -> None:
    for mode, status in (("navigate", 200), ("no-cors", 403), ("cors", 403)):
        reply = await local.get("/ui", headers={"sec-fetch-site": site, "sec-fetch-mode": mode})
        assert reply.status == status, mode
    own = {"sec-fetch-site": "same-origin", "sec-fetch-mode": "cors"}
    assert (await local.get("/ui/overview/panels", headers=own)).status == 200


async def test_an_unknown_host_name_is_refused_where_there_are_no_keys(local: Browser) -> None:
    reply = await local.get("/ui", headers={"host": "rebound.example"})
    assert reply.status == 403
    assert "AUTOTTS_ALLOWED_HOSTS" in reply.text


# Parts


def test_a_session_ends_after_its_lifetime() -> None:
    clock = Clock()
    sessions = Sessions(60, clock)
    session_id = sessions.open("hash")
    clock.now += 59.9
    assert sessions.find(session_id) is not None
    clock.now += 0.1
    assert sessions.find(session_id) is None
    assert len(sessions) == 0


def test_the_number_of_sessions_is_bounded_in_all_and_for_each_key() -> None:
    sessions = Sessions(60, Clock())
    first = sessions.open("mine")
    ids = [sessions.open("mine") for _ in range(MOST_PER_KEY)]
    assert sessions.find(first) is None
    assert all(sessions.find(each) for each in ids)
    for index in range(MOST_SESSIONS + 5):
        sessions.open(f"key {index}")
    assert len(sessions) == MOST_SESSIONS
    assert sessions.find(ids[0]) is None


def test_failures_are_limited_by_address_and_in_all_and_forgotten_after_a_minute() -> None:
    clock = Clock()
    limiter = SignInLimiter(clock)
    for _ in range(FAILURES):
        assert limiter.retry_after("a") == 0
        limiter.count_failure("a")
    assert limiter.retry_after("a") == WINDOW_S
    assert limiter.retry_after("b") == 0
    for index in range(ALL_FAILURES):
        limiter.count_failure(f"address {index}")
    assert limiter.retry_after("b") == WINDOW_S
    clock.now += WINDOW_S
    assert limiter.retry_after("a") == limiter.retry_after("b") == 0
    for index in range(MOST_ADDRESSES + 9):
        limiter.count_failure(f"more {index}")
    assert len(limiter._failures) == MOST_ADDRESSES


def test_a_csrf_token_is_valid_for_its_cookie_and_its_proxy_only() -> None:
    tokens = CsrfTokens()
    assert tokens.is_valid(tokens.of("cookie"), "cookie")
    assert not tokens.is_valid(tokens.of("cookie"), "other")
    assert not tokens.is_valid(tokens.of(""), "")
    assert not tokens.is_valid(CsrfTokens().of("cookie"), "cookie")
