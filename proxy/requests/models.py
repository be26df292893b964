"""What of a request the proxy reads, and whether a controller can serve it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Final, NamedTuple, Self, TypeVar

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from discovery.answers import AUTO, AnswerKind, canonical, parse_kind
from discovery.answers.redaction import MARK
from discovery.errors import UnknownAnswerKind, unknown_field
from proxy.errors import BadRequest, clipped
from proxy.requests import field_table, field_values, strict_json
from proxy.requests.beta import EFFORTS
from proxy.requests.messages import kind, messages_of, template_fields, why_not_text, with_reasoning

T = TypeVar("T", bound=BaseModel)

Positive = Annotated[int, Field(ge=1, le=2**31, strict=True)]
Some = Annotated[int, Field(ge=1, lt=2**63)]


MOST_MESSAGES: Final = 10_000
"""Messages of a conversation, and items of a Responses request's `input`."""
MOST_PROMPT_IDS: Final = 2**20
"""Token ids of a prompt, and of all prompts of one text completion that controllers serve."""
MOST_PROMPTS: Final = 128
"""Prompts of one text completion that controllers serve."""
MOST_STOPS: Final = 64
"""Stop strings. Four of them may be left to the upstream; of more the proxy takes care itself."""
MOST_BIASES: Final = 1024
"""Tokens that `logit_bias` may name, as vLLM's sampler has it."""
MOST_OPTIONS: Final = 64
"""Members of the objects that the proxy reads beside the text, `tts` among them."""

MOST_NAME: Final = 512
"""Characters of a name, such as the model's."""
MOST_SHOWN: Final = 80
"""Characters of a key that an error names."""


def _as_list(given: object) -> object:
    return [given] if isinstance(given, str) else given


def _at_most(limit: int, things: str) -> BeforeValidator:
    """Make a validator that refuses longer lists and objects before anything is built of them.

    It refuses longer texts only where `things` are characters: a text is one thing.
    """

    def check(given: object) -> object:
        is_bounded = isinstance(given, str if things == "characters" else list | dict)
        if is_bounded and isinstance(given, Sized) and len(given) > limit:
            raise ValueError(f"at most {limit} {things} are accepted, not {len(given)}")
        return given

    return BeforeValidator(check)


def _short_ids(given: object) -> object:
    """Pass a prompt on unless it has too many token ids."""
    ids = given[0] if isinstance(given, list) and len(given) == 1 else given
    if isinstance(ids, list) and len(ids) > MOST_PROMPT_IDS:
        raise ValueError(f"at most {MOST_PROMPT_IDS} token ids are accepted, not {len(ids)}")
    return given


Name = Annotated[str, Field(max_length=MOST_NAME), _at_most(MOST_NAME, "characters")]
TokenId = Annotated[str, Field(max_length=32), AfterValidator(lambda text: str(int(text)))]
_Bias = Annotated[float, Field(allow_inf_nan=False)]
Biases = Annotated[dict[TokenId, _Bias], Field(max_length=MOST_BIASES), _at_most(MOST_BIASES, "tokens")]
Options = Annotated[dict[str, Any], Field(max_length=MOST_OPTIONS), _at_most(MOST_OPTIONS, "members")]
Messages = Annotated[
    list[dict[str, Any]], Field(max_length=MOST_MESSAGES, fail_fast=True), _at_most(MOST_MESSAGES, "messages")
]
_Stops = Annotated[list[str], Field(max_length=MOST_STOPS), _at_most(MOST_STOPS, "strings")]
Stops = Annotated[_Stops, BeforeValidator(_as_list, json_schema_input_type=str | _Stops)]


def _seed(given: int) -> int | None:
    """Return the seed; to vLLM -1 is no seed."""
    return None if given == -1 else given


def _kind_of(spec: object) -> object:
    """A kind of answers by its name."""
    if not isinstance(spec, str):
        return spec
    try:
        return parse_kind(spec)
    except UnknownAnswerKind as error:
        raise ValueError(str(error)) from None


class TtsOptions(BaseModel):
    """The `tts` object of a request: what it asks of the proxy itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    beta: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False, strict=True)] | None = None
    target_tokens: Positive | None = None  # what the request is to spend on average; sets β where none is given
    controller: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    max_total_tokens: Positive | None = None  # over all branches and probes
    deadline_s: Annotated[float, Field(gt=0, le=86400, allow_inf_nan=False)] | None = None
    answer: Annotated[AnswerKind, BeforeValidator(_kind_of)] = AUTO  # how answers are read
    required: Annotated[bool, Field(strict=True)] | None = None  # 400 where no controller can serve; None: the server's
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
        given = [name for name in ("correct", "answer", "score") if getattr(self, name) is not None]
        if len(given) != 1:
            has = " and ".join(given) or "none of them"
            raise ValueError(f"feedback has exactly one of correct, answer and score; this has {has}")
        return self


class StreamOptions(BaseModel):
    """OpenAI's `stream_options`, as far as it concerns the proxy."""

    model_config = ConfigDict(extra="allow", frozen=True)

    include_usage: bool | None = False


SAMPLING: Final = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "logit_bias")
"""Fields that mean the same for a branch generated in pieces as for one in a single request."""


class PassThroughReason(NamedTuple):
    """Why no controller can serve a request."""

    reason: str  # a word users know: `structured_output`, `tools`, or a field's name
    field: str  # of the request


_TOOL_ROLES: Final = ("tool", "function")
"""Roles of messages that hold a tool's result."""


class GenerationRequest(BaseModel):
    """A request for text: the fields that the endpoints share.

    All values that vLLM 0.32 accepts are accepted, whether or not a controller serves the request.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    param: ClassVar[str]  # the field its prompt is in
    unservable: ClassVar[Mapping[str, tuple[Any, ...]]]  # see `fields.CHAT`

    model: Name | None = None  # empty is none
    stream: bool | None = False
    stream_options: Annotated[StreamOptions | None, _at_most(MOST_OPTIONS, "members")] = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    logit_bias: Biases | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63), AfterValidator(_seed)] | None = None
    ignore_eos: bool | None = False
    cache_salt: Annotated[str, Field(max_length=1024)] | None = None
    stop: Stops | None = None
    tts: Annotated[
        TtsOptions,
        BeforeValidator(_or_nothing, json_schema_input_type=TtsOptions | None),
        _at_most(MOST_OPTIONS, "members"),
    ] = TtsOptions()

    def each(self) -> Sequence[Self]:
        """Return a request for each prompt."""
        return [self]

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
        """How much the model is to think, in OpenAI's words."""
        return None

    effort_field: ClassVar[str] = "reasoning_effort"

    @property
    def truncates(self) -> bool:
        """Whether the upstream is to shorten a prompt that is too long."""
        return False

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

    def unserved(self) -> PassThroughReason | None:
        """Return why no controller can serve the request, or None. Such requests pass through."""
        name = field_table.first_effective_field((self.model_extra or {}).items(), self.unservable)
        if name is None and not (self.effort is None or self.effort in EFFORTS):
            name = self.effort_field
        return None if name is None else PassThroughReason(field_table.REASONS.get(name, name), name)


class ChatRequest(GenerationRequest):
    """A chat completion request."""

    param: ClassVar[str] = "messages"
    unservable: ClassVar[Mapping[str, tuple[Any, ...]]] = field_table.CHAT

    messages: Messages
    max_tokens: Some | None = None
    max_completion_tokens: Some | None = None
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

    def unserved(self) -> PassThroughReason | None:
        unserved = super().unserved()
        if unserved is not None:
            return unserved
        if not self.messages:
            return PassThroughReason(self.param, self.param)
        for message in self.messages:
            content = message.get("content")
            if isinstance(content, list) and any(kind(part) != "text" for part in content):
                return PassThroughReason(field_table.MULTIMODAL, self.param)
            if message.get("tool_calls") or message.get("function_call") or message.get("role") in _TOOL_ROLES:
                return PassThroughReason(field_table.TOOLS, self.param)
        return None


class CompletionRequest(GenerationRequest):
    """A request to continue a text or a list of token ids, or several of either."""

    param: ClassVar[str] = "prompt"
    unservable: ClassVar[Mapping[str, tuple[Any, ...]]] = field_table.TEXT

    prompt: Annotated[Any, BeforeValidator(_short_ids)] = None
    max_tokens: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    _checked: Sequence[str | list[int]] | None = PrivateAttr(None)

    @property
    def branch_limit(self) -> int | None:
        return self.max_tokens

    @property
    def prompt_text(self) -> str | None:
        prompt = self._prompts[0] if self._prompts else None
        return prompt if isinstance(prompt, str) else None

    @property
    def prompt_ids(self) -> Sequence[int] | None:
        prompt = self._prompts[0] if self._prompts else None
        return prompt if isinstance(prompt, list) else None

    def each(self) -> Sequence[Self]:
        prompts = self._prompts
        return [self] if len(prompts) < 2 else [self._with_checked(prompt) for prompt in prompts]

    def _with_checked(self, prompt: str | list[int]) -> Self:
        """Return the request with one prompt, whose ids have been checked."""
        part = self.model_copy(update={"prompt": prompt})
        part._checked = [prompt]
        return part

    @property
    def _prompts(self) -> Sequence[str | list[int]]:
        """The prompts, if controllers can serve them; else none. They are checked once: there may be a million ids."""
        if self._checked is None:
            self._checked = _served_prompts(self.prompt)
        return self._checked

    def unserved(self) -> PassThroughReason | None:
        unserved = super().unserved()
        if unserved is None and self.max_tokens == 0:
            return PassThroughReason("max_tokens", "max_tokens")
        return PassThroughReason(self.param, self.param) if unserved is None and not self._prompts else unserved


def _served_prompts(given: Any) -> Sequence[str | list[int]]:
    """Return the prompts in a `prompt` field.

    Return none if one is empty or neither a text nor token ids, or if they are more than controllers serve.
    """
    has_several = isinstance(given, list) and given and isinstance(given[0], str | list)
    prompts = given if has_several else [given]
    if len(prompts) > MOST_PROMPTS or sum(len(ids) for ids in prompts if isinstance(ids, list)) > MOST_PROMPT_IDS:
        return []
    return prompts if all(map(_is_prompt, prompts)) else []


def _is_prompt(given: object) -> bool:
    if isinstance(given, list):
        return {*map(type, given)} == {int} and min(given) >= 0
    return isinstance(given, str) and bool(given)


class Reasoning(BaseModel):
    """The `reasoning` object of a Responses request."""

    model_config = ConfigDict(extra="allow", frozen=True)

    effort: Name | None = None


class ResponsesRequest(GenerationRequest):
    """A Responses request; its `input` is a text or messages of text where a controller serves it."""

    param: ClassVar[str] = "input"
    unservable: ClassVar[Mapping[str, tuple[Any, ...]]] = field_table.RESPONSES
    effort_field: ClassVar[str] = "reasoning"

    input: Annotated[Any, _at_most(MOST_MESSAGES, "items")] = None
    instructions: str | None = None
    max_output_tokens: Some | None = None
    reasoning: Annotated[Reasoning | None, _at_most(MOST_OPTIONS, "members")] = None
    include_reasoning: bool | None = True
    include: Annotated[list[Name], Field(max_length=MOST_OPTIONS)] | None = None
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

    @property
    def _messages(self) -> list[dict[str, Any]] | None:
        """The input as messages, if they are of text alone and the last one is complete."""
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        return messages_of(self.input) if isinstance(self.input, list) else None

    def unserved(self) -> PassThroughReason | None:
        unserved = super().unserved()
        if unserved is not None:
            return unserved
        if field_table.first_effective_field((self.text or {}).items(), _TEXT_FORMAT) is not None:
            return PassThroughReason(field_table.STRUCTURED, "text")
        if not set(self.include or ()) <= _INCLUDED:
            return PassThroughReason("include", "include")
        if self.truncation not in (None, "disabled", "auto"):
            return PassThroughReason("truncation", "truncation")
        if self._messages is not None:
            return None
        items = self.input if isinstance(self.input, list) else []
        return PassThroughReason(why_not_text(items) or self.param, self.param)


_TEXT_FORMAT: Final[Mapping[str, tuple[Any, ...]]] = MappingProxyType({"format": ({"type": "text"},)})
"""The member of `text` that matters: vLLM has no use for `verbosity`."""
_INCLUDED: Final = {
    "reasoning.encrypted_content",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
}
"""Values of `include` that add nothing to a reply of text: vLLM encrypts no thoughts and has nothing of the others."""


def parse(made: type[T], raw: bytes) -> T:
    """Return a request of one kind. Raises BadRequest naming the first field that is wrong."""
    body = strict_json.read(raw)
    parsed = _validated(made, body)
    field_values.check(body)
    return parsed


def parse_feedback_request(raw: bytes) -> FeedbackRequest:
    """What a client says of an answer. Raises BadRequest naming the first field that is wrong."""
    return _validated(FeedbackRequest, strict_json.read(raw))


def _validated(made: type[T], body: dict[str, Any]) -> T:
    try:
        return made.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(clipped(str(part), MOST_SHOWN) for part in first["loc"] if part != "[key]")
        problem = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            problem = _unknown(made, first["loc"])
        raise BadRequest(f"{where}: {problem}" if where else problem, param=where or None, code=_code(where)) from None


def _unknown(made: type[BaseModel], place: Sequence[int | str]) -> str:
    """The message about an unknown field at `place`: the nearest known one, and all of them."""
    owner = TtsOptions if place[0] == "tts" and len(place) > 1 else made
    names: list[str] = []
    for name, field in owner.model_fields.items():
        alias = field.validation_alias
        names += map(str, alias.choices) if isinstance(alias, AliasChoices) else [name]
    return unknown_field(str(place[-1]), names)


def _code(where: str) -> str | None:
    return "bad_beta" if where == "tts.beta" else None
