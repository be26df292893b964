"""Handle requests that set β but are forwarded without a controller: refuse them, or count, log and report them."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from typing import Any, Final

from starlette.responses import Response

from proxy.errors import BadRequest
from proxy.http.sse import StreamedResponse
from proxy.requests.generation_request import PassThroughReason, TtsOptions
from proxy.telemetry.metrics import Metrics
from proxy.types import EffectiveBeta
from proxy.upstream.body_tap import BodySource, convert_pieces

logger = logging.getLogger(__name__)

NO_BETA: Final = PassThroughReason("no_beta", "")
"""Reason of a request that sets no β."""
GREEDY: Final = PassThroughReason("temperature", "temperature")
"""Reason of a greedy request (temperature 0) whose β comes from the server's default only."""
MAX_HELD_BYTES: Final = 2**16
"""Maximum bytes of a reply that are held back until its first JSON object begins."""

_FIRST_OBJECT: Final = re.compile(rb'\A\s*\{\s*(["}])')
_FIRST_EVENT: Final = re.compile(rb'^data:\s*\{\s*(["}])', re.MULTILINE)


class UnappliedBeta:
    """Counts and logs the requests whose β is not applied, during the lifetime of the proxy."""

    def __init__(self, metrics: Metrics, *, is_required: bool) -> None:
        self._metrics = metrics
        self._is_required = is_required
        self._logged: set[tuple[str, str]] = set()  # (model, reason)

    @property
    def models(self) -> set[str]:
        """The models about which something was logged."""
        return {model for model, _ in self._logged}

    def forget(self, model: str) -> None:
        """Forget a model that is served no longer."""
        self._logged = {logged for logged in self._logged if logged[0] != model}

    def report(self, model: str, tts: TtsOptions, beta: EffectiveBeta | None, unserved: PassThroughReason) -> None:
        """Count a forwarded request whose β is not applied, and log the first for each model and reason.

        Raises BadRequest if the client (`tts.required`) or the operator (AUTOTTS_REQUIRED) demands a controller.
        """
        is_lost = beta is not None and unserved is not GREEDY
        if tts.required or (tts.required is None and self._is_required and is_lost):
            switch = "tts.required" if tts.required else "the server's AUTOTTS_REQUIRED"
            remedy = unserved.remedy or (f"leave out {unserved.field}" if unserved.field else "set tts.beta")
            if is_lost:
                remedy += ", or set tts.required to false"
            raise BadRequest(
                f"a controller cannot serve this request ({unserved.reason}) and {switch} is set; {remedy}",
                param=unserved.field or None,
                code="tts_not_applicable",
            )
        if beta is None:
            return
        self._metrics.beta_not_applied.labels(model, unserved.reason, str(beta.source)).inc()
        if (model, unserved.reason) not in self._logged:
            self._logged.add((model, unserved.reason))
            logger.warning(
                "β %g (%s) was not applied to a request for model %s (reason: %s); "
                "further ones are counted, not logged",
                beta.value,
                beta.source,
                model,
                unserved.reason,
            )


def unapplied_tts(beta: EffectiveBeta | None, unserved: PassThroughReason) -> dict[str, Any]:
    """Return the `tts` object of a reply that no controller served."""
    return {
        "applied": False,
        "reason": unserved.reason,
        "field": unserved.field or None,
        "beta_asked": None if beta is None else beta.value,
        "beta_source": None if beta is None else str(beta.source),
    }


def with_tts_member(response: Response, tts: Mapping[str, Any]) -> Response:
    """Return `response` with the member `tts` added to its JSON object, or to the first event of its stream.

    All other bytes stay as they are. Errors, and bodies of other content types, are returned unchanged.
    """
    media = response.headers.get("content-type", "")
    is_stream = media.startswith("text/event-stream")
    if not 200 <= response.status_code < 300 or not (is_stream or media.startswith("application/json")):
        return response
    inserter = _MemberInserter(tts, is_stream=is_stream)
    if isinstance(response, StreamedResponse):
        response.source = _inserting(response.source, inserter)
        return response
    response.body = inserter.take(bytes(response.body)) + inserter.flush()
    response.headers["content-length"] = str(len(response.body))
    return response


class _MemberInserter:
    """Inserts a member at the front of the first JSON object in a body that arrives in pieces."""

    def __init__(self, tts: Mapping[str, Any], *, is_stream: bool) -> None:
        self._member = b'"tts":' + json.dumps(tts, ensure_ascii=False, separators=(",", ":")).encode()
        self._first_object = _FIRST_EVENT if is_stream else _FIRST_OBJECT
        self._held = b""  # until the first object is found
        self._is_done = False

    def take(self, piece: bytes) -> bytes:
        """Return the bytes that can be sent once `piece` has arrived."""
        if self._is_done:
            return piece
        self._held += piece
        match = self._first_object.search(self._held)
        if match is None and len(self._held) <= MAX_HELD_BYTES:
            return b""
        body = self.flush()
        if match is None:
            return body
        at = match.start(1)
        separator = b"," if match[1] == b'"' else b""
        return body[:at] + self._member + separator + body[at:]

    def flush(self) -> bytes:
        """Return the bytes that are held back, and hold back nothing from now on."""
        held, self._held, self._is_done = self._held, b"", True
        return held


def _inserting(source: BodySource, inserter: _MemberInserter) -> BodySource:
    def insert(piece: bytes, is_last: bool) -> bytes:
        ready = inserter.take(piece)
        return ready + inserter.flush() if is_last else ready

    return convert_pieces(source, insert)
