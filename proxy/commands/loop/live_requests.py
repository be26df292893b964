"""Live requests of a loop: ask fresh questions, and compare the answers and costs of two controllers on them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from openai import AsyncOpenAI

from deploy.embedded import SERVED_MODEL_NAME
from deploy.embedded.task import Problem
from discovery.answers import canonical_answer
from discovery.evaluation.paired_statistics import NORMAL_95

CONCURRENCY: Final = 8


class LiveAnswer(NamedTuple):
    """Outcome and cost of one request."""

    right: bool
    tokens: int  # over all branches and probes
    controller: str
    stage: str | None


class LiveEstimate(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float

    def contains(self, value: float) -> bool:
        """Return whether `value` is in the interval."""
        return self.low <= value <= self.high


async def ask_all(
    url: str, problems: Sequence[Problem], beta: float, on_answer: Callable[[], object] = lambda: None
) -> list[LiveAnswer]:
    """Ask every problem at `beta`, a few at the same time; answers are in the order of the problems."""
    slots = asyncio.Semaphore(CONCURRENCY)
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=2) as client:

        async def ask(problem: Problem) -> LiveAnswer:
            async with slots:
                answer = await _ask(client, problem, beta)
            on_answer()
            return answer

        return list(await asyncio.gather(*map(ask, problems)))


async def _ask(client: AsyncOpenAI, problem: Problem, beta: float) -> LiveAnswer:
    reply = await client.chat.completions.create(
        model=SERVED_MODEL_NAME,
        messages=[{"role": "user", "content": problem.question}],
        extra_headers={"x-tts-beta": f"{beta:g}"},
    )
    details: dict[str, Any] = (reply.model_extra or {})["tts"]
    right = canonical_answer(reply.choices[0].message.content or "") == problem.answer
    return LiveAnswer(right, details["tokens"]["total"], details["controller"], details["stage"])


def mean_interval(values: NDArray[np.float64]) -> LiveEstimate:
    """Return the mean of (questions,) values with its normal 95 % interval."""
    mean = float(values.mean())
    half = NORMAL_95 * _standard_error(values)
    return LiveEstimate(mean, mean - half, mean + half)


def predict(episodes: NDArray[np.float64], count: int, figures: int = 1) -> LiveEstimate:
    """Return the interval in which the mean over `count` new questions, asked once each, is predicted to be.

    It is one of `figures` intervals that all hold together with at least 95 % (Bonferroni): of several intervals of
    95 % each, one fails far more often than one time in twenty.

    `episodes` has the value of every replayed episode: (branch orders, questions). Both means vary: the replayed one
    with the recorded questions, the live one with its questions and its branches.
    """
    per_question = episodes.mean(axis=0)
    mean = float(per_question.mean())
    variance = float(per_question.var(ddof=1)) / per_question.size + float(episodes.var(ddof=1)) / count
    half = NormalDist().inv_cdf(1 - 0.025 / figures) * math.sqrt(variance)
    return LiveEstimate(mean, mean - half, mean + half)


def right_of(answers: Sequence[LiveAnswer]) -> NDArray[np.float64]:
    """Return 1 for each right answer and 0 for the others: (requests,)."""
    return np.array([answer.right for answer in answers], np.float64)


def tokens_of(answers: Sequence[LiveAnswer]) -> NDArray[np.float64]:
    """Return the tokens of each answer: (requests,)."""
    return np.array([answer.tokens for answer in answers], np.float64)


def _standard_error(values: NDArray[np.float64]) -> float:
    return float(values.std(ddof=1)) / math.sqrt(values.size) if values.size > 1 else math.inf
