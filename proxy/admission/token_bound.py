"""Upper bound on the tokens that a forwarded request can generate, and the body fields that enforce it.

The bound is the number of completions (prompts times `n`) times the tokens of each. A request for more than its caps is
refused, and a request without a limit gets one. According to vLLM's source, no other field makes it generate more.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from proxy.admission.token_budget import Caps, TokenLimit, request_limit, smaller
from proxy.errors import BadRequest
from proxy.requests.anthropic_request import MessagesRequest
from proxy.requests.chat_request import ChatRequest
from proxy.requests.completion_request import CompletionRequest
from proxy.requests.generation_request import GenerationRequest
from proxy.requests.responses_request import ResponsesRequest

DEFAULT_MAX_TOKENS: Final = 16
"""Limit of a text completion that sets none, in tokens: the default of vLLM and OpenAI."""
_LIMIT_FIELDS: Final[Mapping[type[GenerationRequest], tuple[str, ...]]] = MappingProxyType(
    {
        ChatRequest: ("max_completion_tokens", "max_tokens"),
        CompletionRequest: ("max_tokens",),
        ResponsesRequest: ("max_output_tokens",),
        MessagesRequest: ("max_tokens",),
    }
)
"""Fields that limit the tokens of a completion, by type of request. The first is set if the request has none."""
_CLIENT_TOOLS: Final = ("function", "custom")
"""Types of tools that the client runs. Other tools make the upstream generate again, as often as the model asks."""
_TRANSPARENT_FIELDS: Final = frozenset(
    {
        *("model", "messages", "prompt", "max_tokens", "max_completion_tokens", "n", "stream", "stream_options"),
        *("temperature", "top_p", "top_k", "min_p", "seed"),
        *("presence_penalty", "frequency_penalty", "repetition_penalty"),
        *("reasoning_effort", "chat_template_kwargs", "user", "metadata", "store", "tts"),
    }
)
"""Fields that hide no token from the client. `stop` is not among them: vLLM holds back text that might match it."""


class TokenBound(NamedTuple):
    """Token bound of one request, and how its actual tokens can be read from the reply."""

    max_tokens: int | None = None  # None without a cap
    completions: int = 1
    put: Mapping[str, Any] = MappingProxyType({})  # members of the body that enforce the bound
    adds_usage: bool = False  # the proxy requested the stream's usage chunk, which must not reach the client
    is_usage_complete: bool = True  # the reported usage counts all generated tokens
    shows_tokens: bool = False  # the stream shows all generated tokens as text, soon after they are generated


UNBOUNDED: Final = TokenBound()
"""Bound of a request whose caller has no token caps."""
GENERATES_NOTHING: Final = TokenBound(max_tokens=0)
"""Bound of a request that generates no tokens."""


class _CallerCaps(NamedTuple):
    """Caps of a request, and the part of them that its key sets."""

    all: Caps  # of the key and the server together
    key: str  # name of the key, for error messages
    own: Caps  # of the key
    requested: int | None  # tts.max_total_tokens
    processes: int  # of one of which the caps are

    def check(self, reason: str, param: str, each: int, completions: int) -> None:
        """Raise BadRequest, naming the cap and its source, if `completions` of `each` tokens do not fit."""
        total_tokens = each * completions
        requested = smaller(self.requested, total_tokens)
        cap, source = request_limit(requested, self.key, self.own, self.all, self.processes)
        if cap == total_tokens:
            return
        period = "a minute" if "minute" in source.lower() else "a request"
        total = f" for each of {completions} completions, {total_tokens} tokens in all" if completions > 1 else ""
        remedy = "; send fewer prompts or a smaller n, set fewer tokens for each, or raise the limit"
        message = f"{reason}{total}; {source} is {cap} tokens {period}{remedy if completions > 1 else ''}"
        raise BadRequest(message, param=param, code="cap_too_small")


def check_prompts(limit: TokenLimit, count: int, *, is_clients: bool) -> None:
    """Raise BadRequest if `limit` has not even one token for each of `count` prompts under β.

    Their reservations would never fit, however long the client waits. `is_clients` says whether the request set the
    limit itself.
    """
    if limit.tokens is None or limit.tokens >= count:
        return
    raising = "raise it" if is_clients else "ask the operator to raise the limit"
    raise BadRequest(
        f"prompt has {count} prompts, but {limit.source.rstrip(',')} is {limit.tokens} tokens, which is less than one "
        f"for each; send fewer prompts in a request, or {raising}",
        param="tts.max_total_tokens" if is_clients else "prompt",
        code="cap_too_small",
    )


def bound_request(
    request: GenerationRequest,
    caps: Caps,
    model_length: int,
    key: str = "",
    own: Caps | None = None,
    requested: int | None = None,
    processes: int = 1,
) -> TokenBound:
    """Return the bound on `request` under `caps`, for a model of `model_length` tokens (0 if unknown).

    `own` are the caps of the request's `key`, which `caps` include. `requested` is the request's own cap. Limits per
    minute are the part of one of `processes`. Raises BadRequest, naming the field and the cap.
    """
    if caps.tokens is None and caps.tokens_per_minute is None and requested is None:
        return UNBOUNDED
    _check_tools(request)
    extra = request.model_extra or {}
    completions = max(_count(extra, "n"), _count(extra, "best_of"))
    if isinstance(request, CompletionRequest):
        completions *= _count_prompts(request)
    put: dict[str, Any] = {}
    callers = _CallerCaps(caps, key, own or Caps(), requested, processes)
    each = _limit_each(request, callers, model_length, completions, put)
    reports_usage = isinstance(request, ResponsesRequest | MessagesRequest)  # at the end of every stream
    adds_usage = bool(request.stream) and not reports_usage and not request.wants_usage
    if adds_usage:
        options = {} if request.stream_options is None else request.stream_options.model_extra or {}
        kept = {name: value for name, value in options.items() if name != "continuous_usage_stats"}
        put["stream_options"] = {**kept, "include_usage": True}
    return TokenBound(
        completions * each,
        completions,
        put,
        adds_usage,
        is_usage_complete=extra.get("use_beam_search") in (None, False),  # usage leaves out dropped beams
        shows_tokens=not reports_usage and request.model_fields_set | extra.keys() <= _TRANSPARENT_FIELDS,
    )


def _limit_each(
    request: GenerationRequest, caps: _CallerCaps, model_length: int, completions: int, put: dict[str, Any]
) -> int:
    """Return the maximum tokens of one completion. If the body does not limit them to that, add the limit to `put`.

    Raises BadRequest.
    """
    names = _LIMIT_FIELDS[type(request)]
    limits: list[tuple[int, str]] = [(value, name) for name in names if (value := getattr(request, name)) is not None]
    if limits:
        each, name = max(limits)
        each = max(1, each)  # vLLM generates one token even for a limit of 0
        caps.check(f"{name} is {each}", name, each, completions)
        return each
    default = DEFAULT_MAX_TOKENS if isinstance(request, CompletionRequest) else None
    cap = caps.all.cap(smaller(caps.requested, None if default is None else default * completions)) or 0
    each = max(1, cap // completions if default is None else min(default, cap // completions))
    caps.check(
        "at least 1 token is needed",
        request.prompt_field if isinstance(request, CompletionRequest) else "n",
        1,
        completions,
    )
    if default is None and 0 < model_length <= each:
        return model_length
    put[names[0]] = each
    return each


def _count(extra: Mapping[str, Any], name: str) -> int:
    value = extra.get(name)
    if value is None:
        return 1
    if type(value) is not int or value < 1:
        raise BadRequest(f"{name} must be a whole number of at least 1, not {value!r:.40}", param=name)
    return value


def _count_prompts(request: CompletionRequest) -> int:
    """Return the number of prompts. A list of token ids is one prompt."""
    prompt, embeddings = request.prompt, (request.model_extra or {}).get("prompt_embeds")
    is_ids = isinstance(prompt, list) and all(type(item) is int for item in prompt)
    lists = [[prompt] if is_ids else prompt, embeddings]
    return max(1, sum(len(value) if isinstance(value, list) else value is not None for value in lists))


def _check_tools(request: GenerationRequest) -> None:
    """Raise BadRequest for tools that let the upstream generate any number of times."""
    tools = (request.model_extra or {}).get("tools") if isinstance(request, ResponsesRequest) else None
    if not tools:
        return
    if not isinstance(tools, list) or not all(isinstance(t, dict) and t.get("type") in _CLIENT_TOOLS for t in tools):
        message = "tokens cannot be limited for tools that the upstream runs; use only tools of type function or custom"
        raise BadRequest(message, param="tools", code="cap_too_small")
