"""Ask the real model through the proxy, and read the token counters of vLLM and of the proxy."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, NamedTuple

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from discovery.answers import canonical_answer
from proxy.server import running
from proxy.settings import load
from tests.real_model.model import DTYPE, NAME, server

INTERVAL: Final = 16
CONCURRENCY: Final = 12
"""Concurrent requests."""
EXAMPLES: Final = 6
SETTLED_S: Final = 30.0
"""Seconds within which vLLM must have ended aborted requests."""

Message = Mapping[str, str]


class Sum(NamedTuple):
    """One addition."""

    left: int
    right: int

    @property
    def question(self) -> str:
        """The question, worded as a user would ask it."""
        return f"What is {self.left} + {self.right}?"

    @property
    def answer(self) -> int:
        """The sum."""
        return self.left + self.right

    @property
    def worked(self) -> str:
        """The reply of a worked example."""
        return f"{self.left} + {self.right} = {self.answer}. The answer is \\boxed{{{self.answer}}}."


def draw_sums(count: int) -> tuple[list[Message], list[Sum]]:
    """Return six worked examples as chat turns, and `count` other sums; the same ones every time."""
    generator = random.Random(7)
    every = [Sum(left, right) for left in range(11, 60) for right in range(5, 21)]
    drawn = generator.sample(every, EXAMPLES + count)
    turns: list[Message] = [
        {"role": role, "content": content}
        for example in drawn[:EXAMPLES]
        for role, content in (("user", example.question), ("assistant", example.worked))
    ]
    return turns, drawn[EXAMPLES:]


class Reply(NamedTuple):
    """The text and the cost of one reply."""

    text: str
    generated: int  # completion tokens billed, over all branches and probes
    total: int  # tokens billed, with the suffixes that probes append
    branches: int
    stop: str  # empty without β
    agreement: float | None = None  # share of the votes for it; None without β, or if nothing voted

    @property
    def number(self) -> str | None:
        """The answer that the text states, in its canonical form; None if there is none."""
        return canonical_answer(self.text)


class RealModel:
    """Client of the proxy in front of the served model."""

    def __init__(self, url: str, vllm: str, http: aiohttp.ClientSession) -> None:
        self.url = url
        self.vllm = vllm
        self.http = http

    async def ask(self, messages: Sequence[Message], beta: float | None, **fields: Any) -> Reply:
        """Send one chat request; `beta` None leaves the request to vLLM alone."""
        headers = {} if beta is None else {"x-tts-beta": f"{beta:g}"}
        body = {"model": NAME, "messages": list(messages), **fields}
        async with self.http.post(f"{self.url}/v1/chat/completions", json=body, headers=headers) as response:
            reply = await response.json()
        if response.status != 200:
            raise RuntimeError(f"status {response.status}: {reply}")
        text, generated, tts = reply["choices"][0]["message"]["content"], reply["usage"]["completion_tokens"], {}
        if beta is not None:
            tts = reply["tts"]
        total = tts["tokens"]["total"] if tts else generated
        return Reply(text or "", generated, total, tts.get("branches", 1), tts.get("stop", ""), tts.get("agreement"))

    async def ask_all(
        self, conversations: Sequence[Sequence[Message]], beta: float | None, **fields: Any
    ) -> list[Reply]:
        """Send one request for each conversation, a few at a time; return the replies in order."""
        gate = asyncio.Semaphore(CONCURRENCY)

        async def ask(messages: Sequence[Message]) -> Reply:
            async with gate:
                return await self.ask(messages, beta, **fields)

        return list(await asyncio.gather(*map(ask, conversations)))

    async def generated(self) -> int:
        """Return the tokens vLLM has generated so far, once it is idle."""
        async with asyncio.timeout(SETTLED_S):
            while await self._metric(self.vllm, "vllm:num_requests_running", "vllm:num_requests_waiting"):
                pass
        return await self._metric(self.vllm, "vllm:generation_tokens_total")

    async def unseen(self) -> int:
        """Return the most tokens that requests the proxy cut can have generated without being billed, so far."""
        return await self._metric(self.url, "autotts_unseen_tokens_total")

    async def _metric(self, server: str, *names: str) -> int:
        async with self.http.get(f"{server}/metrics") as response:
            families = text_string_to_metric_families(await response.text())
        return int(sum(sample.value for family in families for sample in family.samples if sample.name in names))


@asynccontextmanager
async def serving(dtype: str = DTYPE) -> AsyncIterator[RealModel]:
    """Serve the model and a proxy in front of it."""
    timeout = aiohttp.ClientTimeout(total=600)
    async with (
        server(dtype) as vllm,
        running(load(upstream=vllm.url, interval=INTERVAL)) as url,
        aiohttp.ClientSession(timeout=timeout) as http,
    ):
        yield RealModel(url, vllm.url, http)
