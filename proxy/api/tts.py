"""Endpoints under `/v1/tts`: explanations of requests, feedback, the calibration of β, and the usage of keys."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from datetime import timedelta
from http import HTTPStatus
from typing import Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from controllers.rollout_state import RolloutStage
from discovery.audit.explain import explain
from discovery.errors import StoreError, TraceError
from discovery.store import EpisodeDetails, ServedEpisode
from discovery.store.usage.periods import Bucket, Period, UsageTotal
from proxy.admission.auth import Caller
from proxy.api.service import Service
from proxy.errors import ApiError, NotFound
from proxy.requests.parsing import parse_feedback_request

logger = logging.getLogger(__name__)

SHOWN_CHARS: Final = 100
"""Maximum characters of an answer in the explanation of an episode."""


class TtsEndpoints:
    """Endpoints under `/v1/tts`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def explain(self, request: Request) -> Response:
        """Explain why a request ended as it did.

        Raises NotFound, also for requests of other tenants, RecordsAway or ApiError.
        """
        caller: Caller = request.state.caller
        recent = self._service.recent
        own = recent.resolve(caller.tenant, request.path_params["request_id"], is_admin=caller.is_admin)
        passed = recent.find(own)
        if passed is not None and caller.may_see(passed.tenant):
            return JSONResponse(passed.as_json(recent.upstream_id(own)))
        episode = await self._service.episode_log.find(caller, own)
        try:
            return await asyncio.to_thread(_explained, episode)
        except TraceError as error:
            raise ApiError(f"the record of this request cannot be read: {error}", code="unreadable_record") from None

    async def feedback(self, request: Request) -> Response:
        """Record a client's feedback on an answer. Raises BadRequest, NotFound, TooMany or RecordsAway."""
        service = self._service
        feedback = parse_feedback_request(await service.bodies.read(request))
        caller: Caller = request.state.caller
        own = service.recent.resolve(caller.tenant, feedback.request, is_admin=caller.is_admin)
        feedback = feedback.model_copy(update={"request": own})
        receipt = await service.episode_log.record_feedback(caller, feedback)
        owner = receipt.owner
        if receipt.is_first and receipt.satisfied is not None and owner.stage is not None:
            stage = RolloutStage(owner.stage)
            service.controllers.record_feedback(stage, owner.digest, owner.model, receipt.satisfied)
        status = HTTPStatus.OK if receipt.is_on_disk else HTTPStatus.ACCEPTED
        return JSONResponse(
            {
                "id": receipt.id,
                "object": "tts.feedback",
                "request_id": feedback.request,
                "status": "recorded" if receipt.is_on_disk else "queued",
            },
            status,
        )

    async def curve(self, request: Request) -> Response:
        """Return the calibrated cost and accuracy of each β on a model. Raises NotFound."""
        model, _ = await self._service.models.find(request.query_params.get("model"))
        first = self._service.betas.calibrations.get(model.id)
        if first is None:
            advice = "run `autotts calibrate` and start the proxy with AUTOTTS_CALIBRATION"
            message = f"there is no calibration for model {model.id!r}; {advice}"
            raise NotFound(message, param="model", code="no_calibration")
        name = request.query_params.get("controller")
        calibration = first if name is None else first.of_name(name)
        if calibration is None:
            calibrated = ", ".join(other.controller for other in first.all)
            message = f"model {model.id!r} was calibrated for {calibrated}, not {name!r}"
            raise NotFound(message, param="controller", code="no_calibration")
        return JSONResponse({"model": model.id, **calibration.as_json()})

    async def keys(self, _: Request) -> Response:
        """Return the limits, the usage and the rights of each key."""
        ring = self._service.authenticator.keyring
        configured = ring.keys if ring else ()
        usage = await self._service.request_slots.as_json({key.name: key.caps for key in configured})
        recorded = await self._usage_of_last_day()
        for key in configured:
            usage["keys"][key.name] |= {
                "last_day": None if recorded is None else _as_json([recorded[key.tenant]]),
                "admin": key.is_admin,
                "priority": key.has_priority,
                "beta": key.beta,
            }
        usage["all"]["last_day"] = None if recorded is None else _as_json(recorded.values())
        return JSONResponse(usage)

    async def _usage_of_last_day(self) -> defaultdict[str, UsageTotal] | None:
        """Return what the store knows of each tenant's requests in the last 24 hours; None if it cannot be read."""
        reader = self._service.usage
        if reader is None:
            return None
        try:
            totals = await reader.by_tenant(Period.until_now(timedelta(days=1), Bucket.HOUR))
        except StoreError as error:
            logger.warning("the usage of keys cannot be read: %s", error)
            return None
        return defaultdict(lambda: UsageTotal("", 0, 0, 0.0), {total.name: total for total in totals})


def _as_json(totals: Iterable[UsageTotal]) -> dict[str, int]:
    listed = list(totals)
    return {"requests": sum(each.requests for each in listed), "tokens": sum(each.tokens for each in listed)}


def _explained(episode: ServedEpisode) -> Response:
    """Return the explanation of an episode. Raises TraceError.

    This is slow, so it runs in a thread. Answers are clipped because the explanation repeats them in each round.
    """
    answers = [_clipped(answer) for answer in episode.about.get("answers", ())]
    about = EpisodeDetails(**{**episode.about, "answers": answers})
    answer = None if episode.answer is None else _clipped(episode.answer)
    return JSONResponse(explain(replace(episode, answer=answer, about=about)))


def _clipped(answer: str) -> str:
    return answer if len(answer) <= SHOWN_CHARS else f"{answer[: SHOWN_CHARS - 1]}…"
