"""Retry policy: which requests to the upstream are sent again, after which pauses, and how many.

A request is retried only if the upstream did no work for it: it could not be reached, it closed the connection without
a response, or its status says that the request was not processed. Retries stop when the circuit breaker opens, and a
budget bounds them to a share of all requests. Health checks are never retried. `transport.py` applies this policy.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Final

import aiohttp

RETRY_PAUSES_S: Final = (0.05, 0.5)
"""Seconds before the first and the second retry. There is no third."""
UNPROCESSED_STATUSES: Final = (HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT)
"""Statuses that say the upstream did not process the request."""
NO_RESPONSE_ERRORS: Final = (
    aiohttp.ClientConnectorError,
    aiohttp.ClientOSError,
    aiohttp.ServerDisconnectedError,
    aiohttp.ConnectionTimeoutError,
)
"""Errors that aiohttp raises when a request got no response at all."""
RETRY_SHARE: Final = 0.2
"""Share of all requests that may be retries."""
MAX_SAVED_RETRIES: Final = 10.0
"""Retries that quiet times may save up."""


class RetryBudget:
    """Bounds retries to a share of all requests, so that retries alone cannot keep an upstream down."""

    def __init__(self) -> None:
        self._saved = 1.0

    def earn(self) -> None:
        """Count a request."""
        self._saved = min(MAX_SAVED_RETRIES, self._saved + RETRY_SHARE)

    def spend(self) -> bool:
        """Return whether a request may be retried. If so, the retry is counted."""
        if self._saved < 1:
            return False
        self._saved -= 1
        return True
