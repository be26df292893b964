"""Which fields of a request that is handed on go to the upstream: those that OpenAI and vLLM have for clients.

What steers the server rather than the answer (its queue, its caches, its templates) is for admins. What nobody knows
stays here; vLLM would take no notice of it either.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Final

from proxy.errors import Forbidden

_CLIENTS: Final = """
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
    cache_salt
"""
_ADMINS: Final = """
    priority request_id session_id kv_transfer_params ec_transfer_params vllm_xargs logits_processors
    chat_template media_io_kwargs mm_processor_kwargs mm_payload return_mm_kwargs routed_experts_prompt_start
    watermarking enable_response_messages previous_input_messages
"""
FORWARDED: Final = frozenset(_CLIENTS.split())
"""Of the endpoints that are handed on, whatever they do. A tenant's `cache_salt` is put in place of its client's."""

ADMINS: Final = frozenset(_ADMINS.split())
"""vLLM has them too, and one client's could harm another's."""


def withheld(names: Iterable[str], *, is_admin: bool) -> Collection[str]:
    """Those of `names` that stay here. Raises Forbidden, naming it, for one that only an admin may set."""
    unknown = [name for name in names if name not in FORWARDED and name != "tts"]
    if is_admin or not unknown:
        return ()
    for name in unknown:
        if name in ADMINS:
            raise Forbidden(f"{name} is for admins; leave it out, or send the admin key", param=name, code="admin_only")
    return unknown
