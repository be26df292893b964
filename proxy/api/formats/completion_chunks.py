"""Write a reply as a stream of OpenAI chunks: the first chunk, progress, the text, the finish reason and usage."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Any, NamedTuple

from proxy import errors
from proxy.api.formats.endpoint_format import EpisodeNews
from proxy.http.sse import DONE, PING, format_event
from proxy.requests.generation_request import GenerationRequest
from proxy.types import Plan, Reply


class ChunkFormat(NamedTuple):
    """Format of the chunks of one stream: the repeated fields, and the choice in each kind of chunk."""

    head: Mapping[str, Any]  # fields that each chunk repeats
    first: Mapping[str, Any]  # choice of the first chunk
    progress: Callable[[str], Mapping[str, Any]]  # returns the choice for a line of progress
    text: Callable[[Reply], list[dict[str, Any]]]  # returns the choices for the reply's text
    last: Callable[[str], Mapping[str, Any]]  # returns the choice for a finish reason

    def chunk(self, choice: Mapping[str, Any], **extra: Any) -> bytes:
        """Return a chunk of one choice as a server-sent event."""
        return format_event({**self.head, "choices": [choice], **extra})


async def stream_chunks(request: GenerationRequest, news: EpisodeNews, chunks: ChunkFormat) -> AsyncGenerator[bytes]:
    """Yield the chunks of one reply: the first at once, progress as it comes, then the text, usage and `[DONE]`."""
    yield chunks.chunk(chunks.first)
    try:
        async with aclosing(news) as items:
            async for item in items:
                if item is None:
                    yield PING
                elif isinstance(item, str):
                    yield chunks.chunk(chunks.progress(item))
                elif isinstance(item, Mapping):
                    yield format_event({**chunks.head, "choices": [], "tts": item})
                else:
                    reply = item
    except errors.ApiError as error:  # the status has been sent, so the error must be an event
        yield format_event(errors.body(error))
        return
    for choice in chunks.text(reply):
        yield chunks.chunk(choice)
    yield chunks.chunk(chunks.last(reply.message.finish_reason), tts=reply.tts)
    if request.wants_usage:
        yield format_event({**chunks.head, "choices": [], "usage": reply.usage, "tts": reply.tts})
    yield DONE


def chunk_head(plan: Plan, kind: str) -> dict[str, Any]:
    """Return the fields at the beginning of a reply and of each of its chunks."""
    return {"id": plan.request_id, "object": kind, "created": plan.created, "model": plan.prompt.model}


def reasoning_fields(text: str) -> dict[str, str]:
    """Return a thought under both field names that clients use."""
    return {"reasoning": text, "reasoning_content": text}
