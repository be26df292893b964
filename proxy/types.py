"""Types that several folders of the proxy share: plans, prompts, upstream calls, branches and replies.

Of the proxy, this module imports modules below it only, so that no folder must import another just for its types.
"""

from __future__ import annotations

import json
import math
import time
from array import array
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, NamedTuple

from controllers import Limits
from controllers.builtin import is_admin_only
from controllers.loading import Spec
from controllers.rollout_state import RolloutStage
from controllers.signals import NO_SIGNALS, Signal
from discovery.answers import AUTO, Answer, AnswerKind
from discovery.data.recordings import question_id
from proxy import probe_templates
from proxy.reply_request import ReplyRequest
from proxy.token_ids import GrowingIds

STREAM_INTERVAL = 64
"""Tokens per chunk of a vLLM stream. Smaller chunks cost CPU; larger ones leave more tokens uncounted in an abort."""
BYTES_SENT_PER_ID: Final = 6
"""Approximate bytes of a token id in a request: five digits and a comma."""
ALIAS_BETAS: Final = (0.25, 0.5, 0.75, 1.0)
"""β of the aliases listed for each model. Clients may use any other β in an alias as well."""
BETA_BUCKETS: Final = (0.0, *ALIAS_BETAS)
"""Values of β that metrics distinguish."""


class Model(NamedTuple):
    """A model that the upstream serves."""

    id: str
    max_length: int  # tokens, prompt included


class ReplicaStatus(NamedTuple):
    """State of one of several upstreams."""

    url: str  # without credentials
    is_up: bool  # whether its latest health check passed
    circuit_breaker: str  # `closed`, `open` or `half-open`
    branches: int  # in flight or waiting


@dataclass(slots=True)
class Output:
    """The output of one prompt so far. It is filled while it streams."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish: str | None = None  # "stop" or "length"; None while it runs or if it was aborted
    ended_by_token: bool = False  # ended by an end-of-reply token: the last of `ids`, without text
    server_text: str | None = None  # the server's text while it may contain the prompt's; None if `text` is final
    log_probabilities: array[float] = field(default_factory=lambda: array("d"))
    """Log-probability of each token in nats; NaN if the server did not send it. Empty unless the call asks for it."""
    token_texts: list[str] = field(default_factory=list)  # of each token; empty unless the call asks for them

    @property
    def text_ids(self) -> list[int]:
        """The token ids that have text."""
        return self.ids[:-1] if self.ended_by_token else self.ids


@dataclass(slots=True)
class Call:
    """One completion request to the upstream: every prompt `n` times with the same sampling."""

    prompts: Sequence[Sequence[int]]
    max_tokens: int
    sampling: Mapping[str, Any]
    n: int = 1
    priority: int = 0  # larger is served later, if the server schedules by priority
    salt: str | None = None  # restricts the call to a part of the prefix cache
    suffix_tokens: int = 0  # prompt tokens that the proxy wrote itself
    stream_interval: int = STREAM_INTERVAL  # tokens per chunk of an output
    needs_log_probabilities: bool = False  # ask for the log-probability of each generated token
    needs_token_texts: bool = False  # ask for the text of each token too; only together with log-probabilities
    outputs: list[Output] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int | None = None  # as the server reports them: for one prompt only, even if there are several
    on_finish: Callable[[Output], Awaitable[None]] | None = None
    """Awaited for each output that ends. It may raise to abort the call."""

    def __post_init__(self) -> None:
        self.outputs = [Output() for _ in range(len(self.prompts) * self.n)]

    @property
    def size(self) -> int:
        """Approximate size of the request's body in bytes."""
        return BYTES_SENT_PER_ID * sum(map(len, self.prompts)) + len(json.dumps(dict(self.sampling)))

    @property
    def progress(self) -> int:
        """Number of tokens and of ended outputs that have arrived so far."""
        return self.generated + sum([output.finish is not None for output in self.outputs])

    @property
    def max_unseen_tokens(self) -> int:
        """Upper bound on tokens that have been generated but have not arrived, if the call is aborted now."""
        running = (output for output in self.outputs if output.finish is None)
        return sum(max(0, min(self.stream_interval, self.max_tokens - len(output.ids))) for output in running)

    @property
    def lacks_log_probabilities(self) -> bool:
        """Whether it asks for log-probabilities, tokens have arrived, and none has one."""
        known = (not math.isnan(value) for output in self.outputs for value in output.log_probabilities)
        return next(known, None) is False and not any(known)

    @property
    def generated(self) -> int:
        """Number of tokens that have arrived so far."""
        return sum([len(output.ids) for output in self.outputs])


class BetaSource(StrEnum):
    """Source of a request's β."""

    HEADER = "header"
    BODY = "body"
    TARGET = "target_tokens"
    EFFORT = "reasoning_effort"
    ALIAS = "model_alias"
    DEFAULT = "default"


class EffectiveBeta(NamedTuple):
    """The β that a request runs with, and its source."""

    value: float  # in [0, 1]
    source: BetaSource
    requested: float | None = None  # value before load shedding reduced it; None if it was not reduced

    @property
    def is_from_client(self) -> bool:
        """Whether the client set β, rather than the operator's default."""
        return self.source is not BetaSource.DEFAULT

    def scaled(self, factor: float) -> EffectiveBeta:
        """Return β multiplied by the load-shedding `factor`. It is unchanged if the factor is 1 or more."""
        return self if factor >= 1 else self._replace(value=self.value * factor, requested=self.value)

    def shrunk_alike(self, beta: float) -> float:
        """Return another β, reduced by the factor by which load shedding has reduced this one."""
        if self.requested is None:
            return beta
        return beta * self.value / self.requested if self.requested else 0.0

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


class Otherwise(StrEnum):
    """Consequence of less agreement than `min_agreement` asks for."""

    ANSWER = "answer"  # the reply is sent like any other
    FLAG = "flag"  # the reply is flagged
    ESCALATE = "escalate"  # the episode continues once at a larger β; the reply is flagged if that does not help


class AgreementRule(NamedTuple):
    """The agreement that a request asks for, and what follows if there is less."""

    minimum: float  # share of the votes, above 0
    otherwise: Otherwise
    escalate_beta: float | None  # β at which the episode continues; None if it does not

    def is_met(self, agreement: float | None) -> bool:
        """Return whether an agreement is known and large enough."""
        return agreement is not None and agreement >= self.minimum


class Prompt(NamedTuple):
    """A prompt as token ids, with all parameters for generating and reading its branches."""

    model: str
    ids: Sequence[int]
    tail: str  # last characters of its text; they show whether the chat template opened a thought
    sampling: Mapping[str, Any]  # for branches, without `seed` and `stop`
    greedy_first: bool = False  # the first branch is generated at temperature 0, whatever `sampling` says
    stop: Sequence[str] = ()
    seed: int | None = None
    kind: AnswerKind = AUTO
    template: probe_templates.Template = probe_templates.TEMPLATES[probe_templates.Family.QWEN3]
    salt: str | None = None  # restricts the prompt to its tenant's part of the upstream's prefix cache
    asks_for_answer: bool = False  # the question asks for an answer that can be voted on
    priority: int = 0  # of its calls at the upstream; larger is served later


class EnvironmentLimits(NamedTuple):
    """Limits on the branches and probes of one request, in tokens unless stated otherwise."""

    interval: int
    branch: int  # maximum length of a branch
    probe: int  # maximum generated by a probe
    ahead: int | None = None  # maximum that a branch is generated ahead of the controller; None: to its end
    sent_bytes: int | None = None  # bytes sent to the upstream after which no further round begins
    cut_probes: int | None = None  # number of replies cut by a stop string that are probed for an answer; None: all
    cap: int | None = None  # of the episode, for branches that do not pause


class IntervalSignals(NamedTuple):
    """Signals of one interval of a branch, in per mille; None if unknown."""

    confidence: int | None
    lowest: int | None


@dataclass(slots=True)
class LiveBranch:
    """Tokens, text and answer of a branch. The controller's view of it is in `controllers.State`."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    pieces: int = 0  # number of requests it was generated in
    finish: str | None = None  # "stop", "length", or None while it runs
    answer: Answer | None = None  # the answer in its reply, once finished and read
    is_read: bool = False
    log_probabilities: array[float] = field(default_factory=lambda: array("d"))  # of `ids`; empty if not asked for
    interval_signals: list[IntervalSignals] = field(default_factory=list)  # of its first whole intervals
    ended_by_stop_string: bool = False  # it was ended by one of the client's stop strings
    label: int | None = None  # the number of its answer, once a fact has revealed it
    ahead: deque[Output] = field(default_factory=deque)  # intervals generated before the controller advanced the branch
    encoded: GrowingIds = field(default_factory=GrowingIds)  # JSON of `ids`, as far as it has been sent


class ChosenController(NamedTuple):
    """The controller chosen for one request."""

    spec: Spec
    stage: RolloutStage | None  # the rollout stage it serves in; None if the request named it
    stage_model: str | None = None  # the model that the stage is set for; None: the default, or no stage


class CanaryMetric(StrEnum):
    """Quality of episodes that the canary test compares. In a rollback it is the reason."""

    TOKENS = "tokens"
    FAILURES = "failures"
    UNANSWERED = "unanswered"
    FEEDBACK = "feedback"


class Provenance(NamedTuple):
    """Tenant, question and sampling parameters of a request, for its record."""

    tenant: str
    text: str  # the question's text
    sampling: Mapping[str, Any]  # all parameters that determine how a branch is sampled, except for the model
    chat_template: str  # hash of the chat template; empty if unknown

    @property
    def question(self) -> str:
        """The id of the question."""
        return question_id(self.text)


class FinalAnswerLimits(NamedTuple):
    """Limits in tokens on the final answer of an unfinished branch."""

    free: int  # for a free answer
    led: int  # for an answer after the probe's lead


@dataclass(frozen=True, slots=True)
class Plan:
    """All decisions about a request that are made before its first branch."""

    request_id: str
    created: int  # seconds since the epoch
    started: float  # on the monotonic clock, before planning
    beta: EffectiveBeta
    choice: ChosenController
    prompt: Prompt
    environment_limits: EnvironmentLimits
    limits: Limits
    final_answer_limits: FinalAnswerLimits
    deadline_s: float | None
    temperature: float | None  # of sampled branches; None: the model's own default
    provenance: Provenance
    streamed: bool
    signals: frozenset[Signal] = NO_SIGNALS  # to measure, for the controller, the shadow or a recording
    agreement_rule: AgreementRule | None = None  # None: any agreement will do
    reply: ReplyRequest | None = None  # if branches are whole replies of the upstream
    max_length: int = 0  # of the model, in tokens
    affinity: bytes = b""  # key that chooses one of several upstreams; equal for prompts that begin alike

    @property
    def spec(self) -> Spec:
        """The spec of the controller."""
        return self.choice.spec

    @property
    def stage(self) -> RolloutStage | None:
        """The rollout stage that the controller serves in; None if the request named it."""
        return self.choice.stage

    @property
    def remaining_s(self) -> float | None:
        """Seconds until the deadline, 0 or less if it has passed; None without a deadline."""
        return None if self.deadline_s is None else self.started + self.deadline_s - time.monotonic()

    @property
    def controller(self) -> str:
        """The controller's name."""
        return self.spec.name

    @property
    def ignores_eos(self) -> bool:
        """Whether branches run to their token limit, for benchmarks. Such branches have no answer."""
        return bool(self.prompt.sampling.get("ignore_eos"))

    @property
    def probe_template(self) -> str:
        """Name of the template of probes; empty for whole replies, which are not probed."""
        return "" if self.reply is not None else self.prompt.template.name

    @property
    def records_all(self) -> bool:
        """Whether the client wants all branches recorded, rather than an answer."""
        return is_admin_only(self.spec.name)


class Message(NamedTuple):
    """The message that the client reads."""

    content: str
    reasoning: str | None
    finish_reason: str  # "stop", "length" or "tool_calls"
    visible_tokens: int  # tokens of `content`
    written: str  # everything after the prompt, including the thought and its marks
    tool_calls: Sequence[Mapping[str, Any]] = ()  # in OpenAI's format
    logprobs: Mapping[str, Any] | None = None  # in OpenAI's format, if the client asks for them


@dataclass(frozen=True, slots=True)
class Reply:
    """The reply to one served request."""

    plan: Plan
    message: Message
    tokens: Mapping[str, int]  # by purpose; they add up to all tokens of the upstream except the prompt
    usage: Mapping[str, Any]
    tts: Mapping[str, Any]
    label: int | None = None  # of a whole reply; None if it has no vote or is the judge's

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the client's prompt, once. Those of `usage` include suffixes, which `tokens` has too."""
        total: int = self.usage["total_tokens"]
        return total - sum(self.tokens.values())

    @property
    def finish_reasons(self) -> list[str]:
        """Finish reason of the text, in a list of one."""
        return [self.message.finish_reason]
