"""Use an installation as a person would: its commands, the server, the dashboard and the sandbox."""

from __future__ import annotations

import json
import re
from typing import Any, Final
from urllib.parse import urljoin

import aiohttp

from deploy.embedded.task import held_back
from tests.fakes import MODEL, FakeVLLM, chain
from tests.packaging.installation import Installation
from tests.proxy.conftest import INTERVAL

HEAVY: Final = ("torch", "vllm", "ray", "numba", "matplotlib", "tkinter", "optuna", "sympy", "transformers")
"""Modules that importing the server must not import."""
LINK: Final = re.compile(r'(?:href|src)="([^"#]+)"')
ASSET: Final = re.compile(r"\.(css|js|svg)(\?|$)")


def check_origin(installed: Installation) -> float:
    """Assert that all packages come from the environment; return the processor seconds to import the server."""
    imported = installed.imports()
    for origin in imported["origins"]:
        assert origin.startswith(str(installed.site)), origin
    assert [name for name in HEAVY if name in imported["modules"]] == []
    return float(imported["seconds"])


def check_commands(installed: Installation, version: str) -> None:
    """Assert that the version, the sandbox's self-test and an evaluation of a file, which is sandboxed, work."""
    assert installed.run("--version") == f"autotts {version}\n"
    assert json.loads(installed.run("doctor", "--json"))["sealed"]
    champion = installed.site / "deploy" / "embedded" / "champion"
    scores = installed.folder / "scores.json"
    installed.run(
        *("evaluate", "--recordings", str(champion / "recordings.jsonl.xz"), "--betas", "0.5", "--shuffles", "1"),
        *("--controllers", f"cmc,{champion / 'champion.py'}", "--max-branches", "16", "--json", str(scores)),
    )
    assert {'"cmc"', '"champion"'} <= set(re.findall(r'"\w+"', scores.read_text()))


async def check_upstream(installed: Installation) -> None:
    """Assert that `autotts serve --upstream` works, with the dashboard's assets."""
    chains = [chain("7", 100 + 7 * number, ["7"], mark=chr(97 + number % 26)) for number in range(64)]
    async with (
        FakeVLLM(chains, INTERVAL).serve() as backend,
        installed.serving("--upstream", backend.url, "--interval", str(INTERVAL)) as url,
    ):
        reply = await check_server(url)
    assert reply["tts"]["answer"] == "7"


async def check_server(url: str, model: str = MODEL, question: str = "What is 1 + 1?") -> dict[str, Any]:
    """Assert that a request is served by a controller, and that the dashboard finds its assets; return the reply."""
    async with aiohttp.ClientSession() as http:
        body = {"model": model, "messages": [{"role": "user", "content": question}], "tts": {"beta": 0.25}}
        async with http.post(f"{url}/v1/chat/completions", json=body) as response:
            reply: dict[str, Any] = await response.json()
            assert (response.status, response.headers.get("x-tts-applied")) == (200, "true"), reply
        assets = set()
        for page in ("/ui", "/ui/frontier", "/ui/playground", "/docs"):
            async with http.get(url + page) as response:
                assert response.status == 200, (page, response.status)
                assets |= {urljoin(url + page, link) for link in LINK.findall(await response.text())}
        assets = {asset for asset in assets if ASSET.search(asset)}
        assert any("echarts" in asset for asset in assets), assets
        assert all(asset.startswith(url) for asset in assets), assets  # nothing comes from elsewhere
        for asset in assets:
            async with http.get(asset) as response:
                assert response.status == 200, (asset, response.status)
                assert await response.read(), asset
        return reply


async def check_embedded(installed: Installation) -> dict[str, Any]:
    """Assert that `autotts serve` without an upstream serves the embedded model; return its reply."""
    async with installed.serving() as url:
        return await check_server(url, "autotts-tiny", held_back(1)[0].question)
