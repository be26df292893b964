"""Stock clients of agents: pydantic-ai, openai-agents and instructor, with β by header, alias and default.

The last two need other versions of packages than the project. They run in an environment of their own, as a process.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
from openai import AsyncOpenAI, DefaultAsyncHttpxClient
from pydantic import BaseModel

from proxy.server import running
from proxy.settings import load
from tests.bench.peers import AGENT_CLIENTS
from tests.chat_fake import SEED
from tests.fakes import MODEL
from tests.proxy.api.agent_fake import RESULT, AgentVLLM

SCRIPT: Final = Path(__file__).parent / "agent_script.py"
FOUR: Final = "self_consistency@4"
SETTINGS: Final[Mapping[str, Any]] = {
    "interval": 10,
    "beta": 0.25,
    "tools_controller": FOUR,
    "json_controller": FOUR,
    "reply_controller": FOUR,
}
SOURCES: Final[Mapping[str, tuple[str, str, dict[str, str]]]] = {
    "header": ("0.5", MODEL, {"x-tts-beta": "0.5"}),
    "model_alias": ("0.75", f"{MODEL}@0.75", {}),
    "default": ("0.25", MODEL, {}),
}
"""β, the model and the headers of a request, by the source of β."""
ROME: Final = {"name": "Rome", "people": 2}
ANSWER: Final = "It is \\boxed{7} degrees."


class City(BaseModel):
    """A city."""

    name: str
    people: int


@asynccontextmanager
async def agent_proxy() -> AsyncIterator[str]:
    """Run a proxy with a default β, and yield the base URL for clients."""
    async with AgentVLLM().serve() as backend, running(load(upstream=backend.url, **SETTINGS)) as url:
        yield f"{url}/v1"


@pytest.mark.slow  # importing the client takes seconds
@pytest.mark.parametrize("source", SOURCES)
async def test_pydantic_ai_runs_an_agent_with_a_tool_and_reads_structured_output(source: str) -> None:
    from pydantic_ai import Agent, NativeOutput
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider
    from pydantic_ai.settings import ModelSettings

    beta, name, headers = SOURCES[source]
    seen: list[tuple[str, str, str]] = []
    asked: list[str] = []

    async def see(response: Any) -> None:
        seen.append(tuple(response.headers[f"x-tts-{field}"] for field in ("applied", "beta", "beta-source")))

    def weather(city: str, unit: str = "C") -> str:
        """Return the weather of a city."""
        asked.append(f"{city} {unit}")
        return RESULT

    http = DefaultAsyncHttpxClient(event_hooks={"response": [see]})
    async with (
        agent_proxy() as url,
        AsyncOpenAI(base_url=url, api_key="unused", max_retries=0, http_client=http) as client,
    ):
        settings = ModelSettings(extra_body={"seed": SEED}, extra_headers=headers)
        for made in (OpenAIChatModel, OpenAIResponsesModel):
            model: Any = made(name, provider=OpenAIProvider(openai_client=client))
            asked.clear()
            forecaster = Agent(model, tools=[weather], model_settings=settings)
            result = await forecaster.run("What is the weather in Rome?")
            assert (result.output, asked) == (ANSWER, ["Rome C"])
            assert result.usage.requests == 2
            async with forecaster.run_stream("What is the weather in Rome?") as stream:
                assert await stream.get_output() == ANSWER
            assert asked == ["Rome C", "Rome C"]

            for output in (City, NativeOutput(City)):  # as a call of a tool, and as a response format
                reader: Any = Agent(model, output_type=output, model_settings=settings)
                read = await reader.run("Which city?")
                assert read.output == City(**ROME)
    assert seen == [("true", beta, source)] * 12


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.skipif(
    not AGENT_CLIENTS.python.exists(), reason="openai-agents and instructor are not here; `make test` installs them"
)
@pytest.mark.parametrize("client", ["agents", "instructor"])
async def test_clients_with_requirements_of_their_own_run_unmodified(client: str, tmp_path: Path) -> None:
    requests = [{"model": name, "headers": headers} for _, name, headers in SOURCES.values()]
    async with agent_proxy() as url:
        process = await asyncio.create_subprocess_exec(
            str(AGENT_CLIENTS.python),
            *("-W", "error", str(SCRIPT), client, url, json.dumps(requests)),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**AGENT_CLIENTS.environment(), "HOME": str(tmp_path)},
        )
        output, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    lines = [json.loads(line) for line in output.splitlines()]
    outputs: dict[str, dict[str, Any]] = {
        "agents": {
            f"{endpoint}: {kind}": output
            for endpoint in ("chat", "responses")
            for kind, output in (("loop", ANSWER), ("streamed loop", ANSWER), ("output type", ROME))
        },
        "instructor": {"TOOLS": ROME, "JSON_SCHEMA": ROME, "JSON": ROME, "partial": ROME},
    }
    expected = [
        (kind, output, beta, source)
        for source, (beta, _, _) in SOURCES.items()
        for kind, output in outputs[client].items()
    ]
    assert [(line["kind"], line["output"]) for line in lines] == [(kind, output) for kind, output, _, _ in expected]
    for line, (kind, _, beta, source) in zip(lines, expected, strict=True):
        is_loop = kind.endswith("loop")
        assert line.get("asked") == (["Rome C"] if is_loop else None)
        assert [
            (seen["x-tts-applied"], seen["x-tts-beta"], seen["x-tts-beta-source"], seen["x-tts-controller"])
            for seen in line["headers"]
        ] == [("true", beta, source, FOUR)] * (2 if is_loop else 1)
