"""Format of `/v1/completions`: the `text_completion` object of one or several prompts, and its chunks."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from proxy import errors
from proxy.api.formats.completion_chunks import ChunkFormat, chunk_head, reasoning_fields, stream_chunks
from proxy.api.formats.endpoint_format import BatchNews, EpisodeNews
from proxy.api.formats.prompt_batch import Batch
from proxy.http.sse import DONE, PING, format_event, split_text
from proxy.requests.completion_request import CompletionRequest
from proxy.requests.generation_request import GenerationRequest
from proxy.types import Plan, Reply


def to_json(_: CompletionRequest, reply: Reply) -> dict[str, Any]:
    """Return a `text_completion` with the winner's whole text after the prompt, including its thought."""
    choice = _text_choice(0, reply.message.written, reply.message.finish_reason)
    return {**chunk_head(reply.plan, "text_completion"), "choices": [choice], "usage": reply.usage, "tts": reply.tts}


def stream(request: CompletionRequest, plan: Plan, news: EpisodeNews) -> AsyncGenerator[bytes]:
    """Stream a reply as `text_completion` chunks. Progress is sent in fields of its own, not in the text."""
    chunks = ChunkFormat(
        chunk_head(plan, "text_completion"),
        _text_choice(0),
        lambda line: {**_text_choice(0), **reasoning_fields(line)},
        lambda reply: [_text_choice(0, piece) for piece in split_text(reply.message.written)],
        lambda finish: _text_choice(0, finish=finish),
    )
    return stream_chunks(request, news, chunks)


def batch_to_json(batch: Batch) -> dict[str, Any]:
    """Return the `text_completion` of several prompts, with one choice per prompt."""
    messages = [reply.message for reply in batch.replies]
    choices = [_text_choice(i, message.written, message.finish_reason) for i, message in enumerate(messages)]
    head = {**chunk_head(batch.plan, "text_completion"), "id": batch.request_id}
    return {**head, "choices": choices, "usage": batch.usage, "tts": batch.tts}


async def stream_batch(
    request: GenerationRequest, request_id: str, plans: Sequence[Plan], news: BatchNews
) -> AsyncGenerator[bytes]:
    """Yield the chunks of several prompts: each text when its episode ends, and the bill with the last chunk."""
    head = {**chunk_head(plans[0], "text_completion"), "id": request_id}

    def chunk(choice: Mapping[str, Any], **extra: Any) -> bytes:
        return format_event({**head, "choices": [choice], **extra})

    for index in range(len(plans)):
        yield chunk(_text_choice(index))
    try:
        async with aclosing(news) as items:
            async for item in items:
                if item is None:
                    yield PING
                elif isinstance(item, Batch):
                    batch = item
                elif isinstance(item.content, str):
                    yield chunk({**_text_choice(item.prompt), **reasoning_fields(item.content)})
                elif isinstance(item.content, Mapping):
                    tts = {"prompt": item.prompt, **item.content}
                    yield format_event({**head, "choices": [], "tts": tts})
                else:
                    for piece in split_text(item.content.message.written):
                        yield chunk(_text_choice(item.prompt, piece))
    except errors.ApiError as error:
        yield format_event(errors.body(error))
        return
    *others, last = [_text_choice(i, "", finish) for i, finish in enumerate(batch.finish_reasons)]
    for choice in others:
        yield chunk(choice)
    yield chunk(last, tts=batch.tts)
    if request.wants_usage:
        yield format_event({**head, "choices": [], "usage": batch.usage, "tts": batch.tts})
    yield DONE


def _text_choice(index: int, text: str = "", finish: str | None = None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish}
