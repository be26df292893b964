"""Lists of served requests: filters, pages, and the position where a page ends."""

from __future__ import annotations

from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple

from discovery.store.records import stored_time

MAX_PAGE: Final = 200
MAX_COUNTED: Final = 10_000
"""Requests that are counted at most, because counting more would take longer than a page may."""


class RequestFilter(NamedTuple):
    """Which requests are listed. None does not restrict; bounds belong to their range."""

    since: datetime | None = None
    until: datetime | None = None  # does not belong to the range
    tenant: str | None = None
    model: str | None = None
    controller: str | None = None
    stop: str | None = None
    beta_min: float | None = None
    beta_max: float | None = None
    tokens_min: int | None = None
    tokens_max: int | None = None
    is_fallback: bool | None = None  # whether the baseline took over

    def clauses(self) -> dict[str, Any]:
        """Return clauses on table `episode_facts` with their values; those without a value do not restrict."""
        return {
            "created >= ?": None if self.since is None else stored_time(self.since),
            "created < ?": None if self.until is None else stored_time(self.until),
            "tenant = ?": self.tenant,
            "model = ?": self.model,
            "controller = ?": self.controller,
            "stop = ?": self.stop,
            "beta >= ?": self.beta_min,
            "beta <= ?": self.beta_max,
            "tokens >= ?": self.tokens_min,
            "tokens <= ?": self.tokens_max,
            "is_fallback = ?": None if self.is_fallback is None else int(self.is_fallback),
        }


class PageEnd(NamedTuple):
    """The last request of a page. The next page begins after it, however many requests were added meanwhile."""

    created: str
    id: str

    def encode(self) -> str:
        """Return it as text for an address."""
        return urlsafe_b64encode("\n".join(self).encode()).decode().rstrip("=")

    @classmethod
    def decode(cls, text: str) -> PageEnd:
        """Return the position that `encode` made a text of. Raises ValueError."""
        try:
            created, _, identity = urlsafe_b64decode(text + "=" * (-len(text) % 4)).decode().partition("\n")
            datetime.fromisoformat(created)
        except ValueError:  # also invalid base64 and UTF-8
            raise ValueError(f"page {text[:40]!r} does not exist; start from the first page") from None
        return cls(created, identity)


class ListedRequest(NamedTuple):
    """One row of a list of requests."""

    request: str
    created: str
    tenant: str  # a hash; empty for a caller without a key
    model: str
    controller: str
    beta: float
    stop: str
    tokens: int
    seconds: float
    rounds: int
    branches: int
    is_fallback: bool


class RequestPage(NamedTuple):
    """A page of requests, latest first."""

    requests: Sequence[ListedRequest]
    end: PageEnd | None  # None on the last page


class FilterChoices(NamedTuple):
    """Values that occur, for the menus of a filter. Each is sorted."""

    models: Sequence[str]
    controllers: Sequence[str]
    stops: Sequence[str]
    tenants: Sequence[str]
