"""Complete recordings, made by asking the running proxy for them as any client would.

One request is one branch, and a branch is on disk before its place is taken by another: whatever happens, a finished
branch is neither lost nor bought twice. Two that collect into one file share the work.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from itertools import islice
from pathlib import Path
from typing import Any, Final, NamedTuple

import openai
from openai.types.chat import ChatCompletion

from discovery.errors import BadRecording, CollectError
from discovery.formats import Line, as_line, parse_line
from discovery.lines import Claims, Lines
from discovery.questions import Question
from discovery.recordings import Origin, RecordedBranch, Version, question_text

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
NEAR: Final = 256
"""Branches that are looked at for one nobody else is at."""

KEY: Final = "AUTOTTS_ADMIN_KEY"
"""The variable that has the proxy's admin key."""
PASSING: Final = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.CONFLICT, HTTPStatus.TOO_MANY_REQUESTS})
"""Refusals that may be none the next time, as all from 500 on."""
UPSTREAM_ERROR: Final = "upstream_error"
_DECIMAL: Final = re.compile(r"[0-9]{1,6}(?:\.[0-9]{1,6})?", re.ASCII)

Key = tuple[str, int]
"""A branch: its question, and which of its branches it is."""


@dataclass(frozen=True)
class Order:
    """What is to be recorded, and how it is asked for."""

    model: str  # empty: the only one the proxy serves
    benchmark: str  # what the questions belong to
    branches: int  # of each question
    answer: str = "auto"  # how answers are read
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None  # of a branch
    keep_text: bool = False  # write questions down, not only their hashes

    @property
    def sampling(self) -> dict[str, Any]:
        """What is sent of how branches are drawn."""
        asked = {"temperature": self.temperature, "top_p": self.top_p, "max_tokens": self.max_tokens}
        return {name: value for name, value in asked.items() if value is not None}

    @property
    def settings(self) -> dict[str, Any]:
        """All by which branches that were made by one order are told from those of another; in their `sampling`."""
        return self.sampling | ({} if self.answer == "auto" else {"answer": self.answer})

    def made(self, line: Line) -> bool:
        """Whether `line` could have come of it."""
        names = ("temperature", "top_p", "max_tokens", "answer")
        settings = {name: value for name in names if (value := line.sampling.get(name)) is not None}
        return (line.model, line.benchmark, settings) == (self.model, self.benchmark, self.settings)


class Held:
    """What a file holds of an order, as far as it has been read."""

    def __init__(self, lines: Lines, order: Order) -> None:
        self.done: set[Key] = set()
        self.spent = 0  # tokens of all its branches, probes included
        self.version: Version | None = None  # of all of them
        self._lines = lines
        self._order = order
        self._dearest = 0  # tokens of a branch
        self._dearest_probe = 0

    def read(self) -> list[Key]:
        """Take in what is new, and return which branches. Raises CollectError or BadRecording at what is none."""
        new: list[Key] = []
        for number, text in self._lines.new():
            where = f"{self._lines.path}:{number}"
            try:
                line = parse_line(text)
            except BadRecording as error:
                raise BadRecording(f"{where}: {error}") from None
            if line.part is None:
                raise CollectError(f"{where} was not collected (it has no part); name another file")
            if self._order.made(line):
                recorded = line.recorded()
                self.agree(recorded.version, where)
                key = recorded.question, line.part
                if key not in self.done:
                    self.done.add(key)
                    new.append(key)
                self._count(recorded.branches[0])
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

    def worst(self) -> int | None:
        """The most that a branch may cost, as far as is known; None if nothing is."""
        if self.version is None:
            return None
        if self._order.max_tokens is None:
            return self._dearest
        return self._order.max_tokens + self._order.max_tokens // self.version.interval * self._dearest_probe

    def _count(self, branch: RecordedBranch) -> None:
        cost = _cost(branch)
        self.spent += cost
        self._dearest = max(self._dearest, cost)
        self._dearest_probe = max(self._dearest_probe, *branch.probe_tokens, 0)


class Trouble(NamedTuple):
    """A request that failed, and may not the next time."""

    words: str
    wait_s: float | None = None  # as the proxy asks
    tokens: int = 0  # that it cost all the same


@dataclass
class Collected:
    """How far it is."""

    total: int  # branches that are wanted
    done: int = 0  # of them in the file
    mine: int = 0  # branches this process has put there
    tokens: int = 0  # this process has spent
    spent: int = 0  # tokens of all in the file that are of one order, and what this process has lost
    seconds: float = 0.0
    skipped: list[str] = field(default_factory=list)  # branches that were given up, and why
    is_out: bool = False  # it ended because the next branch might have passed the budget


class Collector:
    """Has an order carried out, once."""

    def __init__(
        self,
        client: openai.AsyncOpenAI,
        lines: Lines,
        claims: Claims,
        questions: Sequence[Question],
        order: Order,
        at_once: int,
        budget: int | None,
        backoff_s: float,
        on_change: Callable[[Collected], None],
    ) -> None:
        self._client = client
        self._lines = lines
        self._claims = claims
        self._order = order
        self._at_once = at_once
        self._budget = budget
        self._backoff_s = backoff_s
        self._on_change = on_change
        self._held = Held(lines, order)
        wanted = ((question.question, part) for question in questions for part in range(order.branches))
        self._questions = {question.question: question for question in questions}
        self._open = OrderedDict.fromkeys(wanted)  # not begun here
        self._wanted = frozenset(self._open)
        self._flying: set[Key] = set()
        self._is_known = False  # a reply has shown how the proxy records now
        self._lost = 0  # tokens of what failed
        self._began = time.monotonic()
        self._at = Collected(len(self._wanted))

    async def run(self) -> Collected:
        """Collect until nothing is left to do. Raises CollectError, BadRecording or NotWritten."""
        self._lines.mend()
        self._look()
        running: set[asyncio.Task[None]] = set()
        try:
            while True:
                while len(running) < self._at_once and (key := self._begin()) is not None:
                    running.add(asyncio.create_task(self._collect(key)))
                if running:
                    timeout = LOOK_S if self._open else None
                    ended, _ = await asyncio.wait(running, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                    for task in ended:
                        task.result()
                    running -= ended
                elif self._open and (self._elsewhere() or self._may_begin()):
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
        at.spent = self._held.spent + self._lost
        at.seconds = time.monotonic() - self._began
        self._on_change(at)

    def _begin(self) -> Key | None:
        """A branch that nobody else is at; None if there is none, or it may not be begun now."""
        if not self._may_begin():
            return None
        for key in list(islice(self._open, NEAR)):
            if not self._claims.take(self._name(key)):
                continue
            self._look()  # whoever was at it may have written it
            may_begin = self._may_begin()
            if may_begin and key in self._open:
                del self._open[key]
                self._flying.add(key)
                return key
            self._claims.give_back(self._name(key))
            if not may_begin:
                break
        return None

    def _may_begin(self) -> bool:
        """Whether one more branch fits the budget, whatever those in flight will cost.

        Where there is a budget, or branches of an earlier run, the first goes alone: it shows what a branch costs, and
        whether the proxy records as it did.
        """
        if self._flying and not self._is_known and (self._held.version is not None or self._budget is not None):
            return False
        if self._budget is None:
            return True
        worst, elsewhere = self._held.worst(), self._elsewhere()
        if worst is None:
            return not elsewhere and self._lost + (self._order.max_tokens or 1) <= self._budget
        return self._held.spent + self._lost + (len(self._flying) + elsewhere + 1) * worst <= self._budget

    def _elsewhere(self) -> int:
        """How many branches others are at."""
        return self._claims.elsewhere(self._name(key) for key in islice(self._open, NEAR))

    async def _collect(self, key: Key) -> None:
        try:
            asked = await self._ask(key)
            if isinstance(asked, Trouble):
                self._at.skipped.append(f"question {self._questions[key[0]].id}, branch {key[1]}: {asked.words}")
                return
            recorded = asked.recorded()
            self._held.agree(recorded.version, f"what {self._client.base_url} records")
            self._is_known = True
            self._lines.append(as_line(recorded, asked.part))
            self._at.mine += 1
            self._at.tokens += _cost(recorded.branches[0])
        finally:
            self._flying.discard(key)
            self._claims.give_back(self._name(key))

    async def _ask(self, key: Key) -> Line | Trouble:
        """A branch; or the last of what went wrong, after some tries."""
        for failures in range(RETRIES + 1):
            asked = await self._ask_once(*key)
            if isinstance(asked, Line):
                return asked
            self._lost += asked.tokens
            self._at.tokens += asked.tokens
            if failures < RETRIES:
                wait_s = self._backoff_s * 2**failures if asked.wait_s is None else asked.wait_s
                await asyncio.sleep(min(wait_s, LONGEST_WAIT_S))
        return asked

    async def _ask_once(self, question: str, part: int) -> Line | Trouble:
        """A branch, or what went wrong. Raises CollectError if it would go wrong again."""
        messages: Any = list(self._questions[question].messages)
        tts = {"controller": CONTROLLER, "beta": 1, "answer": self._order.answer, "required": True}
        try:
            reply = await self._client.chat.completions.create(
                model=self._order.model, messages=messages, **self._order.sampling, extra_body={"tts": tts}
            )
        except openai.APIStatusError as error:
            return _refused(error)
        except openai.APIConnectionError as error:
            return Trouble(f"{self._client.base_url}: {error.__cause__ or error}")
        except (openai.OpenAIError, ValueError) as error:
            raise CollectError(f"{self._client.base_url} gives no chat completion: {error}") from None
        told = (reply.model_extra or {}).get("tts") if isinstance(reply, ChatCompletion) else None
        if not isinstance(told, dict) or "recording" not in told:
            raise CollectError(
                f"{self._client.base_url} replies without a recording; --url is to be an AutoTTS proxy's"
            )
        try:
            line = self._line(question, part, reply.model, told["recording"])
        except (BadRecording, TypeError, KeyError) as error:
            raise CollectError(f"{self._client.base_url} replies with what is no recording: {error}") from None
        return line if line.branches[0].complete else _cut(told)

    def _line(self, question: str, part: int, model: str, recording: Any) -> Line:
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
        return parse_line(json.dumps(line).encode())

    def _name(self, key: Key) -> str:
        """A branch as it is claimed."""
        order = self._order
        return json.dumps([order.model, order.benchmark, order.settings, *key], sort_keys=True)


async def collect(
    url: str,
    key: str,
    questions: Sequence[Question],
    order: Order,
    out: Path,
    at_once: int = 8,
    budget: int | None = None,
    *,
    backoff_s: float = BACKOFF_S,
    on_change: Callable[[Collected], None] = lambda _: None,
) -> Collected:
    """Have `order` carried out by the proxy at `url`, whose admin key is `key`; branches go to `out`.

    `budget` is in tokens, of all branches there of this model and settings. What it raises (CollectError, BadRecording,
    NotWritten) leaves the file sound, and so does cancelling it.
    """
    base_url = url.rstrip("/").removesuffix("/v1") + "/v1"
    timeout = openai.Timeout(LONGEST_BRANCH_S, connect=CONNECT_S)
    async with openai.AsyncOpenAI(base_url=base_url, api_key=key, max_retries=0, timeout=timeout) as client:
        order = replace(order, model=await _model(client, order.model))
        claims = Claims(out.with_name(f"{out.name}.lock"))
        try:
            collector = Collector(client, Lines(out), claims, questions, order, at_once, budget, backoff_s, on_change)
            return await collector.run()
        finally:
            claims.close()


async def _model(client: openai.AsyncOpenAI, name: str) -> str:
    """The model that is meant: `name`, or the only one the proxy serves. Raises CollectError."""
    try:
        listed = [model.id async for model in client.models.list(timeout=CONNECT_S)]
        served = [one for one in listed if one.rpartition("@")[0] not in listed]  # NAME@BETA is no model of its own
    except openai.APIStatusError as error:
        raise CollectError(f"{client.base_url}models says {error.status_code}: {error.message}") from None
    except (openai.OpenAIError, ValueError) as error:
        raise CollectError(
            f"no proxy answers at {client.base_url} ({error.__cause__ or error}); start one, or name it by --url"
        ) from None
    if not name and len(served) == 1:
        return served[0]
    if name not in served:
        wrong = f"there is no model {name!r}" if name else "--model is needed"
        raise CollectError(f"{wrong}; the proxy serves {', '.join(served) or 'none'}")
    return name


def _cost(branch: RecordedBranch) -> int:
    """Tokens it took, probes included."""
    return branch.tokens + sum(branch.probe_tokens)


def _cut(tts: dict[str, Any]) -> Trouble:
    """What it means that a branch was not run to its end. Raises CollectError if the next one would not be either."""
    stop, tokens = str(tts.get("stop")), tts.get("tokens")
    if stop != UPSTREAM_ERROR:
        raise CollectError(
            f"the proxy cuts branches short ({stop}), and long ones only, so the rest would not stand for all; "
            "have it run without AUTOTTS_DEADLINE_S and AUTOTTS_MAX_TOTAL_TOKENS, and bound branches by --max-tokens"
        )
    return Trouble("the upstream failed midway", tokens=_number(tokens.get("total")) if isinstance(tokens, dict) else 0)


def _refused(error: openai.APIStatusError) -> Trouble:
    """What a status means that is no success. Raises CollectError if trying again would not mend it."""
    status, headers = error.status_code, error.response.headers
    said = error.body.get("message") if isinstance(error.body, dict) else None
    words = f"{status}: {said or error.message}"
    if status < HTTPStatus.INTERNAL_SERVER_ERROR and status not in PASSING:
        way = f"; {KEY} must be the proxy's" if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN) else ""
        raise CollectError(f"the proxy says {words}{way}")
    wait = headers.get("retry-after", "")
    return Trouble(words, float(wait) if _DECIMAL.fullmatch(wait) else None, _number(headers.get("x-tts-tokens")))


def _number(value: object) -> int:
    """A count as a reply has it; 0 where it is none."""
    text = str(value)
    return int(text) if text.isascii() and text.isdigit() else 0
