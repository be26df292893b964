"""Protection of the dashboard in the browser: response headers, the origin of requests, and the cookie."""

from __future__ import annotations

from typing import Final

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from proxy.errors import Forbidden, clipped
from proxy.http.origins import is_loopback

COOKIE: Final = "autotts_ui"
"""Name of the cookie. It holds a random id: of a session once somebody has signed in."""
CSP: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
    "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
HEADERS: Final = {
    "content-security-policy": CSP,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    # Not `no-referrer`: with that, browsers send forms with the origin `null`, and it could not be checked.
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}
"""Headers of every response of the dashboard."""
_FORWARDED: Final = ("forwarded", "x-forwarded-", "x-real-ip", "via")
"""Beginnings of the names of headers that gateways add."""
_MOST_SHOWN: Final = 100


class SecurityHeaders:
    """ASGI middleware that adds the headers of the dashboard to every response."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("cache-control", "no-store")
            await send(message)

        await self._app(scope, receive, sending)


def check_origin(request: Request) -> None:
    """Raise Forbidden for a request that a page of another origin sent, whatever its method.

    Only links to the dashboard are let through. Without keys, other pages could otherwise let it work, and time it.
    """
    origin = request.headers.get("origin")
    if origin is None:
        site = request.headers.get("sec-fetch-site", "same-origin")
        is_link = request.method == "GET" and request.headers.get("sec-fetch-mode", "navigate") == "navigate"
        if site in ("same-origin", "none") or is_link:
            return
        shown = site
    else:
        authority = origin.partition("://")[2].lower()  # empty for `null`
        if authority and authority == request.headers.get("host", "").lower():
            return
        shown = origin
    raise Forbidden(
        f"a page of {clipped(shown, _MOST_SHOWN)!r} sent this request; use the dashboard's own pages. If a gateway is "
        "in front of the proxy, it must forward the Host header unchanged",
        param="origin",
        code="origin_not_allowed",
    )


def is_local(request: Request) -> bool:
    """Return whether a request comes from this machine and not through a gateway on it."""
    client = request.client
    has_gateway = any(name.startswith(_FORWARDED) for name in request.headers)
    return client is not None and is_loopback(client.host) and not has_gateway


def is_https(request: Request) -> bool:
    """Return whether the browser uses https. TLS ends in front of the proxy, so the browser's own word counts too."""
    origin, forwarded = request.headers.get("origin", ""), request.headers.get("x-forwarded-proto", "")
    outermost = forwarded.partition(",")[0].strip().lower()  # each gateway may add its own
    return request.url.scheme == "https" or origin.startswith("https://") or outermost == "https"


def cookie_header(request: Request, value: str, lifetime_s: float | None = None) -> str:
    """Return a Set-Cookie header. Without a lifetime the browser forgets the cookie when it closes."""
    parts = [f"{COOKIE}={value}", "Path=/ui", "HttpOnly", "SameSite=Strict"]
    if lifetime_s is not None:
        parts.append(f"Max-Age={int(lifetime_s)}")
    if is_https(request):
        parts.append("Secure")
    return "; ".join(parts)
