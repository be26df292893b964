"""Clients: requests of every kind, and what each of them was answered."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import aiohttp

from deploy.embedded.task import held_back
from tests.proxy.admission.test_api_keys import ALICE, BOB, bearer

MODEL: Final = "autotts-tiny"
QUESTIONS: Final = [problem.question for problem in held_back(200)]
RETRYABLE: Final = frozenset({429, 500, 502, 503, 504})
"""Statuses that a client may get while upstream, store or keys are disturbed."""
TOOL: Final = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}
SCHEMA: Final = {"type": "object", "properties": {"result": {"type": "integer"}}, "required": ["result"]}
JSON: Final = {"type": "json_schema", "json_schema": {"name": "r", "schema": SCHEMA}}
STREAM: Final = {"stream": True, "stream_options": {"include_usage": True}}
TTS: Final = {"beta": 0.25, "max_total_tokens": 1500}


BACK_OFF_S: Final = 0.25
"""Seconds that a client waits after a refusal, as clients do."""


class Kind(NamedTuple):
    """A kind of request: its path and body. `bad` ones must be refused with a status of 4xx."""

    name: str
    path: str
    fields: dict[str, Any]
    bad: bool = False
    raw: bytes | None = None


CHAT: Final = "/v1/chat/completions"
KINDS: Final[Sequence[Kind]] = (
    Kind("chat", CHAT, {"tts": TTS}),
    Kind("chat stream", CHAT, {"tts": TTS, **STREAM}),
    Kind("completions", "/v1/completions", {"tts": TTS}),
    Kind("responses", "/v1/responses", {"tts": TTS}),
    Kind("responses stream", "/v1/responses", {"tts": TTS, "stream": True}),
    Kind("tools", CHAT, {"tts": TTS, "tools": [TOOL], "max_tokens": 60}),
    Kind("JSON", CHAT, {"tts": TTS, "max_tokens": 60, "response_format": JSON}),
    Kind("passed through", CHAT, {"max_tokens": 80}),
    Kind("passed through stream", CHAT, {"max_tokens": 80, **STREAM}),
    Kind("prompt ids", "/v1/completions", {"tts": TTS, "n": 1, "max_tokens": 120}),
)
WARM_UP: Final = Kind("warm-up", CHAT, {"tts": {**TTS, "controller": "single"}, "max_tokens": 16})
"""A cheap kind, with which the store is filled before memory is compared."""
BAD: Final[Sequence[Kind]] = (
    Kind("not JSON", CHAT, {}, True, b'{"model": '),
    Kind("no messages", CHAT, {"messages": []}, True),
    Kind("beta of 7", CHAT, {"tts": {"beta": 7}}, True),
    Kind("unknown field of tts", CHAT, {"tts": {"bata": 0.5}}, True),
    Kind("unknown controller", CHAT, {"tts": {"beta": 0.5, "controller": "nobody"}}, True),
    Kind("huge max_tokens", CHAT, {"tts": TTS, "max_tokens": -5}, True),
    Kind("latin", CHAT, {}, True, '{"model": "é"}'.encode("latin-1")),
)


@dataclass
class Tally:
    """Requests, outcomes, bills and faults that the clients of one cycle noted."""

    sent: Counter[str] = field(default_factory=Counter)  # by kind
    outcomes: Counter[str] = field(default_factory=Counter)  # answered, refused, failed, left
    statuses: Counter[int] = field(default_factory=Counter)
    bills: dict[str, tuple[int, int]] = field(default_factory=dict)  # total and completion tokens by request id
    passed: int = 0  # completion tokens of replies without a controller
    bounds: int = 0  # of forwarded requests without a whole reply, which are billed by their bound
    faults: list[str] = field(default_factory=list)  # what no client may see

    @property
    def answers(self) -> int:
        """Ends of requests, each of which must have exactly one."""
        return self.outcomes.total()


class Client:
    """Sends requests one after another."""

    def __init__(self, url: str, http: aiohttp.ClientSession, dice: random.Random, tally: Tally) -> None:
        self._url = url
        self._http = http
        self._dice = dice
        self._tally = tally

    async def run(self, is_over: asyncio.Event) -> None:
        """Send requests of random kinds, some bad, and leave some before their end."""
        while not is_over.is_set():
            roll = self._dice.random()
            kind = self._dice.choice(BAD if roll < 0.1 else KINDS)
            await self._ask_patiently(kind, self._dice.uniform(0, 2) if 0.1 <= roll < 0.25 else None)

    async def repeat(self, kind: Kind, is_over: asyncio.Event) -> None:
        """Send requests of one kind."""
        while not is_over.is_set():
            await self._ask_patiently(kind)

    async def _ask_patiently(self, kind: Kind, leave_after: float | None = None) -> None:
        """Send one request, and wait after a refusal that it did not deserve."""
        refused = self._tally.outcomes["refused"]
        await self.ask(kind, leave_after)
        if not kind.bad and self._tally.outcomes["refused"] > refused:
            await asyncio.sleep(BACK_OFF_S)

    async def ask(self, kind: Kind, leave_after: float | None = None) -> None:
        """Send one request and note its end; with `leave_after`, disconnect after so many seconds."""
        self._tally.sent[kind.name] += 1
        outcome = await self._end_or_leave(kind, leave_after)
        self._tally.outcomes[outcome] += 1
        if outcome != "answered" and "tts" not in kind.fields:
            self._tally.bounds += kind.fields.get("max_tokens", 0)

    async def _end_or_leave(self, kind: Kind, leave_after: float | None) -> str:
        if leave_after is None:
            return await self._end(kind)
        request = asyncio.create_task(self._end(kind))
        await asyncio.wait({request}, timeout=leave_after)
        if not request.done():
            request.cancel()
        try:
            return await request
        except asyncio.CancelledError:
            return "left"

    async def _end(self, kind: Kind) -> str:
        try:
            return await self._answer(kind)
        except aiohttp.ClientError as error:
            self._note(kind, f"{type(error).__name__}: {error}")
            return "failed"

    async def _answer(self, kind: Kind) -> str:
        question = self._dice.choice(QUESTIONS)
        content: dict[str, Any] = {"messages": [{"role": "user", "content": question}]}
        if kind.path == "/v1/completions":
            content = {"prompt": question}
        elif kind.path == "/v1/responses":
            content = {"input": question}
        body = json.dumps({"model": MODEL, **content, **kind.fields}).encode() if kind.raw is None else kind.raw
        headers = {"content-type": "application/json", **bearer(self._dice.choice((ALICE, BOB)))}
        async with self._http.post(self._url + kind.path, data=body, headers=headers) as response:
            self._tally.statuses[response.status] += 1
            text = await response.text()
            return self._judge(kind, response.status, response.headers.get("x-tts-applied"), text)

    def _judge(self, kind: Kind, status: int, applied: str | None, text: str) -> str:
        """Return the outcome of a response; note what is wrong with it."""
        if kind.bad or status != 200:
            if kind.bad and not 400 <= status < 500 and status not in RETRYABLE:
                self._note(kind, f"a bad request got {status}: {text[:200]}")
            elif not kind.bad and status not in RETRYABLE:
                self._note(kind, f"status {status}: {text[:200]}")
            with suppress(ValueError, TypeError, KeyError):
                if json.loads(text)["error"]["message"]:
                    return "refused"
            self._note(kind, f"an error without a message: {text[:200]}")
            return "refused"
        is_stream = bool(kind.fields.get("stream"))
        try:
            reply = last_event(text) if is_stream else json.loads(text)
        except ValueError as error:
            self._note(kind, f"{error}: {text[-200:]!r}")
            return "failed"
        if reply is None or reply.get("error"):
            return "refused"  # a stream that ended with an error event
        usage = reply.get("usage") or {}
        completion = usage.get("completion_tokens", usage.get("output_tokens", 0))
        if applied == "true" and "tts" in reply:
            tokens = reply["tts"]["tokens"]
            if tokens["total"] != sum(count for name, count in tokens.items() if name != "total"):
                self._note(kind, f"the bill does not add up: {tokens}")
            if reply["id"] in self._tally.bills:
                self._note(kind, f"the id {reply['id']} was answered twice")
            self._tally.bills[reply["id"]] = (tokens["total"], completion)
        else:
            self._tally.passed += completion
        return "answered"

    def _note(self, kind: Kind, fault: str) -> None:
        """Note a fault, unless the upstream's own bytes, or their lack, are passed through as they must be."""
        is_forwarded = "tts" not in kind.fields and kind.raw is None
        is_spoilt = is_forwarded and ("Payload" in fault or "<html>" in fault)
        if not is_spoilt:
            self._tally.faults.append(f"{kind.name}: {fault}")


def last_event(text: str) -> dict[str, Any] | None:
    """Return the event of a stream that has its usage, or None if it ended with an error. Raises ValueError.

    A stream must have exactly one end.
    """
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    ends = events.count("[DONE]")
    parsed = [json.loads(event) for event in events if event != "[DONE]"]
    if any(event.get("error") or event.get("type") in ("error", "response.failed") for event in parsed):
        return None
    last = ("response.completed", "response.incomplete")
    completed = [event["response"] for event in parsed if event.get("type") in last]
    if completed:
        if len(completed) != 1:
            raise ValueError(f"{len(completed)} events that end a response")
        only: dict[str, Any] = completed[0]
        return only
    if ends != 1:
        raise ValueError(f"{ends} ends of a stream")
    merged: dict[str, Any] = {}
    for event in parsed:
        merged |= {name: value for name, value in event.items() if value is not None}
    return merged
