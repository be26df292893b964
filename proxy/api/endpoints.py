"""The forms in which served requests come and go: one life of a request, several endpoints.

A `Form` is an endpoint's request, its whole reply and its stream. What happens between them is the same for all.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Final, NamedTuple

from proxy import errors
from proxy.api import responses
from proxy.api.prompt_batch import Batch
from proxy.http.sse import DONE, PING, event, pieces
from proxy.requests import models
from proxy.types import Plan, Reply

Thinking = AsyncGenerator[str | Reply | None]
"""What `stream.thinking` yields."""


class Part(NamedTuple):
    """News of one prompt of several."""

    prompt: int  # its place
    content: str | Reply  # what a round brought, or the end


BatchThinking = AsyncGenerator[Part | Batch | None]
"""Events of a stream of several prompts, as `stream.thinking` yields them."""


class Form(NamedTuple):
    """One endpoint: how a request is read and a reply written."""

    made: type[models.GenerationRequest]
    prefix: str  # of its ids
    whole: Callable[[Any, Reply], Mapping[str, Any]]  # of the request and the reply to it
    events: Callable[[Any, Plan, Thinking], AsyncGenerator[bytes]]  # the same, before there is a reply


def chat_completion(request: models.ChatRequest, reply: Reply) -> dict[str, Any]:
    """A `chat.completion`."""
    message = reply.message
    content = {"role": "assistant", "content": message.content, "refusal": None}
    if message.reasoning and request.include_reasoning is not False:
        content |= _reasoning(message.reasoning)
    return {
        **_head(reply.plan, "chat.completion"),
        "choices": [{"index": 0, "message": content, "logprobs": None, "finish_reason": message.finish_reason}],
        "usage": reply.usage,
        "tts": reply.tts,
    }


def chat_events(request: models.ChatRequest, plan: Plan, thinking: Thinking) -> AsyncGenerator[bytes]:
    """The same as chunks, the role at once."""

    def choice(finish: str | None = None, **delta: Any) -> dict[str, Any]:
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}

    def written(reply: Reply) -> list[dict[str, Any]]:
        thought = reply.message.reasoning
        is_shown = bool(thought) and request.include_reasoning is not False
        before = [choice(**_reasoning(piece)) for piece in pieces(thought or "")] if is_shown else []
        return before + [choice(content=piece) for piece in pieces(reply.message.content)]

    chunks = _Chunks(
        _head(plan, "chat.completion.chunk"),
        choice(role="assistant", content=""),
        lambda line: choice(**_reasoning(line)),
        written,
        lambda finish: choice(finish),
    )
    return _chunked(request, thinking, chunks)


def text_completion(_: models.CompletionRequest, reply: Reply) -> dict[str, Any]:
    """A `text_completion`: all the winner wrote after the prompt, its thought included."""
    choice = {"index": 0, "text": reply.message.written, "logprobs": None, "finish_reason": reply.message.finish_reason}
    return {**_head(reply.plan, "text_completion"), "choices": [choice], "usage": reply.usage, "tts": reply.tts}


def text_events(request: models.CompletionRequest, plan: Plan, thinking: Thinking) -> AsyncGenerator[bytes]:
    """The same as chunks. What the rounds bring stands beside the text, not in it."""

    def choice(text: str = "", finish: str | None = None, **extra: Any) -> dict[str, Any]:
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish, **extra}

    chunks = _Chunks(
        _head(plan, "text_completion"),
        choice(),
        lambda line: choice(**_reasoning(line)),
        lambda reply: [choice(piece) for piece in pieces(reply.message.written)],
        lambda finish: choice(finish=finish),
    )
    return _chunked(request, thinking, chunks)


def text_batch(batch: Batch) -> dict[str, Any]:
    """Return the `text_completion` of several prompts, a choice each."""
    messages = [reply.message for reply in batch.replies]
    choices = [_text_choice(i, message.written, message.finish_reason) for i, message in enumerate(messages)]
    head = {**_head(batch.plan, "text_completion"), "id": batch.request_id}
    return {**head, "choices": choices, "usage": batch.usage, "tts": batch.tts}


async def text_batch_events(
    request: models.GenerationRequest, request_id: str, plans: Sequence[Plan], thinking: BatchThinking
) -> AsyncGenerator[bytes]:
    """Yield the chunks of several prompts: each text when its episode is over, the bill with the last chunk."""
    head = {**_head(plans[0], "text_completion"), "id": request_id}

    def chunk(choice: Mapping[str, Any], **extra: Any) -> bytes:
        return event({**head, "choices": [choice], **extra})

    for index in range(len(plans)):
        yield chunk(_text_choice(index))
    try:
        async with aclosing(thinking) as items:
            async for item in items:
                if item is None:
                    yield PING
                elif isinstance(item, Batch):
                    batch = item
                elif isinstance(item.content, str):
                    yield chunk({**_text_choice(item.prompt), **_reasoning(item.content)})
                else:
                    for piece in pieces(item.content.message.written):
                        yield chunk(_text_choice(item.prompt, piece))
    except errors.ApiError as error:
        yield event(errors.body(error))
        return
    *others, last = [_text_choice(i, "", finish) for i, finish in enumerate(batch.finish_reasons)]
    for choice in others:
        yield chunk(choice)
    yield chunk(last, tts=batch.tts)
    if request.wants_usage:
        yield event({**head, "choices": [], "usage": batch.usage, "tts": batch.tts})
    yield DONE


def _text_choice(index: int, text: str = "", finish: str | None = None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish}


class _Chunks(NamedTuple):
    """How the chunks of a stream are written: what all of them repeat, and the choice in each."""

    head: Mapping[str, Any]
    first: Mapping[str, Any]
    line: Callable[[str], Mapping[str, Any]]  # of what a round brought
    written: Callable[[Reply], list[dict[str, Any]]]
    last: Callable[[str], Mapping[str, Any]]  # with the finish reason

    def one(self, choice: Mapping[str, Any], **extra: Any) -> bytes:
        """A chunk of one choice."""
        return event({**self.head, "choices": [choice], **extra})


async def _chunked(request: models.GenerationRequest, thinking: Thinking, chunks: _Chunks) -> AsyncGenerator[bytes]:
    yield chunks.one(chunks.first)
    try:
        async with aclosing(thinking) as items:
            async for item in items:
                if item is None:
                    yield PING
                elif isinstance(item, str):
                    yield chunks.one(chunks.line(item))
                else:
                    reply = item
    except errors.ApiError as error:  # the status is out: an error can only be an event now
        yield event(errors.body(error))
        return
    for choice in chunks.written(reply):
        yield chunks.one(choice)
    yield chunks.one(chunks.last(reply.message.finish_reason), tts=reply.tts)
    if request.wants_usage:
        yield event({**chunks.head, "choices": [], "usage": reply.usage, "tts": reply.tts})
    yield DONE


def _head(plan: Plan, kind: str) -> dict[str, Any]:
    return {"id": plan.request_id, "object": kind, "created": plan.created, "model": plan.prompt.model}


def _reasoning(text: str) -> dict[str, str]:
    """A thought, under both names that clients know."""
    return {"reasoning": text, "reasoning_content": text}


CHAT: Final = Form(models.ChatRequest, "chatcmpl-", chat_completion, chat_events)
TEXT: Final = Form(models.CompletionRequest, "cmpl-", text_completion, text_events)
RESPONSES: Final = Form(models.ResponsesRequest, "resp_", responses.whole, responses.events)
