"""Branches run to their ends after the answer has gone out, so that what was served can be replayed.

A served episode is censored: nobody knows what a branch that was pruned, or was running when the vote was settled,
would have said. Of some episodes, drawn by their id and by nothing that happened in them, every branch is run to its
end and asked after each interval, and more are opened up to a fixed number: how many a controller opens depends on what
the first ones said, and branches chosen so would not stand for others.

It takes what is left over: at a low priority, a few branches at a time, none while requests wait, here or at the
upstream, and no more tokens in any hour than it is given.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Final, TypeVar

from controllers import Action, Probed, Round, State, Stop, advance, branch, probe
from discovery.answers import redacted
from discovery.data.recordings import Origin, RecordedBranch, RecordedQuestion, live_split
from proxy.admission.request_slot import RequestSlots
from proxy.environment.live_environment import LiveEnvironment
from proxy.errors import UpstreamError
from proxy.recording import recorded_branches
from proxy.recording.template_drift import TemplateDrift
from proxy.settings import Settings, StoreText
from proxy.telemetry.metrics import Metrics
from proxy.types import Plan
from proxy.upstream.client import UpstreamClient

T = TypeVar("T")

logger = logging.getLogger(__name__)

BENCHMARK: Final = "live"
"""What live questions belong to."""
PRIORITY: Final = 1_000_000
"""Larger is later, where vLLM schedules by priority; elsewhere it changes nothing."""
MOST_WAITING: Final = 64
"""Episodes that wait to be finished; those drawn meanwhile are left out."""
LOOK_S: Final = 0.25
"""Seconds between looks at whether the upstream has time."""
HOUR_S: Final = 3600.0
TELL_S: Final = 60.0
"""Seconds between log lines about episodes that are skipped."""


@dataclass
class PendingEpisode:
    """An episode that was drawn, as it was when its answer went out."""

    plan: Plan
    environment: LiveEnvironment
    rounds: Sequence[Round]
    settled: int = field(init=False)  # tokens of it that are paid for; at first those of its client

    def __post_init__(self) -> None:
        self.settled = self.environment.meter.billed


def drawn(request_id: str, share: float) -> bool:
    """Whether a request is of the share that is recorded: by its id, and by another draw than a canary's."""
    lot = int.from_bytes(blake2b(request_id.encode(), digest_size=8, person=b"recording").digest()) / 2**64
    return lot < share


class BranchCompleter:
    """Finishes episodes, one after the other."""

    def __init__(
        self, engine: UpstreamClient, settings: Settings, metrics: Metrics, turns: RequestSlots, drift: TemplateDrift
    ) -> None:
        self._engine = engine
        self._aside = engine.for_background()
        self._settings = settings
        self._metrics = metrics
        self._turns = turns
        self._drift = drift
        self._waiting: asyncio.Queue[PendingEpisode] = asyncio.Queue(MOST_WAITING)
        self._purse = Purse(settings.record_tokens_per_hour)
        self._skipped = 0  # since the log was last told
        self._why_skipped = ""
        self._told_at = float("-inf")

    def wants(self, plan: Plan, state: State) -> bool:
        """Whether an episode is to be finished: it was drawn, and its branches are as its controller left them."""
        settings = self._settings
        ended = state.stop in (Stop.ANSWERED, Stop.MAX_TOKENS)
        readable = plan.prompt.kind.is_probeable and not plan.prompt.stop  # a stop string is the client's text
        readable = readable and self._drift.is_asked_alike(plan)  # else it would be a version of its own
        if plan.records_all or plan.ignores_eos:  # its client has the recording, or it can have no answers
            return False
        return bool(settings.store and ended and readable and drawn(plan.request_id, settings.record_fraction))

    def take(self, unfinished: PendingEpisode) -> bool:
        """Have an episode finished in its time; False if too many wait, or an hour has too few tokens for any of it."""
        settings = self._settings
        if self._waiting.full():
            self._skip(f"{MOST_WAITING} wait already; a smaller AUTOTTS_RECORD_FRACTION draws fewer")
            return False
        if not self._at_once(unfinished.plan):
            most = settings.record_tokens_per_hour
            self._skip(f"an hour has too few tokens for one; AUTOTTS_RECORD_TOKENS_PER_HOUR is {most}")
            return False
        self._waiting.put_nowait(unfinished)
        return True

    def close(self) -> None:
        """Give up those that wait."""
        if count := self._waiting.qsize():
            self._skip("the server is shutting down", count)
        self._tell_of_skipped()

    def _skip(self, why: str, count: int = 1) -> None:
        """Count episodes that were drawn and are not recorded, and say so at once, then once a minute at most."""
        self._metrics.recordings.labels("skipped").inc(count)
        self._skipped += count
        self._why_skipped = why
        if time.monotonic() - self._told_at >= TELL_S:
            self._tell_of_skipped()

    def _tell_of_skipped(self) -> None:
        if self._skipped:
            logger.warning("%s drawn episodes are not recorded: %s", self._skipped, self._why_skipped)
            self._told_at, self._skipped = time.monotonic(), 0

    async def next(self) -> RecordedQuestion | None:
        """The recording of the next episode that waits; None if it failed."""
        unfinished = await self._waiting.get()
        outcome, found = "skipped", None  # if the proxy ends meanwhile
        try:
            found = await self._finish(unfinished)
            outcome = "recorded"
        except Exception as error:  # whatever it is, the others go on
            outcome = "failed"
            words = error.logged if isinstance(error, UpstreamError) else type(error).__name__
            logger.warning("%s: its recording is given up: %s", unfinished.plan.request_id, words)
        finally:
            self._settle(unfinished)
            self._metrics.recordings.labels(outcome).inc()
        return found

    async def _finish(self, unfinished: PendingEpisode) -> RecordedQuestion:
        plan, environment = unfinished.plan, unfinished.environment
        environment.continue_in_background(self._aside, PRIORITY)
        await self._turn(unfinished, 1)
        await self._drift.confirm(plan, time.monotonic())  # before it costs anything
        at_once = self._at_once(plan)
        rounds = list(unfinished.rounds)
        running = [i for i, one in enumerate(environment.branches) if one.finish is None]
        for group in _groups(running, at_once):
            rounds += await self._run_out(unfinished, [move for i in group for move in (advance(i), probe(i))])
        missing = range(len(environment.branches), self._settings.record_branches)
        for group in _groups(missing, at_once):
            rounds += await self._run_out(unfinished, [move for i in group for move in (branch(), probe(i))])
        late = await self._ask_late(unfinished, rounds)
        await self._drift.confirm(plan, time.monotonic())
        return _recorded(plan, self._settings.store_text, recorded_branches.branches(environment, rounds, late))

    async def _run_out(self, unfinished: PendingEpisode, actions: Sequence[Action]) -> list[Round]:
        """Rounds that begin with `actions` and run their branches to their ends, asking after each interval."""
        environment = unfinished.environment
        rounds: list[Round] = []
        running = sorted({action.branch for action in actions if action.branch >= 0})
        while running:
            await self._turn(unfinished, len(running))
            rounds.append(Round(actions, await environment.execute(actions)))
            running = [i for i in running if environment.branches[i].finish is None]
            actions = [move for i in running for move in (advance(i), probe(i))]
        return rounds

    async def _ask_late(self, unfinished: PendingEpisode, rounds: Sequence[Round]) -> dict[tuple[int, int], Probed]:
        """What branches would have answered after intervals nobody asked them after."""
        environment = unfinished.environment
        asked = recorded_branches.asked(rounds)
        interval = environment.limits.interval
        gaps = [
            (index, intervals)
            for index, one in enumerate(environment.branches)
            for intervals in range(1, -(-len(one.ids) // interval))
            if (index, intervals) not in asked
        ]
        late: dict[tuple[int, int], Probed] = {}
        for group in _groups(gaps, self._at_once(unfinished.plan)):
            await self._turn(unfinished, len(group))
            late.update(zip(group, await environment.probe_at(group), strict=True))
        return late

    async def _turn(self, unfinished: PendingEpisode, branches: int) -> None:
        """Return when the upstream has time and there are tokens to spend, for an interval of some branches."""
        self._settle(unfinished)
        while True:
            if self._purse.holds(branches * _most(unfinished.plan)) and not await self._busy():
                return
            await asyncio.sleep(LOOK_S)

    def _at_once(self, plan: Plan) -> int:
        """Branches that may run at a time: an interval of them must fit into what an hour has."""
        return min(self._settings.record_at_once, self._settings.record_tokens_per_hour // _most(plan))

    def _settle(self, unfinished: PendingEpisode) -> None:
        """Take notice of what an episode has cost since."""
        spent = unfinished.environment.meter.billed - unfinished.settled
        unfinished.settled += spent
        self._purse.spend(spent)
        self._metrics.recording_tokens.labels(unfinished.plan.prompt.model).inc(spent)

    async def _busy(self) -> bool:
        """Whether requests wait, here or at the upstream, or that is left alone; where it does not say, whether any is
        served at all."""
        here, engine = (self._turns.episodes, self._turns.passthrough), self._engine
        if any(one.waiting for one in (*here, engine.branch_semaphore)) or not engine.breaker.is_closed:
            return True
        waiting = await engine.queue_length()
        return any(one.in_flight for one in here) if waiting is None else waiting > 0


class Purse:
    """Tokens that may be spent: so many in any hour. What it holds is spent, and told, before it is asked again."""

    def __init__(self, per_hour: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._left = per_hour
        self._clock = clock
        self._spent: deque[tuple[float, int]] = deque()  # when, and how many, in the last hour

    def spend(self, tokens: int) -> None:
        """So many have been spent by now."""
        if tokens:
            self._left -= tokens
            self._spent.append((self._clock(), tokens))

    def holds(self, tokens: int) -> bool:
        """Whether so many may be spent from now on."""
        while self._spent and self._spent[0][0] <= self._clock() - HOUR_S:
            self._left += self._spent.popleft()[1]
        return self._left >= tokens


def _most(plan: Plan) -> int:
    """Tokens that an interval of a branch, and asking after it, can cost."""
    return plan.environment_limits.interval + plan.limits.probe_tokens


def _groups(values: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for at in range(0, len(values), size):
        yield values[at : at + size]


def _recorded(plan: Plan, text: StoreText, branches: Sequence[RecordedBranch]) -> RecordedQuestion:
    """The recording of an episode whose branches are complete."""
    return RecordedQuestion(
        question=plan.provenance.question,
        model=plan.prompt.model,
        benchmark=BENCHMARK,
        interval=plan.environment_limits.interval,
        branches=[_veiled(one) for one in branches] if text is StoreText.NONE else branches,
        split=live_split(plan.provenance.question),
        text=plan.provenance.text if text is StoreText.FULL else None,
        sampling=plan.provenance.sampling,
        probe_template=plan.prompt.template.name,
        origin=Origin.LIVE,
        chat_template=plan.provenance.chat_template,
        request=plan.request_id,
    )


def _veiled(recorded: RecordedBranch) -> RecordedBranch:
    """The same branch, its answers not to be read."""
    probes = [None if answer is None else redacted(answer) for answer in recorded.probes]
    return recorded._replace(probes=probes, final=None if recorded.final is None else redacted(recorded.final))
