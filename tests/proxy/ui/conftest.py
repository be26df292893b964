"""Fixtures: a browser-like client of a dashboard, with and without keys."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from html import unescape
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import pytest
import pytest_asyncio
from yarl import URL

from proxy.admission import api_keys
from proxy.server import running
from proxy.settings import load
from proxy.ui.protection import COOKIE
from tests.fakes import FakeVLLM
from tests.proxy.conftest import SMALL

ALICE, BOB, ROOT, BOSS = "sk-autotts-alice", "sk-autotts-bob", "sk-autotts-root", "sesame"


class PageReply(NamedTuple):
    """A response of the dashboard."""

    status: int
    headers: Mapping[str, str]
    text: str
    cookies: list[str]  # Set-Cookie headers


class Browser:
    """A client that keeps its cookie and sends the CSRF token of the page it saw last, as a browser does."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.csrf = ""
        self._http = aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True))

    @property
    def cookie(self) -> str:
        """The value of the cookie."""
        cookie = self._http.cookie_jar.filter_cookies(URL(f"{self.url}/ui")).get(COOKIE)
        return cookie.value if cookie else ""

    async def get(self, path: str, **options: Any) -> PageReply:
        return await self._send("GET", path, **options)

    async def post(self, path: str, fields: Mapping[str, str] | None = None, **options: Any) -> PageReply:
        return await self._send("POST", path, data={"csrf": self.csrf, **(fields or {})}, **options)

    async def sign_in(self, key: str) -> PageReply:
        await self.get("/ui/sign-in")
        reply = await self.post("/ui/sign-in", {"key": key})
        if reply.status == 303:
            await self.get("/ui")
        return reply

    async def _send(self, method: str, path: str, **options: Any) -> PageReply:
        async with self._http.request(method, self.url + path, allow_redirects=False, **options) as response:
            text = await response.text()
            if token := re.search(r'<meta name="csrf" content="([^"]*)">', text):
                self.csrf = unescape(token[1])
            return PageReply(response.status, response.headers, text, response.headers.getall("set-cookie", []))

    async def close(self) -> None:
        await self._http.close()


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.toml"
    path.write_text(
        "\n".join(
            [
                api_keys.key_file_entry("alice", ALICE),
                api_keys.key_file_entry("bob", BOB),
                api_keys.key_file_entry("root", ROOT, admin=True),
            ]
        )
    )
    return path


@pytest_asyncio.fixture
async def keyed_url(backend: FakeVLLM, key_file: Path, tmp_path: Path) -> AsyncIterator[str]:
    """Serve a proxy with keys of two clients and of an admin, an admin key, and a store."""
    settings = load(
        upstream=backend.url, keys=key_file, admin_key=BOSS, store=tmp_path / "s.db", record_fraction=0.0, **SMALL
    )
    async with running(settings) as url:
        yield url


@pytest_asyncio.fixture
async def open_url(backend: FakeVLLM, tmp_path: Path) -> AsyncIterator[str]:
    """Serve a proxy without keys, with a store."""
    settings = load(upstream=backend.url, store=tmp_path / "s.db", record_fraction=0.0, store_text="full", **SMALL)
    async with running(settings) as url:
        yield url


@pytest_asyncio.fixture
async def browser(keyed_url: str) -> AsyncIterator[Browser]:
    client = Browser(keyed_url)
    yield client
    await client.close()


@pytest_asyncio.fixture
async def local(open_url: str) -> AsyncIterator[Browser]:
    client = Browser(open_url)
    yield client
    await client.close()


@pytest_asyncio.fixture
async def admin(backend: FakeVLLM, key_file: Path, folder: Path, tmp_path: Path) -> AsyncIterator[Browser]:
    """Yield an admin's client of a dashboard with the runs in `folder`, a fixture of the module."""
    settings = load(
        upstream=backend.url, keys=key_file, admin_key=BOSS, ui_runs=folder, store=tmp_path / "s.db", **SMALL
    )
    async with running(settings) as url:
        browser = Browser(url)
        await browser.sign_in(BOSS)
        yield browser
        await browser.close()
