"""Requests that set β and that no controller serves: refused, or counted, logged and told to their client."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Awaitable, Mapping
from typing import Any, Final

from starlette.responses import Response

from proxy.errors import BadRequest
from proxy.http.sse import StreamedResponse
from proxy.requests.generation_request import PassThroughReason, TtsOptions
from proxy.telemetry.metrics import Metrics
from proxy.types import EffectiveBeta
from proxy.upstream.body_tap import BodySink, BodySource

logger = logging.getLogger(__name__)

NO_BETA: Final = PassThroughReason("no_beta", "")
"""The reason of a request that sets no β."""
GREEDY: Final = PassThroughReason("temperature", "temperature")
"""The reason of a greedy request for which only the operator sets β."""
SEARCHED: Final = 2**16
"""Bytes of a reply in which its first object is looked for."""

_FIRST_OBJECT: Final = re.compile(rb'\A\s*\{\s*(["}])')
_FIRST_EVENT: Final = re.compile(rb'^data:\s*\{\s*(["}])', re.MULTILINE)


class UnappliedBeta:
    """Counts, logs and reports requests whose β is not applied, over one proxy's life."""

    def __init__(self, metrics: Metrics, *, is_required: bool) -> None:
        self._metrics = metrics
        self._is_required = is_required
        self._logged: set[tuple[str, str]] = set()  # models and reasons

    def take(self, model: str, tts: TtsOptions, beta: EffectiveBeta | None, unserved: PassThroughReason) -> None:
        """Count a request that passes through, and log the first for each reason.

        Raises BadRequest where the client or the operator would rather have it refused.
        """
        is_lost = beta is not None and unserved is not GREEDY
        if tts.required or (tts.required is None and self._is_required and is_lost):
            switch = "tts.required" if tts.required else "the server's AUTOTTS_REQUIRED"
            way_out = f"leave {unserved.field} out" if unserved.field else "set tts.beta"
            if is_lost:
                way_out += ", or set tts.required to false"
            raise BadRequest(
                f"a controller cannot serve this request ({unserved.reason}) and {switch} is set; {way_out}",
                param=unserved.field or None,
                code="tts_not_applicable",
            )
        if beta is None:
            return
        self._metrics.beta_not_applied.labels(model, unserved.reason, str(beta.source)).inc()
        if (model, unserved.reason) not in self._logged:
            self._logged.add((model, unserved.reason))
            logger.warning(
                "β %g (%s) was not applied to a request for %s: %s. More like it are counted, not logged",
                beta.value,
                beta.source,
                model,
                unserved.reason,
            )


def unapplied_tts(beta: EffectiveBeta | None, unserved: PassThroughReason) -> dict[str, Any]:
    """Return the `tts` object of a reply that no controller took part in."""
    return {
        "applied": False,
        "reason": unserved.reason,
        "field": unserved.field or None,
        "beta_asked": None if beta is None else beta.value,
        "beta_source": None if beta is None else str(beta.source),
    }


def mark(response: Response, tts: Mapping[str, Any]) -> None:
    """Add the member `tts` to a reply: to its object, or to the first event of its stream; the rest stays as it is."""
    media = response.headers.get("content-type", "")
    is_stream = media.startswith("text/event-stream")
    if not 200 <= response.status_code < 300 or not (is_stream or media.startswith("application/json")):
        return
    insertion = _Insertion(tts, is_stream=is_stream)
    if isinstance(response, StreamedResponse):
        response.pour = _inserting(response.pour, insertion)
        return
    response.body = insertion.take(bytes(response.body)) + insertion.rest()
    response.headers["content-length"] = str(len(response.body))


class _Insertion:
    """Puts a member into the first object of a body that comes in pieces."""

    def __init__(self, tts: Mapping[str, Any], *, is_stream: bool) -> None:
        self._member = b'"tts":' + json.dumps(tts, ensure_ascii=False, separators=(",", ":")).encode()
        self._first = _FIRST_EVENT if is_stream else _FIRST_OBJECT
        self._held = b""
        self._is_over = False

    def take(self, piece: bytes) -> bytes:
        """Return what can be sent once `piece` has come."""
        if self._is_over:
            return piece
        self._held += piece
        found = self._first.search(self._held)
        if found is None and len(self._held) <= SEARCHED:
            return b""
        passed = self.rest()
        if found is None:
            return passed
        at = found.start(1)
        separator = b"," if found[1] == b'"' else b""
        return passed[:at] + self._member + separator + passed[at:]

    def rest(self) -> bytes:
        """Return what is held back; nothing will be."""
        held, self._held, self._is_over = self._held, b"", True
        return held


def _inserting(pour: BodySource, insertion: _Insertion) -> BodySource:
    async def inserting(hand: BodySink) -> None:
        def take(piece: bytes, is_last: bool) -> Awaitable[None]:
            passed = insertion.take(piece)
            if is_last:
                passed += insertion.rest()
            return hand(passed, is_last) if passed or is_last else _nothing()

        await pour(take)

    return inserting


async def _nothing() -> None:
    pass
