"""Format of `/v1/chat/completions`: the `chat.completion` object and its chunks."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from proxy.api.formats.completion_chunks import ChunkFormat, chunk_head, reasoning_fields, stream_chunks
from proxy.api.formats.endpoint_format import EpisodeNews
from proxy.http.sse import split_text
from proxy.requests.chat_request import ChatRequest
from proxy.types import Plan, Reply


def to_json(request: ChatRequest, reply: Reply) -> dict[str, Any]:
    """Return a `chat.completion`."""
    message = reply.message
    content = {"role": "assistant", "content": message.content, "refusal": None}
    if message.reasoning and request.include_reasoning is not False:
        content |= reasoning_fields(message.reasoning)
    return {
        **chunk_head(reply.plan, "chat.completion"),
        "choices": [{"index": 0, "message": content, "logprobs": None, "finish_reason": message.finish_reason}],
        "usage": reply.usage,
        "tts": reply.tts,
    }


def stream(request: ChatRequest, plan: Plan, news: EpisodeNews) -> AsyncGenerator[bytes]:
    """Stream a reply as `chat.completion.chunk` events. The first one, with the role, is sent at once."""

    def choice(finish: str | None = None, **delta: Any) -> dict[str, Any]:
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}

    def text(reply: Reply) -> list[dict[str, Any]]:
        thought = reply.message.reasoning
        is_shown = bool(thought) and request.include_reasoning is not False
        before = [choice(**reasoning_fields(piece)) for piece in split_text(thought or "")] if is_shown else []
        return before + [choice(content=piece) for piece in split_text(reply.message.content)]

    chunks = ChunkFormat(
        chunk_head(plan, "chat.completion.chunk"),
        choice(role="assistant", content=""),
        lambda line: choice(**reasoning_fields(line)),
        text,
        lambda finish: choice(finish),
    )
    return stream_chunks(request, news, chunks)
