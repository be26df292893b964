"""LiteLLM's gateway in front of the proxy over a real vLLM: β and the token bill pass through it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
import yaml

from deploy.embedded.task import held_back
from proxy.server import running
from proxy.settings import EMBEDDED, load
from proxy.upstream.embedded import free_port
from tests.bench.peers import PEERS

LITELLM = next(peer for peer in PEERS if peer.name == "LiteLLM")
COMMAND = LITELLM.folder / "bin" / "litellm"
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(not COMMAND.exists(), reason="LiteLLM's gateway is not here; `make test` installs it"),
]

MODEL = "autotts-tiny"
QUESTION = held_back(1, lengths=(4, 4))[0].question
MESSAGES = [{"role": "user", "content": QUESTION}]
BETA: dict[str, Any] = {"beta": 0.25}
START_S = 240.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(vllm: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    """Yield the gateway's URL. Its models are the proxy's, one of them an alias with β."""
    folder = tmp_path_factory.mktemp("gateway")
    async with running(load(upstream=vllm, **EMBEDDED)) as proxy:
        common = {"api_base": f"{proxy}/v1", "api_key": "unused"}
        config = yaml.safe_load(documented().replace("http://127.0.0.1:8400", proxy))
        config["model_list"] += [
            {"model_name": name, "litellm_params": {"model": model, **common}}
            for name, model in {"quarter": f"hosted_vllm/{MODEL}@0.25", "openai": f"openai/{MODEL}"}.items()
        ]
        file = folder / "config.yaml"
        file.write_text(yaml.safe_dump(config))
        port = free_port()
        flags = ["--config", str(file), "--host", "127.0.0.1", "--port", str(port), "--telemetry", "False"]
        with (folder / "log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                str(COMMAND),
                *flags,
                stdout=log,
                stderr=log,
                env=LITELLM.environment() | {"HOME": str(folder), "TTS_KEY": "unused"},
            )
        try:
            await started(process, f"http://127.0.0.1:{port}", folder / "log")
            yield f"http://127.0.0.1:{port}"
        finally:
            with suppress(ProcessLookupError):
                process.terminate()
            await process.wait()


def documented() -> str:
    """Return the configuration of the gateway in docs/operations.md."""
    text = (Path(__file__).parents[3] / "docs" / "operations.md").read_text("utf-8")
    return text.partition("## Behind LiteLLM's gateway")[2].partition("```text\n")[2].partition("```")[0]


async def started(process: asyncio.subprocess.Process, url: str, log: Path) -> None:
    """Wait until the gateway answers."""
    async with asyncio.timeout(START_S), aiohttp.ClientSession() as http:
        while True:
            assert process.returncode is None, f"the gateway does not start: see {log}"
            with suppress(aiohttp.ClientError):
                async with http.get(f"{url}/health/liveliness") as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(0.2)


async def ask(gateway: str, path: str, body: dict[str, Any], **headers: str) -> tuple[Any, Any]:
    """Return the headers and JSON of a reply, or of a stream its last object, which has the usage."""
    async with aiohttp.ClientSession() as http, http.post(f"{gateway}/v1/{path}", json=body, headers=headers) as answer:
        text = await answer.text()
        assert answer.status == 200, text
        if not body.get("stream"):
            return answer.headers, json.loads(text)
        events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: {")]
        assert "boxed" in text
        return answer.headers, json.loads(events[-1])


@pytest.mark.parametrize(
    ("source", "fields", "headers"),
    [
        ("model_alias", {"model": "quarter"}, {}),
        ("body", {"tts": BETA}, {}),
        ("reasoning_effort", {"reasoning_effort": "low"}, {}),
        ("header", {}, {"x-tts-beta": "0.25"}),
        ("body", {"model": "openai", "tts": BETA}, {}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_beta_from_any_source_passes_through_the_gateway(
    gateway: str, source: str, fields: dict[str, Any], headers: dict[str, str], stream: bool
) -> None:
    body: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, **fields}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    answered, reply = await ask(gateway, "chat/completions", body, **headers)
    headers_seen = {name: answered[f"llm_provider-x-tts-{name}"] for name in ("applied", "beta", "beta-source")}
    assert headers_seen == {"applied": "true", "beta": "0.25", "beta-source": source}
    if stream:  # the gateway drops the `tts` of a stream
        assert reply["usage"]["completion_tokens"] > 100
        return
    assert "\\boxed{" in reply["choices"][0]["message"]["content"]
    assert int(answered["llm_provider-x-tts-tokens"]) >= reply["usage"]["completion_tokens"] > 0
    assert int(answered["llm_provider-x-tts-branches"]) > 1


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("responses", {"model": "quarter", "input": QUESTION}),
        ("responses", {"model": "tiny", "input": QUESTION, "reasoning": {"effort": "low"}}),
    ],
)
async def test_beta_passes_through_the_gateway_on_the_responses_endpoint(
    gateway: str, path: str, fields: dict[str, Any]
) -> None:
    answered, reply = await ask(gateway, path, fields)
    assert (answered["llm_provider-x-tts-applied"], answered["llm_provider-x-tts-beta"]) == ("true", "0.25")
    assert reply["usage"]["output_tokens"] > 0


async def test_the_gateway_forwards_the_reason_why_beta_was_not_applied(gateway: str) -> None:
    body = {"model": "tiny", "messages": MESSAGES, "tts": BETA, "n": 2}
    answered, _ = await ask(gateway, "chat/completions", {**body, "max_tokens": 20})
    assert (answered["llm_provider-x-tts-applied"], answered["llm_provider-x-tts-reason"]) == ("false", "n")
