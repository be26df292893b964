"""Turn the messages and items of requests into what the upstream's `/tokenize` takes, as vLLM itself does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from proxy.requests import field_table
from proxy.requests.beta import NO_EFFORT


def template_fields(given: Mapping[str, Any] | None, effort: str | None) -> dict[str, Any]:
    """Return the chat template's variables as vLLM sets them: an effort wins, `enable_thinking` follows from it."""
    variables = dict(given or {})
    if effort is not None:
        variables["reasoning_effort"] = effort
        variables.setdefault("enable_thinking", effort != NO_EFFORT)
    return {"chat_template_kwargs": variables} if variables else {}


_ROLES: Final = ("user", "assistant", "system", "developer")


def _is_partial(item: object) -> bool:
    """Whether an item of a Responses request is unfinished, so that vLLM would continue it."""
    return isinstance(item, dict) and item.get("status") in ("in_progress", "incomplete")


def messages_of(items: Sequence[object]) -> list[dict[str, Any]] | None:
    """Turn the items of a Responses request into chat messages as vLLM does, or None if they are not of text.

    A thought and the assistant's text after it become one message. vLLM would continue a last item that is unfinished;
    no controller does.
    """
    if not items or _is_partial(items[-1]):
        return None
    messages: list[dict[str, Any]] = []
    for item in items:
        message = _message(item)
        if message is None:
            return None
        last = messages[-1] if messages else {}
        is_rest = last.get("role") == message["role"] == "assistant" and not last.keys() & message.keys() - {"role"}
        if is_rest:
            last.update(message)
        else:
            messages.append(message)
    return messages


def _message(item: object) -> dict[str, Any] | None:
    """Turn an item of a Responses request into a chat message, or None if it is not one of text."""
    if not isinstance(item, dict):
        return None
    if item.get("type") == "reasoning":
        return _thought(item)
    if item.get("type", "message") != "message" or item.get("role") not in _ROLES:
        return None
    content = item.get("content")
    if isinstance(content, list):
        if not content or any(kind(part) not in ("input_text", "output_text") for part in content):
            return None
        texts = [part.get("text") for part in content]
        if not all(isinstance(text, str) for text in texts):
            return None
        is_first_alone = len(texts) == 1 or item["role"] == "assistant"  # of whose parts vLLM takes the first
        content = texts[0] if is_first_alone else [{"type": "text", "text": text} for text in texts]
    elif not isinstance(content, str):
        return None
    return {"role": item["role"], "content": content}


def _thought(item: Mapping[str, Any]) -> dict[str, Any] | None:
    """Turn a reasoning item into a message with the text of its first part, or else of its summary's."""
    if item.get("encrypted_content"):  # vLLM cannot read it
        return None
    parts = item.get("content") or item.get("summary") or [{"text": ""}]
    text = parts[0].get("text") if isinstance(parts, list) and isinstance(parts[0], dict) else None
    return {"role": "assistant", "reasoning": text} if isinstance(text, str) else None


def with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with its thought under vLLM's newer name, which is the only one that `/tokenize` reads."""
    if message.get("reasoning_content") is None or message.get("reasoning") is not None:
        return message
    return {**message, "reasoning": message["reasoning_content"]}


def why_not_text(items: Sequence[object]) -> str | None:
    """Return what the items of a Responses request are besides text: tools' or multimodal, or None."""
    if any(str(kind(item)).endswith(("_call", "_call_output", "_tools")) for item in items):
        return field_table.TOOLS
    parts = [str(kind(part)) for item in items for part in _parts(item)]
    is_multimodal = any(part.startswith("input_") and part != "input_text" for part in parts)
    return field_table.MULTIMODAL if is_multimodal else None


def _parts(item: object) -> Sequence[object]:
    content = item.get("content") if isinstance(item, dict) else None
    return content if isinstance(content, list) else ()


def kind(part: object) -> object:
    """Return the type of a part of a message; a bare string is text."""
    return part.get("type") if isinstance(part, dict) else "text"
