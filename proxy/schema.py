"""What of a request the proxy reads, and whether a controller can serve it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Final, Self, TypeVar

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from discovery.answers import AUTO, Kind, canonical, parse_kind
from discovery.answers.veil import MARK
from discovery.errors import UnknownKind
from proxy import strict
from proxy.errors import BadRequest

T = TypeVar("T", bound=BaseModel)

Positive = Annotated[int, Field(ge=1, le=2**31, strict=True)]
Some = Annotated[int, Field(ge=1)]


def _as_list(given: object) -> object:
    return [given] if isinstance(given, str) else given


TokenId = Annotated[str, AfterValidator(lambda text: str(int(text)))]
_Stops = Annotated[list[str], Field(max_length=4)]
Stops = Annotated[_Stops, BeforeValidator(_as_list, json_schema_input_type=str | _Stops)]


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
    progress: Annotated[bool, Field(strict=True)] = False  # a stream tells of each round, as reasoning


def _or_nothing(given: object) -> object:
    return TtsOptions() if given is None else given


def _comparable(answer: str) -> str:
    """An answer that others can be compared with."""
    if canonical(answer) is None:
        raise ValueError("there is nothing in it that an answer could be compared with")
    if answer.lstrip().startswith(MARK):
        raise ValueError(f"it begins with {MARK!r}, as what the proxy keeps of an answer does; say the answer itself")
    return answer


class FeedbackRequest(BaseModel):
    """What a client says of an answer: one of `correct`, `answer` and `score`; `id` is `request_id` by another name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    request: Annotated[str, Field(min_length=1, max_length=200, validation_alias=AliasChoices("request_id", "id"))]
    correct: Annotated[bool, Field(strict=True)] | None = None
    answer: Annotated[str, Field(min_length=1, max_length=10_000), AfterValidator(_comparable)] | None = None
    score: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False, strict=True)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _names_one_request(cls, given: dict[str, Any]) -> dict[str, Any]:
        if given.get("id", ...) == given.get("request_id"):
            return {name: value for name, value in given.items() if name != "id"}
        return given

    @model_validator(mode="after")
    def _says_one_thing(self) -> FeedbackRequest:
        if sum(one is not None for one in (self.correct, self.answer, self.score)) != 1:
            raise ValueError("say one of correct, answer and score")
        return self


class StreamOptions(BaseModel):
    """OpenAI's `stream_options`, as far as it concerns the proxy."""

    model_config = ConfigDict(extra="allow", frozen=True)

    include_usage: bool | None = False


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


_TOOLS: Final = ("tool", "function")
"""Roles of messages that say what a tool has."""


class Generation(BaseModel):
    """A request for text, as far as its endpoints agree. Fields it does not name are the upstream's business.

    What vLLM 0.32 takes is taken here, in the forms it takes it, whether or not a controller serves the request.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    param: ClassVar[str]  # the field its prompt is in
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = _NEUTRAL

    model: str | None = None  # empty is none
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: int | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    logit_bias: dict[TokenId, Annotated[float, Field(allow_inf_nan=False)]] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stops | None = None
    tts: Annotated[TtsOptions, BeforeValidator(_or_nothing, json_schema_input_type=TtsOptions | None)] = TtsOptions()

    def served_by(self, controller: str) -> Self:
        """The same request, naming a controller."""
        return self.model_copy(update={"tts": self.tts.model_copy(update={"controller": controller})})

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, but for empty ones."""
        return tuple(stop for stop in self.stop or () if stop)

    @property
    def wants_usage(self) -> bool:
        """Whether a stream is to end with a usage chunk."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def branch_limit(self) -> int | None:
        """Tokens the client allows a reply, which here bounds each branch."""
        raise NotImplementedError

    @property
    def effort(self) -> str | None:
        """How much is to be thought, in OpenAI's words."""
        return None

    @property
    def prompt_text(self) -> str | None:
        """The prompt, where it is a text of the client's own; such a prompt goes through no chat template."""
        return None

    @property
    def prompt_ids(self) -> Sequence[int] | None:
        """The same where it is token ids."""
        return None

    @property
    def conversation(self) -> Sequence[Mapping[str, Any]]:
        """The prompt, where it is a conversation."""
        return ()

    @property
    def template_fields(self) -> dict[str, Any]:
        """What the chat template takes besides the messages."""
        return {}

    def unserved(self) -> str | None:
        """The field no controller can serve yet, or None. Such requests pass through."""
        for name, value in (self.model_extra or {}).items():
            if name not in _INDIFFERENT and not _is_one_of(value, (None, [], {}, *self.neutral.get(name, ()))):
                return name
        return None


class ChatRequest(Generation):
    """A chat completion request."""

    param: ClassVar[str] = "messages"

    messages: list[dict[str, Any]]
    max_tokens: Some | None = None
    max_completion_tokens: Some | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def branch_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def effort(self) -> str | None:
        return self.reasoning_effort

    @property
    def conversation(self) -> Sequence[Mapping[str, Any]]:
        return self.messages

    @property
    def template_fields(self) -> dict[str, Any]:
        return _template_fields(self.chat_template_kwargs, self.reasoning_effort)

    def unserved(self) -> str | None:
        reason = super().unserved()
        if reason is not None:
            return reason
        if not self.messages:
            return self.param
        for message in self.messages:
            content = message.get("content")
            if isinstance(content, list) and any(_kind(part) != "text" for part in content):
                return "content"
            if message.get("tool_calls") or message.get("function_call") or message.get("role") in _TOOLS:
                return "tools"
        return None


class CompletionRequest(Generation):
    """A request to go on with one text, or with one list of token ids."""

    param: ClassVar[str] = "prompt"
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
        {
            **{name: values for name, values in _NEUTRAL.items() if name != "logprobs"},  # here 0 asks for them
            "best_of": (1,),
            "echo": (False,),
            "suffix": ("",),
        }
    )

    prompt: Any = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None

    @property
    def branch_limit(self) -> int | None:
        return self.max_tokens

    @property
    def prompt_text(self) -> str | None:
        prompt = self._alone
        return prompt if isinstance(prompt, str) else None

    @property
    def prompt_ids(self) -> Sequence[int] | None:
        prompt = self._alone
        return prompt if isinstance(prompt, list) else None

    @property
    def _alone(self) -> str | list[int] | None:
        """The prompt, if it is one and not empty; it may stand in a list."""
        prompt = self.prompt
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
            prompt = prompt[0]
        if isinstance(prompt, list):
            return prompt if prompt and all(type(i) is int and i >= 0 for i in prompt) else None
        return prompt if isinstance(prompt, str) and prompt else None

    def unserved(self) -> str | None:
        reason = super().unserved()
        if reason is None and self.max_tokens == 0:
            return "max_tokens"
        return self.param if reason is None and self._alone is None else reason


class Reasoning(BaseModel):
    """The `reasoning` object of a Responses request."""

    model_config = ConfigDict(extra="allow", frozen=True)

    effort: str | None = None


class ResponsesRequest(Generation):
    """A Responses request; its `input` is a text or messages of text where a controller serves it."""

    param: ClassVar[str] = "input"
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
        {**_NEUTRAL, "background": (False,), "truncation": ("disabled",)}
    )

    input: Any = None
    instructions: str | None = None
    max_output_tokens: Some | None = None
    reasoning: Reasoning | None = None
    text: dict[str, Any] | None = None

    @property
    def branch_limit(self) -> int | None:
        return self.max_output_tokens

    @property
    def effort(self) -> str | None:
        return None if self.reasoning is None else self.reasoning.effort

    @property
    def conversation(self) -> Sequence[Mapping[str, Any]]:
        told = [] if not self.instructions else [{"role": "system", "content": self.instructions}]
        return [*told, *(self._said or [])]

    @property
    def template_fields(self) -> dict[str, Any]:
        return _template_fields(None, self.effort)

    @property
    def _said(self) -> list[dict[str, Any]] | None:
        """The input as messages, if they are of text alone."""
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        if not isinstance(self.input, list) or not self.input:
            return None
        messages = [_message(item) for item in self.input]
        return None if None in messages else [message for message in messages if message is not None]

    def unserved(self) -> str | None:
        reason = super().unserved()
        if reason is None and any(name != "format" and value is not None for name, value in (self.text or {}).items()):
            reason = "text"
        if reason is None and (self.text or {}).get("format") not in (None, {"type": "text"}):
            reason = "text"
        return self.param if reason is None and self._said is None else reason


def _template_fields(given: Mapping[str, Any] | None, effort: str | None) -> dict[str, Any]:
    fields = dict(given or {})
    if effort is not None:
        fields.setdefault("reasoning_effort", effort)
    return {"chat_template_kwargs": fields} if fields else {}


_ROLES: Final[Mapping[str, str]] = MappingProxyType(
    {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
)


def _message(item: object) -> dict[str, Any] | None:
    """An item of a Responses request as a chat message, or None if it is not one of text."""
    if not isinstance(item, dict) or item.get("type", "message") != "message" or item.get("role") not in _ROLES:
        return None
    content = item.get("content")
    if isinstance(content, list):
        if not content or any(_kind(part) not in ("input_text", "output_text") for part in content):
            return None
        texts = [part.get("text") for part in content]
        if not all(isinstance(text, str) for text in texts):
            return None
        content = texts[0] if len(texts) == 1 else [{"type": "text", "text": text} for text in texts]
    elif not isinstance(content, str):
        return None
    return {"role": _ROLES[item["role"]], "content": content}


def parse(made: type[T], raw: bytes) -> T:
    """A request of one kind. Raises BadRequest naming the first field that is wrong."""
    return _validated(made, strict.read(raw))


def parse_feedback(raw: bytes) -> FeedbackRequest:
    """What a client says of an answer. Raises BadRequest naming the first field that is wrong."""
    return _validated(FeedbackRequest, strict.read(raw))


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


def _is_one_of(value: object, values: Iterable[object]) -> bool:
    """Whether `value` is among `values`; true is no 1."""
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in values)


def _kind(part: object) -> object:
    return part.get("type") if isinstance(part, dict) else "text"
