"""Request body of POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final

from proxy.requests import field_table
from proxy.requests.field_types import Messages, Name, Options, TokenCount
from proxy.requests.generation_request import GenerationRequest, PassThroughReason
from proxy.requests.messages import part_type, template_fields, with_reasoning

_TOOL_ROLES: Final = ("tool", "function")
"""Roles of messages that hold a tool's result."""


class ChatRequest(GenerationRequest):
    """A chat completion request."""

    prompt_field: ClassVar[str] = "messages"
    unsupported_fields: ClassVar[Mapping[str, tuple[Any, ...]]] = field_table.CHAT

    messages: Messages
    max_tokens: TokenCount | None = None
    max_completion_tokens: TokenCount | None = None
    reasoning_effort: Name | None = None
    include_reasoning: bool | None = True
    chat_template_kwargs: Options | None = None

    @property
    def branch_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def effort(self) -> str | None:
        return self.reasoning_effort

    @property
    def conversation(self) -> Sequence[Mapping[str, Any]]:
        return [with_reasoning(message) for message in self.messages]

    @property
    def template_fields(self) -> dict[str, Any]:
        return template_fields(self.chat_template_kwargs, self.reasoning_effort)

    def pass_through_reason(self) -> PassThroughReason | None:
        reason = super().pass_through_reason()
        if reason is not None:
            return reason
        if not self.messages:
            return PassThroughReason(self.prompt_field, self.prompt_field)
        for message in self.messages:
            content = message.get("content")
            if isinstance(content, list) and any(part_type(part) != "text" for part in content):
                return PassThroughReason(field_table.MULTIMODAL, self.prompt_field)
            if message.get("tool_calls") or message.get("function_call") or message.get("role") in _TOOL_ROLES:
                return PassThroughReason(field_table.TOOLS, self.prompt_field)
        return None
