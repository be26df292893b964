"""The HTTP server: routes, and what a client is told when something goes wrong."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from http import HTTPStatus
from typing import Any, Final, NamedTuple
from uuid import uuid4

import aiohttp
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from controllers.builtin import is_admin_only
from controllers.installed import Stage
from discovery.audit.explain import explain
from discovery.errors import DiscoveryError, TraceError
from discovery.evaluation import calibration
from discovery.evaluation.calibration import FULL_RANGE, Arm, BetaMap, Calibrations
from discovery.store import EpisodeDetails, ServedEpisode
from proxy import errors
from proxy.admission.auth import Access, Caller, Callers
from proxy.admission.load_shedding import Load
from proxy.admission.request_slot import Held, Turn, Turns
from proxy.admission.token_bound import Bound
from proxy.api import endpoints as wire
from proxy.api import openapi
from proxy.api.prompt_batch import BEGUN_TOGETHER, Batch, together
from proxy.environment.answer_reader import GraderPool
from proxy.episode import reply, run
from proxy.errors import (
    ApiError,
    BadRequest,
    Forbidden,
    NotFound,
    RecordsAway,
    TooMany,
    Unauthorised,
    UpstreamError,
)
from proxy.http import graceful_shutdown
from proxy.http.access_log import Timing
from proxy.http.json_edit import splice
from proxy.http.origins import PageGuard, with_cors
from proxy.http.request_body import Bodies
from proxy.http.sse import ClientGone, Stream, thinking, unless_gone
from proxy.passthrough import forward as passthrough
from proxy.passthrough.request_ids import Passed, Recent
from proxy.passthrough.unapplied_beta import GREEDY, NO_BETA, Unapplied, mark, told
from proxy.recording.episode_log import Records
from proxy.recording.template_drift import Drift
from proxy.requests import beta as dial
from proxy.requests import field_table, field_values, strict_json
from proxy.requests import models as schema
from proxy.rollout.controller_runner import Casting
from proxy.settings import Settings
from proxy.telemetry import logs, tracing
from proxy.telemetry.metrics import CONTENT_TYPE, Metrics
from proxy.types import ALIAS_BETAS, BetaSource, EffectiveBeta, Model, Plan, Reply
from proxy.upstream import eager_task
from proxy.upstream.branch_semaphore import Berths
from proxy.upstream.client import Engine
from proxy.upstream.health_monitor import Pulse

logger = logging.getLogger(__name__)

CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that left; nobody reads it but the access log."""
SHOWN_CHARS: Final = 100
"""Characters of an answer that are shown where an episode is explained."""


class Service:
    """What the routes share: one upstream, its settings and metrics, and what β costs there."""

    def __init__(self, settings: Settings, engine: Engine, calibrations: Calibrations, callers: Callers) -> None:
        self.settings = settings
        self.engine = engine
        self.calibrations = calibrations
        self.metrics = Metrics()
        self.spans = tracing.make()
        engine.watcher = tracing.Observer(self.metrics, self.spans)
        self.pulse = Pulse(self._is_ready, self.metrics)
        self.metrics.branches_in_flight.set_function(lambda: engine.berths.taken)
        self.metrics.calls_waiting.set_function(lambda: engine.berths.waiting)
        self.unapplied = Unapplied(self.metrics, is_required=settings.required)
        self.grading = GraderPool(self.metrics)
        self.casting = Casting(settings, self.metrics, calibrations)
        self.drift = Drift(engine, settings, self.metrics)
        engine.on_event = self._hear_of_upstream
        self.callers = callers
        self.guard = PageGuard(settings)
        self.bodies = Bodies(settings.max_body_bytes, settings.max_bodies_bytes)
        if (keyring := callers.keyring) is not None:
            self.metrics.keys_broken.set_function(lambda: keyring.is_broken)
        self.turns = Turns(settings, self.metrics)
        self.records = Records(engine, settings, self.metrics, self.turns, self.drift)
        self.load = Load(engine, settings, self.metrics)
        self.recent = Recent()
        self._models: dict[str, Model] = {}
        self._served: list[str] = []  # models, as of the latest look at the upstream

    def _hear_of_upstream(self, event: str) -> None:
        self.metrics.upstream_events.labels(event).inc()
        self.drift.fail()

    async def models(self) -> dict[str, Model]:
        """The upstream's models by name, asked anew. Raises UpstreamError."""
        self._models = {model.id: model for model in await self.engine.models()}
        return self._models

    async def find_model(self, name: str | None) -> tuple[Model, float | None]:
        """The model `name` means, and the β its alias sets. Raises NotFound, BadRequest or UpstreamError."""
        name = name or self.settings.model
        known = self._models or await self.models()
        if name is None:
            if not known:
                raise errors.UpstreamNonsense(f"{self.engine.shown} serves no model")
            return next(iter(known.values())), None
        if name in known or name in await self.models():
            return self._models[name], None
        plain = name.rpartition("@")[0]
        _, beta = dial.split_alias(name) if plain in self._models else (name, None)
        if beta is not None:
            return self._models[plain], beta
        hint = f"; β is set by a number, as in {plain}@0.5" if plain in self._models else ""
        message = f"there is no model {name!r}; there are {', '.join(self._models)}{hint}"
        raise NotFound(message, param="model", code="model_not_found")

    # Text

    async def complete_chat(self, request: Request) -> Response:
        """A chat completion: by a controller where it can be, else by the upstream alone."""
        return await self._complete(wire.CHAT, request)

    async def complete_text(self, request: Request) -> Response:
        """The same of a text that is gone on with."""
        return await self._complete(wire.TEXT, request)

    async def respond(self, request: Request) -> Response:
        """The same as a Response."""
        return await self._complete(wire.RESPONSES, request)

    async def _complete(self, form: wire.Form, request: Request) -> Response:
        raw = await self.bodies.read(request)
        parsed = schema.parse(form.made, raw)
        caller: Caller = request.state.caller
        is_recording = is_admin_only(parsed.tts.controller or "")
        if is_recording:
            self.callers.require_admin(caller, f"controller {parsed.tts.controller}")
        model, alias = await self.find_model(parsed.model)
        turned = dial.resolve(
            request.headers.getlist(dial.HEADER),
            body=parsed.tts.beta,
            effort=parsed.effort,
            alias=alias,
            model=model.id,
            default=self._default(model.id),
            target=None if parsed.tts.target_tokens is None else partial(self._aim, model.id, parsed.tts),
        )
        unserved = _why_not(parsed, turned)
        if turned is None or unserved is not None:
            why = NO_BETA if turned is None or unserved is None else unserved
            return await self._pass(request, parsed, raw, model, turned, why)
        if parsed.tts.controller is None and self._is_single(turned, parsed, model):
            parsed = parsed.served_by("single")
        if not (parsed.tts.required or is_recording):
            turned = turned.scaled(await self.load.factor())
        name = f"{form.prefix}{uuid4().hex}"
        parts = parsed.each()
        if len(parts) > 1:
            return await self._complete_each(request, parts, model, turned, name)
        turn = self.turns.episode(request, parsed.tts.max_total_tokens)
        planning = self._planning(request, parsed, model, turned, turn, name)
        named = request.scope["path"], model.id, request.state.held
        try:
            with self._seeing_off(model.id):
                plan = await unless_gone(request.receive, self.spans.plan(*named, planning))
        except BadRequest as error:
            if error.code != run.CONTEXT_EXCEEDED or not parsed.truncates:
                raise
            turn.leave()
            why = schema.PassThroughReason("truncation", "truncation")
            return await self._pass(request, parsed, raw, model, turned, why)
        self.recent.name_by_client(caller.tenant, logs.client_request_id.get(), plan.request_id)
        if not parsed.stream:
            served = await unless_gone(request.receive, self._serve(turn, plan))
            return JSONResponse(form.whole(parsed, served), headers=reply.reply_headers(served.plan, served.tts))
        news: asyncio.Queue[str] = asyncio.Queue()
        tell = news.put_nowait if parsed.tts.progress else None
        thoughts = thinking(lambda: self._serve(turn, plan, tell), news, self.settings.ping_s)
        events = form.events(parsed, plan, thoughts)
        return Stream.of(events, reply.early_headers(plan))

    def _planning(
        self,
        request: Request,
        parsed: schema.GenerationRequest,
        model: Model,
        turned: EffectiveBeta,
        turn: Turn,
        name: str,
    ) -> Coroutine[Any, Any, Plan]:
        caller: Caller = request.state.caller
        is_kept = self.records.recorder.is_on or is_admin_only(parsed.tts.controller or "")
        return run.plan(
            self.engine,
            self.casting,
            self.turns.settings_for(request, turn),
            model,
            parsed,
            turned,
            tenant=caller.tenant,
            drift=self.drift if is_kept else None,
            salt=caller.salt or parsed.cache_salt,
            request_id=name,
            cap_source=turn.cap_source,
        )

    async def _complete_each(
        self,
        request: Request,
        parts: Sequence[schema.GenerationRequest],
        model: Model,
        turned: EffectiveBeta,
        name: str,
    ) -> Response:
        """Serve each prompt of a request by an episode of its own, and answer with one reply."""
        parsed, path = parts[0], request.scope["path"]
        turns = self.turns.episodes_of(request, parsed.tts.max_total_tokens, len(parts))
        news: asyncio.Queue[wire.Part] = asyncio.Queue()

        def planning(index: int) -> Coroutine[Any, Any, Plan]:
            return self._planning(request, parts[index], model, turned, turns[index], f"{name}-{index}")

        async def plan_all() -> list[Plan]:
            plans = [await self.spans.plan(path, model.id, request.state.held, planning(0))]
            for start in range(1, len(parts), BEGUN_TOGETHER):
                indices = range(start, min(start + BEGUN_TOGETHER, len(parts)))
                plans += await together([planning(index) for index in indices], lambda _: 0)
            return plans

        async def serve(index: int) -> Reply:
            for _ in range(index // BEGUN_TOGETHER):
                await asyncio.sleep(0)  # let other requests run before the next prompts begin
            logs.request_id.set(plans[index].request_id)
            tell = partial(_tell_part, news, index) if parsed.tts.progress else None
            served = await self._episode(turns[index], plans[index], tell)
            news.put_nowait(wire.Part(index, served))
            return served

        async def serve_all() -> Batch:
            work = [serve(index) for index in range(len(plans))]
            return Batch(name, await together(work, lambda served: sum(served.tokens.values())))

        with self._seeing_off(model.id):
            plans = await unless_gone(request.receive, plan_all())
        logs.request_id.set(name)
        tenant, first = request.state.caller.tenant, plans[0].request_id  # both names lead to the first prompt
        self.recent.name(tenant, name, first)
        self.recent.name_by_client(tenant, logs.client_request_id.get(), first)
        if not parsed.stream:
            batch = await unless_gone(request.receive, self.spans.episode(plans[0], serve_all()))
            return JSONResponse(wire.text_batch(batch), headers=batch.headers)
        thoughts = thinking(lambda: self.spans.episode(plans[0], serve_all()), news, self.settings.ping_s)
        events = wire.text_batch_events(parsed, name, plans, thoughts)
        return Stream.of(events, {**reply.early_headers(plans[0]), "x-request-id": name})

    def _is_single(self, turned: EffectiveBeta, parsed: schema.GenerationRequest, model: Model) -> bool:
        """Whether one branch serves: no thought is wanted, or the operator's β does not pay for this model."""
        if turned.source is BetaSource.EFFORT and parsed.effort == dial.NO_EFFORT:
            return True
        return not turned.is_from_client and self._map(model.id).arm is Arm.SINGLE

    def _map(self, model: str) -> BetaMap:
        """How the dial is best used on a model, as far as anybody has measured the controller that serves."""
        first = self.calibrations.get(model)
        found = None if first is None else first.of_digest(self.casting.stages.now.champion.digest)
        return FULL_RANGE if found is None else found.map

    def _default(self, model: str) -> float | None:
        """β of requests that set none: the operator's, but no more than is worth what it costs."""
        beta = self.settings.beta
        return None if beta is None else min(beta, self._map(model).cap)

    def _aim(self, model: str, asked: schema.TtsOptions) -> float:
        """The β that spends `asked.target_tokens` on average. Raises BadRequest if nobody has measured it."""
        first = self.calibrations.get(model)
        champion = self.casting.stages.now.champion
        named = asked.controller
        if first is None:
            reason = f"there is no calibration for model {model!r}"
        elif found := first.of_digest(champion.digest) if named is None else first.of_name(named):
            return found.beta_for(asked.target_tokens or 0)
        else:
            known = ", ".join(one.controller for one in first.all)
            other = f"and {champion.name} serves" if named is None else f"not {named}"
            reason = f"model {model!r} was calibrated for {known}, {other}"
        raise BadRequest(f"{reason}; set tts.beta instead", param="tts.target_tokens", code="no_calibration")

    async def _serve(self, turn: Turn, plan: Plan, tell: Callable[[str], None] | None = None) -> Reply:
        return await self.spans.episode(plan, self._episode(turn, plan, tell))

    async def _episode(self, turn: Turn, plan: Plan, tell: Callable[[str], None] | None) -> Reply:
        known = self.engine, self.grading, self.casting, self.metrics, self.records
        async with AsyncExitStack() as stack:
            with self._seeing_off(plan.prompt.model):
                async with run.fail_after(plan.remaining_s):
                    await stack.enter_async_context(turn)
            return await run.serve(*known, plan, tell, turn.settle)

    @contextmanager
    def _seeing_off(self, model: str) -> Iterator[None]:
        """Count a client that leaves before anything was begun that is counted."""
        try:
            yield
        except (ClientGone, asyncio.CancelledError):
            if not graceful_shutdown.is_cut():
                self.metrics.requests.labels(model, "", "disconnected").inc()
            raise

    async def _pass(
        self,
        request: Request,
        parsed: schema.GenerationRequest,
        raw: bytes,
        model: Model,
        turned: EffectiveBeta | None,
        unserved: schema.PassThroughReason,
    ) -> Response:
        self.unapplied.take(model.id, parsed.tts, turned, unserved)
        is_named = parsed.model is not None or self.settings.model is not None
        bound = self.turns.bound(request, parsed, model)
        put = {**bound.put, **({"model": model.id} if is_named and parsed.model != model.id else {})}
        drop = list(field_table.fields_to_drop(parsed.model_extra or {}, is_admin=request.state.caller.is_admin))
        if "tts" in parsed.model_fields_set:
            drop.append("tts")
        body = splice(raw, drop=drop, put=put)
        content_type = None if "json" in request.headers.get("content-type", "") else "application/json"
        about = _untouched(unserved.reason), model.id, content_type, bound
        response = await self._forward(request, body, *about, is_stream=bool(parsed.stream))
        if "tts" in parsed.model_fields_set:
            mark(response, told(turned, unserved))
        self._remember(request, response, model.id, unserved.reason)
        return response

    def _remember(self, request: Request, response: Response, model: str, reason: str) -> None:
        """Keep what was handed on findable, by all its ids."""
        tenant, own, named = request.state.caller.tenant, _request_id(), logs.client_request_id.get()
        created = datetime.now(UTC).isoformat(timespec="milliseconds")
        about = request.scope["path"], model, reason, response.status_code, named or None
        self.recent.add(Passed(own, tenant, created, *about))
        self.recent.name_by_client(tenant, named, own)
        if isinstance(response, Stream):
            response.pour = self.recent.seeing(response.pour, tenant, own)
        else:
            self.recent.see(tenant, own, bytes(response.body))

    # What happened

    async def explain(self, request: Request) -> Response:
        """Why a request ended as it did. Raises NotFound, for requests of others too, RecordsAway or ApiError."""
        caller: Caller = request.state.caller
        named = request.path_params["request_id"]
        found = self.recent.resolve(caller.tenant, named, is_admin=caller.is_admin)
        passed = self.recent.find(found)
        if passed is not None and caller.may_see(passed.tenant):
            return JSONResponse(passed.as_json(self.recent.upstream_id(found)))
        episode = await self.records.find(caller, found)
        try:
            return await asyncio.to_thread(_explained, episode)
        except TraceError as error:
            raise ApiError(f"what is kept of this request cannot be read: {error}", code="unreadable_record") from None

    async def hear(self, request: Request) -> Response:
        """Take what a client says of an answer. Raises BadRequest, NotFound, TooMany or RecordsAway."""
        said = schema.parse_feedback_request(await self.bodies.read(request))
        caller: Caller = request.state.caller
        own = self.recent.resolve(caller.tenant, said.request, is_admin=caller.is_admin)
        said = said.model_copy(update={"request": own})
        heard = await self.records.hear(caller, said)
        if heard.is_first and heard.content is not None and heard.owner.stage is not None:
            self.casting.heard(Stage(heard.owner.stage), heard.owner.digest, heard.content)
        told = {"id": heard.id, "object": "tts.feedback", "request_id": said.request}
        status = HTTPStatus.OK if heard.is_on_disk else HTTPStatus.ACCEPTED
        return JSONResponse({**told, "status": "recorded" if heard.is_on_disk else "queued"}, status)

    # The rest

    async def forward(self, request: Request) -> Response:
        """Another endpoint of the upstream's, untouched."""
        raw = await self.bodies.read(request)
        asked = strict_json.read(raw)
        field_values.check(asked)
        drop = field_table.fields_to_drop(asked, is_admin=request.state.caller.is_admin)
        name, put = asked.get("model"), dict[str, str]()
        if isinstance(name, str) and "@" in name:
            put = {"model": (await self.find_model(name))[0].id}
        return await self._forward(request, splice(raw, drop=drop, put=put), _untouched("endpoint"))

    async def look(self, request: Request) -> Response:
        """Read something of the upstream's, untouched."""
        return await self._forward(request, b"", _untouched("endpoint"))

    async def _forward(
        self,
        request: Request,
        body: bytes,
        headers: Mapping[str, str],
        model: str = "",
        content_type: str | None = None,
        bound: Bound | None = None,
        *,
        is_stream: bool = False,
    ) -> Response:
        turn = self.turns.passing(request, model, bound)
        body = request.state.caller.salted(body)

        async def work() -> Response:
            await turn.__aenter__()
            whole = self.engine, request, body, headers, content_type
            asked = passthrough.forward(*whole, is_stream=is_stream, in_pieces=bool(turn.cap))
            return await turn.metered(asked)

        with self._seeing_off(model):
            response = await unless_gone(request.receive, work())
        is_failure = response.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR
        self.metrics.requests.labels(model, "", "failed" if is_failure else "passed_through").inc()
        return response

    async def list_models(self, request: Request) -> Response:
        """The upstream's models, as it lists them, and after them their aliases."""
        if not self.settings.model_aliases:
            return await passthrough.forward(self.engine, request, b"", _untouched("endpoint"))
        cards = await self.engine.cards()
        aliases = [dial.alias(card, beta) for card in cards for beta in ALIAS_BETAS]
        return JSONResponse({"object": "list", "data": [*cards, *aliases]}, headers=_untouched("endpoint"))

    async def retrieve_model(self, request: Request) -> Response:
        """One model, or an alias of one with any β. Raises NotFound, BadRequest or UpstreamError."""
        name = request.path_params["model"]
        model, beta = await self.find_model(name)
        card = next((card for card in await self.engine.cards() if card["id"] == model.id), None)
        if card is None:
            raise NotFound(f"there is no model {name!r} any more", param="model", code="model_not_found")
        told = card if beta is None else {**dial.alias(card, beta), "id": name}
        return JSONResponse(told, headers=_untouched("endpoint"))

    async def curve(self, request: Request) -> Response:
        """What β costs and brings on a model, as it was calibrated. Raises NotFound."""
        model, _ = await self.find_model(request.query_params.get("model"))
        first = self.calibrations.get(model.id)
        if first is None:
            raise NotFound(f"there is no calibration for model {model.id!r}", param="model", code="no_calibration")
        name = request.query_params.get("controller")
        found = first if name is None else first.of_name(name)
        if found is None:
            known = ", ".join(one.controller for one in first.all)
            message = f"model {model.id!r} was calibrated for {known}, not {name!r}"
            raise NotFound(message, param="controller", code="no_calibration")
        return JSONResponse({"model": model.id, **found.as_json()})

    async def tell_keys(self, _: Request) -> Response:
        """What each key may use, and uses now."""
        ring = self.callers.keyring
        return JSONResponse(self.turns.as_json({key.name: key.caps for key in ring.keys} if ring else {}))

    async def health(self, _: Request) -> Response:
        """The process is alive."""
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """Return whether the upstream serves a model. Callers with a key, where there are keys, also learn the details.

        The upstream is asked once a second at most, however often this is called.
        """
        up = await self.pulse.is_ready() and self.engine.breaker.is_closed
        told: dict[str, object] = {"ready": up}
        if self.callers.knows(request):
            sandbox = {"level": self.casting.level, "lacking": self.casting.lacking}
            told |= {"upstream": self.engine.shown, "models": self._served, "sandbox": sandbox}
            told["recorder"] = self.records.recorder.as_json()
        return JSONResponse(told, HTTPStatus.OK if up else HTTPStatus.SERVICE_UNAVAILABLE)

    async def _is_ready(self) -> bool:
        """Return whether the upstream is well and serves a model, by asking it."""
        try:
            is_well = await self.engine.healthy()
            self._served = [model.id for model in await self.engine.models(is_check=True)] if is_well else []
        except UpstreamError:
            self._served = []
        return bool(self._served)

    async def document(self, _: Request) -> Response:
        """What there is to be asked, as OpenAPI tells it."""
        return JSONResponse(openapi.document())

    async def page(self, _: Request) -> Response:
        """Prometheus' page."""
        return Response(self.metrics.page(), media_type=CONTENT_TYPE)


Endpoint = Callable[[Request], Awaitable[Response]]


class Route(NamedTuple):
    """A path, the method of Service that answers it, and who may call it."""

    path: str
    method: str
    name: str
    access: Access


ROUTES: Final = (
    Route("/v1/chat/completions", "POST", "complete_chat", Access.CLIENT),
    Route("/v1/completions", "POST", "complete_text", Access.CLIENT),
    Route("/v1/responses", "POST", "respond", Access.CLIENT),
    Route("/v1/models", "GET", "list_models", Access.CLIENT),
    Route("/v1/models/{model:path}", "GET", "retrieve_model", Access.CLIENT),
    Route("/v1/tts/curve", "GET", "curve", Access.CLIENT),
    Route("/v1/tts/feedback", "POST", "hear", Access.CLIENT),
    Route("/v1/tts/keys", "GET", "tell_keys", Access.ADMIN),
    Route("/v1/tts/requests/{request_id:path}", "GET", "explain", Access.CLIENT),
    Route("/openapi.json", "GET", "document", Access.CLIENT),
    Route("/health", "GET", "health", Access.ANYONE),
    Route("/ready", "GET", "ready", Access.ANYONE),
    Route("/metrics", "GET", "page", Access.CLIENT),
    *(Route(path, "POST", "forward", Access.CLIENT) for path in passthrough.PATHS),
    *(Route(path, "GET", "look", Access.CLIENT) for path in passthrough.LOOKS),
)
"""All that can be reached. A test holds the app to it, and tries each with no key, a client's and an admin's."""


def create_app(settings: Settings) -> FastAPI:
    """The proxy over `settings.upstream`, which must be set."""
    if settings.upstream is None:
        raise errors.SettingsError("upstream: the app needs one; `autotts serve` starts the embedded model itself")
    calibrations, callers = _calibrations(settings), Callers(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            session = await stack.enter_async_context(upstream_session(settings))
            berths = Berths(settings.branches_in_flight)
            engine = Engine(str(settings.upstream), session, read_timeout_s=settings.read_timeout_s, berths=berths)
            stack.push_async_callback(engine.close)
            service = app.state.service = Service(settings, engine, calibrations, callers)
            stack.push_async_callback(service.spans.close)
            service.pulse.open()
            stack.push_async_callback(service.pulse.close)
            stack.push_async_callback(service.grading.close)
            await service.casting.open()
            stack.push_async_callback(service.casting.close)
            await service.records.open()
            stack.push_async_callback(service.records.close)
            stack.push_async_callback(service.load.close)
            if settings.store is not None:
                service.drift.open()
                stack.push_async_callback(service.drift.close)
            yield

    endpoints = {route: _endpoint(route) for route in ROUTES}
    app = _App(title="AutoTTS Proxy", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.settings = settings
    app.straight = {(route.method, route.path): endpoints[route] for route in ROUTES}
    for route, endpoint in endpoints.items():
        app.add_route(route.path, endpoint, methods=[route.method])
    app.add_exception_handler(ApiError, _tell)
    app.add_exception_handler(HTTPException, _tell_http)
    app.add_exception_handler(ClientGone, _tell_nobody)
    app.add_exception_handler(Exception, _tell_unforeseen)
    return app


class _App(FastAPI):
    """Has what is the same for all requests around all else: outside of what the framework has there."""

    straight: Mapping[tuple[str, str], Endpoint]  # by method and path
    settings: Settings

    def build_middleware_stack(self) -> ASGIApp:
        straight = Straight(super().build_middleware_stack(), self.straight)
        return Timing(with_cors(straight, self.settings), [path for _, path in self.straight])


class Straight:
    """An ASGI app around another: a request whose method and path are an endpoint's goes there straight away.

    What the framework does on the way there costs more than the whole of handing a request on.
    """

    def __init__(self, app: ASGIApp, endpoints: Mapping[tuple[str, str], Endpoint]) -> None:
        self._app = app
        self._endpoints = endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = self._endpoints.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if endpoint is None:
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive, send)
        try:
            response = await endpoint(request)
        except ApiError as error:
            response = await _tell(request, error)
        except ClientGone as error:
            response = await _tell_nobody(request, error)
        except Exception as error:
            response = await _tell_unforeseen(request, error)
            await response(scope, receive, send)
            raise
        await response(scope, receive, send)


def _endpoint(route: Route) -> Endpoint:
    async def endpoint(request: Request) -> Response:
        service = request.app.state.service
        if route.access is not Access.ANYONE:
            service.guard.check(route.method, request.scope["headers"])
        request.state.caller = service.callers.admit(request, route.access)
        held = request.state.held = ExitStack()  # what is let go when the response is out, or there is none
        try:
            response: Response = await getattr(service, route.name)(request)
        except BaseException:
            held.close()
            raise
        return Held(response, held)

    return endpoint


def _calibrations(settings: Settings) -> Calibrations:
    """What the operator's file says of β. Raises SettingsError."""
    try:
        return {} if settings.calibration is None else calibration.read_calibrations(settings.calibration)
    except DiscoveryError as error:
        raise errors.SettingsError(f"calibration: {error}") from None


def upstream_session(settings: Settings) -> aiohttp.ClientSession:
    """A session for requests to the upstream, with as many connections as branches need."""
    key = settings.upstream_api_key
    headers = {"accept-encoding": "identity"}  # bodies are handed on as they come
    if key is not None:
        headers["authorization"] = f"Bearer {key.get_secret_value()}"
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30),
        cookie_jar=aiohttp.DummyCookieJar(),  # what one client's request was given is not sent with another's
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=settings.connect_timeout_s),
        headers=headers,
        auto_decompress=False,
        request_class=eager_task.Request,
        json_serialize=lambda data: json.dumps(data, separators=(",", ":")),
    )


def _explained(episode: ServedEpisode) -> Response:
    """What happened in an episode. Takes time, and its answers stand in it once a round. Raises TraceError."""
    about = EpisodeDetails(**{**episode.about, "answers": [_clipped(one) for one in episode.about.get("answers", ())]})
    answer = None if episode.answer is None else _clipped(episode.answer)
    return JSONResponse(explain(replace(episode, answer=answer, about=about)))


def _clipped(answer: str) -> str:
    return answer if len(answer) <= SHOWN_CHARS else f"{answer[: SHOWN_CHARS - 1]}…"


def _tell_part(news: asyncio.Queue[wire.Part], index: int, line: str) -> None:
    news.put_nowait(wire.Part(index, line))


def _why_not(parsed: schema.GenerationRequest, turned: EffectiveBeta | None) -> schema.PassThroughReason | None:
    """Return why no controller serves a request, or None."""
    unserved = parsed.unserved()
    if unserved is None and parsed.temperature == 0 and turned is not None and not turned.is_from_client:
        return GREEDY
    return unserved


def _untouched(reason: str) -> dict[str, str]:
    """Return the headers of a response that no controller took part in."""
    return {"x-request-id": _request_id(), "x-tts-applied": "false", "x-tts-reason": reason}


def _request_id() -> str:
    return logs.request_id.get() or f"req-{uuid4().hex}"


async def _tell(request: Request, error: Exception) -> Response:
    if not isinstance(error, ApiError):
        raise error
    if outcome := _outcome(error):
        request.app.state.service.metrics.requests.labels("", "", outcome).inc()
    headers = {"x-request-id": _request_id(), **error.headers}
    if error.spent:  # a client's retry would buy every branch again
        headers |= {"x-should-retry": "false", "x-tts-tokens": str(error.spent)}
    return JSONResponse(errors.body(error), error.status, headers)


def _outcome(error: ApiError) -> str:
    """What `error` is counted as; empty where it is counted already, or elsewhere."""
    if error.is_counted or isinstance(error, TooMany | RecordsAway):
        return ""
    if isinstance(error, Unauthorised | Forbidden):
        return "denied"
    return "failed" if error.status >= HTTPStatus.INTERNAL_SERVER_ERROR else "refused"


async def _tell_http(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    message = f"{request.method} {request.url.path}: {error.detail}"
    if error.status_code == HTTPStatus.NOT_FOUND and (instead := passthrough.UNSERVED.get(request.url.path)):
        message = f"{request.method} {request.url.path} is not served: {instead}"
    elif error.status_code == HTTPStatus.NOT_FOUND and (meant := _meant(request.url.path)):
        message = f"{message}; did you mean {meant}? A client's base URL ends in /v1"
    told = NotFound(message, code="not_found") if error.status_code == HTTPStatus.NOT_FOUND else BadRequest(message)
    return JSONResponse(errors.body(told), error.status_code, {**(error.headers or {}), "x-request-id": _request_id()})


def _meant(path: str) -> str | None:
    """Return the path of an endpoint that a client asks for under a wrong base URL: without /v1, with it twice, or
    with the path of another server before it (`/openai/deployments/NAME/chat/completions`)."""
    with_version = f"/v1/{path.strip('/')}"
    while with_version.startswith("/v1/v1/"):
        with_version = with_version.removeprefix("/v1")
    if with_version.startswith("/v1/models/") and with_version != path:
        return with_version
    served = [route.path for route in ROUTES if route.path.startswith("/v1/")]
    ends = [known for known in served if with_version.endswith(known.removeprefix("/v1"))]
    meant = max(ends, key=len, default=path)
    return None if meant == path else meant


async def _tell_nobody(_: Request, __: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _tell_unforeseen(request: Request, _: Exception) -> Response:
    """A fault of ours. The traceback goes to the log, never to the client."""
    told = ApiError("the proxy failed; its log tells more", code="internal_error")
    return JSONResponse(errors.body(told), told.status, {"x-request-id": _request_id()})
