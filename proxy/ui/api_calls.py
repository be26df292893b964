"""Call the proxy's own endpoints with the identity of a viewer, so that a page shows what clients get.

The request runs through the same route and access check as one from outside. Only the identity comes from the session
instead of an API key, so that no key has to be kept in the browser or in a session.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message

from proxy.admission.auth import Access, Caller
from proxy.api.routes import ROUTES, Route
from proxy.errors import UnsupportedMedia
from proxy.http.leases import with_leases
from proxy.http.origins import is_json
from proxy.ui.page import PageContext

_ROUTES: Final[Mapping[tuple[str, str], Route]] = {(route.method, route.path): route for route in ROUTES}
_DROPPED: Final = frozenset(
    {b"cookie", b"content-type", b"content-length", b"authorization", b"x-api-key", b"accept-encoding"}
)


async def call_api(
    context: PageContext,
    method: str,
    path: str,
    body: bytes | None = None,
    caller: Caller | None = None,
) -> Response:
    """Return the response of the endpoint with a fixed path, such as `/v1/tts/feedback`.

    Without `body`, the JSON body of the viewer's own request is passed on. `caller` is the viewer's unless given.
    Raises what the endpoint raises.
    """
    route = _ROUTES[method, path]
    original = context.request
    if body is None and not is_json(original.headers.get("content-type", "").encode("latin-1")):
        raise UnsupportedMedia("send application/json", param="content-type", code="unsupported_media_type")
    caller = context.viewer.caller if caller is None else caller
    sent = [(name, value) for name, value in original.scope["headers"] if name not in _DROPPED and name[:2] != b"x-"]
    sent.append((b"content-type", b"application/json"))
    scope = {
        **original.scope,
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": sent,
        "path_params": {},
        "app": original.scope["ui_host"],
        "state": {},
    }
    has_sent = body is None

    async def receive() -> Message:
        nonlocal has_sent
        if has_sent:
            return await original.receive()
        has_sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    request = Request(scope, receive)
    if route.access is Access.ADMIN:
        context.service.authenticator.require_admin(caller, path)
    request.state.caller = caller
    return await with_leases(request, route.endpoint(context.api))
