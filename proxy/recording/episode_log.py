"""Record served requests: their episodes, recordings of sampled episodes, and clients' feedback."""

from __future__ import annotations

import asyncio
import json
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple, Protocol, TypeVar
from uuid import uuid4

from controllers import State
from controllers.builtin import BASELINE
from discovery.answers import are_same_redacted, canonical, is_redacted, redacted
from discovery.data.packed_rounds import pack_rounds
from discovery.store import DatabaseUrl, EpisodeDetails, Feedback, ServedEpisode
from discovery.store.records import SATISFIED_SCORE, stored_time, utc_now
from proxy.admission.auth import Caller
from proxy.admission.request_slot import RequestSlots
from proxy.admission.token_budget import BudgetExceeded, RateLimit, retry_after
from proxy.environment.episode_environment import EpisodeEnvironment
from proxy.environment.live_environment import LiveEnvironment
from proxy.environment.reply_environment import ReplyEnvironment
from proxy.errors import NotFound, RecordsAway, TooMany
from proxy.recording.branch_completion import BranchCompleter, PendingEpisode
from proxy.recording.store_writer import RECENT, RequestOwner, StoreWriter
from proxy.recording.template_drift import TemplateDrift
from proxy.requests.feedback_request import FeedbackRequest
from proxy.rollout.controller_runner import ControllerRunner
from proxy.settings import Settings, StoreText
from proxy.telemetry import logs
from proxy.telemetry.metrics import Metrics
from proxy.types import Plan, Reply
from proxy.upstream.fleet.interface import Upstream

ACKNOWLEDGE_S: Final = 0.01
"""Maximum seconds that a feedback response waits until the feedback is on disk."""
ELSEWHERE_S: Final = 2.0
"""Maximum seconds that a response waits for a request that another process may be writing."""
LOOK_AGAIN_S: Final = 0.1
NO_REQUEST: Final = ""
"""Id of a request that does not exist.

It is looked up in place of another tenant's request, so that the response does not reveal that the request exists.
"""


class _HasTenant(Protocol):
    @property
    def tenant(self) -> str: ...


_Owned = TypeVar("_Owned", bound=_HasTenant)


class FeedbackReceipt(NamedTuple):
    """The result of recording feedback."""

    id: str
    owner: RequestOwner  # of the rated request
    satisfied: bool | None  # whether the client was satisfied; None if unknown
    is_first: bool  # whether it is the first feedback on its request that says whether the client was satisfied
    is_on_disk: bool


class EpisodeLog:
    """Records the episodes and feedback of one proxy."""

    def __init__(
        self, engine: Upstream, settings: Settings, metrics: Metrics, slots: RequestSlots, drift: TemplateDrift
    ) -> None:
        self.writer = StoreWriter(settings, metrics)
        self.drift = drift
        self.completer = BranchCompleter(engine, settings, metrics, slots, drift)
        self._metrics = metrics
        self._text = settings.store_text
        self._is_shared = settings.workers > 1 or isinstance(settings.store, DatabaseUrl)
        self._completing: asyncio.Task[None] | None = None
        self._rated: OrderedDict[str, None] = OrderedDict()  # requests with feedback of known satisfaction
        self._feedback_at = datetime.now(UTC)  # time of the latest feedback
        self._feedback_rate = RateLimit(settings.feedback_per_minute)

    async def open(self) -> None:
        """Start writing records and completing episodes."""
        await self.writer.open()
        if self.writer.is_on:
            self._completing = asyncio.create_task(self._complete())

    async def close(self) -> None:
        """Stop completing episodes, and write the queued records."""
        try:
            if self._completing is not None:
                self._completing.cancel()
                await asyncio.gather(self._completing, return_exceptions=True)
                self.completer.close()
        finally:
            await self.writer.close()

    def record(
        self,
        plan: Plan,
        runner: ControllerRunner,
        environment: EpisodeEnvironment,
        state: State,
        reply: Reply | None,
        stop: str,
    ) -> None:
        """Queue the record of an ended episode and, if it was sampled, the completion of its branches.

        `stop` is the reason why it ended: that of its state, or another if it has no reply.
        """
        if not self.writer.is_on:
            return
        owner = RequestOwner(plan.provenance.tenant, plan.stage, plan.spec.digest, plan.prompt.model)
        sampled = reply is not None and self._complete_later(plan, runner, environment, state)
        made = _episode(plan, runner, environment, state, reply, str(stop), self._text, sampled)
        self.writer.put(plan.request_id, made, owner)

    def _complete_later(
        self, plan: Plan, runner: ControllerRunner, environment: EpisodeEnvironment, state: State
    ) -> bool:
        """Queue the completion of an episode's branches, if it was sampled. Returns whether it is queued."""
        if isinstance(environment, LiveEnvironment) and self.completer.wants(plan, state):
            return self.completer.enqueue(PendingEpisode(plan, environment, tuple(runner.measured_rounds)))
        if isinstance(environment, ReplyEnvironment) and self.completer.wants_replies(plan, environment, state):
            return self.completer.enqueue(PendingEpisode(plan, environment, ()))
        return False

    async def _complete(self) -> None:
        while True:
            recording = await self.completer.next()
            if recording is not None:
                self.writer.put(recording.request, lambda recording=recording: recording)  # type: ignore[misc]

    async def find(self, caller: Caller, request: str) -> ServedEpisode:
        """Return the episode of a request. Raises NotFound, also for other tenants' requests, or RecordsAway."""
        episode = await self._look_up(caller, self.writer.find, request) if self.writer.is_on else None
        if episode is None:
            raise _unknown(request)
        return episode

    async def _look_up(
        self, caller: Caller, find: Callable[[str], Awaitable[_Owned | None]], request: str
    ) -> _Owned | None:
        """Return what `find` finds of a request that the caller may see, or None.

        If the store is shared, another process may have served the request and not written it yet, so this waits for
        it. A request of another tenant takes as long as one that does not exist.
        """
        deadline = time.monotonic() + (ELSEWHERE_S if self._is_shared else 0)
        while True:
            owned = await find(request)
            if owned is not None and not caller.may_see(owned.tenant):
                owned = await find(NO_REQUEST)
            if owned is not None or time.monotonic() >= deadline:
                return owned
            await asyncio.sleep(LOOK_AGAIN_S)

    async def record_feedback(self, caller: Caller, feedback: FeedbackRequest) -> FeedbackReceipt:
        """Queue a client's feedback. Raises NotFound, also for other tenants' requests, TooMany or RecordsAway."""
        self._count_feedback(caller)
        owner = await self._look_up(caller, self.writer.owner, feedback.request)
        if owner is None:
            raise _unknown(feedback.request)
        kind, value, satisfied = await self._rate(feedback)
        earliest = self._feedback_at + timedelta(microseconds=1)  # keeps the order if the clock is set back
        self._feedback_at = max(datetime.now(UTC), earliest)
        created = stored_time(self._feedback_at)
        record = Feedback(uuid4().hex, feedback.request, kind, json.dumps(value), created, owner.tenant)
        kept = self.writer.put(feedback.request, lambda: record, hurry=True)
        await asyncio.wait({kept}, timeout=ACKNOWLEDGE_S)
        if kept.done() and not kept.result():
            if await self.writer.owner(feedback.request) is None:  # the request was forgotten, or its record was lost
                raise _unknown(feedback.request)
            raise RecordsAway("the feedback queue is full; retry later", code="recorder_full")
        self._metrics.feedback.labels(kind, "unknown" if satisfied is None else str(satisfied).lower()).inc()
        is_first = satisfied is not None and feedback.request not in self._rated
        if is_first:
            self._rated[feedback.request] = None
        if len(self._rated) > RECENT:
            self._rated.popitem(last=False)
        return FeedbackReceipt(record.id, owner, satisfied, is_first, kept.done())

    def _count_feedback(self, caller: Caller) -> None:
        """Raise TooMany if the caller's key has used up its feedback for this minute.

        Callers without a key share one limit, because they could send any token.
        """
        holder = caller.key or (caller.tenant if caller.is_admin else "")
        try:
            self._feedback_rate.take(holder, time.monotonic())
        except BudgetExceeded as error:
            self._metrics.refusals.labels("feedback_per_minute").inc()
            sender = (
                f"key {caller.key} has" if caller.key else "the admin has" if holder else "callers without key have"
            )
            most, after = self._feedback_rate.per_minute, retry_after(error.after_s)
            message = f"{sender} sent feedback {most} times within a minute, the limit AUTOTTS_FEEDBACK_PER_MINUTE"
            raise TooMany(f"{message}; retry in {after} s", after=after, code="rate_limit_exceeded") from None

    async def _rate(self, feedback: FeedbackRequest) -> tuple[str, Any, bool | None]:
        """Return the kind and value of feedback, and whether the client was satisfied (None if unknown)."""
        if feedback.correct is not None:
            return "correct", feedback.correct, feedback.correct
        if feedback.score is not None:
            return "score", feedback.score, feedback.score >= SATISFIED_SCORE
        answer = feedback.answer or ""
        satisfied = None
        with suppress(RecordsAway):
            episode = await self.writer.find(feedback.request)
            if episode is not None and episode.answer is not None:
                satisfied = _same(answer, episode.answer)
        return "answer", redacted(answer) if self._text is StoreText.NONE else answer, satisfied


def _same(answer: str, recorded: str) -> bool:
    """Return whether two answers are equal by their canonical text. `recorded` may be redacted."""
    if is_redacted(recorded):
        return are_same_redacted(answer, recorded)
    form, recorded_form = canonical(answer), canonical(recorded)
    if answer.strip() == recorded.strip():
        return True
    return form is not None and recorded_form is not None and form.text == recorded_form.text


def _unknown(request: str) -> NotFound:
    message = (
        f"unknown request {request!r}, or one that was sent with another API key or bearer token "
        "(the client's api_key; send the same), or one that was passed through or refused"
    )
    return NotFound(message, param="request_id", code="unknown_request")


def _episode(
    plan: Plan,
    runner: ControllerRunner,
    environment: EpisodeEnvironment,
    state: State,
    reply: Reply | None,
    stop: str,
    text: StoreText,
    sampled: bool,
) -> Callable[[], ServedEpisode]:
    """Return a function that builds the record of an episode.

    It can run in a thread later, because it uses copies, and labels that do not change once they are known.
    """
    seconds = round(time.monotonic() - plan.started, 6)
    created = utc_now()
    labels, count = environment.labels, len(environment.labels)
    classes = dict(environment.labels.classes) if isinstance(environment, ReplyEnvironment) else {}
    rounds = tuple(runner.rounds)
    about = EpisodeDetails(
        beta_source=plan.beta.source_text,
        stage=None if plan.stage is None else str(plan.stage),
        fallback=runner.fallback,
        decided=runner.decided,
        limits=asdict(plan.limits),
        spent=state.spent,
        seconds=seconds,
        answer_kind=str(plan.prompt.kind.method),  # without its argument: a pattern is the client's text
        usage={} if reply is None else dict(reply.usage),
        sampling=dict(plan.provenance.sampling),
        chat_template=plan.provenance.chat_template,
        probe_template=plan.prompt.template.name,
        streamed=plan.streamed,
        votable=environment.votable,
    )
    if plan.reply is not None:
        about["branch"] = "reply"
        about["selected_by"] = None if reply is None else reply.tts["selected_by"]
    if plan.signals:
        about["signals"] = sorted(plan.signals)
    if runner.fallback is not None or runner.escalated_at is not None:
        about["baseline"] = BASELINE
    if plan.agreement_rule is not None:
        about["min_agreement"] = plan.agreement_rule.minimum
        if reply is not None:
            about["flagged"] = reply.tts["flagged"]
    if runner.escalated_at is not None and runner.escalated_beta is not None:
        about |= {"escalated_at": runner.escalated_at, "escalated_beta": runner.escalated_beta}
    if environment.cutoff is not None:
        about["refused"] = environment.cutoff
    if sampled:
        about["sampled"] = True
    if client_id := logs.client_request_id.get():
        about["client_request_id"] = client_id
    if text is StoreText.FULL:
        about["text"] = plan.provenance.text
        about["reply"] = None if reply is None else reply.message.content
    ledger = {"aborted": environment.meter.billed} if reply is None else dict(reply.tokens)
    branches = len(environment.branches)
    answer = state.answer if plan.reply is None or plan.reply.has_votes else None
    if answer in classes:
        about["vote_class"] = classes[answer]
        if reply is not None and reply.label in classes and reply.label != answer:
            about["reply_class"] = classes[reply.label]

    def make() -> ServedEpisode:
        answers = [labels.written(label) if label in classes else labels.recorded(label) for label in range(count)]
        written = answers
        if text is StoreText.NONE:
            written = [classes.get(label) or redacted(answer) for label, answer in enumerate(answers)]
        about["answers"] = written
        return ServedEpisode(
            id=plan.request_id,
            request_id=plan.request_id,
            model=plan.prompt.model,
            controller=plan.controller,
            digest=plan.spec.digest,
            beta=plan.beta.value,
            rounds=len(rounds),
            branches=branches,
            ledger=ledger,
            stop=stop,
            answer=None if answer is None else written[answer],
            question=plan.provenance.question,
            created=created,
            sandbox=runner.level,
            tenant=plan.provenance.tenant,
            about=about,
            trace=pack_rounds(rounds),
        )

    return make
