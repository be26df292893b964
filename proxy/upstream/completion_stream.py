"""Read vLLM's streamed completions into a Call, within limits, and check them against the reported usage.

Every function raises UpstreamProtocolError for a stream that vLLM would not send. The argument `problem` builds that
error and prefixes the upstream's name.
"""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator, Callable, Mapping
from textwrap import shorten
from typing import Any, Final, NamedTuple, TypedDict

import msgspec

from proxy.errors import UpstreamProtocolError
from proxy.token_ids import prompts_json
from proxy.types import Call, Output
from proxy.upstream.connections.pooled_request import UpstreamResponse
from proxy.upstream.response_body import BYTES_PER_ID, MIN_BODY_BYTES, ByteAllowance, LineSplitter

BYTES_PER_TOKEN: Final = 4096
"""Maximum bytes of a stream per token: each token may come in a chunk of its own, with its text."""
FINISH_REASONS: Final = ("stop", "length")
"""Finish reasons of successful completions. Any other reason is a failure."""
MAX_TOKEN_ID: Final = 2**31
"""Exclusive upper bound of token ids, and of model lengths in tokens."""
MIN_LOG_PROBABILITY: Final = -9999.0
"""Log-probability of a token that cannot be sampled. vLLM sends it in place of minus infinity."""
MAX_LOG_PROBABILITY: Final = 0.01
"""Largest log-probability that counts as one: rounding may bring it above 0."""

_INTEGERS: Final = frozenset({int})
_PROMPT_IDS: Final = b'"prompt_token_ids":['


class _Choice(TypedDict, total=False):
    """Members of a choice that are read. `add_chunk` checks their types."""

    index: Any
    text: Any
    token_ids: Any
    logprobs: Any
    finish_reason: Any
    stop_reason: Any


class _Chunk(TypedDict, total=False):
    """Members of a chunk that are read."""

    choices: list[_Choice]
    usage: Any
    error: Any


_CHUNKS: Final = msgspec.json.Decoder(_Chunk)

Problem = Callable[[str], UpstreamProtocolError]
"""Builds an error from a description such as "ended a stream early"."""
AddChunk = Callable[[Call, Mapping[str, Any], Problem], list[Output]]
"""Adds a chunk to a call, and returns the outputs that it finishes."""


class OptionalFields(NamedTuple):
    """Fields of a completion request that a server may refuse, and whether this one accepts them."""

    priority: bool = True
    log_probabilities: bool = True


def without_refused(call: Call, fields: OptionalFields, refusal: str) -> OptionalFields | None:
    """Return `fields` without the one that the server's message refuses; None if it refuses none that was sent."""
    message = refusal.lower()
    if call.generated:
        return None
    if call.priority and fields.priority and "priority" in message:
        return fields._replace(priority=False)
    if call.needs_log_probabilities and fields.log_probabilities and "logprob" in message:
        return fields._replace(log_probabilities=False)
    return None


def compact_json(value: object) -> bytes:
    """Return a value as JSON for the upstream, without spaces."""
    return json.dumps(value, separators=(",", ":")).encode()


def completion_body(model: str, call: Call, fields: OptionalFields) -> bytes:
    """Return the body of a streamed `POST /v1/completions` that returns token ids.

    The JSON of the prompts is put together from its parts, because they may have many thousands of ids.
    """
    others = compact_json(completion_request(model, call, fields))
    return b'{"prompt":%b,%b' % (prompts_json(call.prompts), others[1:])


def completion_request(model: str, call: Call, fields: OptionalFields) -> dict[str, Any]:
    """Return the fields of a streamed `POST /v1/completions`, except for the prompt.

    With `logprobs: 0` vLLM sends the log-probability of each generated token and no alternatives. Ids in place of
    texts bound the size of a chunk.
    """
    needs_log_probabilities = call.needs_log_probabilities and fields.log_probabilities
    logprobs = {"logprobs": 0, "return_tokens_as_token_ids": not call.needs_token_texts}
    return {
        **call.sampling,
        "model": model,
        "n": call.n,
        "max_tokens": call.max_tokens,
        "return_token_ids": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "stream_interval": call.stream_interval,
        **({"priority": call.priority} if call.priority and fields.priority else {}),
        **({"cache_salt": call.salt} if call.salt else {}),
        **(logprobs if needs_log_probabilities else {}),
    }


async def read_events(
    response: UpstreamResponse, call: Call, longest: int, per_token: int = BYTES_PER_TOKEN
) -> AsyncIterator[list[bytes]]:
    """Yield the data of the server-sent events that arrive together, until `[DONE]`.

    The bytes that are accepted are bounded by the longest prompt and the number of tokens received for `call`:
    `longest` ids that the server sends back with each output, and `per_token` bytes.
    """
    lines = LineSplitter(MIN_BODY_BYTES + BYTES_PER_ID * longest)
    allowance = ByteAllowance(MIN_BODY_BYTES + BYTES_PER_ID * longest * len(call.outputs), per_token)
    async for data in response.content.iter_any():
        allowance.spend(len(data))
        payloads = [line[6:].strip() for line in lines.take(data) if line.startswith(b"data: ")]
        if b"[DONE]" in payloads:
            yield payloads[: payloads.index(b"[DONE]")]
            return
        yield payloads
        allowance.earn(call.progress)


def parse_chunk(payload: bytes, parse: Callable[[bytes], dict[str, Any]]) -> Mapping[str, Any]:
    """Return the members of a chunk that `add_chunk` reads.

    vLLM repeats the ids of the whole prompt in an output's first chunk. They are cut out, and other members that are
    not needed are skipped. `parse` parses chunks in which this fails, so that it raises the errors.
    """
    begin = payload.find(_PROMPT_IDS)
    try:
        if begin >= 0:
            begin += len(_PROMPT_IDS)
            end = payload.index(b"]", begin)
            if not payload[begin:end].translate(None, b"0123456789, "):
                payload = payload[:begin] + payload[end:]
        chunk: Mapping[str, Any] = _CHUNKS.decode(payload)
    except (ValueError, RecursionError):
        return parse(payload)
    return chunk


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
            ids = check_token_ids(choice["token_ids"])
            output.ids += ids
            if call.needs_log_probabilities:
                _add_log_probabilities(call, output, len(ids), choice.get("logprobs"))
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


def _add_log_probabilities(call: Call, output: Output, count: int, sent: object) -> None:
    """Add the log-probabilities of `count` new tokens. They are unknown unless the server sent one for each token."""
    output.log_probabilities.extend(map(_log_probability, _list_of(count, "token_logprobs", sent)))
    if call.needs_token_texts:
        texts = _list_of(count, "tokens", sent)
        output.token_texts += [text if isinstance(text, str) else "" for text in texts]


def _list_of(count: int, name: str, sent: object) -> list[object]:
    """Return the list of `count` values at `name`, or None for each of them if there is no such list."""
    values = sent.get(name) if isinstance(sent, dict) else None
    return values if isinstance(values, list) and len(values) == count else [None] * count


def _log_probability(value: object) -> float:
    """Return a log-probability in nats, bounded as vLLM does it. It is NaN if `value` is not one."""
    if isinstance(value, bool) or not isinstance(value, float | int) or not value <= MAX_LOG_PROBABILITY:
        return math.nan
    return max(MIN_LOG_PROBABILITY, min(0.0, value))


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
    generated, prompt, cached = read_usage(usage, problem)
    if generated != call.generated:
        raise problem(f"reported completion_tokens {generated} but sent {call.generated} tokens")
    sent = sum(map(len, call.prompts))  # each prompt once, whatever `n` is; vLLM adds nothing to token ids
    if prompt != sent:
        raise problem(f"reported prompt_tokens {prompt} for prompts of {sent} tokens")
    if cached is not None and not 0 <= cached <= prompt:
        raise problem(f"reported cached_tokens {cached} for prompts of {prompt} tokens")
    call.prompt_tokens, call.cached_tokens = prompt, cached


def read_usage(usage: Mapping[str, Any], problem: Problem) -> tuple[int, int, int | None]:
    """Return the generated tokens, the prompt's tokens and, if the server says, those of them that it had cached."""
    try:
        generated, prompt = usage["completion_tokens"], usage["prompt_tokens"]
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    except (KeyError, TypeError, AttributeError):
        generated = prompt = cached = None
    if not (type(generated) is int and type(prompt) is int and (cached is None or type(cached) is int)):
        raise problem("sent a usage object without token counts")
    return generated, prompt, cached


def check_token_ids(value: object) -> list[int]:
    """Return `value` if it is a list of token ids. Raises TypeError."""
    if not isinstance(value, list) or not {*map(type, value)} <= _INTEGERS:  # booleans are no ids
        raise TypeError
    if value and not 0 <= min(value) <= max(value) < MAX_TOKEN_ID:
        raise TypeError
    return value
