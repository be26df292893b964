"""Convert a Responses request to the chat completion that stands for it: tools, the format of the reply and limits.

Its input becomes messages in `messages.py`. Values that are malformed stay as they are: their check names the field.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

_SHARED: Final = frozenset(
    {
        *("model", "user", "seed", "cache_salt", "tts", "stream", "stream_options", "include_reasoning", "store"),
        *("temperature", "top_p", "top_k", "min_p", "logit_bias", "structured_outputs", "parallel_tool_calls"),
        *("presence_penalty", "frequency_penalty", "repetition_penalty", "chat_template_kwargs"),
        *("stop", "stop_token_ids", "include_stop_str_in_output", "skip_special_tokens", "ignore_eos"),
        *("media_io_kwargs", "mm_processor_kwargs", "priority"),
    }
)
"""Fields that mean the same in a chat completion. Others, such as `max_tokens`, have no effect on a response."""
FORMATS: Final = ("json_schema", "json_object")
"""Types of `text.format` that a chat completion has, too."""


def chat_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a chat completion for those of a Responses request, without its messages."""
    chat = {name: value for name, value in fields.items() if name in _SHARED}
    if fields.get("max_output_tokens") is not None:
        chat["max_completion_tokens"] = fields["max_output_tokens"]
    effort = (fields.get("reasoning") or {}).get("effort")
    if effort is not None:
        chat["reasoning_effort"] = effort
    if tools := fields.get("tools"):
        chat["tools"] = [*map(_chat_tool, tools)] if isinstance(tools, list) else tools
        if fields.get("tool_choice") is not None:
            chat["tool_choice"] = _chat_tool_choice(fields["tool_choice"])
    written = (fields.get("text") or {}).get("format")
    if isinstance(written, dict) and written.get("type") in FORMATS:
        chat["response_format"] = _response_format(written)
    return chat


def is_hosted(tool: object) -> bool:
    """Return whether a tool is not a function of the client, but one that the server would run."""
    return isinstance(tool, dict) and isinstance(tool.get("type"), str) and tool["type"] != "function"


def _chat_tool(tool: Any) -> Any:
    if not isinstance(tool, dict):
        return tool
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


def _chat_tool_choice(choice: Any) -> Any:
    if not isinstance(choice, dict):
        return choice
    return {"type": "function", "function": {"name": choice.get("name")}}


def _response_format(written: Mapping[str, Any]) -> dict[str, Any]:
    if written["type"] == "json_object":
        return {"type": "json_object"}
    return {"type": "json_schema", "json_schema": {name: value for name, value in written.items() if name != "type"}}
