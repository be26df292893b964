"""Request body of POST /v1/messages, Anthropic's API, which the upstream answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final

from proxy.requests.field_types import Messages, TokenCount
from proxy.requests.generation_request import GenerationRequest, PassThroughReason

NO_CONTROLLER: Final = PassThroughReason("messages", "", "use /v1/chat/completions")
"""Why no controller serves Anthropic's API."""


class MessagesRequest(GenerationRequest):
    """A request of Anthropic's API. It is always forwarded."""

    prompt_field: ClassVar[str] = "messages"
    unsupported_fields: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    messages: Messages
    max_tokens: TokenCount | None = None

    @property
    def branch_limit(self) -> int | None:
        return self.max_tokens

    @property
    def conversation(self) -> Sequence[Mapping[str, Any]]:
        system = (self.model_extra or {}).get("system")
        return self.messages if system is None else [{"role": "system", "content": system}, *self.messages]

    def pass_through_reason(self) -> PassThroughReason:
        return NO_CONTROLLER
