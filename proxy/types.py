"""Types that several folders of the proxy share: what a request asks, what the upstream brings, and what a client gets.

They import nothing of the proxy above them, so that no folder has to import another for its types alone.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, NamedTuple, Protocol

from controllers import Action, Limits
from controllers.builtin import is_admin_only
from controllers.loading import Spec
from controllers.rollout_state import RolloutStage
from discovery.answers import AUTO, Answer, AnswerKind
from discovery.data.recordings import question_id
from proxy import probe_templates

STREAM_INTERVAL = 64
"""Tokens vLLM gathers into one chunk: fewer costs CPU, more loses count when a request is aborted."""
BYTES_SENT_PER_ID: Final = 6
"""Bytes that a token id takes in a request, on the whole: five digits and a comma."""
ALIAS_BETAS: Final = (0.25, 0.5, 0.75, 1.0)
"""β of the aliases that are listed beside each model; any other may be named as well."""
BETA_BUCKETS: Final = (0.0, *ALIAS_BETAS)
"""Values of β that metrics tell apart; every effort has one of its own."""


class Model(NamedTuple):
    """A model the upstream serves."""

    id: str
    max_length: int  # tokens, prompt included


@dataclass(slots=True)
class Output:
    """What one prompt has become so far; filled while it streams."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish: str | None = None  # "stop", "length" or, while running or cut, None
    at_token: bool = False  # it ended by a token that ends replies, which is the last of `ids` and has no text
    raw: str | None = None  # the server's text, where it may hold the prompt's; `text` is then decoded from `ids`

    @property
    def written(self) -> list[int]:
        """The ids that have text."""
        return self.ids[:-1] if self.at_token else self.ids


@dataclass(slots=True)
class Call:
    """One completion request: every prompt `n` times with the same sampling."""

    prompts: Sequence[Sequence[int]]
    max_tokens: int
    sampling: Mapping[str, Any]
    n: int = 1
    priority: int = 0  # larger is later, where the server schedules by priority
    salt: str | None = None  # of the part of the prefix cache it may use
    suffix_tokens: int = 0  # of its prompts, that are of our own making
    stream_interval: int = STREAM_INTERVAL  # tokens of an output that come together
    outputs: list[Output] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int | None = None  # as the server reports it: of one prompt only when there are several
    on_finish: Callable[[Output], Awaitable[None]] | None = None  # awaited for each output that ends; may raise to cut

    def __post_init__(self) -> None:
        self.outputs = [Output() for _ in range(len(self.prompts) * self.n)]

    @property
    def size(self) -> int:
        """Bytes of the request's body, about."""
        return BYTES_SENT_PER_ID * sum(map(len, self.prompts)) + len(json.dumps(dict(self.sampling)))

    @property
    def brought(self) -> int:
        """Tokens, and ends of completions, that it has brought so far."""
        return self.generated + sum(output.finish is not None for output in self.outputs)

    @property
    def most_unseen(self) -> int:
        """The most tokens that can have been generated and not arrived, if it is cut now."""
        running = (output for output in self.outputs if output.finish is None)
        return sum(min(self.stream_interval, self.max_tokens - len(output.ids)) for output in running)

    @property
    def generated(self) -> int:
        """Tokens it has brought so far."""
        return sum(len(output.ids) for output in self.outputs)


class ObservedRequest(NamedTuple):
    """A request to the upstream that an observer follows to its end."""

    on_end: Callable[[int | None, BaseException | None], object]
    """Called once with the response's status, if there is one, and the error, if there is one."""
    headers: Mapping[str, str]  # to send with the request


class UpstreamObserver:
    """Receives events about requests to the upstream. This base class ignores them all."""

    def request(self, method: str, path: str) -> ObservedRequest | None:
        """Called when a request begins that is neither a generation nor a health check; None if it is not followed."""
        return None

    def generation(self, model: str, call: Call) -> AbstractContextManager[object]:
        """Return a context to run one generation in."""
        return nullcontext()

    def round(self, actions: Sequence[Action]) -> AbstractContextManager[object]:
        """Return a context to run one round of actions in."""
        return nullcontext()

    def headers(self) -> Mapping[str, str]:
        """Return headers to send with a generation; called inside its context."""
        return {}


class BetaSource(StrEnum):
    """Where a request's β comes from."""

    HEADER = "header"
    BODY = "body"
    TARGET = "target_tokens"
    EFFORT = "reasoning_effort"
    ALIAS = "model_alias"
    DEFAULT = "default"


class EffectiveBeta(NamedTuple):
    """The β a request runs with, and where it comes from."""

    value: float  # in [0, 1]
    source: BetaSource
    requested: float | None = None  # value before load shedding reduced it; None if it was not reduced

    @property
    def is_from_client(self) -> bool:
        """Whether the client set β, rather than the operator's default."""
        return self.source is not BetaSource.DEFAULT

    def scaled(self, factor: float) -> EffectiveBeta:
        """Return β multiplied by the load-shedding `factor`; unchanged if that is 1 or more."""
        return self if factor >= 1 else self._replace(value=self.value * factor, requested=self.value)

    @property
    def source_text(self) -> str:
        """The source as clients see it.

        Under load shedding this is `load` for the operator's β, and for instance `header, load` for a client's.
        """
        if self.requested is None:
            return str(self.source)
        return f"{self.source}, load" if self.is_from_client else "load"

    @property
    def bucket(self) -> str:
        """The nearest of `BETA_BUCKETS`, as a metric label. It bounds the number of label values."""
        return f"{min(BETA_BUCKETS, key=lambda bucket: (abs(bucket - self.value), -bucket)):g}"


class Prompt(NamedTuple):
    """What a request asks, ready for the engine."""

    model: str
    ids: Sequence[int]
    tail: str  # the end of its text, to see whether the template opened a thought
    sampling: Mapping[str, Any]  # of its branches, without seed and stop
    greedy_first: bool = False  # the first branch is generated at temperature 0, whatever `sampling` says
    stop: Sequence[str] = ()
    seed: int | None = None
    kind: AnswerKind = AUTO
    template: probe_templates.Template = probe_templates.TEMPLATES[probe_templates.Family.QWEN3]
    salt: str | None = None  # of its tenant's part of the upstream's prefix cache
    asks: bool = False  # its question asks for an answer that can be voted on


class EnvironmentLimits(NamedTuple):
    """Token bounds of the request's branches and probes."""

    interval: int
    branch: int  # the most a branch may grow to
    probe: int  # the most a probe may generate
    ahead: int | None = None  # the most a branch may be run ahead of what is asked for; None if to its end
    sent_bytes: int | None = None  # after which no round begins any more
    cut_probes: int | None = None  # replies cut by a stop string that may be asked for their answer; None is all


@dataclass(slots=True)
class LiveBranch:
    """A branch's own text; what the controller knows of it is in State."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    pieces: int = 0  # requests it was generated in
    finish: str | None = None  # "stop", "length", or None while it runs
    answer: Answer | None = None  # what its reply answers, once finished and read
    is_read: bool = False
    is_cut: bool = False  # it was finished by one of the client's stop strings
    label: int | None = None  # the number of that answer, once a fact has told it
    ahead: deque[Output] = field(default_factory=deque)  # intervals generated that nobody asked for yet


class ChosenController(NamedTuple):
    """The controller of one request."""

    spec: Spec
    stage: RolloutStage | None  # that it was chosen for; None if the request named it


class CanaryMetric(StrEnum):
    """What is compared; the reason of a rollback."""

    TOKENS = "tokens"
    FAILURES = "failures"
    UNANSWERED = "unanswered"
    FEEDBACK = "feedback"


class Provenance(NamedTuple):
    """Who asked and what, as far as it may be written down."""

    tenant: str
    text: str  # of the question
    sampling: Mapping[str, Any]  # all by which a branch is drawn that is not the model's own
    chat_template: str  # its hash; empty if it is not known

    @property
    def question(self) -> str:
        """What the question is known by."""
        return question_id(self.text)


class FinalAnswerLimits(NamedTuple):
    """Token bounds for making an unfinished branch answer."""

    free: int  # tokens of a reply in its own words
    led: int  # tokens after the probe's lead-in, where time or money is short


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything about a request that is settled before its first branch."""

    request_id: str
    created: int  # seconds since the epoch
    started: float  # by the monotonic clock, before it was planned
    beta: EffectiveBeta
    spec: Spec  # of the controller
    stage: RolloutStage | None  # that it was chosen for; None if the request named it
    prompt: Prompt
    environment_limits: EnvironmentLimits
    limits: Limits
    final_answer_limits: FinalAnswerLimits
    deadline_s: float | None
    temperature: float | None  # of sampled branches; None leaves it to the model's own default
    provenance: Provenance
    streamed: bool

    @property
    def remaining_s(self) -> float | None:
        """Seconds until its deadline, none or less if that has passed; None if it has none."""
        return None if self.deadline_s is None else self.started + self.deadline_s - time.monotonic()

    @property
    def controller(self) -> str:
        """The controller's name."""
        return self.spec.name

    @property
    def ignores_eos(self) -> bool:
        """Whether branches run to their limit, as benchmarks ask; they then answer nothing."""
        return bool(self.prompt.sampling.get("ignore_eos"))

    @property
    def records_all(self) -> bool:
        """Whether its branches are wanted, rather than an answer."""
        return is_admin_only(self.spec.name)


class Message(NamedTuple):
    """What the client reads."""

    content: str
    reasoning: str | None
    finish_reason: str  # "stop" or "length"
    visible_tokens: int  # tokens of `content`
    written: str  # all that follows the prompt, thought and marks included


@dataclass(frozen=True, slots=True)
class Reply:
    """A served request's outcome."""

    plan: Plan
    message: Message
    tokens: Mapping[str, int]  # by what they were spent on; they add up to what the upstream did
    usage: Mapping[str, Any]
    tts: Mapping[str, Any]

    @property
    def finish_reasons(self) -> list[str]:
        """How its text ended."""
        return [self.message.finish_reason]


class RequestResult(Protocol):
    """What a request came to, for one prompt or for several."""

    @property
    def finish_reasons(self) -> list[str]:
        """How each text ended."""

    @property
    def usage(self) -> Mapping[str, Any]:
        """OpenAI's usage."""

    @property
    def tts(self) -> Mapping[str, Any]:
        """The `tts` object of the response."""
