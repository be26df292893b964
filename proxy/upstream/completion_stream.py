"""Read vLLM's streamed completions into a Call, within limits, and check them against the reported usage.

Every function raises UpstreamProtocolError for a stream that vLLM would not send. The argument `problem` builds that
error and prefixes the upstream's name.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from textwrap import shorten
from typing import Any, Final

import aiohttp

from proxy.errors import UpstreamProtocolError
from proxy.types import Call, Output
from proxy.upstream.response_body import BYTES_PER_ID, MIN_BODY_BYTES, ByteAllowance, LineSplitter

BYTES_PER_TOKEN: Final = 4096
"""Maximum bytes of a stream per token: each token may come in a chunk of its own, with its text."""
FINISH_REASONS: Final = ("stop", "length")
"""Finish reasons of successful completions. Any other reason is a failure."""
MAX_TOKEN_ID: Final = 2**31
"""Exclusive upper bound of token ids, and of model lengths in tokens."""

Problem = Callable[[str], UpstreamProtocolError]
"""Builds an error from a description such as "ended a stream early"."""


def completion_request(model: str, call: Call, *, takes_priority: bool) -> dict[str, Any]:
    """Return the body of a streamed `POST /v1/completions` that returns token ids."""
    return {
        **call.sampling,
        "model": model,
        "prompt": call.prompts[0] if len(call.prompts) == 1 else call.prompts,
        "n": call.n,
        "max_tokens": call.max_tokens,
        "return_token_ids": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "stream_interval": call.stream_interval,
        **({"priority": call.priority} if call.priority and takes_priority else {}),
        **({"cache_salt": call.salt} if call.salt else {}),
    }


async def read_events(response: aiohttp.ClientResponse, call: Call) -> AsyncIterator[bytes]:
    """Yield the data of each server-sent event until `[DONE]`.

    The bytes that are accepted are bounded by the prompts' length and the number of tokens received for `call`.
    """
    longest = max(map(len, call.prompts))  # the server sends the prompt's ids back with each completion
    lines = LineSplitter(MIN_BODY_BYTES + BYTES_PER_ID * longest)
    allowance = ByteAllowance(MIN_BODY_BYTES + BYTES_PER_ID * longest * len(call.outputs), BYTES_PER_TOKEN)
    async for data in response.content.iter_any():
        allowance.spend(len(data))
        for line in lines.take(data):
            if line.startswith(b"data: "):
                payload = line[6:].strip()
                if payload == b"[DONE]":
                    return
                yield payload
        allowance.earn(call.progress)


def add_chunk(call: Call, chunk: Mapping[str, Any], problem: Problem) -> list[Output]:
    """Add a chunk to the call's outputs and return the outputs that it finishes.

    Tokens beyond `max_tokens` are stored before the error is raised: they were generated, so they are billed.
    """
    ended: list[Output] = []
    longest = 0
    try:
        for choice in chunk["choices"]:
            index = choice["index"]
            output = call.outputs[index if index >= 0 else len(call.outputs)]
            output.ids += check_token_ids(choice["token_ids"])
            longest = max(longest, len(output.ids))
            if output.server_text is None:
                output.text += choice["text"]
            else:
                output.server_text += choice["text"]
            if choice["finish_reason"] is not None:
                output.finish = choice["finish_reason"]
                output.ended_by_token = output.finish == "stop" and not isinstance(choice.get("stop_reason"), str)
                ended.append(output)
    except (KeyError, IndexError, TypeError):
        raise problem("sent a completion chunk that is not in vLLM's format; vLLM 0.10 or later is needed") from None
    if longest > call.max_tokens:
        raise problem(f"sent {longest} tokens of a completion with max_tokens {call.max_tokens}")
    return ended


def finish_call(call: Call, usage: Mapping[str, Any] | None, problem: Problem) -> None:
    """Check that every completion ended properly and that the reported usage matches the received tokens.

    Fills in the call's prompt tokens and cached tokens.
    """
    if usage is None or any(output.finish is None for output in call.outputs):
        raise problem("ended a stream before all completions had finished")
    for output in call.outputs:
        if output.finish not in FINISH_REASONS:
            reason = shorten(str(output.finish), 40)
            raise problem(f"ended a completion with finish_reason {reason!r}; expected 'stop' or 'length'")
        if output.finish == "length" and len(output.ids) != call.max_tokens:  # continuing it would never end
            received = f"{len(output.ids)} of {call.max_tokens} tokens"
            raise problem(f"ended a completion with finish_reason 'length' after {received}")
    try:
        generated, prompt = usage["completion_tokens"], usage["prompt_tokens"]
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    except (KeyError, TypeError, AttributeError):
        generated = prompt = cached = None
    if not (type(generated) is int and type(prompt) is int and (cached is None or type(cached) is int)):
        raise problem("sent a usage object without token counts")
    if generated != call.generated:
        raise problem(f"reported completion_tokens {generated} but sent {call.generated} tokens")
    sent = sum(map(len, call.prompts))  # each prompt once, whatever `n` is; vLLM adds nothing to token ids
    if prompt != sent:
        raise problem(f"reported prompt_tokens {prompt} for prompts of {sent} tokens")
    if cached is not None and not 0 <= cached <= prompt:
        raise problem(f"reported cached_tokens {cached} for prompts of {prompt} tokens")
    call.prompt_tokens, call.cached_tokens = prompt, cached


def check_token_ids(value: object) -> list[int]:
    """Return `value` if it is a list of token ids. Raises TypeError."""
    if not isinstance(value, list) or not all(type(token) is int for token in value):
        raise TypeError
    if value and not 0 <= min(value) <= max(value) < MAX_TOKEN_ID:
        raise TypeError
    return value
