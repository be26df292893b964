"""The most that a request can generate which is handed on, and what its body needs so that this holds.

Texts it is answered with (prompts, `n`) times the tokens of each. A client that asks for more than a cap is refused;
one that sets no limit is given one. Read off vLLM's source: nothing else that it takes has it generate more.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from proxy.admission.token_budget import Caps, request_limit
from proxy.errors import BadRequest
from proxy.requests.chat_request import ChatRequest
from proxy.requests.completion_request import CompletionRequest
from proxy.requests.generation_request import GenerationRequest
from proxy.requests.responses_request import ResponsesRequest

UNSET: Final = 16
"""Tokens of a text that is gone on with, where no limit is set: vLLM's default, and OpenAI's."""
_LIMITS: Final[Mapping[type[GenerationRequest], tuple[str, ...]]] = MappingProxyType(
    {
        ChatRequest: ("max_completion_tokens", "max_tokens"),
        CompletionRequest: ("max_tokens",),
        ResponsesRequest: ("max_output_tokens",),
    }
)
"""Fields that limit a text of each kind of request; the first is set where none is."""
_OWN_TOOLS: Final = ("function", "custom")
"""Tools that the client runs. With others the upstream goes on by itself, as often as the model likes."""
_PLAIN: Final = frozenset(
    {
        *("model", "messages", "prompt", "max_tokens", "max_completion_tokens", "n", "stream", "stream_options"),
        *("temperature", "top_p", "top_k", "min_p", "seed"),
        *("presence_penalty", "frequency_penalty", "repetition_penalty"),
        *("reasoning_effort", "chat_template_kwargs", "user", "metadata", "store", "tts"),
    }
)
"""Fields by which no token is kept from the client. `stop` is none of them: text that might be one is held back."""


class TokenBound(NamedTuple):
    """What one request can generate, and how that is known afterwards."""

    most: int | None = None  # tokens; None where nobody holds it to any
    texts: int = 1  # it is answered with
    put: Mapping[str, Any] = MappingProxyType({})  # members of its body that make it so
    has_asked: bool = False  # the usage of its stream was asked for by the proxy, and is not the client's
    tells: bool = True  # a usage counts all that was generated
    shows: bool = False  # a stream shows all that was generated as text, about as it comes


UNBOUNDED: Final = TokenBound()
GENERATES_NOTHING: Final = TokenBound(most=0)
"""Of a request that generates nothing."""


class _Caps(NamedTuple):
    """The caps of a request, and which of them are its key's own."""

    all: Caps
    key: str
    own: Caps

    def check(self, given: str, param: str, each: int, texts: int) -> None:
        """Raise BadRequest, naming the cap and whose it is, if so many texts of `each` tokens do not fit."""
        cap, source = request_limit(each * texts, self.key, self.own, self.all)
        if cap == each * texts:
            return
        per = "a minute" if "minute" in source.lower() else "a request"
        many = f" and {texts} texts are asked for, {each * texts} tokens in all" if texts > 1 else ""
        raise BadRequest(f"{given}{many}; {source} is {cap} tokens {per}", param=param, code="cap_too_small")


def bound_request(
    request: GenerationRequest, caps: Caps, longest: int, key: str = "", own: Caps | None = None
) -> TokenBound:
    """The bound on `request` under `caps`, for a model of `longest` tokens at most (0: unknown).

    `own` are the caps of the request's `key`, which `caps` contain. Raises BadRequest, naming the field and the cap.
    """
    if caps.tokens is None and caps.tokens_per_minute is None:
        return UNBOUNDED
    _check_tools(request)
    extra = request.model_extra or {}
    texts = max(_whole(extra, "n"), _whole(extra, "best_of"))
    if isinstance(request, CompletionRequest):
        texts *= _prompts(request)
    put: dict[str, Any] = {}
    most = texts * _each(request, _Caps(caps, key, own or Caps()), longest, texts, put)
    is_response = isinstance(request, ResponsesRequest)
    has_asked = bool(request.stream) and not is_response and not request.wants_usage
    if has_asked:
        options = {} if request.stream_options is None else request.stream_options.model_extra or {}
        kept = {name: value for name, value in options.items() if name != "continuous_usage_stats"}
        put["stream_options"] = {**kept, "include_usage": True}
    return TokenBound(
        most,
        texts,
        put,
        has_asked,
        tells=extra.get("use_beam_search") in (None, False),  # beams that were given up are in no usage
        shows=not is_response and request.model_fields_set | extra.keys() <= _PLAIN,
    )


def _each(request: GenerationRequest, caps: _Caps, longest: int, texts: int, put: dict[str, Any]) -> int:
    """Tokens of each text at most; `put` takes the limit where one has to be set. Raises BadRequest."""
    names = _LIMITS[type(request)]
    given: list[tuple[int, str]] = [(value, name) for name in names if (value := getattr(request, name)) is not None]
    if given:
        each, name = max(given)
        each = max(1, each)  # where none is asked for the upstream generates one all the same
        caps.check(f"{name} is {each}", name, each, texts)
        return each
    default = UNSET if isinstance(request, CompletionRequest) else None
    cap = caps.all.cap(None if default is None else default * texts) or 0
    each = max(1, cap // texts if default is None else min(default, cap // texts))
    caps.check(
        "each text needs a token", request.prompt_field if isinstance(request, CompletionRequest) else "n", 1, texts
    )
    if default is None and 0 < longest <= each:
        return longest
    put[names[0]] = each
    return each


def _whole(extra: Mapping[str, Any], name: str) -> int:
    value = extra.get(name)
    if value is None:
        return 1
    if type(value) is not int or value < 1:
        raise BadRequest(f"{name} must be a whole number, 1 or more", param=name)
    return value


def _prompts(request: CompletionRequest) -> int:
    """How many prompts it has; a list of token ids is one."""
    given, embedded = request.prompt, (request.model_extra or {}).get("prompt_embeds")
    is_ids = isinstance(given, list) and all(type(one) is int for one in given)
    lists = [[given] if is_ids else given, embedded]
    return max(1, sum(len(one) if isinstance(one, list) else one is not None for one in lists))


def _check_tools(request: GenerationRequest) -> None:
    """Raise BadRequest for a request whose answer may go through any number of generations."""
    tools = (request.model_extra or {}).get("tools") if isinstance(request, ResponsesRequest) else None
    if not tools:
        return
    if not isinstance(tools, list) or not all(isinstance(t, dict) and t.get("type") in _OWN_TOOLS for t in tools):
        words = "what the upstream's own tools bring about can be held to no cap; name functions of your own"
        raise BadRequest(words, param="tools", code="cap_too_small")
