"""Accuracy over tokens on the embedded model: controllers against optillm and its_hub, on the same problems and vLLM.

Tokens of all are what vLLM's own counter says. optillm's self-consistency takes five samples of its own accord, one
after the other, and groups whole replies by their wording. its_hub doubles its samples until three quarters agree; it
is given a function that reads the answer, which its manual asks for.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import aiohttp
import numpy as np
from openai import AsyncOpenAI

from deploy.embedded.task import Problem, held_back
from discovery.answers import canonical_answer
from discovery.evaluation.paired_statistics import NORMAL_95
from proxy.server import running
from proxy.settings import EMBEDDED, load
from proxy.upstream.embedded import free_port
from tests.bench.its_hub_client import CONCURRENCY
from tests.bench.live import MODEL, embedded_model
from tests.bench.peers import ITS_HUB, OPTILLM, PeerMissing
from tests.bench.real_load import CHAMPION
from tests.bench.rows import Row, Size
from tests.bench.servers import ServerFailed, lists_models, served

BETAS: Final = (0.0, 0.25, 0.5, 0.75, 1.0)
BUDGETS: Final = (8, 16, 32)
"""Most samples of its_hub."""
CLIENT: Final = Path(__file__).with_name("its_hub_client.py")
SEED: Final = 20_261_130
MAX_TOKENS: Final = 500

Ask = Callable[[Sequence[Problem]], Awaitable[list[tuple[str, float]]]]
"""Asks problems; returns the text of each reply and its seconds."""


class RivalPoint(NamedTuple):
    """Accuracy, tokens and latency of one policy."""

    name: str
    accuracy: float  # percent
    half: float  # half the width of its 95 % interval
    tokens: float  # per problem
    seconds: float  # median


async def rows(size: Size) -> list[Row]:
    """Return a row for each rival, beside both controllers for as many tokens. A missing rival's row says why."""
    problems = held_back(size.pick(100, 3), SEED)
    async with embedded_model(size) as upstream:
        ours: dict[str, list[RivalPoint]] = {}
        for label, controller in (
            ("adaptive_consistency", "adaptive_consistency"),
            ("the discovered controller", str(CHAMPION / "champion.py")),
        ):
            ours[label] = [point async for point in _controller(upstream, label, controller, problems, size)]
        rivals: list[RivalPoint | tuple[str, str]] = []
        try:
            await OPTILLM.install()
            port = free_port()
            command = OPTILLM.serve(OPTILLM.folder, port, upstream)
            async with served(port, command, OPTILLM.environment(), OPTILLM.folder, ready=lists_models) as server:
                name = "optillm self_consistency, 5 samples"
                rivals.append(await _measure(upstream, name, _optillm(server.url), problems))
        except (PeerMissing, ServerFailed) as error:
            rivals.append(("optillm", str(error)))
        try:
            await ITS_HUB.install()
            for budget in BUDGETS if not size.is_quick else BUDGETS[:1]:
                name = f"its_hub AdaptiveSelfConsistency, budget {budget}"
                rivals.append(await _measure(upstream, name, _its_hub(upstream, budget), problems))
        except PeerMissing as error:
            rivals.append(("its_hub", str(error)))
    return [
        *(_own_row(point, len(problems)) for points in ours.values() for point in points),
        *(_rival_row(rival, ours) for rival in rivals),
    ]


async def _controller(
    upstream: str, label: str, controller: str, problems: Sequence[Problem], size: Size
) -> AsyncIterator[RivalPoint]:
    settings = load(upstream=upstream, **{**EMBEDDED, "interval": 32, "controller": controller})
    async with running(settings) as url:
        for beta in BETAS if not size.is_quick else BETAS[1:2]:
            yield await _measure(upstream, f"{label}, β = {beta:g}", _proxy(url, beta), problems)


async def _measure(upstream: str, name: str, ask: Ask, problems: Sequence[Problem]) -> RivalPoint:
    """Ask all problems and return accuracy, and tokens by vLLM's counter."""
    before = await generated_tokens(upstream)
    replies = await ask(problems)
    tokens = (await generated_tokens(upstream) - before) / len(problems)
    right = [canonical_answer(text) == problem.answer for (text, _), problem in zip(replies, problems, strict=True)]
    share = statistics.fmean(right)
    half = 100 * NORMAL_95 * math.sqrt(share * (1 - share) / len(right))
    return RivalPoint(name, 100 * share, half, tokens, statistics.median(seconds for _, seconds in replies))


async def generated_tokens(upstream: str) -> float:
    """Return the tokens that vLLM has generated since its start."""
    async with aiohttp.ClientSession() as http, http.get(f"{upstream}/metrics") as response:
        text = await response.text()
    return sum(map(float, re.findall(r"^vllm:generation_tokens_total(?:\{.*\})? (\S+)$", text, re.MULTILINE)))


def _proxy(url: str, beta: float) -> Ask:
    return _chat(url, MODEL, {"x-tts-beta": f"{beta:g}"})


def _optillm(url: str) -> Ask:
    return _chat(url, f"self_consistency-{MODEL}", {}, max_tokens=MAX_TOKENS)


def _chat(url: str, model: str, headers: dict[str, str], max_tokens: int | None = None) -> Ask:
    async def ask_all(problems: Sequence[Problem]) -> list[tuple[str, float]]:
        slots = asyncio.Semaphore(CONCURRENCY)
        limit = {} if max_tokens is None else {"max_tokens": max_tokens}

        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=600) as client:

            async def ask(problem: Problem) -> tuple[str, float]:
                async with slots:
                    began = time.perf_counter()
                    reply = await client.chat.completions.create(
                        model=model,
                        messages=[{"role": "user", "content": problem.question}],
                        extra_headers=headers,
                        extra_body=limit,
                    )
                    return reply.choices[0].message.content or "", time.perf_counter() - began

            return list(await asyncio.gather(*map(ask, problems)))

    return ask_all


def _its_hub(upstream: str, budget: int) -> Ask:
    async def ask_all(problems: Sequence[Problem]) -> list[tuple[str, float]]:
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *(str(ITS_HUB.python), str(CLIENT), upstream, MODEL, str(budget)),
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            env=ITS_HUB.environment(),
        )
        questions = json.dumps([problem.question for problem in problems])
        output, errors = await process.communicate(questions.encode())
        if process.returncode:
            raise PeerMissing(f"its_hub failed: {errors.decode(errors='replace').strip().rpartition(chr(10))[2]}")
        return [(text, seconds) for text, seconds in json.loads(output)]

    return ask_all


def _own_row(point: RivalPoint, problems: int) -> Row:
    measured = f"{point.accuracy:.1f} ± {point.half:.1f} %, {point.tokens:,.0f} tokens, {point.seconds:.2f} s"
    return Row(f"{point.name}: {problems} problems", measured, "", "")


def _rival_row(rival: RivalPoint | tuple[str, str], ours: dict[str, list[RivalPoint]]) -> Row:
    if not isinstance(rival, RivalPoint):
        return Row(rival[0], rival[1], "", "")
    beside = [
        f"{label} for as many tokens: {accuracy_at(points, rival.tokens):.1f} %" for label, points in ours.items()
    ]
    gains = [f"{accuracy_at(points, rival.tokens) - rival.accuracy:+.1f}" for points in ours.values()]
    measured = f"{rival.accuracy:.1f} ± {rival.half:.1f} %, {rival.tokens:,.0f} tokens, {rival.seconds:.2f} s"
    return Row(rival.name, measured, "; ".join(beside), f"{' and '.join(gains)} points")


def accuracy_at(points: Sequence[RivalPoint], tokens: float) -> float:
    """Return the accuracy of a frontier for a number of tokens, linear in their logarithm between its points.

    Beyond its ends it is that of the nearest point.
    """
    ordered = sorted((point.tokens, point.accuracy) for point in points)
    spent = np.log([point[0] for point in ordered])
    return float(np.interp(math.log(tokens), spent, [point[1] for point in ordered]))
