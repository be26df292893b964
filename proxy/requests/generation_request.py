"""Request fields of all generation endpoints, and the decision whether a controller can serve a request.

Each endpoint has its own module: `chat_request.py`, `completion_request.py` and `responses_request.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Final, NamedTuple, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from discovery.answers import AUTO, AnswerKind, parse_kind
from discovery.errors import UnknownAnswerKind
from proxy.requests import field_table
from proxy.requests.beta import EFFORTS
from proxy.requests.field_types import MAX_OPTIONS, Biases, Name, PositiveInt32, Seed, Stops, at_most

SAMPLING: Final = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "logit_bias")
"""Sampling fields whose effect on a branch does not depend on the number of calls that generate it."""


class PassThroughReason(NamedTuple):
    """Reason why no controller can serve a request, so that it is forwarded to the upstream."""

    reason: str  # in responses: `structured_output`, `tools`, or the name of a field
    field: str  # field of the request that causes it


def _parsed_kind(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return parse_kind(value)
    except UnknownAnswerKind as error:
        raise ValueError(str(error)) from None


class TtsOptions(BaseModel):
    """The `tts` object of a request: options for the proxy itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    beta: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False, strict=True)] | None = None
    target_tokens: PositiveInt32 | None = None  # tokens to spend on average, converted to β; excludes `beta`
    controller: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    max_total_tokens: PositiveInt32 | None = None  # over all branches and probes
    deadline_s: Annotated[float, Field(gt=0, le=86400, allow_inf_nan=False)] | None = None
    answer: Annotated[  # how answers are read
        AnswerKind,
        BeforeValidator(_parsed_kind, json_schema_input_type=str),
        Field(json_schema_extra={"default": str(AUTO)}),
    ] = AUTO
    required: Annotated[bool, Field(strict=True)] | None = None  # refuse a request that no controller can serve
    progress: Annotated[bool, Field(strict=True)] = False  # stream a line of progress per round, as reasoning


def _default_if_null(value: object) -> object:
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

    def pass_through_reason(self) -> PassThroughReason | None:
        """Return why no controller can serve the request; None if one can."""
        name = field_table.first_effective_field((self.model_extra or {}).items(), self.unsupported_fields)
        if name is None and not (self.effort is None or self.effort in EFFORTS):
            name = self.effort_field
        return None if name is None else PassThroughReason(field_table.REASONS.get(name, name), name)
