"""The manual's TypeScript runs unmodified with OpenAI's npm package, and is right to its types."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Final

import pytest
from aiohttp import web

from proxy.server import running
from proxy.settings import EMBEDDED, load
from proxy.upstream.embedded import free_port
from tests.docs.blocks import fenced_blocks
from tests.proxy.api.node_client import OPENAI_NODE

ROOT: Final = Path(__file__).parents[3]
PAGES: Final = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPETS: Final = [block for page in PAGES for block in fenced_blocks(page, ROOT) if block.language == "ts"]
CHECKED: Final = (
    *("--noEmit", "--strict", "--noUncheckedIndexedAccess", "--exactOptionalPropertyTypes", "--skipLibCheck"),
    *("--module", "nodenext", "--target", "esnext", "--lib", "esnext,dom"),
)
"""Options of the compiler: those that `tsc --init` sets, and the browser's types for `console`."""
PRINTED: Final = re.compile(
    r"applied: true (?P<reply>.*)\nvotes: (?P<votes>\{.*\})\nβ of this request: 0.25\nwithout β, applied: false\n"
    r"stop: (?:answered|deadline)\nstreamed: (?P<streamed>.*) (?P<tokens>\d+) tokens, stop: answered\n",
    re.DOTALL,
)
CALLS: Final = """
import OpenAI from "openai";

const client = new OpenAI({
  baseURL: "http://127.0.0.1:8400/v1",
  apiKey: "unused",
  defaultHeaders: { "x-tts-beta": "0.5" },
  maxRetries: Number(process.argv[2]),
});
const body = { model: "m", messages: [], tts: { beta: 0.25 } };
for (const beta of ["0", null, undefined]) {
  const sent = client.chat.completions.create(body, { headers: { "x-tts-beta": beta }, timeout: 1000 });
  await sent.catch((error) => console.log(error.constructor.name));
}
"""
needs_node = pytest.mark.skipif(
    OPENAI_NODE.is_missing, reason="OpenAI's npm package is not here; `make test` installs it"
)


async def run(folder: Path, *arguments: str) -> str:
    """Run Node.js in a folder, in which it finds the packages, and return what it prints."""
    (folder / "node_modules").symlink_to(OPENAI_NODE.modules)
    process = await asyncio.create_subprocess_exec(
        *(str(OPENAI_NODE.node), *arguments),
        cwd=folder,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**OPENAI_NODE.environment(), "HOME": str(folder)},
    )
    try:
        async with asyncio.timeout(240):
            output, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert (process.returncode, errors.decode()) == (0, ""), output.decode()
    return output.decode()


def test_the_manual_has_one_typescript_snippet_which_these_tests_run() -> None:
    assert [block.page for block in SNIPPETS] == ["docs/clients.md"]


@needs_node
@pytest.mark.vllm
@pytest.mark.parametrize("suffix", ["mts", "mjs"])
async def test_the_snippet_prints_controlled_forwarded_and_streamed_replies(
    vllm: str, tmp_path: Path, suffix: str
) -> None:
    async with running(load(upstream=vllm, **EMBEDDED)) as url:
        file = tmp_path / f"snippet.{suffix}"
        file.write_text(SNIPPETS[0].code.replace("http://127.0.0.1:8400", url))
        output = await run(tmp_path, file.name)
    printed = PRINTED.fullmatch(output)
    assert printed, output
    assert "\\boxed{" in printed["reply"]
    assert "\\boxed{" in printed["streamed"]
    assert sum(json.loads(printed["votes"]).values()) > 1
    assert int(printed["tokens"]) > 100


@needs_node
@pytest.mark.process
async def test_the_snippet_agrees_with_the_types_of_the_package(tmp_path: Path) -> None:
    """An `@ts-expect-error` above a line that has no error is an error, too."""
    (tmp_path / "snippet.mts").write_text(SNIPPETS[0].code)
    assert await run(tmp_path, str(OPENAI_NODE.compiler), *CHECKED, "snippet.mts") == ""


@needs_node
@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("retries", [0, 1])
async def test_calls_have_the_headers_the_body_the_timeout_and_the_retries_that_the_manual_says(
    retries: int, tmp_path: Path
) -> None:
    received: list[tuple[str | None, object]] = []

    async def hang(request: web.Request) -> web.Response:
        received.append((request.headers.get("x-tts-beta"), (await request.json())["tts"]))
        await asyncio.Event().wait()
        raise AssertionError

    app = web.Application()
    app.router.add_post("/v1/chat/completions", hang)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    try:
        port = free_port()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        (tmp_path / "calls.mjs").write_text(CALLS.replace(":8400", f":{port}"))
        output = await run(tmp_path, "calls.mjs", str(retries))
    finally:
        await runner.cleanup()
    assert output.split() == ["APIConnectionTimeoutError"] * 3
    attempts = [beta for beta in ("0", None, "0.5") for _ in range(retries + 1)]
    assert received == [(beta, {"beta": 0.25}) for beta in attempts]
