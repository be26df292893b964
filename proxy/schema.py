"""What of a chat request the proxy reads, and whether a controller can serve it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Final, TypeVar

import pydantic_core
from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from discovery.answers import AUTO, Kind, parse_kind
from discovery.errors import UnknownKind
from proxy.errors import BadRequest

T = TypeVar("T", bound=BaseModel)

Positive = Annotated[int, Field(ge=1, le=2**31, strict=True)]


def _kind_of(spec: object) -> object:
    """A kind of answers by its name."""
    if not isinstance(spec, str):
        return spec
    try:
        return parse_kind(spec)
    except UnknownKind as error:
        raise ValueError(str(error)) from None


class TtsOptions(BaseModel):
    """The `tts` object of a request: what it asks of the proxy itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    beta: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False, strict=True)] | None = None
    target_tokens: Positive | None = None  # what the request is to spend on average; sets β where none is given
    controller: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    max_total_tokens: Positive | None = None  # over all branches and probes
    deadline_s: Annotated[float, Field(gt=0, le=86400, allow_inf_nan=False)] | None = None
    answer: Annotated[Kind, BeforeValidator(_kind_of)] = AUTO  # how answers are read
    required: Annotated[bool, Field(strict=True)] = False  # 400 rather than pass through when it cannot be served


class FeedbackRequest(BaseModel):
    """What a client says of an answer: one of `correct`, `answer` and `score`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    request: Annotated[str, Field(min_length=1, max_length=200, validation_alias=AliasChoices("request_id", "id"))]
    correct: Annotated[bool, Field(strict=True)] | None = None
    answer: Annotated[str, Field(min_length=1, max_length=10_000)] | None = None
    score: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None

    @model_validator(mode="after")
    def _says_one_thing(self) -> FeedbackRequest:
        if sum(one is not None for one in (self.correct, self.answer, self.score)) != 1:
            raise ValueError("say one of correct, answer and score")
        return self


class StreamOptions(BaseModel):
    """OpenAI's `stream_options`, as far as it concerns the proxy."""

    model_config = ConfigDict(extra="allow", frozen=True)

    include_usage: bool = False


class ChatRequest(BaseModel):
    """A chat completion request. Fields it does not name are the upstream's business."""

    model_config = ConfigDict(extra="allow", frozen=True)

    model: Annotated[str, Field(min_length=1)] | None = None
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: int | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2, allow_inf_nan=False)] | None = None
    logit_bias: dict[str, float] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tts: TtsOptions = TtsOptions()

    def served_by(self, controller: str) -> ChatRequest:
        """The same request, naming a controller."""
        return self.model_copy(update={"tts": self.tts.model_copy(update={"controller": controller})})

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, however they were given."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(stop for stop in given if stop)

    @property
    def branch_limit(self) -> int | None:
        """Tokens the client allows a reply, which here bounds each branch."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def template_fields(self) -> dict[str, Any]:
        """What the chat template takes besides the messages."""
        fields = dict(self.chat_template_kwargs or {})
        if self.reasoning_effort is not None:
            fields.setdefault("reasoning_effort", self.reasoning_effort)
        return {"chat_template_kwargs": fields} if fields else {}

    @property
    def wants_usage(self) -> bool:
        """Whether a stream is to end with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage


SAMPLING: Final = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "logit_bias")
"""Fields that mean the same for a branch generated in pieces as for one in a single request."""

# Fields that change nothing in the answer of a branch.
_INDIFFERENT: Final = {"user", "metadata", "store", "service_tier", "prompt_cache_key", "safety_identifier"}

# Values of fields a controller cannot serve that ask for nothing.
_NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
    {
        "n": (1,),
        "logprobs": (False,),
        "top_logprobs": (0,),
        "presence_penalty": (0,),
        "frequency_penalty": (0,),
        "response_format": ({"type": "text"},),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (True, False),
        "modalities": (["text"],),
    }
)


def parse(raw: bytes) -> tuple[ChatRequest, dict[str, Any]]:
    """A chat request and its JSON object. Raises BadRequest naming the first field that is wrong."""
    body = _object(raw)
    return _validated(ChatRequest, body), body


def parse_feedback(raw: bytes) -> FeedbackRequest:
    """What a client says of an answer. Raises BadRequest naming the first field that is wrong."""
    return _validated(FeedbackRequest, _object(raw))


def _object(raw: bytes) -> dict[str, Any]:
    try:
        body = pydantic_core.from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise BadRequest(f"the body is not JSON: {error}", code="bad_json") from None
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object", code="bad_json")
    return body


def _validated(made: type[T], body: dict[str, Any]) -> T:
    try:
        return made.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        said = f"{where}: {first['msg']}" if where else first["msg"]
        raise BadRequest(said, param=where or None, code=_code(where)) from None


def _code(where: str) -> str | None:
    return "bad_beta" if where == "tts.beta" else None


def unserved(request: ChatRequest) -> str | None:
    """The field of `request` no controller can serve yet, or None. Such requests pass through."""
    for name, value in (request.model_extra or {}).items():
        asks = value not in (None, [], {}) and value not in _NEUTRAL.get(name, ())
        if asks and name not in _INDIFFERENT:
            return name
    for message in request.messages:
        content = message.get("content")
        if isinstance(content, list) and any(_kind(part) != "text" for part in content):
            return "content"
        if message.get("tool_calls") or message.get("role") == "tool":
            return "tools"
    return None


def _kind(part: object) -> object:
    return part.get("type") if isinstance(part, dict) else "text"
