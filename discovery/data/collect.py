"""Collect complete recordings by requesting them from a running proxy, as any client would.

One request records one branch, which is on disk before the next request takes its slot. A finished branch is therefore
never lost and never paid for twice. Several processes may collect into one file; they share the work.

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

from discovery.data.collection_client import CONNECT_S, CollectionClient, FailedRequest, find_model
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
BRANCH_TIMEOUT_S: Final = 6 * 3600.0
"""Seconds without any response after which a branch is given up."""
POLL_S: Final = 0.5
"""Seconds between checks for branches that other processes have written."""
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
        budget: int | None,
        timing: RetryTiming,
        on_change: Callable[[CollectionProgress], None],
    ) -> None:
        self._claims = claims
        self._plan = plan
        self._at_once = at_once
        self._budget = budget
        self._timing = timing
        self._on_change = on_change
        wanted = ((question.question, part) for question in questions for part in range(plan.branches))
        self._questions = {question.question: question for question in questions}
        self._file = CollectionFile(lines, plan, self._questions)
        self._client = CollectionClient(client, plan, self._file, self._lose)
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
                while len(running) < self._at_once and (key := self._begin()) is not None:
                    running.add(asyncio.create_task(self._collect(key)))
                if running:
                    ended, _ = await asyncio.wait(running, timeout=POLL_S, return_when=asyncio.FIRST_COMPLETED)
                    for task in ended:
                        task.result()
                    running -= ended
                elif self._open and (self._may_begin() or self._elsewhere):
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

    def _begin(self) -> BranchKey | None:
        """Claim and return a branch that no process is working on; None if none may be begun now."""
        if not self._may_begin() or (slot := next(filter(self._claims.take, self._slots), None)) is None:
            return None
        while (key := next((key for key in self._open if self._claims.take(self._name(key))), None)) is not None:
            self._refresh()  # the process that had claimed it may have written it
            may_begin = self._may_begin()
            if may_begin and key in self._open:
                del self._open[key]
                self._in_flight[key] = slot
                return key
            self._claims.give_back(self._name(key))
            if not may_begin:
                break
        self._claims.give_back(slot)
        return None

    def _may_begin(self, more: int = 1) -> bool:
        """Return whether `more` further requests fit the budget, whatever those in flight will cost.

        With a budget, or branches of an earlier run, the first request goes alone. It shows how often branches are
        probed, which sets the reserve of the others, and whether the proxy still records as it did.
        """
        is_first = more and not self._is_version_known
        if is_first and self._in_flight and (self._file.version is not None or self._budget is not None):
            return False
        if self._budget is None:
            return True
        self._elsewhere = self._claims.elsewhere(self._slots)
        self._refresh()  # after counting: a branch that has left its slot since is in the file
        self._progress.reserve = self._reserve()
        if is_first and self._file.version is None and self._elsewhere:
            return False
        in_flight = len(self._in_flight) + self._elsewhere + more
        return self._file.spent + in_flight * self._progress.reserve <= self._budget

    def _reserve(self) -> int:
        """Return the tokens to reserve for a branch."""
        version = self._file.version
        return self._plan.reserved_tokens(None if version is None else version.interval)

    async def _collect(self, key: BranchKey) -> None:
        """Record one branch, or the reason why it was skipped."""
        question, part = key
        try:
            result = await self._request(key)
            if result is None:
                self._open[key] = None
            elif isinstance(result, RecordingLine):
                self._is_version_known = True
                recorded = result.recorded()
                self._file.add(format_recording_line(recorded, result.part))
                self._progress.mine += 1
                self._progress.tokens += branch_cost(recorded.branches[0])
            elif result.is_about_question:
                self._refuse(question, result.message)
            else:
                name = self._questions[question].id
                self._progress.skipped.append(f"question {name}, branch {part}: {result.message}")
        finally:
            self._claims.give_back(self._in_flight.pop(key))
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

    async def _request(self, key: BranchKey) -> RecordingLine | FailedRequest | None:
        """Return a branch, or the last failure after some retries; None if the budget allows no further request."""
        question, part = key
        for failures in range(RETRIES + 1):
            if failures and not self._may_begin(0):
                return None
            cap = None if self._budget is None else self._reserve()
            result = await self._client.request_branch(self._questions[question], part, cap)
            if isinstance(result, RecordingLine):
                return result
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
    timing: RetryTiming = DEFAULT_TIMING,
    on_change: Callable[[CollectionProgress], None] = lambda _: None,
) -> CollectionProgress:
    """Collect the branches of `plan` from the proxy at `url`, whose admin key is `key`, and append branches to `out`.

    `budget` limits the tokens of all branches in `out` of this model and these settings, and of failed requests for
    them, which are recorded in `out`.lost. It is never exceeded, except by requests of a killed process.

    Raises CollectError, BadRecording or FileWriteError. The file stays valid then, and also if this is cancelled.
    """
    base_url = url.rstrip("/").removesuffix("/v1") + "/v1"
    timeout = openai.Timeout(BRANCH_TIMEOUT_S, connect=CONNECT_S)
    async with openai.AsyncOpenAI(base_url=base_url, api_key=key, max_retries=0, timeout=timeout) as client:
        model, longest = await find_model(client, plan.model)
        plan = replace(plan, model=model, longest=longest)
        if budget is not None and not (plan.max_tokens or longest):
            raise CollectError(
                f"the proxy does not report the context length of {model}: --max-tokens-total needs --max-tokens"
            )
        claims = WorkClaims(out.with_name(f"{out.name}.lock"))
        try:
            collector = Collector(client, SharedLines(out), claims, questions, plan, at_once, budget, timing, on_change)
            return await collector.run()
        finally:
            claims.close()
