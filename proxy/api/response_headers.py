"""Headers of responses without a controller, and the request id of every response."""

from __future__ import annotations

from uuid import uuid4

from proxy.telemetry import logs


def untouched_headers(reason: str) -> dict[str, str]:
    """Return the headers of a response without a controller. `reason` says why none served the request."""
    return {"x-request-id": current_request_id(), "x-tts-applied": "false", "x-tts-reason": reason}


def current_request_id() -> str:
    """Return the id of the request that this task serves."""
    return logs.request_id.get() or f"req-{uuid4().hex}"
