"""Fixtures: Chromium, pages that report what went wrong in them, and proxies with some recorded requests."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import aiohttp
import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, async_playwright

from proxy.admission import api_keys
from proxy.server import running
from proxy.settings import load
from tests.fakes import FakeVLLM, chain
from tests.proxy.conftest import INTERVAL, SMALL
from tests.readability import ROOT

CHROMIUM: Final = shutil.which("chromium") or shutil.which("chromium-browser")
SCREENSHOTS: Final = ROOT / "build" / "screenshots"
AXE: Final = (Path(__file__).parent / "vendor" / "axe.min.js").read_text()
ALICE, BOB, ROOT_KEY = "sk-autotts-alice", "sk-autotts-bob", "sk-autotts-root"
HOSTILE: Final = "What is 3 + 4? </script><script>document.title='owned'</script><img src=x onerror=alert(1)>"
SERIOUS: Final = ("serious", "critical")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)
            item.add_marker(pytest.mark.process)
            if CHROMIUM is None:
                reason = "chromium is not here; `make test` installs it as root where there is apt"
                item.add_marker(pytest.mark.skip(reason=reason))


class Visit:
    """A page in the browser, and the problems that it had."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.url = url
        self.problems: list[str] = []
        page.on("console", self._note_console)
        page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        page.on("dialog", self._note_dialog)
        page.on("request", self._note_request)

    async def open(self, path: str) -> int:
        """Open a page and return its status."""
        response = await self.page.goto(self.url + path)
        assert response is not None
        return response.status

    async def shoot(self, name: str) -> None:
        """Write a screenshot of the page."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        await self.page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)

    async def settle(self) -> None:
        """Wait until charts have been drawn again in the size and the colours of now."""
        await self.page.evaluate("() => new Promise((done) => requestAnimationFrame(() => setTimeout(done, 50)))")

    async def barriers(self) -> list[str]:
        """Return what axe finds that keeps people with disabilities from using the page."""
        await self.page.evaluate(AXE)
        found = await self.page.evaluate("async () => (await axe.run({iframes: false})).violations")
        return [
            f"{violation['id']}: {node['target']} {node['failureSummary']}"
            for violation in found
            if violation["impact"] in SERIOUS
            for node in violation["nodes"]
        ]

    async def overflow(self) -> int:
        """Return by how many pixels the page is wider than its window."""
        return int(await self.page.evaluate("document.documentElement.scrollWidth - innerWidth"))

    def _note_console(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.problems.append(f"console: {message.text}")

    async def _note_dialog(self, dialog: Any) -> None:
        self.problems.append(f"dialog: {dialog.message}")
        await dialog.dismiss()

    def _note_request(self, request: Any) -> None:
        if not request.url.startswith((self.url, "data:")):
            self.problems.append(f"request to {request.url}")


class Chromium(NamedTuple):
    """A running browser."""

    browser: Browser

    @asynccontextmanager
    async def visit(self, url: str, width: int = 1280, **options: Any) -> AsyncIterator[Visit]:
        """Open an empty page in a context of its own, and fail if it had problems."""
        context = await self.browser.new_context(viewport={"width": width, "height": 900}, **options)
        try:
            visit = Visit(await context.new_page(), url)
            yield visit
            assert visit.problems == []
        finally:
            await context.close()


@asynccontextmanager
async def open_chromium() -> AsyncIterator[Chromium]:
    """Start a browser."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield Chromium(browser)
        finally:
            await browser.close()


@pytest_asyncio.fixture
async def chromium() -> AsyncIterator[Chromium]:
    async with open_chromium() as browser:
        yield browser


@pytest_asyncio.fixture
async def upstream() -> AsyncIterator[FakeVLLM]:
    """Serve chains that probes see change their minds, and of which a quarter answers otherwise."""
    probes = [["", "7"], ["9", "7"], ["", "9", "7"]]
    chains = [chain("7" if i % 4 else "9", 100 + 47 * (i % 7), probes[i % 3], mark=chr(97 + i % 26)) for i in range(64)]
    async with FakeVLLM(chains, INTERVAL).serve() as fake:
        yield fake


class Served(NamedTuple):
    """A proxy with recorded requests."""

    url: str
    requests: list[str]  # ids, in the order in which they were sent


@pytest_asyncio.fixture
async def served(upstream: FakeVLLM, tmp_path: Path) -> AsyncIterator[Served]:
    """Serve without keys, and record every request with its branches."""
    async with running(_settings(upstream, tmp_path)) as url:
        tts = [(0.5, "parallel_probe"), (0.2, "cmc"), (1, "adaptive_consistency"), (0.75, "parallel_probe")]
        sent = [await _ask(url, {"beta": beta, "controller": name}) for beta, name in tts]
        await until_recorded(url, sent[-1])
        yield Served(url, sent)


@pytest_asyncio.fixture
async def keyed(upstream: FakeVLLM, tmp_path: Path) -> AsyncIterator[Served]:
    """Serve with keys of two clients and an admin. Alice and Bob have sent a request each, in this order."""
    keys = tmp_path / "keys.toml"
    entries = [
        api_keys.key_file_entry("alice", ALICE),
        api_keys.key_file_entry("bob", BOB),
        api_keys.key_file_entry("root", ROOT_KEY, admin=True),
    ]
    keys.write_text("\n".join(entries))
    async with running(_settings(upstream, tmp_path, keys=keys)) as url:
        sent = [await _ask(url, {"beta": 0.5}, key) for key in (ALICE, BOB)]
        await until_recorded(url, sent[-1], ROOT_KEY)
        yield Served(url, sent)


def _settings(upstream: FakeVLLM, folder: Path, **more: Any) -> Any:
    return load(
        upstream=upstream.url,
        store=folder / "s.db",
        store_text="full",
        record_fraction=1.0,
        record_branches=8,
        **{**SMALL, **more},
    )


async def _ask(url: str, tts: dict[str, Any], key: str = "") -> str:
    body = {"model": "fake-model", "messages": [{"role": "user", "content": HOSTILE}], "tts": tts}
    headers = {"authorization": f"Bearer {key}"} if key else {}
    async with (
        aiohttp.ClientSession(headers=headers) as http,
        http.post(f"{url}/v1/chat/completions", json=body) as response,
    ):
        return str((await response.json())["id"])


async def until_recorded(url: str, request_id: str, key: str = "") -> None:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    async with aiohttp.ClientSession(headers=headers) as http:
        for _ in range(500):
            async with http.get(f"{url}/v1/tts/requests/{request_id}") as response:
                if response.status == 200:
                    return
            await asyncio.sleep(0.02)
    raise AssertionError(f"{request_id} was never recorded")
