"""Sessions of the dashboard: who signed in, until when, and how often somebody may try to."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from hashlib import sha256
from hmac import compare_digest, digest
from typing import Final, NamedTuple

MOST_SESSIONS: Final = 1000
MOST_PER_KEY: Final = 16
"""Sessions of one key at the same time; a further one ends the oldest."""
MOST_ADDRESSES: Final = 1000
"""Addresses whose failed attempts are remembered; beyond that the one that failed longest ago is forgotten."""
FAILURES: Final = 10
"""Failed attempts to sign in that one address has per WINDOW_S seconds."""
ALL_FAILURES: Final = 100
"""Failed attempts that all addresses together have per WINDOW_S seconds."""
WINDOW_S: Final = 60.0
_ID_BYTES: Final = 32


class Session(NamedTuple):
    """Somebody who signed in."""

    token_hash: str  # of the key; it is looked up again at each request, so a revoked key ends its sessions
    expires: float  # by the clock of `Sessions`


class Sessions:
    """Sessions in memory, by the hash of their id. They end with the process."""

    def __init__(self, lifetime_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.lifetime_s = lifetime_s  # from signing in to the end of a session
        self._clock = clock
        self._sessions: OrderedDict[str, Session] = OrderedDict()  # the oldest first

    def __len__(self) -> int:
        return len(self._sessions)

    def open(self, token_hash: str) -> str:
        """Begin a session for a key and return its id. The oldest sessions end if there are too many."""
        now = self._clock()
        for old in [key for key, session in self._sessions.items() if session.expires <= now]:
            del self._sessions[old]
        own = [key for key, session in self._sessions.items() if session.token_hash == token_hash]
        for old in own[: max(0, len(own) - MOST_PER_KEY + 1)]:
            del self._sessions[old]
        while len(self._sessions) >= MOST_SESSIONS:
            self._sessions.popitem(last=False)
        session_id = new_id()
        self._sessions[_hashed(session_id)] = Session(token_hash, now + self.lifetime_s)
        return session_id

    def find(self, session_id: str) -> Session | None:
        """Return a session that has not ended, or None."""
        session = self._sessions.get(_hashed(session_id))
        if session is None:
            return None
        if session.expires <= self._clock():
            self.close(session_id)
            return None
        return session

    def close(self, session_id: str) -> None:
        """End a session, if there is one with this id."""
        self._sessions.pop(_hashed(session_id), None)


class SignInLimiter:
    """Limits failed attempts to sign in, by address and in all."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures: OrderedDict[str, deque[float]] = OrderedDict()
        self._all: deque[float] = deque(maxlen=ALL_FAILURES)

    def retry_after(self, address: str) -> float:
        """Return the seconds until `address` may try again; 0 if it may now."""
        now = self._clock()
        limits = ((self._failures.get(address, deque()), FAILURES), (self._all, ALL_FAILURES))
        return max([0.0, *(times[0] + WINDOW_S - now for times, most in limits if len(times) == most)])

    def count_failure(self, address: str) -> None:
        """Count a failed attempt."""
        now = self._clock()
        self._failures.setdefault(address, deque(maxlen=FAILURES)).append(now)
        self._failures.move_to_end(address)
        self._all.append(now)
        while len(self._failures) > MOST_ADDRESSES:
            self._failures.popitem(last=False)


class CsrfTokens:
    """Tokens that prove that a form was sent from a page of this dashboard. Each belongs to one cookie."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)

    def of(self, cookie: str) -> str:
        """Return the token for the holder of a cookie."""
        return digest(self._secret, cookie.encode(), "sha256").hex()

    def is_valid(self, token: str, cookie: str) -> bool:
        """Return whether a token belongs to a cookie. The time it takes does not reveal how much of it is right."""
        return bool(cookie) and compare_digest(token.encode(), self.of(cookie).encode())


def new_id() -> str:
    """Return a random id that cannot be guessed."""
    return secrets.token_urlsafe(_ID_BYTES)


def _hashed(session_id: str) -> str:
    """Return the hash under which a session is kept, so that looking it up reveals nothing by its time."""
    return sha256(session_id.encode()).hexdigest()
