"""Meter the tokens of forwarded replies by the reported usage or, without it, by an upper bound or an estimate."""

from __future__ import annotations

import re
from collections import deque
from typing import Any, Final

import jiter

from proxy.admission.token_bound import TokenBound

TAIL_BYTES: Final = 4096
"""Bytes at the end of a reply that usually contain its usage."""
TAIL_PIECES: Final = 64
"""Number of last pieces of a reply that are kept to read its usage."""
PASSED_THROUGH: Final = "passed_through"
ESTIMATED: Final = "passed_through_estimated"
"""Kinds of tokens in the metrics."""
EVENT_END: Final = b"\n\n"
"""End of a server-sent event as vLLM writes it."""
_REPORTED: Final = re.compile(rb'"(?:completion|output)_tokens"\s{0,9}:\s{0,9}(\d{1,9})(?!\d)')
_REPORTED_PROMPT: Final = re.compile(rb'"(?:prompt|input)_tokens"\s{0,9}:\s{0,9}(\d{1,9})(?!\d)')
_EVENT_END: Final = re.compile(rb"\n\r?\n")
"""End of a server-sent event as any server may write it."""
MAX_HELD_BYTES: Final = 2**22
"""Maximum bytes of a reply, or of a stream's event, that is parsed. Longer ones are charged by the bound."""
UNSEEN_TOKENS: Final = 16
"""Tokens per completion that may have been generated but not received when a stream is cut."""


def last_reported_tokens(tail: bytes) -> int | None:
    """Return the last completion token count in the end of a reply, or None.

    It does not check where the number is, so it is good enough for metrics but not for billing.
    """
    counts = _REPORTED.findall(tail)
    return int(counts[-1]) if counts else None


def last_reported_prompt(tail: bytes) -> int:
    """Return the last prompt token count in the end of a reply, or 0. It is as good as `last_reported_tokens`."""
    counts = _REPORTED_PROMPT.findall(tail)
    return int(counts[-1]) if counts else 0


class UnboundedReplyMeter:
    """Estimates the tokens of a reply without a bound, for metrics.

    It uses the usage at the reply's end. A stream without usage counts one token per event, except for the event with
    the role and the one that ends the stream.
    """

    def __init__(self, *, is_stream: bool) -> None:
        self._is_stream = is_stream
        self._tail: deque[bytes] = deque(maxlen=TAIL_PIECES)
        self._events = 0

    @property
    def charge(self) -> tuple[int, str, int]:
        """Tokens so far, their kind in the metrics, and the tokens of the prompt, or 0 if they are unknown."""
        tail = b"".join(self._tail)[-TAIL_BYTES:]
        reported = last_reported_tokens(tail)
        if reported is None:
            return max(0, self._events - 2), ESTIMATED, 0
        return reported, PASSED_THROUGH, last_reported_prompt(tail)

    def feed(self, data: bytes) -> bytes:
        """Read a piece of the reply and return it unchanged."""
        if self._is_stream:
            self._events += data.count(EVENT_END)
        self._tail.append(data[-TAIL_BYTES:])
        return data

    def finish(self) -> bytes:
        """Return no bytes: this meter holds nothing back."""
        return b""


class BoundedReplyMeter:
    """Meters the reply to a request with a bound.

    A reply is charged by its usage, wherever that is. Without usage (the client disconnects, the stream breaks) it is
    charged by its bound, which is never too little. If `TokenBound.shows_tokens` says that the stream shows every token
    as text, it is charged by that text instead, one token per byte. No charge exceeds the bound.
    """

    def __init__(self, bound: TokenBound, *, is_stream: bool) -> None:
        self._is_stream = is_stream
        self._max_tokens = bound.max_tokens or 0
        self._is_usage_complete = bound.is_usage_complete
        self._hides_usage = is_stream and bound.adds_usage
        self._shows_tokens = is_stream and bound.shows_tokens
        self._seen = UNSEEN_TOKENS * bound.completions  # upper bound on the tokens that the stream has shown
        self._reported: int | None = None
        self._prompt_tokens = 0  # 0 if they are unknown
        self._held = bytearray()
        self._is_unreadable = False  # longer than MAX_HELD_BYTES

    @property
    def cost(self) -> int:
        """Tokens so far."""
        if self._reported is not None:
            return min(self._reported, self._max_tokens)
        is_seen = self._shows_tokens and not self._is_unreadable
        return min(self._seen, self._max_tokens) if is_seen else self._max_tokens

    @property
    def charge(self) -> tuple[int, str, int]:
        """The cost, its kind in the metrics, and the tokens of the prompt, or 0 if they are unknown."""
        return self.cost, PASSED_THROUGH, self._prompt_tokens

    def feed(self, data: bytes) -> bytes:
        """Read a piece of the reply and return the bytes to send to the client now."""
        if self._is_unreadable:
            return data
        before = len(self._held)
        self._held += data
        passed = self._read_events(max(0, before - 2)) if self._is_stream else b""
        if len(self._held) > MAX_HELD_BYTES:
            self._is_unreadable = True
            passed, self._held = passed + self._held, bytearray()
        return passed if self._hides_usage else data

    def finish(self) -> bytes:
        """Read the end of the reply and return the remaining bytes for the client."""
        held, self._held = bytes(self._held), bytearray()
        if not self._is_stream:
            self._read(held)
        elif self._read_event(held):
            held = b""
        return held if self._hides_usage else b""

    def _read_events(self, start: int) -> bytes:
        """Read the complete events, searching for their ends from `start`. Return those for the client."""
        kept, begin = [], 0
        for end in _EVENT_END.finditer(self._held, start):
            event = bytes(self._held[begin : end.end()])
            begin = end.end()
            if not self._read_event(event):
                kept.append(event)
        del self._held[:begin]
        return b"".join(kept)

    def _read_event(self, event: bytes) -> bool:
        """Read an event of a stream. Return whether it is the usage chunk that the client did not request."""
        if not self._shows_tokens and b'"usage"' not in event:
            return False
        lines = [line[5:] for line in event.splitlines() if line.startswith(b"data:")]
        return bool(lines) and self._read(b"\n".join(lines)) and self._hides_usage

    def _read(self, payload: bytes) -> bool:
        """Read a JSON object. Return whether it carries usage and no choices."""
        try:
            chunk = jiter.from_json(payload)
        except ValueError:
            self._seen += len(payload)
            return False
        if not isinstance(chunk, dict):
            return False
        choices = chunk.get("choices")
        if self._is_stream and choices:
            self._seen += _count_tokens(choices)
            return False
        response = chunk.get("response")
        usage = (response if isinstance(response, dict) else chunk).get("usage")
        reported = _count_in(usage, "completion_tokens", "output_tokens")
        self._prompt_tokens = _count_in(usage, "prompt_tokens", "input_tokens") or self._prompt_tokens
        if reported is not None and self._is_usage_complete:
            self._reported = reported
        return reported is not None and choices is not None


def _count_in(usage: object, *names: str) -> int | None:
    """Return the largest count with one of `names` in a usage object, or None."""
    if not isinstance(usage, dict):
        return None
    counts = [usage.get(name) for name in names]
    return max((count for count in counts if type(count) is int and count >= 0), default=None)


def _count_tokens(choices: Any) -> int:
    """Return an upper bound on the tokens that a chunk shows: one per byte of text, at least one per choice."""
    if not isinstance(choices, list):
        return 0
    texts_by_choice = [_texts(choice) for choice in choices if isinstance(choice, dict)]
    return sum(max(1, sum(len(text.encode()) for text in texts)) for texts in texts_by_choice)


def _texts(choice: dict[str, Any]) -> list[str]:
    delta = choice.get("delta")
    values = [choice.get("text"), *(delta.values() if isinstance(delta, dict) else ())]
    return [value for value in values if isinstance(value, str)]
