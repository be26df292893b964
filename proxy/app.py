"""The HTTP server: routes, and what a client is told when something goes wrong."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from http import HTTPStatus
from typing import Any
from uuid import uuid4

import aiohttp
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from controllers.installed import Stage
from controllers.registry import is_admin_only
from discovery import calibration
from discovery.answers import Judge
from discovery.calibration import WHOLE, Arm, Calibrations, Map
from discovery.errors import DiscoveryError
from discovery.explain import explain
from proxy import chat, dial, errors, passthrough, reply, schema
from proxy.callers import identify, require_admin
from proxy.casting import Casting
from proxy.drift import Drift
from proxy.engine import Engine, Model
from proxy.errors import ApiError, BadRequest, NotFound, TooLarge, UpstreamError
from proxy.metrics import CONTENT_TYPE, Metrics
from proxy.records import Records
from proxy.settings import Settings
from proxy.stream import ClientGone, Stream, chat_events, unless_gone

logger = logging.getLogger(__name__)

CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that left; nobody reads it but the access log."""


class Service:
    """What the routes share: one upstream, its settings and metrics, and what β costs there."""

    def __init__(self, settings: Settings, engine: Engine, calibrations: Calibrations) -> None:
        self.settings = settings
        self.engine = engine
        self.calibrations = calibrations
        self.metrics = Metrics()
        self.judge = Judge()
        self.casting = Casting(settings, self.metrics)
        self.records = Records(engine, settings, self.metrics)
        self.drift = Drift(engine, settings, self.metrics)
        self._models: dict[str, Model] = {}

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
                raise errors.UpstreamNonsense(f"{self.engine.url} serves no model")
            return next(iter(known.values())), None
        if name in known or name in await self.models():
            return self._models[name], None
        plain, beta = dial.split_alias(name) if "@" in name else (name, None)
        if plain in self._models:
            return self._models[plain], beta
        raise NotFound(
            f"there is no model {name!r}; there are {', '.join(self._models)}", param="model", code="model_not_found"
        )

    # Chat

    async def complete_chat(self, request: Request) -> Response:
        """A chat completion: by a controller where it can be, else by the upstream alone."""
        parsed, body = schema.parse(await _read(request, self.settings.max_body_bytes))
        caller = identify(self.settings, request)
        if is_admin_only(parsed.tts.controller or ""):
            require_admin(self.settings, caller, f"controller {parsed.tts.controller}")
        model, alias = await self.find_model(parsed.model)
        turned = dial.resolve(
            request.headers.getlist(dial.HEADER),
            body=parsed.tts.beta,
            effort=parsed.reasoning_effort,
            alias=alias,
            model=model.id,
            default=self._default(model.id),
            target=None if parsed.tts.target_tokens is None else partial(self._aim, model.id, parsed.tts),
        )
        reason = _why_not(parsed, turned)
        if turned is None or reason is not None:
            return await self._pass(request, parsed, body, model, reason or "no_beta")
        if not turned.explicit and parsed.tts.controller is None and self._map(model.id).arm is Arm.SINGLE:
            parsed = parsed.served_by("single")
        is_recorded = self.records.recorder.is_on or is_admin_only(parsed.tts.controller or "")
        chat_template = await self.drift.template(model.id) if is_recorded else ""
        known = {"tenant": caller.tenant, "chat_template": chat_template}
        plan = await chat.plan(self.engine, self.casting, self.settings, model, parsed, turned, **known)
        if not parsed.stream:
            served = await unless_gone(request.receive, self._serve(plan))
            return JSONResponse(_completion(served), headers=served.headers)
        head = {
            "id": plan.request_id,
            "object": "chat.completion.chunk",
            "created": plan.created,
            "model": plan.prompt.model,
        }
        events = chat_events(
            head,
            lambda: self._serve(plan),
            usage=parsed.wants_usage,
            ping_s=self.settings.ping_s,
        )
        return Stream(events, headers=reply.known_headers(plan))

    def _map(self, model: str) -> Map:
        """How the dial is best used on a model, as far as anybody has measured the controller that serves."""
        found = self.calibrations.get(model)
        if found is None or found.digest != self.casting.stages.now.champion.digest:
            return WHOLE
        return found.map

    def _default(self, model: str) -> float | None:
        """β of requests that set none: the operator's, but no more than is worth what it costs."""
        beta = self.settings.beta
        return None if beta is None else min(beta, self._map(model).cap)

    def _aim(self, model: str, asked: schema.TtsOptions) -> float:
        """The β that spends `asked.target_tokens` on average. Raises BadRequest if nobody has measured it."""
        found = self.calibrations.get(model)
        champion = self.casting.stages.now.champion
        if found is None:
            reason = f"there is no calibration for model {model!r}"
        elif asked.controller is None and champion.digest != found.digest:
            reason = f"model {model!r} was calibrated for {found.controller}, and {champion.name} serves"
        elif asked.controller not in (None, found.controller):
            reason = f"model {model!r} was calibrated for {found.controller}, not {asked.controller}"
        else:
            return found.beta_for(asked.target_tokens or 0)
        raise BadRequest(f"{reason}; set tts.beta instead", param="tts.target_tokens", code="no_calibration")

    def _serve(self, plan: chat.Plan) -> Coroutine[Any, Any, reply.Reply]:
        return chat.serve(self.engine, self.judge, self.casting, self.metrics, self.records, plan)

    async def _pass(
        self, request: Request, parsed: schema.ChatRequest, body: dict[str, Any], model: Model, reason: str
    ) -> Response:
        if parsed.tts.required:
            raise BadRequest(
                f"a controller cannot serve this request ({reason}) and tts.required is set",
                param=None if reason == "no_beta" else reason,
                code="tts_not_applicable",
            )
        body.pop("tts", None)
        body["model"] = model.id
        content = json.dumps(body).encode()
        return await self._forward(request, content, _untouched(reason), model.id, "application/json")

    # What happened

    async def explain(self, request: Request) -> Response:
        """Why a request ended as it did. Raises NotFound, for requests of others too, or RecordsAway."""
        caller = identify(self.settings, request)
        return JSONResponse(explain(await self.records.find(caller, request.path_params["request_id"])))

    async def hear(self, request: Request) -> Response:
        """What a client says of an answer. Raises BadRequest, NotFound, for requests of others too, or RecordsAway."""
        said = schema.parse_feedback(await _read(request, self.settings.max_body_bytes))
        heard = await self.records.hear(identify(self.settings, request), said)
        if heard.is_first and heard.content is not None and heard.owner.stage is not None:
            self.casting.heard(Stage(heard.owner.stage), heard.owner.digest, heard.content)
        told = {"id": heard.id, "object": "tts.feedback", "request_id": said.request}
        status = HTTPStatus.OK if heard.is_on_disk else HTTPStatus.ACCEPTED
        return JSONResponse({**told, "status": "recorded" if heard.is_on_disk else "queued"}, status)

    # The rest

    async def forward(self, request: Request) -> Response:
        """Another endpoint of the upstream's, untouched."""
        body = await _read(request, self.settings.max_body_bytes)
        return await self._forward(request, body, _untouched("endpoint"))

    async def _forward(
        self,
        request: Request,
        body: bytes,
        headers: Mapping[str, str],
        model: str = "",
        content_type: str | None = None,
    ) -> Response:
        self.metrics.requests.labels(model, "", "passed_through").inc()
        work = passthrough.forward(self.engine, request, body, headers, content_type)
        return await unless_gone(request.receive, work)

    async def list_models(self, request: Request) -> Response:
        """The upstream's models, as it lists them."""
        return await passthrough.forward(self.engine, request, b"", _untouched("endpoint"))

    async def curve(self, request: Request) -> Response:
        """What β costs and brings on a model, as it was calibrated. Raises NotFound."""
        model, _ = await self.find_model(request.query_params.get("model"))
        found = self.calibrations.get(model.id)
        if found is None:
            raise NotFound(f"there is no calibration for model {model.id!r}", param="model", code="no_calibration")
        return JSONResponse({"model": model.id, **found.as_json()})

    async def health(self, _: Request) -> Response:
        """The process is alive."""
        return JSONResponse({"status": "ok"})

    async def ready(self, _: Request) -> Response:
        """The upstream is well and serves a model; and how controllers from files are held."""
        try:
            up = await self.engine.healthy() and bool(await self.models())
        except UpstreamError:
            up = False
        self.metrics.upstream_up.set(up)
        status = HTTPStatus.OK if up else HTTPStatus.SERVICE_UNAVAILABLE
        sandbox = {"level": self.casting.level, "lacking": self.casting.lacking}
        told = {"ready": up, "upstream": self.engine.url, "models": list(self._models), "sandbox": sandbox}
        told["recorder"] = self.records.recorder.as_json()
        return JSONResponse(told, status)

    async def page(self, _: Request) -> Response:
        """Prometheus' page."""
        return Response(self.metrics.page(), media_type=CONTENT_TYPE)


def create_app(settings: Settings) -> FastAPI:
    """The proxy over `settings.upstream`, which must be set."""
    if settings.upstream is None:
        raise errors.SettingsError("upstream: the app needs one; `autotts serve` starts the embedded model itself")
    calibrations = _calibrations(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            session = await stack.enter_async_context(_session(settings))
            engine = Engine(str(settings.upstream), session, read_timeout_s=settings.read_timeout_s)
            service = app.state.service = Service(settings, engine, calibrations)
            stack.callback(service.judge.close)
            await service.casting.open()
            stack.push_async_callback(service.casting.close)
            await service.records.open()
            stack.push_async_callback(service.records.close)
            if settings.store is not None:
                service.drift.open()
                stack.push_async_callback(service.drift.close)
            yield

    app = FastAPI(title="AutoTTS Proxy", lifespan=lifespan, docs_url=None, redoc_url=None)
    routes = [
        ("/v1/chat/completions", "POST", "complete_chat"),
        ("/v1/models", "GET", "list_models"),
        ("/v1/tts/curve", "GET", "curve"),
        ("/v1/tts/feedback", "POST", "hear"),
        ("/v1/tts/requests/{request_id}", "GET", "explain"),
        ("/health", "GET", "health"),
        ("/ready", "GET", "ready"),
        ("/metrics", "GET", "page"),
        *((path, "POST", "forward") for path in passthrough.PATHS),
    ]
    for path, method, name in routes:
        app.add_route(path, _endpoint(name), methods=[method])
    app.add_exception_handler(ApiError, _tell)
    app.add_exception_handler(HTTPException, _tell_http)
    app.add_exception_handler(ClientGone, _tell_nobody)
    app.add_exception_handler(Exception, _tell_unforeseen)
    return app


def _endpoint(name: str) -> Any:
    async def endpoint(request: Request) -> Response:
        response: Response = await getattr(request.app.state.service, name)(request)
        return response

    return endpoint


def _calibrations(settings: Settings) -> Calibrations:
    """What the operator's file says of β. Raises SettingsError."""
    try:
        return {} if settings.calibration is None else calibration.read(settings.calibration)
    except DiscoveryError as error:
        raise errors.SettingsError(f"calibration: {error}") from None


def _session(settings: Settings) -> aiohttp.ClientSession:
    """Connections to the upstream: as many as branches need, not the library's 100."""
    key = settings.upstream_api_key
    headers = {"accept-encoding": "identity"}  # bodies are handed on as they come
    if key is not None:
        headers["authorization"] = f"Bearer {key.get_secret_value()}"
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=settings.connect_timeout_s),
        headers=headers,
        auto_decompress=False,
        json_serialize=lambda data: json.dumps(data, separators=(",", ":")),
    )


async def _read(request: Request, most: int) -> bytes:
    """The request's body. Raises TooLarge."""
    body = bytearray()
    async for data in request.stream():
        body += data
        if len(body) > most:
            raise TooLarge(f"the body is larger than {most} bytes", code="body_too_large")
    return bytes(body)


def _why_not(parsed: schema.ChatRequest, turned: dial.Dial | None) -> str | None:
    """Why no controller serves a request, or None."""
    reason = schema.unserved(parsed)
    if reason is None and parsed.temperature == 0 and turned is not None and not turned.explicit:
        return "temperature"
    return reason


def _completion(served: reply.Reply) -> dict[str, Any]:
    message = served.message
    content = {"role": "assistant", "content": message.content, "refusal": None}
    if message.reasoning:
        content |= {"reasoning": message.reasoning, "reasoning_content": message.reasoning}
    return {
        "id": served.plan.request_id,
        "object": "chat.completion",
        "created": served.plan.created,
        "model": served.plan.prompt.model,
        "choices": [{"index": 0, "message": content, "logprobs": None, "finish_reason": message.finish_reason}],
        "usage": served.usage,
        "tts": served.tts,
    }


def _untouched(reason: str) -> dict[str, str]:
    """The headers of a response no controller had a part in."""
    return {"x-request-id": _request_id(), "x-tts-applied": "false", "x-tts-reason": reason}


def _request_id() -> str:
    return f"req-{uuid4().hex}"


async def _tell(request: Request, error: Exception) -> Response:
    if not isinstance(error, ApiError):
        raise error
    if isinstance(error, BadRequest | NotFound):
        request.app.state.service.metrics.requests.labels("", "", "refused").inc()
    headers = {"x-request-id": _request_id()}
    if error.spent:  # a client's retry would buy every branch again
        headers |= {"x-should-retry": "false", "x-tts-tokens": str(error.spent)}
    return JSONResponse(errors.body(error), error.status, headers)


async def _tell_http(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    message = f"{request.method} {request.url.path}: {error.detail}"
    told = NotFound(message, code="not_found") if error.status_code == HTTPStatus.NOT_FOUND else BadRequest(message)
    return JSONResponse(errors.body(told), error.status_code, {**(error.headers or {}), "x-request-id": _request_id()})


async def _tell_nobody(_: Request, __: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _tell_unforeseen(request: Request, _: Exception) -> Response:
    """A fault of ours. The traceback goes to the log, never to the client."""
    told = ApiError("the proxy failed; its log tells more", code="internal_error")
    return JSONResponse(errors.body(told), told.status, {"x-request-id": _request_id()})
