"""Read the upstream's load from vLLM's metrics page."""

from __future__ import annotations

import math
from typing import Final, NamedTuple

WAITING_GAUGE: Final = ("vllm:num_requests_waiting{", "vllm:num_requests_waiting ")
"""Prefixes of the metric lines with the number of requests in vLLM's queues."""
CACHE_GAUGE: Final = ("vllm:kv_cache_usage_perc{", "vllm:kv_cache_usage_perc ")
"""Prefixes of the metric lines with the share of the KV cache that is in use."""


class UpstreamLoad(NamedTuple):
    """Load of an upstream. A value that it does not report is None."""

    waiting: int | None  # requests in its queues
    cache: float | None  # share of the KV cache in use, in [0, 1], of the fullest engine


def parse_load(page: str) -> UpstreamLoad:
    """Return the load that a page in the Prometheus text format reports."""
    waiting, cache = _gauges(page, WAITING_GAUGE), _gauges(page, CACHE_GAUGE)
    queued = sum(waiting)
    return UpstreamLoad(int(queued) if waiting and math.isfinite(queued) else None, max(cache) if cache else None)


def _gauges(page: str, beginnings: tuple[str, ...]) -> list[float]:
    """Return the values of a metric, one for each engine. Empty if any of them is not a finite number."""
    try:
        values = [float(line.rpartition(" ")[2]) for line in page.splitlines() if line.startswith(beginnings)]
    except ValueError:
        return []
    return values if all(map(math.isfinite, values)) else []
