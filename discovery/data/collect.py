"""Complete recordings, made by asking the running proxy for them as any client would.

One request is one branch, and a branch is on disk before its place is taken by another: whatever happens, a finished
branch is neither lost nor bought twice. Two that collect into one file share the work.

Under a budget each request says what it may cost at most, and the proxy keeps to that; so much is set aside for it.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final, NamedTuple

import openai
from openai.types.chat import ChatCompletion

from discovery.data.importers import RecordingLine, format_recording_line, parse_recording_line
from discovery.data.questions import Question
from discovery.data.recordings import Origin, RecordedBranch, RecordedQuestion, Version, default_split, question_text
from discovery.data.safe_json import parse_json
from discovery.data.shared_jsonl import SharedLines, WorkClaims
from discovery.errors import BadRecording, CollectError

CONTROLLER: Final = "everything@1"
RETRIES: Final = 3
BACKOFF_S: Final = 1.0
"""Seconds before the first retry where the proxy names none; each further one waits twice as long."""
LONGEST_WAIT_S: Final = 300.0
"""Seconds a retry waits at most, whatever the proxy asks for."""
LONGEST_BRANCH_S: Final = 6 * 3600.0
"""Seconds after which a branch is given up that nothing is heard of."""
CONNECT_S: Final = 10.0
LOOK_S: Final = 0.5
"""Seconds between looks at what others have written meanwhile."""
PLACES: Final = 1024
"""Branches that all who collect into one file may be at together."""
ALIKE: Final = 3
"""Questions that are refused in the same words, before any branch is made, after which all would be."""
AWAY_S: Final = 900.0
"""Seconds that are waited for a proxy, or what it asks, to be back."""
PAUSE_S: Final = 2.0
"""Seconds between looks at whether it is."""

PROBE: Final = 64
"""Tokens a probe is taken to cost at most."""
DENSEST: Final = 32
"""Tokens between probes, as long as nobody knows."""
CLOSING: Final = 1024
"""Tokens the proxy is taken to keep back of a request's cap, beside an eighth, for a reply it might have to close."""

ADMIN_KEY_VARIABLE: Final = "AUTOTTS_ADMIN_KEY"
"""The variable that has the proxy's admin key."""
PASSING: Final = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.CONFLICT, HTTPStatus.TOO_MANY_REQUESTS})
"""Refusals that may be none the next time, as all from 500 on."""
UNSENT: Final = frozenset({"ConnectError", "ConnectTimeout"})
"""Why a request was not even sent, as httpx names it, or httpx2, which the newer `openai` brings along."""
UPSTREAM_ERROR: Final = "upstream_error"
QUESTIONABLE: Final = frozenset(
    {HTTPStatus.BAD_REQUEST, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.UNPROCESSABLE_ENTITY}
)
"""Refusals that are about the question."""
_DECIMAL: Final = re.compile(r"[0-9]{1,6}(?:\.[0-9]{1,6})?", re.ASCII)

Key = tuple[str, int]
"""A branch: its question, and which of its branches it is."""


class RetryTiming(NamedTuple):
    """How it waits, and by which clock."""

    backoff_s: float = BACKOFF_S
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep
    clock: Callable[[], float] = time.monotonic


DEFAULT_TIMING: Final = RetryTiming()


@dataclass(frozen=True)
class CollectionPlan:
    """What is to be recorded, and how it is asked for."""

    model: str  # empty: the only one the proxy serves
    benchmark: str  # what the questions belong to
    branches: int  # of each question
    answer: str = "auto"  # how answers are read
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None  # of a branch
    keep_text: bool = False  # write questions down, not only their hashes
    longest: int = 0  # tokens a branch may have where `max_tokens` does not say; 0 if nobody knows

    @property
    def sampling(self) -> dict[str, Any]:
        """What is sent of how branches are drawn."""
        asked = {"temperature": self.temperature, "top_p": self.top_p, "max_tokens": self.max_tokens}
        return {name: value for name, value in asked.items() if value is not None}

    @property
    def settings(self) -> dict[str, Any]:
        """All by which branches that were made by one order are told from those of another; in their `sampling`."""
        return self.sampling | ({} if self.answer == "auto" else {"answer": self.answer})

    @property
    def named(self) -> list[Any]:
        """It as it is told from others that go into one file."""
        return [self.model, self.benchmark, self.settings]

    def most(self, interval: int | None) -> int:
        """Tokens that are set aside for a branch of so many between probes; None where that is not known."""
        tokens = self.max_tokens or self.longest
        probes = -(-tokens // (interval or DENSEST))
        return (tokens + probes * PROBE) * 8 // 7 + CLOSING

    def made(self, line: RecordingLine) -> bool:
        """Whether `line` could have come of it."""
        names = ("temperature", "top_p", "max_tokens", "answer")
        settings = {name: value for name in names if (value := line.sampling.get(name)) is not None}
        return [line.model, line.benchmark, settings] == self.named


class CollectionFile:
    """What a file holds of an order, as far as it has been read; and what failures have cost, told beside it."""

    def __init__(self, lines: SharedLines, order: CollectionPlan, questions: Mapping[str, Question]) -> None:
        self.done: set[Key] = set()
        self.spent = 0  # tokens of all its branches, probes included, and of what was lost
        self.version: Version | None = None  # of all of them
        self._lines = lines
        self._lost = SharedLines(lines.path.with_name(f"{lines.path.name}.lost"), may_be_link=False)
        self._order = order
        self._questions = questions

    def mend(self) -> None:
        """Cut off what processes that were killed have left half written."""
        self._lines.mend()
        self._lost.mend()

    def lose(self, tokens: int) -> None:
        """Write down tokens nothing came of."""
        if tokens:
            self._lost.append(json.dumps({"of": self._order.named, "tokens": tokens}) + "\n")

    def read(self) -> list[Key]:
        """Take in what is new, and return which branches. Raises CollectError or BadRecording at what is none."""
        for number, text in self._lost.new():
            try:
                lost = parse_json(text)
                self.spent += lost["tokens"] if lost["of"] == self._order.named else 0
            except (ValueError, TypeError, KeyError):
                raise BadRecording(f"{self._lost.path}:{number}: tells of no tokens that were lost") from None
        new: list[Key] = []
        for number, text in self._lines.new():
            where = f"{self._lines.path}:{number}"
            try:
                line = parse_recording_line(text)
            except BadRecording as error:
                raise BadRecording(f"{where}: {error}") from None
            if line.part is None:
                raise CollectError(f"{where} was not collected (it has no part); name another file")
            if self._order.made(line):
                recorded = line.recorded()
                self.agree(recorded.version, where)
                self._agree_on_question(recorded, where)
                key = recorded.question, line.part
                if key not in self.done:
                    self.done.add(key)
                    new.append(key)
                self.spent += _cost(recorded.branches[0])
        return new

    def agree(self, version: Version, where: str) -> None:
        """Raise CollectError if a branch was not made as those here were."""
        if self.version is None:
            self.version = version
        changes = [
            f"{name.replace('_', ' ')} {known!r} is {now!r} now"
            for name, known, now in zip(Version._fields, self.version, version, strict=True)
            if known != now
        ]
        if changes:
            raise CollectError(
                f"{where} is not made as what is in {self._lines.path}: {', '.join(changes)}; "
                "the two are not comparable: collect into another file"
            )

    def _agree_on_question(self, recorded: RecordedQuestion, where: str) -> None:
        """Raise CollectError if something else is known of a question now than when a branch of it was made."""
        asked = self._questions.get(recorded.question)
        if asked is None:
            return
        split = asked.split or default_split(asked.question)
        for name, known, now in (
            ("reference", recorded.reference, asked.reference),
            ("split", recorded.split.value, split.value),
        ):
            if known != now:
                raise CollectError(
                    f"question {asked.id}: its {name} is {now!r} now, and {known!r} in {where}; "
                    "set it back, correct all its lines there, or collect into another file"
                )


class FailedRequest(NamedTuple):
    """A request that failed, and may not the next time."""

    words: str
    wait_s: float | None = None  # as the proxy asks
    tokens: int = 0  # that it cost all the same; where nobody tells, all that it may have
    is_away: bool = False  # the proxy, or what it asks, may be gone for a while
    is_questionable: bool = False  # it is about the question: it will fail again


@dataclass
class CollectionProgress:
    """How far it is."""

    total: int  # branches that are wanted
    done: int = 0  # of them in the file
    mine: int = 0  # branches this process has put there
    tokens: int = 0  # this process has spent
    spent: int = 0  # tokens of all in the file that are of one order, and of what was lost over them
    reserve: int = 0  # tokens that are set aside for one more branch
    seconds: float = 0.0
    skipped: list[str] = field(default_factory=list)  # branches and questions that were given up, and why
    is_out: bool = False  # it ended because the next branch might have passed the budget


class Collector:
    """Has an order carried out, once."""

    def __init__(
        self,
        client: openai.AsyncOpenAI,
        lines: SharedLines,
        claims: WorkClaims,
        questions: Sequence[Question],
        order: CollectionPlan,
        at_once: int,
        budget: int | None,
        pace: RetryTiming,
        on_change: Callable[[CollectionProgress], None],
    ) -> None:
        self._client = client
        self._lines = lines
        self._claims = claims
        self._order = order
        self._at_once = at_once
        self._budget = budget
        self._pace = pace
        self._on_change = on_change
        wanted = ((question.question, part) for question in questions for part in range(order.branches))
        self._questions = {question.question: question for question in questions}
        self._held = CollectionFile(lines, order, self._questions)
        self._open = OrderedDict.fromkeys(wanted)  # not begun here
        self._wanted = frozenset(self._open)
        self._places = [json.dumps([*order.named, place], sort_keys=True) for place in range(PLACES)]
        self._flying: dict[Key, str] = {}  # and the place each has
        self._elsewhere = 0  # branches others were at when the budget was last looked at
        self._refused: dict[str, str] = {}  # questions, and why
        self._is_known = False  # a reply has shown how the proxy records now
        self._back = asyncio.Lock()  # of who looks whether the proxy is
        self._began = pace.clock()
        self._at = CollectionProgress(len(self._wanted))

    async def run(self) -> CollectionProgress:
        """Collect until nothing is left to do. Raises CollectError, BadRecording or FileWriteError."""
        self._held.mend()
        self._look()
        running: set[asyncio.Task[None]] = set()
        try:
            while True:
                while len(running) < self._at_once and (key := self._begin()) is not None:
                    running.add(asyncio.create_task(self._collect(key)))
                if running:
                    ended, _ = await asyncio.wait(running, timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
                    for task in ended:
                        task.result()
                    running -= ended
                elif self._open and (self._may_begin() or self._elsewhere):
                    await asyncio.sleep(LOOK_S)
                else:
                    break
                self._look()
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        self._at.is_out = bool(self._open)
        return self._at

    def _look(self) -> None:
        """Take notice of what has been written, by whomever."""
        at = self._at
        for key in self._held.read():
            self._open.pop(key, None)
            at.done += key in self._wanted
        at.spent = self._held.spent
        at.seconds = self._pace.clock() - self._began
        self._on_change(at)

    def _begin(self) -> Key | None:
        """A branch that nobody else is at; None if there is none, or it may not be begun now."""
        if not self._may_begin() or (place := next(filter(self._claims.take, self._places), None)) is None:
            return None
        while (key := next((key for key in self._open if self._claims.take(self._name(key))), None)) is not None:
            self._look()  # whoever was at it may have written it
            may_begin = self._may_begin()
            if may_begin and key in self._open:
                del self._open[key]
                self._flying[key] = place
                return key
            self._claims.give_back(self._name(key))
            if not may_begin:
                break
        self._claims.give_back(place)
        return None

    def _may_begin(self, more: int = 1) -> bool:
        """Whether so many more requests fit the budget, whatever those in flight will cost.

        Where there is a budget, or branches of an earlier run, the first goes alone: it shows how often branches are
        probed, by which all others are reckoned, and whether the proxy records as it did.
        """
        is_first = more and not self._is_known
        if is_first and self._flying and (self._held.version is not None or self._budget is not None):
            return False
        if self._budget is None:
            return True
        self._elsewhere = self._claims.elsewhere(self._places)
        self._look()  # now: what has left its place since is written
        self._at.reserve = self._reserve()
        if is_first and self._held.version is None and self._elsewhere:
            return False
        return self._held.spent + (len(self._flying) + self._elsewhere + more) * self._at.reserve <= self._budget

    def _reserve(self) -> int:
        """Tokens that are set aside for a branch."""
        version = self._held.version
        return self._order.most(None if version is None else version.interval)

    async def _collect(self, key: Key) -> None:
        question, part = key
        try:
            asked = await self._ask(key)
            if asked is None:
                self._open[key] = None
            elif isinstance(asked, RecordingLine):
                self._is_known = True
                self._lines.append(format_recording_line(asked.recorded(), asked.part))
                self._at.mine += 1
                self._at.tokens += _cost(asked.recorded().branches[0])
            elif asked.is_questionable:
                self._refuse(question, asked.words)
            else:
                self._at.skipped.append(f"question {self._questions[question].id}, branch {part}: {asked.words}")
        finally:
            self._claims.give_back(self._flying.pop(key))
            self._claims.give_back(self._name(key))

    def _refuse(self, question: str, words: str) -> None:
        """Give up all branches of a question. Raises CollectError if the first several are refused alike."""
        if question in self._refused:
            return
        self._refused[question] = words
        self._at.skipped.append(f"question {self._questions[question].id}: {words}")
        for part in range(self._order.branches):
            self._open.pop((question, part), None)
        alike = list(self._refused.values())
        if self._held.version is None and len(alike) == ALIKE and len(set(alike)) == 1:
            raise CollectError(f"the proxy says {words}; so it does to each of the first {ALIKE} questions")

    async def _ask(self, key: Key) -> RecordingLine | FailedRequest | None:
        """A branch; or the last of what went wrong, after some tries; None if the budget allows no further one."""
        for failures in range(RETRIES + 1):
            if failures and not self._may_begin(0):
                return None
            asked = await self._ask_once(*key)
            if isinstance(asked, RecordingLine):
                return asked
            self._lose(asked.tokens)
            if asked.is_questionable:
                break
            if failures < RETRIES:
                wait_s = self._pace.backoff_s * 2**failures if asked.wait_s is None else asked.wait_s
                await self._pace.sleep(min(wait_s, LONGEST_WAIT_S))
                if asked.is_away:
                    await self._until_back(asked.words)
        return asked

    def _lose(self, tokens: int) -> None:
        """Take notice of tokens nothing came of."""
        self._held.lose(tokens)
        self._at.tokens += tokens
        self._look()

    async def _until_back(self, words: str) -> None:
        """Wait until the proxy says that it serves. Raises CollectError if it does not for too long."""
        async with self._back:
            began = self._pace.clock()
            while not await self._is_ready():
                if self._pace.clock() - began > AWAY_S:
                    raise CollectError(
                        f"the proxy has not served for {AWAY_S:.0f} s ({words}); what was finished is kept, "
                        "and --resume goes on once it is back"
                    )
                await self._pace.sleep(PAUSE_S)

    async def _is_ready(self) -> bool:
        """Whether the proxy, and what it asks, can serve now."""
        ready = str(self._client.base_url).removesuffix("v1/") + "ready"
        try:
            await self._client.get(ready, cast_to=str, options={"timeout": CONNECT_S})
        except openai.APIStatusError as error:
            return error.status_code < HTTPStatus.INTERNAL_SERVER_ERROR  # somebody serves who has no such page
        except openai.APIConnectionError:
            return False
        return True

    async def _ask_once(self, question: str, part: int) -> RecordingLine | FailedRequest:
        """A branch, or what went wrong. Raises CollectError if it would go wrong with any other."""
        messages: Any = list(self._questions[question].messages)
        tts: dict[str, Any] = {"controller": CONTROLLER, "beta": 1, "answer": self._order.answer, "required": True}
        cap = None if self._budget is None else self._reserve()
        if cap is not None:
            tts["max_total_tokens"] = cap
        try:
            reply = await self._client.chat.completions.create(
                model=self._order.model, messages=messages, **self._order.sampling, extra_body={"tts": tts}
            )
        except openai.APIStatusError as error:
            return _refused(error)
        except openai.APIConnectionError as error:
            is_unsent = type(error.__cause__).__name__ in UNSENT
            words = f"{self._client.base_url}: {error.__cause__ or error}"
            return FailedRequest(words, tokens=0 if is_unsent else cap or 0, is_away=True)
        except (openai.OpenAIError, ValueError) as error:
            raise CollectError(f"{self._client.base_url} gives no chat completion: {error}") from None
        told = (reply.model_extra or {}).get("tts") if isinstance(reply, ChatCompletion) else None
        if not isinstance(told, dict) or "recording" not in told:
            raise CollectError(
                f"{self._client.base_url} replies without a recording; --url is to be an AutoTTS proxy's"
            )
        try:
            line = self._line(question, part, reply.model, told["recording"])
            self._held.agree(line.recorded().version, f"what {self._client.base_url} records")
            return line if line.branches[0].complete else _cut(told, cap)
        except (BadRecording, TypeError, KeyError) as error:
            self._lose(_total(told))
            raise CollectError(f"{self._client.base_url} replies with what is no recording: {error}") from None
        except CollectError:
            self._lose(_total(told))
            raise

    def _line(self, question: str, part: int, model: str, recording: Any) -> RecordingLine:
        """A reply's recording and what the proxy does not know of it. Raises CollectError, or others if it is none."""
        asked = self._questions[question]
        if model != self._order.model:
            raise CollectError(f"the proxy answers as model {model!r}: say --model {model}")
        line = {
            "question": question_text(asked.messages) if self._order.keep_text else None,
            "id": question,
            "model": model,
            "benchmark": self._order.benchmark,
            "interval": recording["interval"],
            "branches": recording["branches"],
            "reference": asked.reference,
            "split": asked.split,
            "sampling": recording["sampling"] | self._order.settings,
            "probe_template": recording["probe_template"],
            "chat_template": recording["chat_template"],
            "origin": Origin.COLLECTED,
            "part": part,
        }
        return parse_recording_line(json.dumps(line).encode())

    def _name(self, key: Key) -> str:
        """A branch as it is claimed."""
        return json.dumps([*self._order.named, *key], sort_keys=True)


async def collect(
    url: str,
    key: str,
    questions: Sequence[Question],
    order: CollectionPlan,
    out: Path,
    at_once: int = 8,
    budget: int | None = None,
    *,
    pace: RetryTiming = DEFAULT_TIMING,
    on_change: Callable[[CollectionProgress], None] = lambda _: None,
) -> CollectionProgress:
    """Have `order` carried out by the proxy at `url`, whose admin key is `key`; branches go to `out`.

    `budget` is in tokens, of all branches there of this model and settings and of what failed over them (which is
    written down beside, in `out`.lost). It is never passed, but by what a killed process was at. What this raises
    (CollectError, BadRecording, FileWriteError) leaves the file sound, and so does cancelling it.
    """
    base_url = url.rstrip("/").removesuffix("/v1") + "/v1"
    timeout = openai.Timeout(LONGEST_BRANCH_S, connect=CONNECT_S)
    async with openai.AsyncOpenAI(base_url=base_url, api_key=key, max_retries=0, timeout=timeout) as client:
        model, longest = await _model(client, order.model)
        order = replace(order, model=model, longest=longest)
        if budget is not None and not (order.max_tokens or longest):
            raise CollectError(
                f"the proxy does not say how long a branch of {model} can be: --max-tokens-total needs --max-tokens"
            )
        claims = WorkClaims(out.with_name(f"{out.name}.lock"))
        try:
            collector = Collector(client, SharedLines(out), claims, questions, order, at_once, budget, pace, on_change)
            return await collector.run()
        finally:
            claims.close()


async def _model(client: openai.AsyncOpenAI, name: str) -> tuple[str, int]:
    """The model that is meant, `name` or the only one the proxy serves, and the most tokens it can have in view, 0 if
    that is not told. Raises CollectError."""
    try:
        listed = {
            model.id: _number((model.model_extra or {}).get("max_model_len"))
            async for model in client.models.list(timeout=CONNECT_S)
        }
        served = [one for one in listed if one.rpartition("@")[0] not in listed]  # NAME@BETA is no model of its own
    except openai.APIStatusError as error:
        raise CollectError(f"{client.base_url}models says {error.status_code}: {error.message}") from None
    except (openai.OpenAIError, ValueError) as error:
        raise CollectError(
            f"no proxy answers at {client.base_url} ({error.__cause__ or error}); start one, or name it by --url"
        ) from None
    if not name and len(served) == 1:
        name = served[0]
    if name not in served:
        wrong = f"there is no model {name!r}" if name else "--model is needed"
        raise CollectError(f"{wrong}; the proxy serves {', '.join(served) or 'none'}")
    return name, listed[name]


def _cost(branch: RecordedBranch) -> int:
    """Tokens it took, probes included."""
    return branch.tokens + sum(branch.probe_tokens)


def _cut(tts: dict[str, Any], cap: int | None) -> FailedRequest:
    """What it means that a branch was not run to its end. Raises CollectError if the next one would not be either."""
    stop = str(tts.get("stop"))
    if stop != UPSTREAM_ERROR:
        ours = "" if cap is None else f"; of --max-tokens-total it could have {cap:,}, which may be too few"
        raise CollectError(
            f"the proxy cuts branches short ({stop}), and long ones only, so the rest would not stand for all; "
            "have it run without AUTOTTS_DEADLINE_S and AUTOTTS_MAX_TOTAL_TOKENS, and bound branches by --max-tokens"
            f"{ours}"
        )
    return FailedRequest("the upstream failed midway", tokens=_total(tts), is_away=True)


def _total(tts: dict[str, Any]) -> int:
    """Tokens that a reply has cost."""
    tokens = tts.get("tokens")
    return _number(tokens.get("total")) if isinstance(tokens, dict) else 0


def _refused(error: openai.APIStatusError) -> FailedRequest:
    """What a status means that is no success. Raises CollectError if no request would have another."""
    status, headers = error.status_code, error.response.headers
    said = error.body.get("message") if isinstance(error.body, dict) else None
    words = f"{status}: {said or error.message}"
    is_away, is_questionable = status >= HTTPStatus.INTERNAL_SERVER_ERROR, status in QUESTIONABLE
    if not is_away and status not in PASSING | QUESTIONABLE:
        way = (
            f"; {ADMIN_KEY_VARIABLE} must be the proxy's"
            if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
            else ""
        )
        raise CollectError(f"the proxy says {words}{way}")
    wait, tokens = headers.get("retry-after", ""), _number(headers.get("x-tts-tokens"))
    return FailedRequest(words, float(wait) if _DECIMAL.fullmatch(wait) else None, tokens, is_away, is_questionable)


def _number(value: object) -> int:
    """A count as a reply has it; 0 where it is none."""
    text = str(value)
    return int(text) if text.isascii() and text.isdigit() else 0
