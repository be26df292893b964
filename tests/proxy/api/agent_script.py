"""Run openai-agents or instructor, unmodified, in an environment of its own. Prints one line of JSON for each request.

    python agent_script.py agents|instructor URL REQUESTS

REQUESTS is a JSON list of objects with `model` and `headers`. It runs as a file: the project is not installed there.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping
from typing import Any

from openai import AsyncOpenAI, DefaultAsyncHttpxClient
from pydantic import BaseModel

SEED = {"seed": 7}
SEEN: list[Mapping[str, str]] = []
"""Headers of the proxy's responses since the last line."""


class City(BaseModel):
    """A city."""

    name: str
    people: int


async def see(response: Any) -> None:
    """Keep the proxy's headers of a response."""
    SEEN.append({name: value for name, value in response.headers.items() if name.startswith("x-tts-")})


def report(**fields: Any) -> None:
    """Print a line with the headers of the responses to these requests."""
    sys.stdout.write(json.dumps({**fields, "headers": list(SEEN)}) + "\n")
    SEEN.clear()


async def run_agents(client: AsyncOpenAI, model: str, headers: Mapping[str, str]) -> None:
    """Run an agent with a tool to its end, also as a stream, and one with an output type, on both endpoints."""
    from agents import (
        Agent,
        ModelSettings,
        OpenAIChatCompletionsModel,
        OpenAIResponsesModel,
        Runner,
        function_tool,
        set_tracing_disabled,
    )

    set_tracing_disabled(True)
    asked: list[str] = []

    def weather(city: str, unit: str = "C") -> str:
        """Return the weather of a city."""
        asked.append(f"{city} {unit}")
        return "21 degrees"

    settings = ModelSettings(extra_body=SEED, extra_headers=dict(headers))
    for endpoint, made in (("chat", OpenAIChatCompletionsModel), ("responses", OpenAIResponsesModel)):
        common: dict[str, Any] = {
            "instructions": "Be brief.",
            "model": made(model=model, openai_client=client),
            "model_settings": settings,
        }
        agent = Agent(name="forecaster", tools=[function_tool(weather)], **common)
        asked.clear()
        ended = await Runner.run(agent, "What is the weather in Rome?")
        report(kind=f"{endpoint}: loop", output=ended.final_output, asked=asked)
        asked.clear()
        streamed = Runner.run_streamed(agent, "What is the weather in Rome?")
        async for _ in streamed.stream_events():
            pass
        report(kind=f"{endpoint}: streamed loop", output=streamed.final_output, asked=asked)
        reader = Agent(name="reader", output_type=City, **common)
        read = await Runner.run(reader, "Which city?")
        report(kind=f"{endpoint}: output type", output=read.final_output.model_dump())


async def run_instructor(client: AsyncOpenAI, model: str, headers: Mapping[str, str]) -> None:
    """Read an object in each way in which instructor asks for one, and one as a stream of partial objects."""
    import instructor

    common: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": "Which city?"}],
        "extra_headers": dict(headers),
        "extra_body": SEED,
    }
    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA, instructor.Mode.JSON):
        reader = instructor.from_openai(client, mode=mode)
        read = await reader.chat.completions.create(response_model=City, max_retries=0, **common)
        report(kind=mode.name, output=read.model_dump())
    reader = instructor.from_openai(client, mode=instructor.Mode.TOOLS)
    stream = reader.chat.completions.create_partial(response_model=City, max_retries=0, **common)
    partials = [partial async for partial in stream]
    report(kind="partial", output=partials[-1].model_dump())


async def main(name: str, url: str, requests: str) -> None:
    """Run one client with each of the requests."""
    run = {"agents": run_agents, "instructor": run_instructor}[name]
    for request in json.loads(requests):
        http = DefaultAsyncHttpxClient(event_hooks={"response": [see]})
        async with AsyncOpenAI(base_url=url, api_key="unused", max_retries=0, http_client=http) as client:
            await run(client, request["model"], request["headers"])


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
