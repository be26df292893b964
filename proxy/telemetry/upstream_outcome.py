"""Outcomes of generation requests to the upstream, as metrics name them."""

from __future__ import annotations

from http import HTTPStatus
from typing import Final

from proxy.errors import (
    UpstreamCircuitOpen,
    UpstreamDisconnected,
    UpstreamError,
    UpstreamProtocolError,
    UpstreamTimeout,
    UpstreamUnreachable,
    is_request_at_fault,
)

_FAILURES: Final = {
    UpstreamUnreachable: "unreachable",
    UpstreamTimeout: "timeout",
    UpstreamCircuitOpen: "ejected",
    UpstreamDisconnected: "broken",
    UpstreamProtocolError: "nonsense",
}


def outcome_of_failure(error: UpstreamError) -> str:
    """Return the outcome of a request that failed with `error`."""
    if error.is_request_at_fault:
        return "refused"
    return next((name for kind, name in _FAILURES.items() if isinstance(error, kind)), "failed")


def outcome_of_response(status: int | None, error: BaseException | None) -> str:
    """Return the outcome of a request that was passed through, by its status or its error."""
    if isinstance(error, UpstreamError):
        return outcome_of_failure(error)
    if error is not None or status is None:
        return "aborted"
    if status < HTTPStatus.BAD_REQUEST:
        return "done"
    return "refused" if is_request_at_fault(status) else "failed"
