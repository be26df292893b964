"""What is kept of served requests: the episode of each, recordings of some, and what their clients say of them."""

from __future__ import annotations

import asyncio
import json
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple
from uuid import uuid4

from controllers import State
from discovery.answers import canonical, is_redacted, redacted
from discovery.data.packed_rounds import pack_rounds
from discovery.evaluation.reference_answers import SATISFIED_SCORE
from discovery.store import EpisodeDetails, Feedback, ServedEpisode
from proxy.admission.auth import Caller
from proxy.admission.request_slot import RequestSlots
from proxy.admission.token_budget import BudgetExceeded, RateLimit, retry_after
from proxy.environment.live_environment import LiveEnvironment
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
from proxy.upstream.client import UpstreamClient

ACKNOWLEDGED_S: Final = 0.01
"""How long feedback waits to be on disk before its client is told that it will be."""
NOBODYS: Final = ""
"""A request nobody made. Who asks for another's is told what is told of it, which may be that nothing is known now."""


class FeedbackReceipt(NamedTuple):
    """What came of feedback."""

    id: str
    owner: RequestOwner  # of the request it is about
    content: bool | None  # whether its client is content; None if that cannot be told
    is_first: bool  # that tells so, of the request
    is_on_disk: bool


class EpisodeLog:
    """The records of one proxy."""

    def __init__(
        self, engine: UpstreamClient, settings: Settings, metrics: Metrics, turns: RequestSlots, drift: TemplateDrift
    ) -> None:
        self.writer = StoreWriter(settings, metrics)
        self.drift = drift
        self.completer = BranchCompleter(engine, settings, metrics, turns, drift)
        self._metrics = metrics
        self._text = settings.store_text
        self._finishing: asyncio.Task[None] | None = None
        self._heard: OrderedDict[str, None] = OrderedDict()  # requests of which it was said whether they did well
        self._said_at = datetime.now(UTC)  # when the latest feedback was given
        self._feedback_rate = RateLimit(settings.feedback_per_minute)

    async def open(self) -> None:
        """Begin to write and to finish."""
        await self.writer.open()
        if self.writer.is_on:
            self._finishing = asyncio.create_task(self._finish())

    async def close(self) -> None:
        """Give up what is being finished, and write what waits."""
        try:
            if self._finishing is not None:
                self._finishing.cancel()
                await asyncio.gather(self._finishing, return_exceptions=True)
                self.completer.close()
        finally:
            await self.writer.close()

    def record(
        self,
        plan: Plan,
        runner: ControllerRunner,
        environment: LiveEnvironment,
        state: State,
        reply: Reply | None,
        outcome: str,
    ) -> None:
        """Have an episode that is over written down, and finished if it was drawn; this takes no time.

        Where its state does not know why it ended, `outcome` says so.
        """
        if not self.writer.is_on:
            return
        owner = RequestOwner(plan.provenance.tenant, plan.stage, plan.spec.digest)
        made = _episode(plan, runner, environment, state, reply, str(state.stop or outcome), self._text)
        self.writer.put(plan.request_id, made, owner)
        if reply is not None and self.completer.wants(plan, state):
            self.completer.enqueue(PendingEpisode(plan, environment, tuple(runner.rounds)))

    async def _finish(self) -> None:
        while True:
            found = await self.completer.next()
            if found is not None:
                self.writer.put(found.request, lambda found=found: found)  # type: ignore[misc]

    async def find(self, caller: Caller, request: str) -> ServedEpisode:
        """The episode of a request. Raises NotFound, for those of others too, or RecordsAway."""
        if self.writer.is_on:
            episode = await self.writer.find(request)
            if episode is not None and not caller.may_see(episode.tenant):
                episode = await self.writer.find(NOBODYS)
            if episode is not None:
                return episode
        raise _unknown(request)

    async def record_feedback(self, caller: Caller, said: FeedbackRequest) -> FeedbackReceipt:
        """Take what a client says of an answer. Raises NotFound, for requests of others too, TooMany or RecordsAway."""
        self._count_feedback(caller)
        owner = await self.writer.owner(said.request)
        if owner is not None and not caller.may_see(owner.tenant):
            owner = await self.writer.owner(NOBODYS)
        if owner is None:
            raise _unknown(said.request)
        kind, value, content = await self._judge(said)
        self._said_at = max(datetime.now(UTC), self._said_at + timedelta(microseconds=1))  # clocks are set back
        created = self._said_at.isoformat(timespec="microseconds")
        feedback = Feedback(uuid4().hex, said.request, kind, json.dumps(value), created, owner.tenant)
        kept = self.writer.put(said.request, lambda: feedback, hurry=True)
        await asyncio.wait({kept}, timeout=ACKNOWLEDGED_S)
        if kept.done() and not kept.result():
            raise RecordsAway("no more can be written down for now; say it again later", code="recorder_full")
        self._metrics.feedback.labels(kind, "unknown" if content is None else str(content).lower()).inc()
        is_first = content is not None and said.request not in self._heard
        if is_first:
            self._heard[said.request] = None
        if len(self._heard) > RECENT:
            self._heard.popitem(last=False)
        return FeedbackReceipt(feedback.id, owner, content, is_first, kept.done())

    def _count_feedback(self, caller: Caller) -> None:
        """Raise TooMany if the caller's key has given as much feedback in a minute as it may.

        Without keys a client could call itself anything, so all such callers share one limit.
        """
        holder = caller.key or (caller.tenant if caller.is_admin else "")
        try:
            self._feedback_rate.take(holder, time.monotonic())
        except BudgetExceeded as error:
            self._metrics.refusals.labels("feedback_per_minute").inc()
            who = f"key {caller.key} has" if caller.key else "the admin has" if holder else "callers without a key have"
            most, after = self._feedback_rate.per_minute, retry_after(error.after_s)
            words = f"{who} given feedback {most} times in a minute, as often as AUTOTTS_FEEDBACK_PER_MINUTE allows"
            raise TooMany(f"{words}; retry in {after} s", after=after, code="rate_limit_exceeded") from None

    async def _judge(self, said: FeedbackRequest) -> tuple[str, Any, bool | None]:
        """What was said, and whether its client is content."""
        if said.correct is not None:
            return "correct", said.correct, said.correct
        if said.score is not None:
            return "score", said.score, said.score >= SATISFIED_SCORE
        answer = said.answer or ""
        content = None
        with suppress(RecordsAway):
            episode = await self.writer.find(said.request)
            if episode is not None and episode.answer is not None:
                content = _same(answer, episode.answer)
        return "answer", redacted(answer) if self._text is StoreText.NONE else answer, content


def _same(answer: str, given: str) -> bool:
    """Whether two answers, the second of which may not be readable, are the same as far as their forms tell."""
    if is_redacted(given):
        return redacted(answer) == given
    one, other = canonical(answer), canonical(given)
    return answer.strip() == given.strip() or (one is not None and other is not None and one.text == other.text)


def _unknown(request: str) -> NotFound:
    return NotFound(f"nothing is known of request {request!r}", param="request_id", code="unknown_request")


def _episode(
    plan: Plan,
    runner: ControllerRunner,
    environment: LiveEnvironment,
    state: State,
    reply: Reply | None,
    stop: str,
    text: StoreText,
) -> Callable[[], ServedEpisode]:
    """What makes the record of an episode from what is known of it now; making it is for another thread."""
    seconds = round(time.monotonic() - plan.started, 6)
    created = datetime.now(UTC).isoformat(timespec="microseconds")
    answers = [environment.labels.written(label) for label in range(len(environment.labels))]
    rounds = tuple(runner.rounds)
    about = EpisodeDetails(
        beta_source=plan.beta.source_text,
        stage=None if plan.stage is None else str(plan.stage),
        fallback=runner.fallback,
        decided=runner.decided,
        limits=asdict(plan.limits),
        spent=state.spent,
        seconds=seconds,
        answer_kind=str(plan.prompt.kind.method),  # not its argument: a pattern is the client's text
        usage={} if reply is None else dict(reply.usage),
        sampling=dict(plan.provenance.sampling),
        chat_template=plan.provenance.chat_template,
        probe_template=plan.prompt.template.name,
        streamed=plan.streamed,
        votable=environment.votable,
    )
    if environment.cutoff is not None:
        about["refused"] = environment.cutoff
    if named := logs.client_request_id.get():
        about["client_request_id"] = named
    if text is StoreText.FULL:
        about["text"] = plan.provenance.text
        about["reply"] = None if reply is None else reply.message.content
    ledger = {"aborted": environment.meter.billed} if reply is None else dict(reply.tokens)
    branches, answer = len(environment.branches), state.answer

    def make() -> ServedEpisode:
        written = [redacted(one) for one in answers] if text is StoreText.NONE else answers
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
