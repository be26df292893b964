"""Tables of request fields: those that are forwarded, need an admin key, or cannot be served by a controller.

Clients may send the fields that OpenAI and vLLM define for clients. Fields that control the server rather than the
answer (its queue, caches or templates) need an admin key. Unknown fields are dropped; vLLM ignores them too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Final

from proxy.errors import Forbidden

_CLIENT_FIELDS: Final = """
    model user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention
    messages prompt input instructions prompt_embeds suffix echo best_of n seed stop stream stream_options
    max_tokens max_completion_tokens max_output_tokens min_tokens thinking_token_budget
    temperature top_p top_k min_p frequency_penalty presence_penalty repetition_penalty length_penalty logit_bias
    logprobs top_logprobs prompt_logprobs logprob_token_ids use_beam_search repetition_detection
    stop_token_ids include_stop_str_in_output ignore_eos allowed_token_ids bad_words skip_special_tokens
    spaces_between_special_tokens add_special_tokens truncate_prompt_tokens truncation_side truncation
    response_format structured_outputs guided_json guided_regex guided_choice guided_grammar
    guided_decoding_backend guided_whitespace_pattern text verbosity modalities audio prediction
    tools tool_choice parallel_tool_calls max_tool_calls functions function_call web_search_options
    reasoning reasoning_effort include_reasoning include background conversation previous_response_id
    context_management add_generation_prompt continue_final_message chat_template_kwargs documents
    return_token_ids return_tokens_as_token_ids return_token_offsets return_prompt_text stream_interval
    encoding_format dimensions embed_dtype endianness instruction normalize activation softmax use_activation
    text_1 text_2 data_1 data_2 query queries items top_n return_documents max_tokens_per_doc max_tokens_per_query
    tokens return_token_strs access_programs background_options image moderation prompt_cache_options
    cache_salt system thinking stop_sequences output_config
"""
FORWARDED: Final = frozenset(_CLIENT_FIELDS.split())
"""Fields that are forwarded to the upstream. A tenant's own `cache_salt` replaces the client's."""

ADMINS: Final[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
    {
        "priority": (0,),
        "request_id": (),
        "session_id": (),
        "kv_transfer_params": (),
        "ec_transfer_params": (),
        "vllm_xargs": (),
        "logits_processors": (),
        "chat_template": (),
        "media_io_kwargs": (),
        "mm_processor_kwargs": (),
        "mm_payload": ("tensors",),
        "return_mm_kwargs": (),
        "routed_experts_prompt_start": (0,),
        "watermarking": (True,),
        "enable_response_messages": (False,),
        "previous_input_messages": (),
    }
)
"""Fields of vLLM with which a client could harm other clients, with the values that have no effect.

They need an admin key.
"""

PRIORITY: Final = "priority"
"""Field that goes with every call of a request that a controller serves."""
_UNSERVED_OF_ADMINS: Final = {name: values for name, values in ADMINS.items() if name != PRIORITY}

_EVERY_REPLY: Final[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
    {
        "presence_penalty": (0,),
        "frequency_penalty": (0,),
        "response_format": ({"type": "text"},),
        "structured_outputs": (),
        "stop_token_ids": (),
        "include_stop_str_in_output": (False,),
        "skip_special_tokens": (True,),
    }
)
_COMPLETION_REPLY: Final[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
    {
        **_EVERY_REPLY,
        "min_tokens": (0,),
        "spaces_between_special_tokens": (True,),
        "allowed_token_ids": (),
        "bad_words": (),
        "thinking_token_budget": (-1,),
        "repetition_detection": (),
    }
)
WHOLE_REPLY: Final[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
    {**_COMPLETION_REPLY, "tools": (), "logprobs": (False,), "top_logprobs": (0,)}
)
"""Fields of a chat request that only the upstream can apply, to a whole reply, with the values that have no effect.

A controller serves such a request with branches that are whole replies.
"""
TOOL_CHOICE: Final = "tool_choice"
"""Field that is served with tools, and cannot be served without."""

_GUIDED: Final = dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar"), ())
_TOOLS: Final[Mapping[str, tuple[Any, ...]]] = MappingProxyType({"tools": (), TOOL_CHOICE: ("none", "auto")})
_COMPLETIONS: Final[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
    {
        **_UNSERVED_OF_ADMINS,
        **_GUIDED,
        "n": (1,),
        "echo": (False,),
        "use_beam_search": (False,),
        "truncate_prompt_tokens": (),
        "prompt_logprobs": (),
        "logprob_token_ids": (),
        "return_token_ids": (False,),
    }
)
CHAT: Final[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
    {
        **_COMPLETIONS,
        TOOL_CHOICE: _TOOLS[TOOL_CHOICE],
        "functions": (),
        "function_call": ("none", "auto"),
        "web_search_options": (),
        "modalities": (["text"],),
        "audio": (),
        "documents": (),
        "add_generation_prompt": (True,),
        "continue_final_message": (False,),
        "add_special_tokens": (False,),
        "return_prompt_text": (False,),
    }
)
"""Fields of a chat request that no controller can serve, each with the values that have no effect."""

TEXT: Final[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
    {
        **_COMPLETIONS,
        **_COMPLETION_REPLY,
        "logprobs": (),  # 0 requests them too
        "suffix": ("",),
        "best_of": (1,),
        "prompt_embeds": (),
        "add_special_tokens": (True,),
    }
)
"""Fields of a text completion that no controller can serve, each with the values that have no effect."""

RESPONSES: Final[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
    {
        **_UNSERVED_OF_ADMINS,
        **_GUIDED,
        "response_format": _EVERY_REPLY["response_format"],
        TOOL_CHOICE: _TOOLS[TOOL_CHOICE],
        "top_logprobs": (0,),
        "background": (False,),
        "conversation": (),
        "context_management": (),
        "previous_response_id": (),
        "prompt": (),
    }
)
"""Fields of a Responses request that no controller can serve, each with the values that have no effect."""
RESPONSES_WHOLE_REPLY: Final[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
    {**{name: values for name, values in _EVERY_REPLY.items() if name != "response_format"}, "tools": _TOOLS["tools"]}
)
"""Fields of a Responses request that only the upstream can apply, as in WHOLE_REPLY. vLLM ignores `response_format`."""

STRUCTURED: Final = "structured_output"
TOOLS: Final = "tools"
MULTIMODAL: Final = "multimodal"
REASONS: Final[Mapping[str, str]] = MappingProxyType(
    {
        **dict.fromkeys(("response_format", "structured_outputs"), STRUCTURED),
        **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar"), STRUCTURED),
        **dict.fromkeys(("functions", "function_call", "tool_choice", "web_search_options"), TOOLS),
        **dict.fromkeys(("modalities", "audio"), MULTIMODAL),
    }
)
"""Reason in responses for a field that no controller can serve. For other fields the reason is the field's name."""


def first_effective_field(fields: Iterable[tuple[str, object]], table: Mapping[str, tuple[Any, ...]]) -> str | None:
    """Return the name of the first field of `table` whose value has an effect, or None.

    Null, an empty list and an empty object never have an effect. Fields that are not in the table do not either.
    """
    for name, value in fields:
        if name in table and not _is_among(value, (None, [], {}, *table[name])):
            return name
    return None


def fields_to_drop(fields: Mapping[str, object], *, is_admin: bool, may_prioritise: bool = False) -> Collection[str]:
    """Return the names of fields that are not forwarded. `may_prioritise` says that the key allows `priority`.

    Raises Forbidden, naming the field, if it needs an admin key and its value has an effect.
    """
    if is_admin:
        return ()
    if may_prioritise and PRIORITY in fields:
        others = {name: value for name, value in fields.items() if name != PRIORITY}
        return fields_to_drop(others, is_admin=False)
    name = first_effective_field(fields.items(), ADMINS)
    if name is not None:
        key = "a key with `priority = true`, or the admin key" if name == PRIORITY else "the admin key"
        raise Forbidden(f"{name} needs {key}; leave it out or send that key", param=name, code="admin_only")
    return [name for name in fields if name not in FORWARDED and name not in ADMINS and name != "tts"]


def _is_among(value: object, values: Iterable[object]) -> bool:
    """Return whether `value` equals one of `values`.

    True differs from 1, "1" equals 1, and null members of an object are ignored.
    """
    if isinstance(value, dict):
        value = {name: member for name, member in value.items() if member is not None}
    return any(_equals(value, other) for other in values)


def _equals(value: object, other: object) -> bool:
    if isinstance(value, str) and isinstance(other, bool | int):  # vLLM reads numbers and booleans from strings
        return value.strip().lower() == str(other).lower()
    return value == other and isinstance(value, bool) == isinstance(other, bool)
