"""A fake vLLM that answers chat completions with scripted replies, streamed as vLLM 0.32 streams them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from proxy.environment.call_continuation import derive_seed
from tests.fakes import EOS, MODEL, Chain, FakeVLLM

PROMPT_TOKENS = 11
SEED = 7
BRANCHES = {derive_seed(SEED, branch, 0): branch for branch in range(128)}
"""Branches by the seed that the proxy derives for them. Concurrent requests may arrive in any order."""


@dataclass(frozen=True)
class ScriptedReply:
    """A reply: one token per character of its thought, content and tool calls, and the end token."""

    content: str = ""
    calls: Sequence[tuple[str, str, str]] = ()  # id, name and arguments
    thought: str = ""
    finish: str = ""  # by default what vLLM would say
    logprobs: Sequence[float] = ()  # of the content's tokens

    @property
    def tokens(self) -> int:
        return len(list(self.deltas()))

    @property
    def finish_reason(self) -> str:
        return self.finish or ("tool_calls" if self.calls else "stop")

    def deltas(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the token and the delta of each chunk. vLLM's parsers hold back the token that opens a call."""
        for char in self.thought:
            yield ord(char), {"reasoning": char}
        for char in self.content:
            yield ord(char), {"content": char}
        for index, (call_id, name, arguments) in enumerate(self.calls):
            yield ord("<"), {}
            function = {"name": name, "arguments": ""}
            yield (
                ord("{"),
                {"tool_calls": [{"index": index, "id": call_id, "type": "function", "function": function}]},
            )
            for char in arguments:
                yield ord(char), {"tool_calls": [{"index": index, "function": {"arguments": char}}]}
        yield EOS, {}


def last_text(body: dict[str, Any]) -> str:
    """Return the text of the last message of a request."""
    content = (body.get("messages") or [{}])[-1].get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def reply_of(chain: Chain) -> ScriptedReply:
    """Return a reply with a chain's text as its content, so that it has as many tokens."""
    return ScriptedReply(chain.text)


@dataclass
class Held:
    """Holds streams back after a number of tokens, until it is released."""

    tokens: int
    reached: asyncio.Event = field(default_factory=asyncio.Event)
    released: asyncio.Event = field(default_factory=asyncio.Event)


class ChatVLLM(FakeVLLM):
    """Answers the n-th branch of a request with seed SEED with the n-th of `replies`; after the last it begins anew.

    Requests without such a seed are numbered as they arrive.

    `running` counts streams, `generated` counts the tokens that were generated, `max_tokens` is obeyed. `chat_fault`
    makes one reply misbehave: "refuse" (400), "cut" (ends without a finish reason), "lie" (usage is wrong), "blind" (no
    token ids), "abort" (another finish reason), "more" (more tokens than allowed), "odd_index". It is number
    `fault_at`, and begins once `fault_waits_for` other replies have ended.
    """

    def __init__(self, replies: Sequence[ScriptedReply], interval: int = 10) -> None:
        super().__init__((), interval)
        self.replies = list(replies)
        self.held: Held | None = None
        self.chat_fault = ""
        self.fault_at = 0
        self.fault_waits_for = 0
        self.ended = 0  # replies that have been sent
        self.enough_ended = asyncio.Event()
        self.judge: Callable[[str], ScriptedReply] = lambda _: ScriptedReply("no idea")
        self.judge_requests: list[dict[str, Any]] = []  # calls that compare replies; `judge` gets their last text
        self.judge_fault = ""
        self.judge_held: Held | None = None

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        number = len(self.requests)
        self.requests.append(body)
        self.headers.append(dict(request.headers))
        self.running += 1
        self.idle.clear()
        try:
            fault = self.chat_fault if number == self.fault_at else ""
            if "</reply " in (text := last_text(body)):
                self.judge_requests.append(self.requests.pop())
                fault = self.judge_fault
                if fault == "refuse_added":  # as vLLM refuses chat_template_kwargs for some tokenisers
                    fault = "refuse" if "chat_template_kwargs" in body else ""
                return await self._stream(request, body, self.judge(text), fault)
            if fault and self.ended < self.fault_waits_for:
                await self.enough_ended.wait()
            branch = BRANCHES.get(body.get("seed"), number)
            return await self._stream(request, body, self.replies[branch % len(self.replies)], fault)
        finally:
            self.ended += 1
            if self.ended >= self.fault_waits_for:
                self.enough_ended.set()
            self.running -= 1
            if not self.running:
                self.idle.set()

    async def _stream(
        self, request: web.Request, body: dict[str, Any], reply: ScriptedReply, fault: str
    ) -> web.StreamResponse:
        if fault == "refuse":
            error = {"message": "no such thing", "type": "BadRequestError", "param": "tools", "code": 400}
            return web.json_response({"error": error}, status=400)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        held = self.judge_held if "</reply " in last_text(body) else self.held
        sent = 0

        def event(choices: list[dict[str, Any]], **more: Any) -> bytes:
            usage = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": sent, "total_tokens": PROMPT_TOKENS + sent}
            chunk = {"id": "chatcmpl-up", "object": "chat.completion.chunk", "created": 1, "model": MODEL}
            return b"data: " + json.dumps({**chunk, "choices": choices, "usage": {**usage, **more}}).encode() + b"\n\n"

        most = min(body.get("max_completion_tokens") or body.get("max_tokens") or 10**9, 10**9)
        tokens = list(reply.deltas())
        cut = tokens[:most]
        finish: str | None = reply.finish_reason if len(tokens) <= most else "length"
        if fault == "cut":
            cut, finish = tokens[:-1], None
        if fault == "more":
            cut, finish = tokens * 3, "stop"
        pieces = [event([_choice({"role": "assistant", "content": ""})])]
        for at, (token, delta) in enumerate(cut):
            sent += 1
            self.generated += 1
            is_last = at == len(cut) - 1
            choice = _choice(delta, finish if is_last else None, None if fault == "blind" else [token])
            if reply.logprobs and "content" in delta:
                value = {
                    "token": delta["content"],
                    "logprob": reply.logprobs[at - len(reply.thought)],
                    "bytes": None,
                    "top_logprobs": [],
                }
                choice["logprobs"] = {"content": [value]}
            if fault == "abort" and is_last:
                choice["finish_reason"] = "abort"
            if fault == "odd_index":
                choice["index"] = 1
            pieces.append(event([choice]))
            if held is not None and sent == held.tokens:
                await response.write(b"".join(pieces))
                pieces.clear()
                held.reached.set()
                await held.released.wait()
        if fault != "cut":
            details = {"prompt_tokens_details": {"cached_tokens": 3}}
            sent += fault == "lie"
            pieces += [event([], **details), b"data: [DONE]\n\n"]
        await response.write(b"".join(pieces))
        return response


def _choice(delta: dict[str, Any], finish: str | None = None, ids: list[int] | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    return choice if ids is None else {**choice, "token_ids": ids}
