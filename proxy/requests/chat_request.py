"""Request body of POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from proxy.requests import field_table
from proxy.requests.field_types import Messages, Name, Options, TokenCount
from proxy.requests.generation_request import GenerationRequest, PassThroughReason
from proxy.requests.messages import template_fields, why_not_tokens, with_reasoning


class ChatRequest(GenerationRequest):
    """A chat completion request."""

    prompt_field: ClassVar[str] = "messages"
    unsupported_fields: ClassVar[Mapping[str, tuple[Any, ...]]] = field_table.CHAT
    whole_reply_fields: ClassVar[Mapping[str, tuple[Any, ...]]] = field_table.WHOLE_REPLY

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
        return None if self.messages else PassThroughReason(self.prompt_field, self.prompt_field)

    def whole_reply_reason(self) -> PassThroughReason | None:
        reason = super().whole_reply_reason()
        if reason is not None:
            return reason
        rendered = why_not_tokens(self.messages)
        return None if rendered is None else PassThroughReason(rendered, self.prompt_field)
