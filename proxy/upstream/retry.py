"""Retry policy: which upstream requests are retried, after which pauses, and how often.

A request is retried if it could not be sent, if its status says that the upstream did not process it, or if the
connection closed without a response, as when the upstream is restarted. It is not retried after 504: a gateway sends
that while the upstream works on the request. Retries stop when the circuit breaker opens, and a budget limits them to a
share of all requests. Health checks are never retried. `transport.py` applies this policy.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Final

import aiohttp

RETRY_PAUSES_S: Final = (0.05, 0.5)
"""Seconds before the first and the second retry. There is no third."""
UNPROCESSED_STATUSES: Final = (HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE)
"""Statuses that say the upstream did not process the request."""
UNSENT_ERRORS: Final = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)
"""Errors of a request for which there was no connection."""
NO_RESPONSE_ERRORS: Final = (*UNSENT_ERRORS, aiohttp.ClientOSError, aiohttp.ServerDisconnectedError)
"""Errors that aiohttp raises when a request got no response."""
RETRY_SHARE: Final = 0.2
"""Maximum retries as a share of all requests."""
MAX_SAVED_RETRIES: Final = 10.0
"""Maximum number of unused retries that the budget keeps."""


class RetryBudget:
    """Limits retries to a share of all requests, so that retries alone cannot keep an upstream down."""

    def __init__(self) -> None:
        self._saved = 1.0

    def earn(self) -> None:
        """Count a request, which adds RETRY_SHARE of a retry to the budget."""
        self._saved = min(MAX_SAVED_RETRIES, self._saved + RETRY_SHARE)

    def spend(self) -> bool:
        """Return whether a request may be retried. If so, take the retry from the budget."""
        if self._saved < 1:
            return False
        self._saved -= 1
        return True
