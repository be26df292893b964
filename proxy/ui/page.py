"""Definition of a page: its routes, who may use them, and what an endpoint gets."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from enum import StrEnum
from typing import Any, Final, NamedTuple
from urllib.parse import parse_qsl

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response

from proxy.admission.auth import Caller
from proxy.api.routes import Endpoints
from proxy.api.service import Service
from proxy.errors import BadRequest, TooLarge
from proxy.ui import rendering

MOST_FORM_BYTES: Final = 64 * 2**10
MOST_FIELDS: Final = 200


class ViewAccess(StrEnum):
    """Access that a route of the dashboard requires."""

    ANYONE = "anyone"  # sign-in and static files
    VIEWER = "viewer"  # somebody who signed in, or anyone on this machine if there are no keys
    ADMIN = "admin"  # somebody who signed in with an admin key, or anyone on this machine if there are no keys


class Viewer(NamedTuple):
    """Somebody who looks at the dashboard."""

    caller: Caller  # of the requests that the dashboard sends to the API
    is_admin: bool  # may see everything and act
    is_open: bool = False  # nobody has to sign in here
    is_known: bool = True  # False for somebody who has yet to sign in

    def may_open(self, access: ViewAccess) -> bool:
        """Return whether the viewer may use routes with `access`."""
        if access is ViewAccess.ANYONE:
            return True
        return self.is_known and (self.is_admin or access is ViewAccess.VIEWER)

    @property
    def reader(self) -> Caller:
        """Caller as whom records are read: an admin wherever the viewer may see everything."""
        return self.caller._replace(is_admin=self.is_admin)

    @property
    def tenant_scope(self) -> str | None:
        """Tenant whose requests the viewer may see; None if all."""
        return None if self.is_admin else self.caller.tenant

    @property
    def name(self) -> str:
        """Name for the page and for audit logs."""
        if self.is_open:
            return "this machine"
        return self.caller.key or "admin"


class PageContext(NamedTuple):
    """One request to a page: the request, the service behind it, and who sent it."""

    request: Request
    service: Service
    api: Endpoints
    viewer: Viewer
    csrf: str  # token for the forms of the response

    @property
    def query(self) -> Mapping[str, str]:
        """Parameters of the URL; of repeated ones the last."""
        return self.request.query_params

    @property
    def is_fragment(self) -> bool:
        """Whether htmx asks for a part of a page."""
        return is_fragment(self.request)

    async def form(self) -> Mapping[str, str]:
        """Return the fields of a form that was sent. Raises BadRequest or TooLarge. It may be called repeatedly."""
        return await read_form(self.request)

    def render(self, template: str, status: int = 200, **values: Any) -> Response:
        """Return a page from a template in `proxy/ui/templates`. `values` are escaped."""
        common = {"viewer": self.viewer, "csrf": self.csrf, "path": self.request.url.path, "query": self.query}
        return HTMLResponse(rendering.render(template, **common, **values), status)

    def json(self, data: Any) -> Response:
        """Return data for a script."""
        return JSONResponse(data)

    def redirect(self, path: str) -> Response:
        """Send the browser to another page of the dashboard, after an action."""
        if self.is_fragment:
            return Response(headers={"hx-redirect": path})
        return RedirectResponse(path, 303)


PageEndpoint = Callable[[PageContext], Awaitable[Response]]


class UiRoute(NamedTuple):
    """A path of the dashboard. A POST needs a CSRF token; nothing else may change anything."""

    path: str  # in full, such as /ui/requests/{id}
    endpoint: PageEndpoint
    access: ViewAccess = ViewAccess.VIEWER
    method: str = "GET"


class Page(NamedTuple):
    """A page with its routes, and its place in the navigation."""

    name: str
    title: str
    routes: tuple[UiRoute, ...]
    href: str = ""  # of the navigation's entry; empty if it has none
    access: ViewAccess = ViewAccess.VIEWER  # who sees that entry


def is_fragment(request: Request) -> bool:
    """Return whether htmx asks for a part of a page."""
    return request.headers.get("hx-request") == "true"


async def read_form(request: Request) -> Mapping[str, str]:
    """Return the fields of a urlencoded form, read once. Raises BadRequest or TooLarge."""
    known: Mapping[str, str] | None = getattr(request.state, "form", None)
    if known is not None:
        return known
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MOST_FORM_BYTES:
            raise TooLarge(f"the form is larger than {MOST_FORM_BYTES} bytes", code="body_too_large")
    try:
        pairs = parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=MOST_FIELDS)
    except ValueError:  # also of UnicodeDecodeError
        raise BadRequest("the form cannot be read; send it from the page again") from None
    fields: Mapping[str, str] = dict(pairs)
    request.state.form = fields
    return fields
