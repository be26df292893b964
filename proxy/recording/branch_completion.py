"""Complete the branches of sampled episodes in the background, so that served traffic can be replayed.

A served episode is censored: the ends of pruned branches, and of branches that ran when the vote was settled, are
unknown. Episodes are sampled by their id only, never by what happened in them. Every branch of a sampled episode is run
to its end and probed after each interval. More branches are opened, up to a fixed number. The number that a controller
opens depends on the first answers, so its branches alone are not representative.

Completion uses spare capacity only. It runs a few branches at a time, at low priority and within a token budget per
hour, and pauses while requests wait in the proxy or at the upstream.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Final, TypeVar

from controllers import TO_END, Action, Probed, Round, State, Stop, advance, branch, probe
from discovery.answers import redacted
from discovery.data.recordings import Origin, RecordedBranch, RecordedQuestion, live_split
from proxy.admission.request_slot import RequestSlots
from proxy.admission.token_budget import TokenWindow
from proxy.environment.live_environment import LiveEnvironment
from proxy.environment.reply_environment import ReplyEnvironment
from proxy.errors import UpstreamError
from proxy.recording import recorded_branches, reply_recordings
from proxy.recording.template_drift import TemplateDrift
from proxy.settings import Settings, StoreText
from proxy.telemetry.metrics import Metrics
from proxy.types import Plan
from proxy.upstream.fleet.interface import Upstream

T = TypeVar("T")

logger = logging.getLogger(__name__)

BENCHMARK: Final = "live"
"""Benchmark name of questions from served traffic."""
PRIORITY: Final = 1_000_000
"""Priority of background calls at vLLM. Larger values run later, if vLLM schedules by priority."""
MAX_PENDING: Final = 64
"""Maximum number of episodes that wait for completion. Further sampled episodes are skipped."""
POLL_S: Final = 0.25
"""Seconds between checks for spare capacity."""
HOUR_S: Final = 3600.0
WARN_EVERY_S: Final = 60.0
"""Minimum seconds between log lines about skipped episodes."""


@dataclass
class PendingEpisode:
    """A sampled episode, in its state when the answer was sent."""

    plan: Plan
    environment: LiveEnvironment | ReplyEnvironment
    rounds: Sequence[Round]
    settled: int = field(init=False)  # tokens already charged; at first those charged to the client

    def __post_init__(self) -> None:
        self.settled = self.environment.meter.billed


def is_sampled(request_id: str, share: float) -> bool:
    """Return whether a request belongs to the recorded `share`. The draw is independent of the canary's."""
    lot = int.from_bytes(blake2b(request_id.encode(), digest_size=8, person=b"recording").digest()) / 2**64
    return lot < share


class BranchCompleter:
    """Completes the branches of pending episodes, one episode after the other."""

    def __init__(
        self, engine: Upstream, settings: Settings, metrics: Metrics, slots: RequestSlots, drift: TemplateDrift
    ) -> None:
        self._engine = engine
        self._background = engine.for_background()
        self._settings = settings
        self._metrics = metrics
        self._slots = slots
        self._drift = drift
        self._pending: asyncio.Queue[PendingEpisode] = asyncio.Queue(MAX_PENDING)
        self._window = TokenWindow(settings.record_tokens_per_hour, HOUR_S)
        self._skipped = 0  # episodes since the last log line
        self._skip_reason = ""
        self._logged_at = float("-inf")

    def wants(self, plan: Plan, state: State) -> bool:
        """Return whether an episode should be completed: it was sampled and its branches suit a recording."""
        settings = self._settings
        ended = state.stop in (Stop.ANSWERED, Stop.MAX_TOKENS)
        readable = plan.prompt.kind.is_probeable and not plan.prompt.stop  # a stop string is the client's text
        readable = readable and self._drift.has_usual_probe(plan)  # otherwise it would create a version of its own
        if plan.records_all or plan.ignores_eos:  # the client gets the recording, or there are no answers
            return False
        return bool(settings.store and ended and readable and is_sampled(plan.request_id, settings.record_fraction))

    def wants_replies(self, plan: Plan, environment: ReplyEnvironment, state: State) -> bool:
        """Return whether an episode of whole replies should be recorded: it was sampled and all its replies ended."""
        is_drawn = bool(self._settings.store) and is_sampled(plan.request_id, self._settings.record_fraction)
        return is_drawn and reply_recordings.is_recordable(plan, environment, state)

    def enqueue(self, pending: PendingEpisode) -> bool:
        """Queue an episode. Return False, and count it as skipped, if the queue is full or the budget is too small."""
        settings = self._settings
        if self._pending.full():
            self._skip(f"{MAX_PENDING} episodes are waiting already; lower AUTOTTS_RECORD_FRACTION to sample fewer")
            return False
        if not self._max_parallel(pending.plan):
            budget = settings.record_tokens_per_hour
            unit = "interval" if pending.plan.reply is None else f"reply of up to {_step_cost(pending.plan)} tokens"
            self._skip(f"AUTOTTS_RECORD_TOKENS_PER_HOUR={budget} is too small for one {unit}; raise it")
            return False
        self._pending.put_nowait(pending)
        return True

    def close(self) -> None:
        """Skip the episodes that still wait."""
        if count := self._pending.qsize():
            self._skip("the server is shutting down", count)
        self._log_skipped()

    def _skip(self, reason: str, count: int = 1) -> None:
        """Count skipped episodes. Log them at once, then at most once a minute."""
        self._metrics.recordings.labels("skipped").inc(count)
        self._skipped += count
        self._skip_reason = reason
        if time.monotonic() - self._logged_at >= WARN_EVERY_S:
            self._log_skipped()

    def _log_skipped(self) -> None:
        if self._skipped:
            logger.warning("skipped recording %s sampled episodes: %s", self._skipped, self._skip_reason)
            self._logged_at, self._skipped = time.monotonic(), 0

    async def next(self) -> RecordedQuestion | None:
        """Wait for the next pending episode and return its recording, or None if that failed."""
        pending = await self._pending.get()
        outcome, recording = "skipped", None  # this outcome stays if a shutdown cancels the completion
        try:
            recording = await self._complete(pending)
            outcome = "recorded"
        except Exception as error:  # any failure must not stop the episodes after this one
            outcome = "failed"
            reason = error.logged if isinstance(error, UpstreamError) else type(error).__name__
            logger.warning("%s: recording failed: %s", pending.plan.request_id, reason)
        finally:
            self._settle(pending)
            self._metrics.recordings.labels(outcome).inc()
        return recording

    async def _complete(self, pending: PendingEpisode) -> RecordedQuestion:
        if isinstance(pending.environment, ReplyEnvironment):
            return await self._add_replies(pending, pending.environment)
        return await self._complete_branches(pending, pending.environment)

    async def _add_replies(self, pending: PendingEpisode, environment: ReplyEnvironment) -> RecordedQuestion:
        """Open more replies up to the number that is recorded. Those of the episode have ended."""
        plan = pending.plan
        environment.continue_in_background(self._routed(plan), PRIORITY)
        await self._drift.confirm(plan, time.monotonic())
        missing = range(len(environment.branches), self._settings.record_branches)
        try:
            for group in _groups(missing, self._max_parallel(plan)):
                await self._wait_for_capacity(pending, len(group))
                await environment.execute([branch(TO_END)] * len(group))
        finally:
            await environment.close()  # if one reply fails or the proxy ends, the others run on otherwise
        await self._drift.confirm(plan, time.monotonic())
        return _recording(plan, self._settings.store_text, await reply_recordings.recorded_replies(environment))

    async def _complete_branches(self, pending: PendingEpisode, environment: LiveEnvironment) -> RecordedQuestion:
        plan = pending.plan
        environment.continue_in_background(self._routed(plan), PRIORITY)
        await self._wait_for_capacity(pending, 1)
        await self._drift.confirm(plan, time.monotonic())  # before any tokens are spent
        parallel = self._max_parallel(plan)
        rounds = list(pending.rounds)
        running = [i for i, live in enumerate(environment.branches) if live.finish is None]
        for group in _groups(running, parallel):
            moves = [move for i in group for move in (advance(i), probe(i))]
            rounds += await self._run_to_end(pending, environment, moves)
        missing = range(len(environment.branches), self._settings.record_branches)
        for group in _groups(missing, parallel):
            moves = [move for i in group for move in (branch(), probe(i))]
            rounds += await self._run_to_end(pending, environment, moves)
        late = await self._probe_gaps(pending, environment, rounds)
        await self._drift.confirm(plan, time.monotonic())
        return _recording(plan, self._settings.store_text, recorded_branches.branches(environment, rounds, late))

    async def _run_to_end(
        self, pending: PendingEpisode, environment: LiveEnvironment, actions: Sequence[Action]
    ) -> list[Round]:
        """Execute `actions`, then advance and probe their branches until all have ended. Return the rounds."""
        rounds: list[Round] = []
        running = sorted({action.branch for action in actions if action.branch >= 0})
        while running:
            await self._wait_for_capacity(pending, len(running))
            rounds.append(Round(actions, await environment.execute(actions)))
            running = [i for i in running if environment.branches[i].finish is None]
            actions = [move for i in running for move in (advance(i), probe(i))]
        return rounds

    async def _probe_gaps(
        self, pending: PendingEpisode, environment: LiveEnvironment, rounds: Sequence[Round]
    ) -> dict[tuple[int, int], Probed]:
        """Probe branches after the intervals at which the controller did not. Keys are (branch, intervals)."""
        probed = recorded_branches.probes_by_interval(rounds)
        interval = environment.limits.interval
        gaps = [
            (index, intervals)
            for index, live in enumerate(environment.branches)
            for intervals in range(1, -(-len(live.ids) // interval))
            if (index, intervals) not in probed
        ]
        late: dict[tuple[int, int], Probed] = {}
        for group in _groups(gaps, self._max_parallel(pending.plan)):
            await self._wait_for_capacity(pending, len(group))
            late.update(zip(group, await environment.probe_at(group), strict=True))
        return late

    def _routed(self, plan: Plan) -> Upstream:
        """Return the upstream for the background calls of an episode, which go where its prompt is cached."""
        return self._background.route(plan.prompt.model, lambda: plan.affinity, plan.request_id)

    async def _wait_for_capacity(self, pending: PendingEpisode, branches: int) -> None:
        """Wait until the budget allows one interval of `branches`, or whole replies, and the upstream has capacity."""
        self._settle(pending)
        needed = branches * _step_cost(pending.plan)
        while True:
            if self._window.fits(needed, time.monotonic()) and not await self._is_busy():
                return
            await asyncio.sleep(POLL_S)

    def _max_parallel(self, plan: Plan) -> int:
        """Return how many branches may run concurrently. One step of all of them must fit the hourly budget."""
        return min(self._settings.record_at_once, self._settings.record_tokens_per_hour // _step_cost(plan))

    def _settle(self, pending: PendingEpisode) -> None:
        """Charge the tokens that an episode has spent since the last call."""
        spent = pending.environment.meter.billed - pending.settled
        pending.settled += spent
        self._window.settle(0, spent, time.monotonic())
        self._metrics.recording_tokens.labels(pending.plan.prompt.model).inc(spent)

    async def _is_busy(self) -> bool:
        """Return whether requests wait in the proxy or at the upstream, or the circuit breaker is open.

        If the upstream does not report its queue, it counts as busy while any request is being served.
        """
        queues, engine = (self._slots.episodes, self._slots.passthrough), self._engine
        if any(queue.waiting for queue in queues) or engine.calls_waiting or not engine.is_available:
            return True
        waiting = await engine.queue_length()
        return any(queue.in_flight for queue in queues) if waiting is None else waiting > 0


def _step_cost(plan: Plan) -> int:
    """Return the maximum tokens of one interval of a branch and the probe after it, or of a whole reply."""
    if plan.reply is not None:
        return plan.reply.branch_tokens
    return plan.environment_limits.interval + plan.limits.probe_tokens


def _groups(values: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]


def _recording(plan: Plan, text: StoreText, branches: Sequence[RecordedBranch]) -> RecordedQuestion:
    """Return the recording of an episode whose branches are complete."""
    return RecordedQuestion(
        question=plan.provenance.question,
        model=plan.prompt.model,
        benchmark=BENCHMARK,
        interval=plan.environment_limits.interval,
        branches=[_redacted(recorded) for recorded in branches] if text is StoreText.NONE else branches,
        split=live_split(plan.provenance.question),
        text=plan.provenance.text if text is StoreText.FULL else None,
        sampling=plan.provenance.sampling,
        probe_template=plan.probe_template,
        origin=Origin.LIVE,
        chat_template=plan.provenance.chat_template,
        request=plan.request_id,
    )


def _redacted(recorded: RecordedBranch) -> RecordedBranch:
    """Return the branch with its answers redacted."""
    probes = [None if answer is None else redacted(answer) for answer in recorded.probes]
    return recorded._replace(probes=probes, final=None if recorded.final is None else redacted(recorded.final))
