"""What a reply has cost that is handed back: as it says, or else as much as it can have been."""

from __future__ import annotations

import re
from collections import deque
from typing import Any, Final

import jiter

from proxy.admission.token_bound import TokenBound

TAIL: Final = 4096
"""Bytes of a reply's end in which its usage stands, as a rule."""
LAST: Final = 64
"""Pieces of a reply in which its end is, as a rule."""
PASSED_THROUGH: Final = "passed_through"
ESTIMATED: Final = "passed_through_estimated"
"""Kinds of tokens in the metrics."""
EVENT: Final = b"\n\n"
"""What ends an event, as vLLM writes it."""
_LAST: Final = re.compile(rb'"(?:completion|output)_tokens"\s{0,9}:\s{0,9}(\d{1,9})(?!\d)')
_END: Final = re.compile(rb"\n\r?\n")
"""Of an event."""
HELD: Final = 2**22
"""Bytes of one reply, or of one event of a stream, that are kept to be read; what is longer is not."""
LATE: Final = 16
"""Tokens of each text that may have been on their way when a stream was cut."""


def last_reported_tokens(tail: bytes) -> int | None:
    """Tokens by the usage that stands in the end of a reply, if one does. Good enough to count by, not to bill by: it
    does not look where that stands."""
    said = _LAST.findall(tail)
    return int(said[-1]) if said else None


class UnboundedReplyMeter:
    """What a reply has cost that has no bound, by a glance at it as it passes through `take`: as its end tells, if it
    does, or else its events, each a token but for the role and the end.
    """

    def __init__(self, *, is_stream: bool) -> None:
        self._is_stream = is_stream
        self._last: deque[bytes] = deque(maxlen=LAST)
        self._events = 0

    @property
    def booking(self) -> tuple[int, str]:
        """Tokens, as far as is known, and as what they are counted."""
        said = last_reported_tokens(b"".join(self._last)[-TAIL:])
        return (max(0, self._events - 2), ESTIMATED) if said is None else (said, PASSED_THROUGH)

    def take(self, data: bytes) -> bytes:
        """A piece of the reply, which is the client's as it is."""
        if self._is_stream:
            self._events += data.count(EVENT)
        self._last.append(data[-TAIL:])
        return data

    def rest(self) -> bytes:
        """The reply has come to its end; nothing of it is held."""
        return b""


class BoundedReplyMeter:
    """One reply's, of a request with a bound. It is read as it passes through `take`, wherever its usage stands.

    A reply is billed by its usage. Without one, as when its client leaves or its stream breaks off, it is billed by its
    bound, which is never too little; or by the text that came, a token a byte, where the bound says that no token can
    hide from the client. No bill is above the bound, whatever a usage says.
    """

    def __init__(self, bound: TokenBound, *, is_stream: bool) -> None:
        self._most = bound.most or 0
        self._is_stream = is_stream
        self._tells = bound.tells
        self._hides = is_stream and bound.has_asked
        self._shows = is_stream and bound.shows
        self._seen = LATE * bound.texts  # tokens, at most, that a stream has shown
        self._said: int | None = None
        self._held = bytearray()
        self._is_blind = False  # it is too long to be read

    @property
    def cost(self) -> int:
        """Tokens, as far as is known."""
        if self._said is not None:
            return min(self._said, self._most)
        return min(self._seen, self._most) if self._shows and not self._is_blind else self._most

    @property
    def booking(self) -> tuple[int, str]:
        """The cost, and the kind of tokens it is counted as."""
        return self.cost, PASSED_THROUGH

    def take(self, data: bytes) -> bytes:
        """A piece of the reply; what of it, and of those before, is now for the client."""
        if self._is_blind:
            return data
        before = len(self._held)
        self._held += data
        passed = self._events(max(0, before - 2)) if self._is_stream else b""
        if len(self._held) > HELD:
            self._is_blind = True
            passed, self._held = passed + self._held, bytearray()
        return passed if self._hides else data

    def rest(self) -> bytes:
        """The reply has come to its end; what of it is still for the client."""
        held, self._held = bytes(self._held), bytearray()
        if not self._is_stream:
            self._read(held)
        elif self._event(held):
            held = b""
        return held if self._hides else b""

    def _events(self, start: int) -> bytes:
        """Read the events that are whole, whose ends are looked for from `start` on; those for the client."""
        kept, at = [], 0
        for end in _END.finditer(self._held, start):
            event = bytes(self._held[at : end.end()])
            at = end.end()
            if not self._event(event):
                kept.append(event)
        del self._held[:at]
        return b"".join(kept)

    def _event(self, event: bytes) -> bool:
        """Read an event of a stream. Whether it is the usage that the client has not asked for."""
        if not self._shows and b'"usage"' not in event:
            return False
        lines = [line[5:] for line in event.splitlines() if line.startswith(b"data:")]
        return bool(lines) and self._read(b"\n".join(lines)) and self._hides

    def _read(self, payload: bytes) -> bool:
        """Read a JSON object. Whether it is there for its usage."""
        try:
            chunk = jiter.from_json(payload)
        except ValueError:
            self._seen += len(payload)
            return False
        if not isinstance(chunk, dict):
            return False
        choices = chunk.get("choices")
        if self._is_stream and choices:
            self._seen += _tokens_of(choices)
            return False
        response = chunk.get("response")
        said = _completion((response if isinstance(response, dict) else chunk).get("usage"))
        if said is not None and self._tells:
            self._said = said
        return said is not None and choices is not None


def _completion(usage: object) -> int | None:
    """Generated tokens by a usage, if it tells of any."""
    if not isinstance(usage, dict):
        return None
    said = [usage.get(name) for name in ("completion_tokens", "output_tokens")]
    return max((one for one in said if type(one) is int and one >= 0), default=None)


def _tokens_of(choices: Any) -> int:
    """No fewer tokens than the choices of a chunk show: one in each, and one in every byte of their text."""
    if not isinstance(choices, list):
        return 0
    texts = [_texts(choice) for choice in choices if isinstance(choice, dict)]
    return sum(max(1, sum(len(text.encode()) for text in ones)) for ones in texts)


def _texts(choice: dict[str, Any]) -> list[str]:
    delta = choice.get("delta")
    found = [choice.get("text"), *(delta.values() if isinstance(delta, dict) else ())]
    return [one for one in found if isinstance(one, str)]
