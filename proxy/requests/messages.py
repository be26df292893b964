"""Convert messages and items of requests to chat messages, as vLLM itself does, and find what only vLLM can render."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from proxy.requests import field_table
from proxy.requests.beta import NO_EFFORT


def template_fields(kwargs: Mapping[str, Any] | None, effort: str | None) -> dict[str, Any]:
    """Return the chat template's variables, as vLLM sets them from `chat_template_kwargs` and a reasoning effort.

    The effort overrides the variable `reasoning_effort`, and sets `enable_thinking` unless the client did.
    """
    variables = dict(kwargs or {})
    if effort is not None:
        variables["reasoning_effort"] = effort
        variables.setdefault("enable_thinking", effort != NO_EFFORT)
    return {"chat_template_kwargs": variables} if variables else {}


_ROLES: Final = ("user", "assistant", "system", "developer")
_TOOL_ROLES: Final = ("tool", "function")
"""Roles of messages that hold a tool's result."""


def _is_partial(item: object) -> bool:
    """Return whether a Responses item is unfinished, so that vLLM would continue it."""
    return isinstance(item, dict) and item.get("status") in ("in_progress", "incomplete")


def messages_of(items: Sequence[object]) -> list[dict[str, Any]] | None:
    """Convert the items of a Responses request to chat messages, as vLLM does. Return None if one has no counterpart.

    Texts, images, reasoning, calls of functions and their results have one. Reasoning, the assistant's text after it
    and calls after that become one message. The result is None too if the last item is unfinished: vLLM would continue
    it, but no controller can.
    """
    if not items or _is_partial(items[-1]):
        return None
    messages: list[dict[str, Any]] = []
    for item in items:
        message = _message(item)
        if message is None:
            return None
        last = messages[-1] if messages else {}
        is_assistant = last.get("role") == message["role"] == "assistant"
        if is_assistant and last.keys() & message.keys() == {"role"}:
            last.update(message)
        elif is_assistant and "tool_calls" in last and "tool_calls" in message:
            last["tool_calls"] += message["tool_calls"]
        else:
            messages.append(message)
    return messages


def _message(item: object) -> dict[str, Any] | None:
    """Return a Responses item as a chat message; None if it has no counterpart."""
    if not isinstance(item, dict):
        return None
    if item.get("type") == "reasoning":
        return _reasoning_message(item)
    if item.get("type") == "function_call":
        return _call_message(item)
    if item.get("type") == "function_call_output":
        return _result_message(item)
    if item.get("type", "message") != "message" or item.get("role") not in _ROLES:
        return None
    content = item.get("content")
    if isinstance(content, list):
        parts = _chat_parts(content)
        if parts is None:
            return None
        is_text = all(part["type"] == "text" for part in parts)
        is_single = len(parts) == 1 or item["role"] == "assistant"  # of an assistant, vLLM reads the first text only
        content = parts[0]["text"] if is_text and is_single else parts
    elif not isinstance(content, str):
        return None
    return {"role": item["role"], "content": content}


def _chat_parts(parts: Sequence[object]) -> list[dict[str, Any]] | None:
    """Convert the parts of an item to those of a chat message; None if there are none or one has no counterpart."""
    converted: list[dict[str, Any]] = []
    for part in parts:
        if not isinstance(part, dict):
            return None
        text, image = part.get("text"), part.get("image_url")
        if part.get("type") in ("input_text", "output_text") and isinstance(text, str):
            converted.append({"type": "text", "text": text})
        elif part.get("type") == "input_image" and isinstance(image, str):
            detail = {} if part.get("detail") is None else {"detail": part["detail"]}
            converted.append({"type": "image_url", "image_url": {"url": image, **detail}})
        else:
            return None
    return converted or None


def _call_message(item: Mapping[str, Any]) -> dict[str, Any] | None:
    """Convert a call of a function to an assistant's message."""
    call_id, name, arguments = item.get("call_id"), item.get("name"), item.get("arguments")
    if not (isinstance(call_id, str) and isinstance(name, str) and isinstance(arguments, str)):
        return None
    call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "tool_calls": [call]}


def _result_message(item: Mapping[str, Any]) -> dict[str, Any] | None:
    """Convert the result of a function to a tool's message."""
    call_id, output = item.get("call_id"), item.get("output")
    content = _chat_parts(output) if isinstance(output, list) else output
    if not isinstance(call_id, str) or not isinstance(content, str | list):
        return None
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def _reasoning_message(item: Mapping[str, Any]) -> dict[str, Any] | None:
    """Convert a reasoning item to a chat message with the text of the first part of its content or summary."""
    if item.get("encrypted_content"):  # vLLM cannot read it
        return None
    parts = item.get("content") or item.get("summary") or [{"text": ""}]
    text = parts[0].get("text") if isinstance(parts, list) and isinstance(parts[0], dict) else None
    return {"role": "assistant", "reasoning": text} if isinstance(text, str) else None


def with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with its reasoning under the key `reasoning`, the only one that `/tokenize` reads."""
    if message.get("reasoning_content") is None or message.get("reasoning") is not None:
        return message
    return {**message, "reasoning": message["reasoning_content"]}


def why_not_tokens(messages: Sequence[Mapping[str, Any]]) -> str | None:
    """Return why only the upstream can render chat messages: `field_table.MULTIMODAL`, `field_table.TOOLS` or None."""
    for message in messages:
        content = message.get("content")
        if isinstance(content, list) and any(part_type(part) != "text" for part in content):
            return field_table.MULTIMODAL
        if message.get("tool_calls") or message.get("function_call") or message.get("role") in _TOOL_ROLES:
            return field_table.TOOLS
    return None


def why_no_messages(items: Sequence[object]) -> str | None:
    """Return what Responses items without a counterpart are about: `field_table.TOOLS`, `MULTIMODAL` or None."""
    if any(str(part_type(item)).endswith(("_call", "_call_output", "_tools")) for item in items):
        return field_table.TOOLS
    parts = [str(part_type(part)) for item in items for part in _parts(item)]
    is_multimodal = any(part.startswith("input_") and part != "input_text" for part in parts)
    return field_table.MULTIMODAL if is_multimodal else None


def _parts(item: object) -> Sequence[object]:
    content = item.get("content") if isinstance(item, dict) else None
    return content if isinstance(content, list) else ()


def part_type(part: object) -> object:
    """Return the type of a message part. A bare string is `text`."""
    return part.get("type") if isinstance(part, dict) else "text"
