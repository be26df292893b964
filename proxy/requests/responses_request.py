"""Request body of POST /v1/responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Final

from pydantic import BaseModel, ConfigDict, Field

from proxy.requests import field_table
from proxy.requests.field_types import MAX_MESSAGES, MAX_OPTIONS, Name, Options, TokenCount, at_most
from proxy.requests.generation_request import GenerationRequest, PassThroughReason
from proxy.requests.messages import messages_of, template_fields, why_no_messages, why_not_tokens
from proxy.requests.reply_fields import RESPONSES_NAMES, FieldNames
from proxy.requests.responses_chat import FORMATS, chat_fields, is_hosted

_TEXT_FORMAT: Final[Mapping[str, tuple[Any, ...]]] = MappingProxyType({"format": ({"type": "text"},)})
"""Members of `text` that change a reply, with the values that have no effect. vLLM ignores `verbosity`."""
_IGNORED_INCLUDES: Final = {
    "reasoning.encrypted_content",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
}
"""Values of `include` that add nothing to a text reply. vLLM does not encrypt reasoning or support the others."""


class Reasoning(BaseModel):
    """The `reasoning` object of a Responses request."""

    model_config = ConfigDict(extra="allow", frozen=True)

    effort: Name | None = None


class ResponsesRequest(GenerationRequest):
    """A Responses request. A controller can serve it if its `input` can be converted to chat messages."""

    prompt_field: ClassVar[str] = "input"
    effort_field: ClassVar[str] = "reasoning"
    unsupported_fields: ClassVar[Mapping[str, tuple[Any, ...]]] = field_table.RESPONSES
    whole_reply_fields: ClassVar[Mapping[str, tuple[Any, ...]]] = field_table.RESPONSES_WHOLE_REPLY
    reply_field_names: ClassVar[FieldNames] = RESPONSES_NAMES

    input: Annotated[Any, at_most(MAX_MESSAGES, "items")] = None
    instructions: str | None = None
    max_output_tokens: TokenCount | None = None
    reasoning: Annotated[Reasoning | None, at_most(MAX_OPTIONS, "members")] = None
    include_reasoning: bool | None = True
    include: Annotated[list[Name], Field(max_length=MAX_OPTIONS)] | None = None
    truncation: Name | None = "disabled"
    text: Options | None = None
    chat_template_kwargs: Options | None = None

    @property
    def branch_limit(self) -> int | None:
        return self.max_output_tokens

    @property
    def effort(self) -> str | None:
        return None if self.reasoning is None else self.reasoning.effort

    @property
    def conversation(self) -> Sequence[Mapping[str, Any]]:
        system = [] if not self.instructions else [{"role": "system", "content": self.instructions}]
        return [*system, *(self._messages or [])]

    @property
    def template_fields(self) -> dict[str, Any]:
        return template_fields(self.chat_template_kwargs, self.effort)

    @property
    def truncates(self) -> bool:
        return self.truncation == "auto"

    @cached_property
    def _messages(self) -> list[dict[str, Any]] | None:
        """The input as chat messages; None unless each item has a counterpart and the last one is complete."""
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        return messages_of(self.input) if isinstance(self.input, list) else None

    def pass_through_reason(self) -> PassThroughReason | None:
        reason = super().pass_through_reason()
        if reason is not None:
            return reason
        if self._constrains_text and self._text_format_type not in FORMATS:
            return PassThroughReason(field_table.STRUCTURED, "text")
        fields = self.model_extra or {}
        tools, choice = fields.get("tools"), fields.get(field_table.TOOL_CHOICE)
        if isinstance(tools, list) and any(map(is_hosted, tools)):
            return PassThroughReason(field_table.TOOLS, "tools")
        if is_hosted(choice):  # it names a tool of the server
            return PassThroughReason(field_table.TOOLS, field_table.TOOL_CHOICE)
        if not set(self.include or ()) <= _IGNORED_INCLUDES:
            return PassThroughReason("include", "include")
        if self.truncation not in (None, "disabled", "auto"):
            return PassThroughReason("truncation", "truncation")
        if self._messages is None:
            items = self.input if isinstance(self.input, list) else []
            return PassThroughReason(why_no_messages(items) or self.prompt_field, self.prompt_field)
        if self.truncates and self.whole_reply_reason() is not None:  # only a Responses request can be shortened
            return PassThroughReason("truncation", "truncation")
        return None

    def whole_reply_reason(self) -> PassThroughReason | None:
        reason = super().whole_reply_reason()
        if reason is not None:
            return reason
        if self._constrains_text:
            return PassThroughReason(field_table.STRUCTURED, "text")
        rendered = why_not_tokens(self._messages or [])
        return None if rendered is None else PassThroughReason(rendered, self.prompt_field)

    def chat_body(self, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**chat_fields(fields), "messages": self.conversation}

    @property
    def _constrains_text(self) -> bool:
        return field_table.first_effective_field((self.text or {}).items(), _TEXT_FORMAT) is not None

    @property
    def _text_format_type(self) -> object:
        written = (self.text or {}).get("format")
        return written.get("type") if isinstance(written, dict) else None
