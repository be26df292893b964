"""Format of `/v1/chat/completions`: the `chat.completion` object and its chunks."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from typing import Any

from proxy.api.formats.completion_chunks import ChunkFormat, chunk_head, reasoning_fields, stream_chunks
from proxy.api.formats.endpoint_format import EpisodeNews
from proxy.http.sse import split_text
from proxy.requests.chat_request import ChatRequest
from proxy.requests.field_table import TOOL_CHOICE
from proxy.types import Message, Plan, Reply


def to_json(request: ChatRequest, reply: Reply) -> dict[str, Any]:
    """Return a `chat.completion`."""
    message = reply.message
    is_call = bool(message.tool_calls)
    content: dict[str, Any] = {
        "role": "assistant",
        "content": message.content or _no_content(request, message),
        "refusal": None,
    }
    if is_call:
        content["tool_calls"] = message.tool_calls
    if message.reasoning and request.include_reasoning is not False:
        content |= reasoning_fields(message.reasoning)
    return {
        **chunk_head(reply.plan, "chat.completion"),
        "choices": [
            {"index": 0, "message": content, "logprobs": message.logprobs, "finish_reason": message.finish_reason}
        ],
        "usage": reply.usage,
        "tts": reply.tts,
    }


def _no_content(request: ChatRequest, message: Message) -> str | None:
    """Return vLLM's `content` of a reply without text.

    It is null after a thought or calls, and in a reply that was cut, unless the request forced a call.
    """
    choice = (request.model_extra or {}).get(TOOL_CHOICE)
    is_forced = choice not in (None, "auto", "none")
    is_null = message.reasoning is not None or message.tool_calls or message.finish_reason == "length"
    return None if is_null and not is_forced else ""


def _tool_call_parts(calls: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the deltas of tool calls: of each its id and name first, then pieces of its arguments."""
    for index, call in enumerate(calls):
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        yield {**call, "index": index, "function": {"name": name, "arguments": ""}}
        for piece in split_text(arguments):
            yield {"index": index, "function": {"arguments": piece}}


def stream(request: ChatRequest, plan: Plan, news: EpisodeNews) -> AsyncGenerator[bytes]:
    """Stream a reply as `chat.completion.chunk` events. The first one, with the role, is sent at once."""

    def choice(finish: str | None = None, **delta: Any) -> dict[str, Any]:
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}

    def text(reply: Reply) -> list[dict[str, Any]]:
        thought = reply.message.reasoning
        is_shown = bool(thought) and request.include_reasoning is not False
        before = [choice(**reasoning_fields(piece)) for piece in split_text(thought or "")] if is_shown else []
        texts = [choice(content=piece) for piece in split_text(reply.message.content)]
        if reply.message.logprobs is not None:  # with the first chunk of the content, or in one of their own
            texts = texts or [choice(content="")]
            texts[0]["logprobs"] = reply.message.logprobs
        return before + texts + [choice(tool_calls=[part]) for part in _tool_call_parts(reply.message.tool_calls)]

    chunks = ChunkFormat(
        chunk_head(plan, "chat.completion.chunk"),
        choice(role="assistant", content=""),
        lambda line: choice(**reasoning_fields(line)),
        text,
        lambda finish: choice(finish),
    )
    return stream_chunks(request, news, chunks)
