"""ASGI app: wiring, lifespan and dispatch. The endpoints are in `proxy/api`."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import aiohttp
from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from discovery.errors import DiscoveryError
from discovery.evaluation import calibration
from discovery.evaluation.calibration import Calibrations
from proxy.admission.auth import Access, Authenticator
from proxy.api.error_responses import ErrorResponses
from proxy.api.openapi import package_version
from proxy.api.routes import ROUTES, Endpoint, Endpoints, Route
from proxy.api.service import Service
from proxy.errors import ApiError, SettingsError
from proxy.gateway_headers import keep_gateway_headers
from proxy.http.access_log import AccessLogMiddleware
from proxy.http.leases import with_leases
from proxy.http.origins import with_cors
from proxy.http.request import IndexedRequest, PlainState
from proxy.http.sse import ClientDisconnected
from proxy.settings import Settings
from proxy.telemetry.worker_metrics import WorkerPlace
from proxy.ui.app import UiMount, create_ui
from proxy.ui.sources.jobs import CommandJobs, ReplaySlots
from proxy.upstream.connections.pooled_request import KEEP_ALIVE_S


def create_app(settings: Settings, place: WorkerPlace | None = None) -> FastAPI:
    """Return the proxy over `settings.upstream`, which must be set. Raises SettingsError.

    `place` is that of this process among several workers.
    """
    if settings.upstream is None:
        raise SettingsError("upstream: the app needs one; `autotts serve` starts the embedded model itself")
    calibrations, authenticator = _calibrations(settings), Authenticator(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            session = await stack.enter_async_context(upstream_session(settings))
            service = app.state.service = Service(settings, session, calibrations, authenticator, place)
            app.state.endpoints = Endpoints(service)
            app.state.ui_jobs, app.state.ui_replay_slots = CommandJobs(), ReplaySlots()
            stack.push_async_callback(app.state.ui_jobs.close)
            stack.push_async_callback(service.engine.close)
            stack.push_async_callback(service.tracer.close)
            await service.limits.open()
            stack.push_async_callback(service.limits.close)
            await service.worker_metrics.open()
            stack.push_async_callback(service.worker_metrics.close)
            service.health_monitor.open()
            stack.push_async_callback(service.health_monitor.close)
            stack.push_async_callback(service.grading.close)
            await service.controllers.open()
            stack.push_async_callback(service.controllers.close)
            service.retirement.open()
            stack.push_async_callback(service.retirement.close)
            await service.episode_log.open()
            stack.push_async_callback(service.episode_log.close)
            stack.push_async_callback(service.load_shedding.close)
            if service.usage is not None:
                stack.push_async_callback(service.usage.close)
            if settings.store is not None:
                service.drift.open()
                stack.push_async_callback(service.drift.close)
            yield

    app = _App(
        settings,
        title="AutoTTS Proxy",
        version=package_version(),
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )
    for route in ROUTES:
        _add_route(app, route, app.endpoints[route.method, route.path])
    if settings.ui:
        app.router.routes.append(UiMount(create_ui(settings, app)))
    for failure in (ApiError, HTTPException, ClientDisconnected, Exception):
        app.add_exception_handler(failure, app.failures.respond)
    return app


class _App(FastAPI):
    """A FastAPI app with its own outermost middleware: the access log, CORS and direct dispatch."""

    def __init__(self, settings: Settings, **options: object) -> None:
        self.settings = settings
        self.endpoints = {(route.method, route.path): _endpoint(route) for route in ROUTES}
        self.failures = ErrorResponses([route.path for route in ROUTES])
        super().__init__(**options)  # type: ignore[arg-type]
        self.state = PlainState({})

    def build_middleware_stack(self) -> ASGIApp:
        dispatch = DirectDispatch(super().build_middleware_stack(), self.endpoints, self.failures)
        return AccessLogMiddleware(with_cors(dispatch, self.settings), [path for _, path in self.endpoints])


class _RawRoute(APIRoute):
    """Route that FastAPI describes in the OpenAPI document but whose requests it does not parse."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        return self.endpoint


class DirectDispatch:
    """ASGI app that wraps FastAPI's and sends requests for a known method and path to their endpoint directly.

    The framework's routing and middleware cost more than forwarding a request.
    """

    def __init__(self, app: ASGIApp, endpoints: Mapping[tuple[str, str], Endpoint], failures: ErrorResponses) -> None:
        self._app = app
        self._endpoints = endpoints
        self._failures = failures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = self._endpoints.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if endpoint is None:
            await self._app(scope, receive, send)
            return
        request = IndexedRequest(scope, receive, send)
        try:
            response = await endpoint(request)
        except (ApiError, ClientDisconnected) as error:
            response = await self._failures.respond(request, error)
        except Exception as error:
            response = await self._failures.respond(request, error)
            await response(scope, receive, send)
            raise
        await response(scope, receive, send)


def _add_route(app: FastAPI, route: Route, endpoint: Endpoint) -> None:
    """Add a route to the app, described to FastAPI by its operation."""
    operation = route.operation
    if operation is None:
        app.add_route(route.path, endpoint, methods=[route.method], include_in_schema=False)
        return

    async def described(request: Request, **_: object) -> Response:
        return await endpoint(request)

    described.__signature__ = operation.signature(route.method, needs_key=route.access is not Access.ANYONE)  # type: ignore[attr-defined]
    app.router.add_api_route(
        route.path,
        described,
        methods=[route.method],
        summary=operation.summary,
        operation_id=f"{route.method.lower()}_{re.sub('[^a-z0-9]+', '_', route.path.replace(':path', '')).strip('_')}",
        response_model=None,
        route_class_override=_RawRoute,
        response_class=PlainTextResponse if operation.media == "text/plain" else JSONResponse,
        responses=operation.responses,
    )


def _endpoint(route: Route) -> Endpoint:
    """Return the endpoint of a route behind its access check."""

    async def endpoint(request: Request) -> Response:
        state = request.app.state
        if route.access is not Access.ANYONE:
            state.service.guard.check(route.method, request.scope["headers"])
        caller = request.state.caller = state.service.authenticator.authorise(request, route.access)
        if caller is not None and caller.may_prioritise:
            keep_gateway_headers(request.scope["headers"])
        return await with_leases(request, route.endpoint(state.endpoints))

    return endpoint


def _calibrations(settings: Settings) -> Calibrations:
    """Return the calibrations of the operator's file; none without one. Raises SettingsError."""
    try:
        return {} if settings.calibration is None else calibration.read_calibrations(settings.calibration)
    except DiscoveryError as error:
        raise SettingsError(f"calibration: {error}") from None


def upstream_session(settings: Settings) -> aiohttp.ClientSession:
    """Return a session for requests to the upstream, without a limit on connections."""
    key = settings.upstream_api_key
    headers = {"accept-encoding": "identity"}  # bodies are forwarded without decoding
    if key is not None:
        headers["authorization"] = f"Bearer {key.get_secret_value()}"
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
        cookie_jar=aiohttp.DummyCookieJar(),  # cookies of one client's response must not be sent with another's request
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=settings.connect_timeout_s),
        headers=headers,
        auto_decompress=False,
    )
