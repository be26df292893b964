"""Convert messages and items of requests to chat messages for the upstream's `/tokenize`, as vLLM itself does."""

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


def _is_partial(item: object) -> bool:
    """Return whether a Responses item is unfinished, so that vLLM would continue it."""
    return isinstance(item, dict) and item.get("status") in ("in_progress", "incomplete")


def messages_of(items: Sequence[object]) -> list[dict[str, Any]] | None:
    """Convert the items of a Responses request to chat messages, as vLLM does. Return None unless all are text.

    Reasoning and the assistant's text after it become one message. The result is None too if the last item is
    unfinished: vLLM would continue it, but no controller can.
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
        else:
            messages.append(message)
    return messages


def _message(item: object) -> dict[str, Any] | None:
    """Return a Responses item as a chat message; None if it is not text."""
    if not isinstance(item, dict):
        return None
    if item.get("type") == "reasoning":
        return _reasoning_message(item)
    if item.get("type", "message") != "message" or item.get("role") not in _ROLES:
        return None
    content = item.get("content")
    if isinstance(content, list):
        if not content or any(part_type(part) not in ("input_text", "output_text") for part in content):
            return None
        texts = [part.get("text") for part in content]
        if not all(isinstance(text, str) for text in texts):
            return None
        takes_first = len(texts) == 1 or item["role"] == "assistant"  # vLLM reads only the first part then
        content = texts[0] if takes_first else [{"type": "text", "text": text} for text in texts]
    elif not isinstance(content, str):
        return None
    return {"role": item["role"], "content": content}


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


def why_not_text(items: Sequence[object]) -> str | None:
    """Return why Responses items are not only text: `field_table.TOOLS`, `field_table.MULTIMODAL` or None."""
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
