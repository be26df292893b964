"""Batch of several prompts in one text completion: one episode per prompt, and one reply with one bill."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from proxy.episode.tts_object import reply_headers
from proxy.errors import ApiError
from proxy.http import graceful_shutdown
from proxy.types import Plan, Reply

T = TypeVar("T")

BEGUN_TOGETHER: Final = 16
"""Maximum number of prompts that begin in one turn of the event loop. Each may block the loop for milliseconds."""


@dataclass(frozen=True, slots=True)
class Batch:
    """The outcome of a request with several prompts. The sums are over all of them."""

    request_id: str
    replies: Sequence[Reply]  # in the order of the prompts

    @property
    def plan(self) -> Plan:
        """The first prompt's plan, for the fields that all plans share."""
        return self.replies[0].plan

    @property
    def finish_reasons(self) -> list[str]:
        """Finish reason of each prompt's text."""
        return [reply.message.finish_reason for reply in self.replies]

    @property
    def usage(self) -> Mapping[str, Any]:
        """OpenAI's `usage` object, summed over all prompts."""
        usages = [reply.usage for reply in self.replies]
        details = [usage["prompt_tokens_details"] for usage in usages if usage["prompt_tokens_details"]]
        cached = sum(detail["cached_tokens"] for detail in details) if details else None
        thinking = sum(usage["completion_tokens_details"]["reasoning_tokens"] for usage in usages)
        return {
            **{name: sum(usage[name] for usage in usages) for name in _COUNTS},
            "completion_tokens_details": {"reasoning_tokens": thinking},
            "prompt_tokens_details": None if cached is None else {"cached_tokens": cached},
        }

    @property
    def tts(self) -> Mapping[str, Any]:
        """The `tts` object: the bill of all prompts, and each prompt's own object under `prompts`."""
        objects = [reply.tts for reply in self.replies]
        tokens: Counter[str] = Counter()
        for prompt_object in objects:
            tokens.update(prompt_object["tokens"])
        stops = {str(tts["stop"]): None for tts in objects}
        upstream = [tts["upstream"] for tts in objects]
        cached = [usage["cached_tokens"] for usage in upstream if usage["cached_tokens"] is not None]
        fallbacks = [tts["fallback"] for tts in objects if tts["fallback"] is not None]
        return {
            **{name: value for name, value in objects[0].items() if name in _COMMON},
            "branches": sum(tts["branches"] for tts in objects),
            "rounds": sum(tts["rounds"] for tts in objects),
            "stop": ",".join(stops),
            **{name: _least([tts[name] for tts in objects]) for name in ("agreement", "confidence")},
            **({"flagged": any(tts["flagged"] for tts in objects)} if "flagged" in objects[0] else {}),
            **next(({"escalated_beta": tts["escalated_beta"]} for tts in objects if "escalated_beta" in tts), {}),
            "fallback": fallbacks[0] if fallbacks else None,
            "tokens": dict(tokens),
            "upstream": {
                "requests": sum(usage["requests"] for usage in upstream),
                "prompt_tokens": sum(usage["prompt_tokens"] for usage in upstream),
                "cached_tokens": sum(cached) if cached else None,
            },
            "prompts": [{"request_id": reply.plan.request_id, **reply.tts} for reply in self.replies],
        }

    @property
    def headers(self) -> dict[str, str]:
        """The response's headers."""
        return {**reply_headers(self.plan, self.tts), "x-request-id": self.request_id}


_COUNTS = ("prompt_tokens", "completion_tokens", "total_tokens")
_COMMON = (
    *("applied", "beta", "beta_source", "beta_asked", "temperature", "greedy_first"),
    *("interval", "answer_kind", "probe_template", "min_agreement"),
)


async def together(work: Sequence[Coroutine[Any, Any, T]], cost: Callable[[T], int]) -> list[T]:
    """Run all coroutines to their ends and return the results, or raise the first error.

    An ApiError carries the cost of all of them. Cancelling this cancels all of them.
    """
    tasks = [asyncio.create_task(coroutine) for coroutine in work]
    try:
        await asyncio.gather(*tasks, return_exceptions=True)
    except asyncio.CancelledError:
        if not graceful_shutdown.is_cut_by_shutdown():
            raise
        error: ApiError = graceful_shutdown.shutting_down_error()
        error.spent, error.is_counted = _spent(tasks, cost), True
        raise error from None
    for task in tasks:
        failure = None if task.cancelled() else task.exception()
        if isinstance(failure, ApiError):
            failure.spent = _spent(tasks, cost)
        if failure is not None:
            raise failure
    return [task.result() for task in tasks]


def _least(values: Sequence[float | None]) -> float | None:
    """Return the smallest value; None if one is unknown."""
    known = [value for value in values if value is not None]
    return min(known) if len(known) == len(values) else None


def _spent(tasks: Sequence[asyncio.Task[T]], cost: Callable[[T], int]) -> int:
    spent = 0
    for task in tasks:
        if task.cancelled():
            continue
        failure = task.exception()
        if failure is None:
            spent += cost(task.result())
        elif isinstance(failure, ApiError):
            spent += failure.spent
    return spent
