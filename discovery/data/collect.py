"""Collect complete recordings by requesting them from a running proxy, as any client would.

One request records several branches of a question. They are on disk before another request takes their slots. A
finished branch is therefore never lost and never paid for twice. Several processes may collect into one file; they
share the work.

With a budget, each request states its maximum cost, which the proxy enforces. That amount is reserved for the request.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, NamedTuple

import openai

from discovery.data.collection_client import CollectionClient, FailedRequest, Send, find_model, open_client
from discovery.data.collection_file import CollectionFile, branch_cost
from discovery.data.collection_plan import BranchKey, CollectionPlan
from discovery.data.importers import RecordingLine, format_recording_line
from discovery.data.questions import Question
from discovery.data.shared_jsonl import SharedLines, WorkClaims
from discovery.errors import CollectError

RETRIES: Final = 3
BACKOFF_S: Final = 1.0
"""Seconds before the first retry if the proxy names none; each further retry waits twice as long."""
MAX_WAIT_S: Final = 300.0
"""Longest wait before a retry, whatever the proxy asks for."""
POLL_S: Final = 0.5
"""Seconds between checks for branches that other processes have written."""
BRANCHES_PER_REQUEST: Final = 16
"""Branches of one question that a request asks for. More would leave slots idle until the longest of them ends."""
SLOTS: Final = 1024
"""Branches that all processes collecting into one file may have in flight together."""
MAX_EQUAL_REFUSALS: Final = 3
"""Collecting stops when this many questions are refused with the same message before any branch is recorded."""
AWAY_S: Final = 900.0
"""Seconds to wait for the proxy or its upstream to become available again."""
PAUSE_S: Final = 2.0
"""Seconds between checks whether it is available."""


class RetryTiming(NamedTuple):
    """How retries wait, and by which clock."""

    backoff_s: float = BACKOFF_S
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep
    clock: Callable[[], float] = time.monotonic


DEFAULT_TIMING: Final = RetryTiming()


@dataclass
class CollectionProgress:
    """Progress of a collection."""

    total: int  # branches that are wanted
    done: int = 0  # of them in the file
    mine: int = 0  # branches added by this process
    without_signals: int = 0  # of them without signals, although the plan asks for signals
    tokens: int = 0  # spent by this process
    spent: int = 0  # tokens of all the plan's branches in the file, and of its lost requests
    reserve: int = 0  # tokens reserved for one more branch
    seconds: float = 0.0
    skipped: list[str] = field(default_factory=list)  # branches and questions that were given up, and why
    is_out_of_budget: bool = False  # it ended because the next branch might have exceeded the budget


class Collector:
    """Records the branches of one plan. An object can be used only once."""

    def __init__(
        self,
        client: openai.AsyncOpenAI,
        lines: SharedLines,
        claims: WorkClaims,
        questions: Sequence[Question],
        plan: CollectionPlan,
        at_once: int,
        per_request: int,
        budget: int | None,
        timing: RetryTiming,
        on_change: Callable[[CollectionProgress], None],
        send: Send | None = None,
    ) -> None:
        self._claims = claims
        self._plan = plan
        self._at_once = at_once
        self._per_request = per_request
        self._budget = budget
        self._timing = timing
        self._on_change = on_change
        wanted = ((question.question, part) for question in questions for part in range(plan.branches))
        self._questions = {question.question: question for question in questions}
        self._file = CollectionFile(lines, plan, self._questions)
        self._client = CollectionClient(client, plan, self._file, self._lose, send)
        self._open = OrderedDict.fromkeys(wanted)  # branches this process has not begun
        self._wanted = frozenset(self._open)
        self._slots = [json.dumps([*plan.identity, slot], sort_keys=True) for slot in range(SLOTS)]
        self._in_flight: dict[BranchKey, str] = {}  # the slot of each branch
        self._elsewhere = 0  # other processes' branches in flight when the budget was last checked
        self._refused: dict[str, str] = {}  # the message by question
        self._is_version_known = False  # a reply of this run has shown the current version
        self._availability = asyncio.Lock()  # held by the branch that polls for the proxy
        self._began = timing.clock()
        self._progress = CollectionProgress(len(self._wanted))

    async def run(self) -> CollectionProgress:
        """Collect until nothing is left to do. Raises CollectError, BadRecording or FileWriteError."""
        self._file.repair()
        self._refresh()
        running: set[asyncio.Task[None]] = set()
        try:
            while True:
                while batch := self._begin():
                    running.add(asyncio.create_task(self._collect(batch)))
                if running:
                    ended, _ = await asyncio.wait(running, timeout=POLL_S, return_when=asyncio.FIRST_COMPLETED)
                    for task in ended:
                        task.result()
                    running -= ended
                elif self._open and (self._room() or self._elsewhere):
                    await asyncio.sleep(POLL_S)
                else:
                    break
                self._refresh()
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        self._progress.is_out_of_budget = bool(self._open)
        return self._progress

    def _refresh(self) -> None:
        """Read what any process has written, and report progress."""
        progress = self._progress
        for key in self._file.read():
            self._open.pop(key, None)
            progress.done += key in self._wanted
        progress.spent = self._file.spent
        progress.seconds = self._timing.clock() - self._began
        self._on_change(progress)

    def _begin(self) -> list[BranchKey]:
        """Claim and return branches of one question that no process is working on; none if none may be begun now."""
        most = min(self._at_once - len(self._in_flight), self._per_request)
        slots = self._claim(min(most, self._room()) if most else 0)
        if not slots:
            return []
        self._refresh()  # the processes that had claimed these branches may have written them
        unwritten = [key for key in slots if key in self._open]
        batch = unwritten[: self._room()]
        for key, slot in slots.items():
            if key in batch:
                del self._open[key]
                self._in_flight[key] = slot
            else:
                self._claims.give_back(slot)
                self._claims.give_back(self._name(key))
        return batch if batch or unwritten else self._begin()

    def _claim(self, most: int) -> dict[BranchKey, str]:
        """Claim up to `most` branches of the first question that has one. Return the slot of each."""
        slots: dict[BranchKey, str] = {}
        question: str | None = None
        for key in self._open:
            if len(slots) >= most or question not in (None, key[0]):
                break
            if not self._claims.take(self._name(key)):
                continue
            slot = next(filter(self._claims.take, self._slots), None)
            if slot is None:
                self._claims.give_back(self._name(key))
                break
            slots[key], question = slot, key[0]
        return slots

    def _room(self) -> int:
        """Return how many further branches may be requested, whatever those in flight will cost.

        With a budget, or branches of an earlier run, the first branch goes alone. It shows how often branches are
        probed, which sets the reserve of the others, and whether the proxy still records as it did.
        """
        is_first = not self._is_version_known and (self._file.version is not None or self._budget is not None)
        if is_first and self._in_flight:
            return 0
        room = 1 if is_first else SLOTS
        if self._budget is None:
            return room
        unreserved = self._unreserved()
        if is_first and self._file.version is None and self._elsewhere:
            return 0
        return min(room, max(0, unreserved // self._progress.reserve))

    def _unreserved(self) -> int:
        """Return how much of the budget is neither spent nor reserved. It may be below zero."""
        self._elsewhere = self._claims.elsewhere(self._slots)
        self._refresh()  # after counting: a branch that has left its slot since is in the file
        self._progress.reserve = self._reserve()
        in_flight = len(self._in_flight) + self._elsewhere
        return (self._budget or 0) - self._file.spent - in_flight * self._progress.reserve

    def _reserve(self) -> int:
        """Return the tokens to reserve for a branch."""
        version = self._file.version
        return self._plan.reserved_tokens(None if version is None else version.interval)

    async def _collect(self, batch: Sequence[BranchKey]) -> None:
        """Record branches of one question, or the reason why they were skipped."""
        question = batch[0][0]
        try:
            failure = await self._request(batch)
            missing = [key for key in batch if key in self._in_flight]
            if failure is None:
                self._open |= dict.fromkeys(missing)
            elif failure.is_about_question:
                self._refuse(question, failure.message)
            else:
                named = _name_parts([part for _, part in missing])
                self._progress.skipped.append(f"question {self._questions[question].id}, {named}: {failure.message}")
        finally:
            for key in batch:
                self._leave(key)

    def _record(self, question: str, lines: Sequence[RecordingLine]) -> None:
        """Write branches of a question to the file, then give their slots back."""
        if not lines:
            return
        self._is_version_known = True
        recorded = [(line.recorded(), line.part) for line in lines]
        self._file.add([format_recording_line(*branch) for branch in recorded])
        for recording, part in recorded:
            branch = recording.branches[0]
            self._progress.mine += 1
            self._progress.without_signals += self._plan.signals and not branch.has_signals
            self._progress.tokens += branch_cost(branch)
            self._leave((question, part or 0))

    def _leave(self, key: BranchKey) -> None:
        """Give back the slot and the claim of a branch that is in flight."""
        slot = self._in_flight.pop(key, None)
        if slot is not None:
            self._claims.give_back(slot)
            self._claims.give_back(self._name(key))

    def _refuse(self, question: str, message: str) -> None:
        """Skip all branches of a question. Raises CollectError if the first questions all get the same error."""
        if question in self._refused:
            return
        self._refused[question] = message
        self._progress.skipped.append(f"question {self._questions[question].id}: {message}")
        for part in range(self._plan.branches):
            self._open.pop((question, part), None)
        messages = list(self._refused.values())
        if self._file.version is None and len(messages) == MAX_EQUAL_REFUSALS and len(set(messages)) == 1:
            raise CollectError(
                f"the proxy refuses each of the first {MAX_EQUAL_REFUSALS} questions with the same error: {message}"
            )

    async def _request(self, batch: Sequence[BranchKey]) -> FailedRequest | None:
        """Request and record branches of one question. Return the last failure after some retries.

        Branches that are still in flight afterwards were not recorded. Without a failure they may be requested later:
        the budget allows no further request now, or the proxy opens fewer branches per request.
        """
        question, result = self._questions[batch[0][0]], None
        for failures in range(RETRIES + 1):
            if failures and self._budget is not None and self._unreserved() < 0:
                return None
            parts = [part for question_id, part in batch if (question_id, part) in self._in_flight]
            cap = None if self._budget is None else len(parts) * self._reserve()
            collected = await self._client.request_branches(question, parts, cap)
            self._record(question.question, collected.lines)
            result = collected.failure
            if result is None:
                if len(collected.lines) < len(parts):
                    self._per_request = len(collected.lines)
                return None
            self._lose(result.tokens)
            if result.is_about_question:
                break
            if failures < RETRIES:
                wait_s = self._timing.backoff_s * 2**failures if result.wait_s is None else result.wait_s
                await self._timing.sleep(min(wait_s, MAX_WAIT_S))
                if result.is_away:
                    await self._until_available(result.message)
        return result

    def _lose(self, tokens: int) -> None:
        """Record tokens that were spent on a failed request."""
        self._file.add_lost_tokens(tokens)
        self._progress.tokens += tokens
        self._refresh()

    async def _until_available(self, message: str) -> None:
        """Wait until the proxy is ready. Raises CollectError if that takes longer than `AWAY_S`."""
        async with self._availability:
            began = self._timing.clock()
            while not await self._client.is_ready():
                if self._timing.clock() - began > AWAY_S:
                    raise CollectError(
                        f"the proxy has not been available for {AWAY_S:.0f} s ({message}); finished branches are kept, "
                        "and --resume continues once it is available"
                    )
                await self._timing.sleep(PAUSE_S)

    def _name(self, key: BranchKey) -> str:
        """Return the name under which a branch is claimed."""
        return json.dumps([*self._plan.identity, *key], sort_keys=True)


async def collect(
    url: str,
    key: str,
    questions: Sequence[Question],
    plan: CollectionPlan,
    out: Path,
    at_once: int = 8,
    budget: int | None = None,
    *,
    per_request: int = BRANCHES_PER_REQUEST,
    timing: RetryTiming = DEFAULT_TIMING,
    on_change: Callable[[CollectionProgress], None] = lambda _: None,
    send: Send | None = None,
) -> CollectionProgress:
    """Collect the branches of `plan` from the proxy at `url`, whose admin key is `key`, and append branches to `out`.

    `budget` limits the tokens of all branches in `out` of this model and these settings, and of failed requests for
    them, which are recorded in `out`.lost. It is never exceeded, except by requests of a killed process. `at_once`
    limits the branches in flight, and `per_request` those of one request. `send` sends requests from elsewhere.

    Raises CollectError, BadRecording or FileWriteError. The file stays valid then, and also if this is cancelled.
    """
    async with open_client(url, key) as client:
        model, longest = await find_model(client, plan.model)
        plan = replace(plan, model=model, longest=longest)
        if budget is not None and not (plan.max_tokens or longest):
            raise CollectError(
                f"the proxy does not report the context length of {model}: --max-tokens-total needs --max-tokens"
            )
        claims = WorkClaims(out.with_name(f"{out.name}.lock"))
        try:
            collector = Collector(
                client, SharedLines(out), claims, questions, plan, at_once, per_request, budget, timing, on_change, send
            )
            return await collector.run()
        finally:
            claims.close()


def _name_parts(parts: Sequence[int]) -> str:
    """Return text that names branches by their numbers, as in `branch 3` and `branches 0, 1, 4`."""
    return f"branch {parts[0]}" if len(parts) == 1 else f"branches {', '.join(map(str, parts))}"
