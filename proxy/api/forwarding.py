"""Forward requests that no controller serves to the upstream, within the caller's budget."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from functools import partial
from http import HTTPStatus
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from proxy.admission.token_bound import TokenBound
from proxy.api.response_headers import current_request_id, untouched_headers
from proxy.api.service import Service
from proxy.http import graceful_shutdown
from proxy.http.json_edit import edit_members
from proxy.http.sse import ClientDisconnected, StreamedResponse, cancel_on_disconnect
from proxy.passthrough.forward import forward
from proxy.passthrough.request_ids import ForwardedRequest
from proxy.passthrough.unapplied_beta import unapplied_tts, with_tts_member
from proxy.requests import field_values, strict_json
from proxy.requests.generation_request import GenerationRequest, PassThroughReason
from proxy.telemetry import logs
from proxy.telemetry.metrics import Metrics
from proxy.types import EffectiveBeta, Model
from proxy.upstream.fleet.affinity import affinity_key, body_key
from proxy.upstream.fleet.interface import Upstream
from proxy.upstream.relayed_body import RelayedBody

_FAILURE: Final = int(HTTPStatus.INTERNAL_SERVER_ERROR)


class ForwardEndpoints:
    """Endpoints that the upstream serves, and generation requests that no controller serves."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def post(self, request: Request) -> Response:
        """Forward a POST to an endpoint that the proxy does not serve itself."""
        raw = await self._service.bodies.read(request)
        fields = strict_json.read_object(raw)
        field_values.check(fields)
        drop = request.state.caller.fields_to_drop(fields)
        name, put, engine = fields.get("model"), dict[str, str](), self._service.engine
        if isinstance(name, str) and ("@" in name or (name and engine.replica_states())):
            model = (await self._service.models.find(name))[0].id
            put = {"model": model} if model != name else {}
            engine = engine.route(model, lambda: body_key(raw))
        else:
            engine = engine.route("", lambda: body_key(raw))
        return await self._forward(
            engine, request, edit_members(raw, drop=drop, put=put), untouched_headers("endpoint")
        )

    async def get(self, request: Request) -> Response:
        """Forward a GET."""
        return await self._forward(self._service.engine, request, b"", untouched_headers("endpoint"))

    async def generate(
        self,
        request: Request,
        parsed: GenerationRequest,
        raw: bytes,
        model: Model,
        beta: EffectiveBeta | None,
        unserved: PassThroughReason,
    ) -> Response:
        """Forward a generation request within the caller's budget. The response says why no controller served it."""
        service = self._service
        service.unapplied.report(model.id, parsed.tts, beta, unserved)
        is_named = parsed.model is not None or service.settings.model is not None
        bound = service.request_slots.token_bound(request, parsed, model)
        put = {**bound.put, **({"model": model.id} if is_named and parsed.model != model.id else {})}
        drop = [*request.state.caller.fields_to_drop(parsed.model_extra or {})]
        if "tts" in parsed.model_fields_set:
            drop.append("tts")
        body = edit_members(raw, drop=drop, put=put)
        content_type = None if "json" in request.headers.get("content-type", "") else "application/json"
        response = await self._forward(
            service.engine.route(model.id, lambda: affinity_key(parsed, raw), current_request_id()),
            request,
            body,
            untouched_headers(unserved.reason),
            model.id,
            content_type,
            bound,
        )
        if "tts" in parsed.model_fields_set:
            response = with_tts_member(response, unapplied_tts(beta, unserved))
        return self._remember(request, response, model.id, unserved.reason)

    async def _forward(
        self,
        engine: Upstream,
        request: Request,
        body: bytes,
        headers: Mapping[str, str],
        model: str = "",
        content_type: str | None = None,
        bound: TokenBound | None = None,
    ) -> Response:
        service = self._service
        slot = await service.request_slots.acquire_passthrough(request, model, bound)
        relayed = RelayedBody(request.state.caller.with_cache_salt(body))

        async def work() -> Response:
            await slot.__aenter__()
            in_pieces = bool(slot.caps.tokens)
            forwarding = forward(engine, request, relayed, headers, content_type, in_pieces=in_pieces, model=model)
            return await slot.metered(forwarding, relayed)

        with DisconnectCounter(service.metrics, model):
            response = await cancel_on_disconnect(request.receive, work())
        is_failure = response.status_code >= _FAILURE
        outcome = "failed" if is_failure else "passed_through"
        service.metrics.child(service.metrics.requests, model, "", outcome).inc()
        return response

    def _remember(self, request: Request, response: Response, model: str, reason: str) -> Response:
        """Store a forwarded request under all of its ids. Return the response to send."""
        recent = self._service.recent
        tenant, own, client_id = request.state.caller.tenant, current_request_id(), logs.client_request_id.get()
        created = time.time()
        path, status = request.scope["path"], response.status_code
        recent.add(ForwardedRequest(own, tenant, created, path, model, reason, status, client_id or None))
        recent.add_client_id(tenant, client_id, own)
        if isinstance(response, StreamedResponse):
            response.on_first_piece = partial(recent.note_upstream_id, tenant, own)
        else:
            recent.note_upstream_id(tenant, own, bytes(response.body))
        return response


class DisconnectCounter:
    """Context that counts a client's disconnect, because nothing else counts such a request."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._metrics = metrics
        self._model = model

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        is_gone = error is not None and isinstance(error, ClientDisconnected | asyncio.CancelledError)
        if is_gone and not graceful_shutdown.is_cut_by_shutdown():
            self._metrics.requests.labels(self._model, "", "disconnected").inc()
