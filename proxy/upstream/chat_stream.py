"""Read vLLM's streamed chat completions: one reply per request, with its tool calls, thought and log-probabilities.

Every function raises UpstreamProtocolError for a stream that vLLM would not send, as in `completion_stream.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from textwrap import shorten
from typing import Any, Final

from proxy.types import Call, Output
from proxy.upstream.completion_stream import Problem, check_token_ids, read_usage

MAX_TOOL_CALLS: Final = 1024
"""Maximum number of tool calls in a reply."""
FINISH_REASONS: Final = {"stop": "stop", "tool_calls": "stop", "length": "length", "repetition": "length"}
"""Finish reasons of successful replies, and whether the reply is complete or was cut."""
BYTES_PER_LOGPROB: Final = 1024
"""Maximum bytes of an alternative token in the log-probabilities of a token."""


@dataclass(slots=True)
class ToolCallParts:
    """A tool call as it arrives: its id and name, and pieces of its arguments."""

    id: str = ""
    name: str = ""
    arguments: list[str] = field(default_factory=list)


@dataclass(slots=True)
class ChatOutput(Output):
    """The reply of a chat completion so far. Its texts are exactly those of the server."""

    finish_reason: str | None = None  # as the server sent it
    contents: list[str] = field(default_factory=list)  # pieces of the content
    thoughts: list[str] = field(default_factory=list)  # pieces of the reasoning
    tool_calls: dict[int, ToolCallParts] = field(default_factory=dict)  # by index
    logprobs: list[Any] = field(default_factory=list)  # of each token of the content, if asked for
    grown: asyncio.Event = field(default_factory=asyncio.Event)  # set whenever something arrives

    @property
    def content(self) -> str:
        """The content so far."""
        return "".join(self.contents)

    @property
    def calls(self) -> Sequence[tuple[str, str]]:
        """Name and arguments of each tool call, in the order of their indexes."""
        ordered = (self.tool_calls[index] for index in sorted(self.tool_calls))
        return [(call.name, "".join(call.arguments)) for call in ordered]

    @property
    def tool_call_objects(self) -> Sequence[Mapping[str, Any]]:
        """The tool calls in OpenAI's format."""
        ids = [self.tool_calls[index].id for index in sorted(self.tool_calls)]
        return [
            {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
            for call_id, (name, arguments) in zip(ids, self.calls, strict=True)
        ]


def chat_request(body: Mapping[str, Any], call: Call) -> dict[str, Any]:
    """Return the body of a streamed chat completion whose tokens can be counted as they arrive.

    Token ids are asked for because vLLM then sends a chunk for tokens that its parsers hold back, too. Without the
    thought it would leave them out.
    """
    return {
        **body,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "stream_interval": call.stream_interval,
        "return_token_ids": True,
        "include_reasoning": True,
        **({"cache_salt": call.salt} if call.salt else {}),
    }


def chat_output(call: Call) -> ChatOutput:
    """Return the only output of a call that is a chat completion."""
    (output,) = call.outputs
    if not isinstance(output, ChatOutput):
        raise TypeError("the output of a chat completion must be a ChatOutput")
    return output


def add_chat_chunk(call: Call, chunk: Mapping[str, Any], problem: Problem) -> list[Output]:
    """Add a chunk to the call's only output, a ChatOutput. Returns no outputs, because nothing waits for their end.

    Tokens beyond `max_tokens` are stored before the error is raised: they were generated, so they are billed.
    """
    output = chat_output(call)
    try:
        usage = chunk.get("usage")
        if usage is not None and type(usage["prompt_tokens"]) is int:
            call.prompt_tokens = usage["prompt_tokens"]
        for choice in chunk["choices"]:
            if choice["index"] != 0:
                raise KeyError
            _add_choice(output, choice)
    except (KeyError, TypeError, AttributeError):
        raise problem("sent a chat chunk that is not in vLLM's format; vLLM 0.10 or later is needed") from None
    finally:
        output.grown.set()
    if len(output.ids) > call.max_tokens:
        raise problem(f"sent {len(output.ids)} tokens of a reply with max_tokens {call.max_tokens}")
    return []


def _add_choice(output: ChatOutput, choice: Mapping[str, Any]) -> None:
    """Add a choice to the output. Raises KeyError, TypeError or AttributeError if its format is invalid."""
    ids = choice.get("token_ids")
    if ids is not None:
        output.ids += check_token_ids(ids)
    delta = choice["delta"]
    if content := delta.get("content"):
        output.contents.append(_text(content))
    if thought := delta.get("reasoning") or delta.get("reasoning_content"):
        output.thoughts.append(_text(thought))
    for part in delta.get("tool_calls") or ():
        index = part["index"]
        if type(index) is not int or not 0 <= index < MAX_TOOL_CALLS:
            raise TypeError
        call, function = output.tool_calls.setdefault(index, ToolCallParts()), part.get("function") or {}
        call.id = call.id or _text(part.get("id") or "")
        call.name = call.name or _text(function.get("name") or "")
        if arguments := function.get("arguments"):
            call.arguments.append(_text(arguments))
    logprobs = choice.get("logprobs")
    if logprobs is not None:
        values = logprobs.get("content") or []
        if not isinstance(values, list):
            raise TypeError
        output.logprobs += values
    if choice.get("finish_reason") is not None:
        output.finish_reason = _text(choice["finish_reason"])
        output.finish = FINISH_REASONS.get(output.finish_reason, "stop")


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def finish_chat(call: Call, usage: Mapping[str, Any] | None, problem: Problem) -> None:
    """Check that the reply ended properly and that the reported usage matches the received tokens.

    Fills in the call's prompt tokens and cached tokens.
    """
    output = chat_output(call)
    if usage is None or output.finish_reason is None:
        raise problem("ended a stream before the reply had finished")
    if output.finish_reason not in FINISH_REASONS:
        reason = shorten(str(output.finish_reason), 40)
        raise problem(f"ended a reply with finish_reason {reason!r}; expected {', '.join(FINISH_REASONS)}")
    generated, prompt, cached = read_usage(usage, problem)
    if generated != call.generated:
        raise problem(f"reported completion_tokens {generated} but sent the ids of {call.generated} tokens")
    if cached is not None and not 0 <= cached <= prompt:
        raise problem(f"reported cached_tokens {cached} for a prompt of {prompt} tokens")
    call.prompt_tokens, call.cached_tokens = prompt, cached
