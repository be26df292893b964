"""Queries of usage: a period in buckets of time, the scope of requests, and the points that answer them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Final, NamedTuple

from discovery.store.usage.facts import BETA_STEPS, latency_bounds


class Scope(NamedTuple):
    """Whose requests are read, on which model. None does not restrict."""

    tenant: str | None = None
    model: str | None = None


ALL: Final = Scope()
"""All requests."""


class Bucket(StrEnum):
    """Width of the buckets of a period, in UTC. Each is a prefix of a stored time."""

    MINUTE = "minute"
    HOUR = "hour"
    DAY = "day"

    @property
    def prefix(self) -> int:
        """Characters of a stored time that name a bucket."""
        return {"minute": 16, "hour": 13, "day": 10}[self.value]

    @property
    def width(self) -> timedelta:
        """Duration of a bucket."""
        minutes = {"minute": 1, "hour": 60, "day": 1440}[self.value]
        return timedelta(minutes=minutes)

    def start(self, name: str) -> datetime:
        """Return when the bucket begins that is named by a prefix of a stored time."""
        return datetime.fromisoformat(name + "0000-01-01T00:00"[len(name) :]).replace(tzinfo=UTC)


class Period(NamedTuple):
    """Time from `start` up to `end`, in buckets. Both are widened to whole buckets."""

    start: datetime
    end: datetime
    bucket: Bucket = Bucket.HOUR

    @classmethod
    def until_now(cls, duration: timedelta, bucket: Bucket) -> Period:
        """Return the period of this duration that ends now."""
        now = datetime.now(UTC)
        return cls(now - duration, now, bucket)

    @property
    def bounds(self) -> tuple[str, str]:
        """The first and the last bucket, as prefixes of stored times."""
        first, last = (time.astimezone(UTC).isoformat(timespec="minutes") for time in (self.start, self.end))
        return first[: self.bucket.prefix], last[: self.bucket.prefix]

    def buckets(self) -> list[datetime]:
        """Return when each bucket begins, in order, so that charts can show empty ones."""
        at, last = (self.bucket.start(name) for name in self.bounds)
        starts = []
        while at <= last:
            starts.append(at)
            at += self.bucket.width
        return starts


class UsagePoint(NamedTuple):
    """Sums of the requests in one bucket that share a name."""

    start: datetime
    name: str
    requests: int
    tokens: int
    seconds: float  # sum of their durations


class UsageTotal(NamedTuple):
    """Sums of the requests that share a name."""

    name: str
    requests: int
    tokens: int
    seconds: float  # sum of their durations


class BetaBin(NamedTuple):
    """Requests whose β is nearest to a step of the histogram."""

    beta: float
    requests: int
    tokens: int


class LatencyBin(NamedTuple):
    """Requests whose duration is in a range."""

    shortest_s: float
    longest_s: float
    requests: int


class CostOfBeta(NamedTuple):
    """Means of recent requests with one controller and β on one model."""

    controller: str
    beta: float
    requests: int
    tokens: float
    seconds: float


def beta_bins(totals: Sequence[UsageTotal]) -> list[BetaBin]:
    """Return the histogram of β, of totals by `Measure.BETA`; empty steps have no requests."""
    by_step = {int(total.name): total for total in totals}
    empty = UsageTotal("", 0, 0, 0.0)
    steps = range(BETA_STEPS + 1)
    return [BetaBin(step / BETA_STEPS, *by_step.get(step, empty)[1:3]) for step in steps]


def latency_bins(totals: Sequence[UsageTotal]) -> list[LatencyBin]:
    """Return the histogram of durations, of totals by `Measure.LATENCY`, shortest first, without empty steps."""
    ordered = sorted(totals, key=lambda total: int(total.name))
    return [LatencyBin(*latency_bounds(int(total.name)), total.requests) for total in ordered]


def latency_quantile(bins: Sequence[LatencyBin], share: float) -> float | None:
    """Return the duration that `share` of the requests do not exceed, within 10 %; None without requests."""
    needed = share * sum(count.requests for count in bins)
    for count in bins:
        needed -= count.requests
        if needed <= 0:
            return float((count.shortest_s * count.longest_s) ** 0.5)
    return None
