"""The judge: one call of the model that compares the replies of a request, within its token cap and its deadline."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from enum import StrEnum
from http import HTTPStatus
from typing import Any, Final, NamedTuple, Protocol

from proxy.environment.selection.judge_prompt import JudgePrompt, ReplyCandidate, judge_prompt, read_choice, with_text
from proxy.errors import UpstreamError, UpstreamRefused
from proxy.reply_request import JudgeLimits
from proxy.upstream.chat_stream import ChatOutput

logger = logging.getLogger(__name__)

LEAST: Final = 2
"""Number of replies that must fit into the prompt."""
SPARE_TOKENS: Final = 64
"""Tokens of the model's context that are left free for what the chat template may add."""
UNLIMITED: Final = 2**31
"""Stands for tokens without a limit."""
SELECT_SHARE, WRITE_SHARE = 4, 2
"""Largest part of the room that the answer may take: a quarter for a number, half for a new reply."""

_KEPT_FIELDS: Final = frozenset(
    {
        *("model", "user", "chat_template", "chat_template_kwargs", "reasoning_effort", "priority"),
        *("media_io_kwargs", "mm_processor_kwargs"),
    }
)
"""Fields of the request that also apply where only a number is asked for."""


_ADDED_FIELDS: Final = ("structured_outputs", "chat_template_kwargs")
"""Fields that the proxy adds to the call if the request does not have them."""
_REFUSALS: Final = (HTTPStatus.BAD_REQUEST, HTTPStatus.UNPROCESSABLE_ENTITY)
"""Statuses with which an upstream refuses a field."""


class JudgeOutcome(StrEnum):
    """Result of asking the judge."""

    CHOSEN = "chosen"  # it named a reply, or wrote one
    UNREADABLE = "unreadable"  # it named no reply, or the token limit cut it
    FAILED = "failed"  # the upstream failed
    NO_ROOM = "no_room"  # the prompt of two replies and the answer exceed the cap or the model's context
    LATE = "late"  # the deadline had passed, or passed meanwhile
    SKIPPED = "skipped"  # the episode had ended by its deadline or a failing upstream


class ReplyJudgement(NamedTuple):
    """Answer of the judge."""

    outcome: JudgeOutcome
    compared: int = 0  # number of replies in its prompt
    branch: int | None = None  # that it chose
    written: ChatOutput | None = None  # a new reply


class JudgedEnvironment(Protocol):
    """The part of an environment that the judge uses."""

    @property
    def judge_room(self) -> int | None:
        """Tokens that the judge may cost under the token cap; None without a cap."""

    @property
    def judge_context(self) -> int | None:
        """Tokens of the model's context beside the conversation; None if unknown."""

    async def count_tokens(self, text: str) -> int:
        """Return the number of tokens of a text. Raises UpstreamError."""
        ...

    async def ask_judge(self, body: Mapping[str, Any], max_tokens: int, own_tokens: int) -> ChatOutput:
        """Send a chat completion, and bill it with the `own_tokens` of its prompt. Raises UpstreamError."""
        ...


async def judge_replies(
    environment: JudgedEnvironment,
    body: Mapping[str, Any],
    limits: JudgeLimits,
    candidates: Sequence[ReplyCandidate],
    remaining_s: float | None,
) -> ReplyJudgement:
    """Ask the judge to compare `candidates`, which are replies to the chat request `body`. Never raises ApiError.

    If the prompt has no room for all, the longest are left out.
    """
    compared = 0
    try:
        async with asyncio.timeout(None if remaining_s is None else max(0.0, remaining_s)):
            prompt = judge_prompt(candidates, writes=limits.writes)
            fitted = await _fit(environment, prompt, limits)
            if fitted is None:
                return ReplyJudgement(JudgeOutcome.NO_ROOM)
            kept = [candidates[index] for index in fitted.kept]
            compared = len(kept)
            sent = _body(body, with_text(body.get("messages") or (), prompt.text(fitted.kept)), limits, kept)
            output = await _ask(environment, sent, body, fitted)
    except TimeoutError:
        return ReplyJudgement(JudgeOutcome.LATE, compared)
    except UpstreamError as error:
        logger.warning("the judge of replies failed: %s", error.logged)
        return ReplyJudgement(JudgeOutcome.FAILED, compared)
    return _read(output, limits, kept)


async def _ask(
    environment: JudgedEnvironment, sent: Mapping[str, Any], body: Mapping[str, Any], fitted: _Fitted
) -> ChatOutput:
    """Return the answer to `sent`. If the upstream refuses it, it is asked without the fields that it may not know.

    vLLM refuses `chat_template_kwargs` for Mistral's tokenisers. A refused call costs no tokens.
    """
    sizes = fitted.answer_tokens, fitted.prompt_tokens
    plain = {name: value for name, value in sent.items() if name not in _ADDED_FIELDS or name in body}
    try:
        return await environment.ask_judge(sent, *sizes)
    except UpstreamRefused as error:
        if error.upstream_status not in _REFUSALS or plain.keys() == sent.keys():
            raise
        return await environment.ask_judge(plain, *sizes)


def _read(output: ChatOutput, limits: JudgeLimits, kept: Sequence[ReplyCandidate]) -> ReplyJudgement:
    if output.finish == "stop" and not output.calls:
        if limits.writes and output.content.strip():
            return ReplyJudgement(JudgeOutcome.CHOSEN, len(kept), written=output)
        answer = output.content.strip() or "".join(output.thoughts)  # some parsers take it for a thought
        if not limits.writes and (choice := read_choice(answer, kept)) is not None:
            return ReplyJudgement(JudgeOutcome.CHOSEN, len(kept), choice.branch)
    return ReplyJudgement(JudgeOutcome.UNREADABLE, len(kept))


class _Fitted(NamedTuple):
    """The part of a prompt that fits, and its size."""

    kept: Sequence[int]  # indices of the replies, in order
    prompt_tokens: int
    answer_tokens: int  # most tokens of the answer


async def _fit(environment: JudgedEnvironment, prompt: JudgePrompt, limits: JudgeLimits) -> _Fitted | None:
    """Return what fits into the cap and the context, without the longest replies; None if two replies do not fit."""
    parts = [prompt.head, prompt.question, *prompt.replies]
    head, question, *sizes = await asyncio.gather(*(environment.count_tokens(part) for part in parts))
    bounds = (environment.judge_room, environment.judge_context)
    room = min((bound for bound in bounds if bound is not None), default=UNLIMITED)
    answer = min(limits.answer_tokens, room // (WRITE_SHARE if limits.writes else SELECT_SHARE))
    kept = sorted(range(len(sizes)), key=lambda index: sizes[index])
    total = head + question + sum(sizes)
    while kept and total > room - answer:
        total -= sizes[kept.pop()]
    if len(kept) < LEAST or answer < 1:
        return None
    return _Fitted(sorted(kept), total, min(limits.answer_tokens, room - total))


def _body(
    body: Mapping[str, Any], messages: Sequence[Mapping[str, Any]], limits: JudgeLimits, kept: Sequence[ReplyCandidate]
) -> dict[str, Any]:
    """Return the body of the judge's call. A new reply is sampled like a branch, and a number is constrained."""
    if limits.writes:
        return {**body, "messages": messages}
    fields = {name: value for name, value in body.items() if name in _KEPT_FIELDS}
    template = {"enable_thinking": False, **(body.get("chat_template_kwargs") or {})}
    return {
        **fields,
        "messages": messages,
        "chat_template_kwargs": template,
        "temperature": 0,
        "structured_outputs": {"choice": [str(candidate.number) for candidate in kept]},
    }
