"""Request fields of all generation endpoints, and the decision whether a controller can serve a request.

Each endpoint has its own module: `chat_request.py`, `completion_request.py`,
`responses_request.py` and `anthropic_request.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Final, Literal, NamedTuple, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from discovery.answers import AUTO, AnswerKind, parse_kind
from discovery.answers.code import MAX_EXAMPLES, as_arguments
from discovery.errors import UnknownAnswerKind
from proxy.errors import BadRequest
from proxy.requests import field_table
from proxy.requests.beta import EFFORTS
from proxy.requests.field_types import (
    MAX_NAME,
    MAX_OPTIONS,
    Biases,
    Int64,
    Name,
    PositiveInt32,
    Seed,
    Share,
    Stops,
    at_most,
)
from proxy.requests.reply_fields import CHAT_NAMES, FieldNames
from proxy.types import Otherwise

SAMPLING: Final = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "logit_bias")
"""Sampling fields whose effect on a branch does not depend on the number of calls that generate it."""
_PRIORITY: Final = TypeAdapter(Int64)
MAX_INPUT_CHARS: Final = 20_000
"""Maximum number of characters of `tts.code.inputs`."""
MAX_EXCLUDED: Final = 1024
"""Maximum number of arguments in `tts.tools.exclude`."""


class PassThroughReason(NamedTuple):
    """Reason why no controller can serve a request, so that it is forwarded to the upstream."""

    reason: str  # in responses: `structured_output`, `tools`, or the name of a field
    field: str  # field of the request that causes it; empty if none does
    remedy: str = ""  # what the client can do instead of leaving out the field


def _parsed_kind(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return parse_kind(value)
    except UnknownAnswerKind as error:
        raise ValueError(str(error)) from None


def _checked_inputs(inputs: list[list[Any]]) -> list[list[Any]]:
    """Return `inputs` if all of them can be written as literals, and are not too long together."""
    literals = [as_arguments(args) for args in inputs]
    if None in literals:
        raise ValueError(f"the arguments of call {literals.index(None)} cannot be written as literals of Python")
    if (chars := sum(len(literal or "") for literal in literals)) > MAX_INPUT_CHARS:
        raise ValueError(f"have {chars} characters together; at most {MAX_INPUT_CHARS} are accepted")
    return inputs


class ToolOptions(BaseModel):
    """The object `tts.tools` of a request: how calls of tools are compared."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    exclude: Annotated[  # arguments that are not compared: `ARGUMENT`, or `TOOL.ARGUMENT`
        list[Name], Field(max_length=MAX_EXCLUDED), at_most(MAX_EXCLUDED, "arguments")
    ] = []


class CodeOptions(BaseModel):
    """The object `tts.code` of a request: how functions in replies are called to compare them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    function: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=MAX_NAME)] | None = None
    inputs: Annotated[  # lists of arguments, one for each call
        list[list[Any]], Field(max_length=MAX_EXAMPLES), at_most(MAX_EXAMPLES, "calls"), AfterValidator(_checked_inputs)
    ] = []

    @property
    def arguments(self) -> Sequence[str]:
        """The inputs as literals."""
        return [literal for args in self.inputs if (literal := as_arguments(args)) is not None]


class TtsOptions(BaseModel):
    """The `tts` object of a request: options for the proxy itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    beta: Share | None = None
    target_tokens: PositiveInt32 | None = None  # tokens to spend on average, converted to β; excludes `beta`
    controller: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    max_total_tokens: PositiveInt32 | None = None  # over all branches and probes
    deadline_s: Annotated[float, Field(gt=0, le=86400, allow_inf_nan=False)] | None = None
    answer: Annotated[  # how answers are read
        AnswerKind,
        BeforeValidator(_parsed_kind, json_schema_input_type=str),
        Field(json_schema_extra={"default": str(AUTO)}),
    ] = AUTO
    min_agreement: Share | None = None  # share of the votes that the answer should have; 0: no matter
    otherwise: Otherwise | None = None  # what follows if it has less
    escalate_beta: Share | None = None  # β up to which `escalate` spends
    tools: ToolOptions | None = None
    code: CodeOptions | None = None
    required: Annotated[bool, Field(strict=True)] | None = None  # refuse a request that no controller can serve
    progress: Annotated[bool, Field(strict=True)] | Literal["rounds"] = (
        False  # stream rounds: as reasoning, or as objects
    )
    signals: Annotated[bool, Field(strict=True)] = False  # record signals of confidence too; for `everything` only


def _default_if_null(value: object) -> object:
    if value is not None and not isinstance(value, dict | TtsOptions):
        raise ValueError('must be an object such as {"beta": 0.5}')
    return TtsOptions() if value is None else value


class StreamOptions(BaseModel):
    """OpenAI's `stream_options`; the proxy reads `include_usage` only."""

    model_config = ConfigDict(extra="allow", frozen=True)

    include_usage: bool | None = False


class GenerationRequest(BaseModel):
    """A request to generate text: the fields that the endpoints share.

    Every value that vLLM 0.32 accepts is accepted, whether or not a controller can serve the request.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    prompt_field: ClassVar[str]  # name of the field that holds the prompt
    effort_field: ClassVar[str] = "reasoning_effort"  # name of the field that holds the reasoning effort
    unsupported_fields: ClassVar[Mapping[str, tuple[Any, ...]]]  # no controller serves them: see `field_table.CHAT`
    whole_reply_fields: ClassVar[Mapping[str, tuple[Any, ...]]] = {}  # see `field_table.WHOLE_REPLY`
    reply_field_names: ClassVar[FieldNames] = CHAT_NAMES  # of tools and formats, for messages of errors

    model: Name | None = None  # an empty name counts as none
    stream: bool | None = False
    stream_options: Annotated[StreamOptions | None, at_most(MAX_OPTIONS, "members")] = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    logit_bias: Biases | None = None
    seed: Seed | None = None
    ignore_eos: bool | None = False
    cache_salt: Annotated[str, Field(max_length=1024)] | None = None
    stop: Stops | None = None
    tts: Annotated[
        TtsOptions,
        BeforeValidator(_default_if_null, json_schema_input_type=TtsOptions | None),
        at_most(MAX_OPTIONS, "members"),
    ] = TtsOptions()

    def split_by_prompt(self) -> Sequence[Self]:
        """Return one request for each prompt."""
        return [self]

    def with_controller(self, controller: str) -> Self:
        """Return a copy that names `controller`."""
        return self.model_copy(update={"tts": self.tts.model_copy(update={"controller": controller})})

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings, without empty ones."""
        return tuple(stop for stop in self.stop or () if stop)

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def branch_limit(self) -> int | None:
        """The client's limit on the tokens of a reply. The proxy applies it to each branch."""
        raise NotImplementedError

    @property
    def effort(self) -> str | None:
        """The reasoning effort as OpenAI names it, such as `low`."""
        return None

    @property
    def truncates(self) -> bool:
        """Whether the upstream may shorten a prompt that is too long."""
        return False

    @property
    def prompt_text(self) -> str | None:
        """The prompt, if it is a plain text. No chat template is applied to it."""
        return None

    @property
    def prompt_ids(self) -> Sequence[int] | None:
        """The prompt, if it is a list of token ids."""
        return None

    @property
    def conversation(self) -> Sequence[Mapping[str, Any]]:
        """The prompt, if it is a list of chat messages; else empty."""
        return ()

    @property
    def template_fields(self) -> dict[str, Any]:
        """Additional fields for the chat template."""
        return {}

    @property
    def priority(self) -> int:
        """The priority at the upstream, where lower is served earlier. Raises BadRequest if it is no 64-bit integer."""
        value = (self.model_extra or {}).get(field_table.PRIORITY)
        try:
            return 0 if value is None else _PRIORITY.validate_python(value)
        except ValidationError:
            message = "must be an integer of 64 bits, such as -5; requests with a lower one are served earlier"
            raise BadRequest(f"{field_table.PRIORITY}: {message}", param=field_table.PRIORITY) from None

    def chat_body(self, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the fields of the chat completion that stands for the request. `fields` are those of its body."""
        return fields

    def pass_through_reason(self) -> PassThroughReason | None:
        """Return why no controller can serve the request; None if one can."""
        fields = self.model_extra or {}
        name = field_table.first_effective_field(fields.items(), self.unsupported_fields)
        if name == field_table.TOOL_CHOICE and self.whole_reply_fields and fields.get("tools"):
            others = {field: value for field, value in self.unsupported_fields.items() if field != name}
            name = field_table.first_effective_field(fields.items(), others)
        if name is None and not (self.effort is None or self.effort in EFFORTS):
            name = self.effort_field
        return None if name is None else PassThroughReason(field_table.REASONS.get(name, name), name)

    def whole_reply_reason(self) -> PassThroughReason | None:
        """Return why branches must be whole replies of the upstream; None if they can be generated by token ids."""
        name = field_table.first_effective_field((self.model_extra or {}).items(), self.whole_reply_fields)
        if name is None and self.whole_reply_fields and self.tts.answer.is_judged:
            name = "tts.answer"
        return None if name is None else PassThroughReason(field_table.REASONS.get(name, name), name)
