"""ASGI app of the dashboard: who may use a route, and pages for errors."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, Final
from urllib.parse import quote

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from proxy import errors
from proxy.api.error_responses import CLIENT_CLOSED_REQUEST
from proxy.api.response_headers import current_request_id
from proxy.api.service import Service
from proxy.errors import ApiError, Forbidden, NotFound, Unauthorised
from proxy.http.sse import ClientDisconnected
from proxy.settings import Settings
from proxy.ui.access import Doorkeeper
from proxy.ui.page import PageContext, UiRoute, ViewAccess, is_fragment, read_form
from proxy.ui.pages.registry import UI_ROUTES
from proxy.ui.protection import SecurityHeaders, check_origin, cookie_header
from proxy.ui.sessions import new_id
from proxy.ui.static_files import serve_static

PREFIX = "/ui"
SIGN_IN = "/ui/sign-in"
CSRF_HEADER = "x-csrf-token"
CSRF_FIELD = "csrf"
_FOREIGN: Final = frozenset({"host_not_allowed", "origin_not_allowed"})
"""Codes of refusals of other sites' requests: their pages get neither a token nor anything about the viewer."""


class UiMount(BaseRoute):
    """Route for `/ui` and all paths below it. Starlette's own mount would not take `/ui` without a slash."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.path = PREFIX

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        path = scope["path"] if scope["type"] == "http" else ""
        is_own = path == PREFIX or path.startswith(f"{PREFIX}/")
        return (Match.FULL, {"endpoint": self.app}) if is_own else (Match.NONE, {})

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)


def create_ui(settings: Settings, host: Starlette) -> ASGIApp:
    """Return the dashboard of an app, whose state has the service and the endpoints once it runs."""
    doorkeeper, state = Doorkeeper(settings), host.state
    routes = [_route(route, doorkeeper, host) for route in UI_ROUTES]
    routes.append(Route("/ui/static/{hash}/{name:path}", serve_static, methods=["GET"]))
    failures = _Failures(doorkeeper, state)
    app = Starlette(routes=routes)
    app.router.redirect_slashes = False
    for failure in (ApiError, HTTPException, ClientDisconnected, ClientDisconnect, Exception):
        app.add_exception_handler(failure, failures.respond)
    return SecurityHeaders(app)


def _route(route: UiRoute, doorkeeper: Doorkeeper, host: Starlette) -> Route:
    """Return the route of a page behind its checks: host, origin, sign-in and CSRF token."""
    state = host.state

    async def endpoint(request: Request) -> Response:
        service: Service = state.service
        service.guard.check("GET", request.scope["headers"])  # the host; forms are no JSON, which POST would need
        check_origin(request)
        request.state.doorkeeper = doorkeeper
        request.scope["ui_host"] = host
        cookie = doorkeeper.cookie(request)
        sent_cookie = cookie or new_id()
        viewer = doorkeeper.viewer(request, service.authenticator)
        if viewer is None and route.access is not ViewAccess.ANYONE:
            raise Unauthorised("sign in with an API key of this proxy", code="invalid_api_key")
        if viewer is not None and route.access is ViewAccess.ADMIN and not viewer.is_admin:
            raise Forbidden(
                f"{request.url.path} is for admins only; sign out, and sign in with an admin key", code="admin_only"
            )
        if route.method == "POST":
            await _check_token(request, doorkeeper, cookie)
        known = viewer or doorkeeper.nobody
        context = PageContext(request, service, state.endpoints, known, doorkeeper.csrf.of(sent_cookie))
        response = await route.endpoint(context)
        if not cookie and "set-cookie" not in response.headers:
            response.headers.append("set-cookie", cookie_header(request, sent_cookie))
        return response

    return Route(route.path, endpoint, methods=[route.method])


async def _check_token(request: Request, doorkeeper: Doorkeeper, cookie: str) -> None:
    """Raise Forbidden unless a POST has the CSRF token of its cookie, in a header or as a field of a form."""
    token = request.headers.get(CSRF_HEADER)
    if token is None and request.headers.get("content-type", "").startswith("application/x-www-form-urlencoded"):
        token = (await read_form(request)).get(CSRF_FIELD)
    if not doorkeeper.csrf.is_valid(token or "", cookie):
        raise Forbidden("this form is too old, or was not sent by the dashboard; reload the page and try again")


class _Failures:
    """Turn exceptions into pages; into JSON for scripts, which read `/ui/data/`."""

    def __init__(self, doorkeeper: Doorkeeper, state: Any) -> None:
        self._doorkeeper = doorkeeper
        self._state = state

    async def respond(self, request: Request, error: Exception) -> Response:
        """Return the response to a request that failed with `error`."""
        if isinstance(error, (ClientDisconnected, ClientDisconnect)):
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        if isinstance(error, HTTPException):
            is_missing = error.status_code == HTTPStatus.NOT_FOUND
            message = f"{request.method} {request.url.path}: {error.detail}"
            error = NotFound(message, code="not_found") if is_missing else _WrongMethod(message)
        if not isinstance(error, ApiError):
            error = errors.internal_error()
        is_page = not request.url.path.startswith("/ui/data/")
        if isinstance(error, Unauthorised) and is_page:
            return self._to_sign_in(request)
        if not is_page:
            return JSONResponse(errors.body(error), error.status, {"x-request-id": current_request_id()})
        viewer, csrf = self._doorkeeper.nobody, ""
        if error.code not in _FOREIGN:
            viewer = self._doorkeeper.viewer(request, self._state.service.authenticator) or viewer
            csrf = self._doorkeeper.csrf.of(self._doorkeeper.cookie(request))
        context = PageContext(request, self._state.service, self._state.endpoints, viewer, csrf)
        template = "error_part.html" if context.is_fragment else "error.html"
        title = HTTPStatus(error.status).phrase
        response = context.render(template, error.status, title=title, message=error.message)
        response.headers["x-request-id"] = current_request_id()
        for name, value in error.headers.items():
            response.headers[name] = value
        return response

    def _to_sign_in(self, request: Request) -> Response:
        """Send the browser to the sign-in page, and from there back to the page that it asked for."""
        if is_fragment(request):
            return Response(status_code=HTTPStatus.UNAUTHORIZED, headers={"hx-redirect": SIGN_IN})
        if request.method != "GET":
            return RedirectResponse(SIGN_IN, HTTPStatus.SEE_OTHER)
        target = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        return RedirectResponse(f"{SIGN_IN}?next={quote(target)}", HTTPStatus.SEE_OTHER)


class _WrongMethod(ApiError):
    """A path of the dashboard does not take this method."""

    status = HTTPStatus.METHOD_NOT_ALLOWED
    type = "invalid_request_error"
