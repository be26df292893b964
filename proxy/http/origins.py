"""Protect a proxy without API keys from web pages, by checking the host, origin and content type of requests.

A browser on the same machine can reach a proxy on loopback. With DNS rebinding, a page can read from the proxy under
the page's own host name. With a form, or `fetch` and `text/plain`, any page can send requests. If clients need API keys
neither attack works, because a page does not know the keys.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from functools import lru_cache
from http import HTTPMethod
from typing import Final
from urllib.parse import urlsplit

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from proxy.errors import Forbidden, UnsupportedMedia, clipped
from proxy.settings import Settings

ANY: Final = "*"
EXPOSED: Final = (
    "retry-after",
    "x-request-id",
    "x-client-request-id",
    "x-should-retry",
    "x-tts-agreement",
    "x-tts-applied",
    "x-tts-beta",
    "x-tts-beta-source",
    "x-tts-branches",
    "x-tts-confidence",
    "x-tts-controller",
    "x-tts-escalated-beta",
    "x-tts-fallback",
    "x-tts-flagged",
    "x-tts-reason",
    "x-tts-rounds",
    "x-tts-stop",
    "x-tts-tokens",
)
"""Response headers that a page of an allowed origin may read."""
_DEFAULT_PORTS: Final = {"http": ":80", "https": ":443"}
_JSON: Final = b"application/json"
_MOST_SHOWN: Final = 100

RawHeaders = Iterable[tuple[bytes, bytes]]


class PageGuard:
    """Refuses requests that a foreign web page may have sent. It is off if clients need API keys."""

    def __init__(self, settings: Settings) -> None:
        has_keys = settings.keys is not None or settings.client_keys is not None
        self.is_on = not has_keys
        self._hosts = listed(settings.allowed_hosts)
        self._origins = listed(settings.allowed_origins)
        is_public = settings.allow_anonymous and not is_loopback(settings.host)
        self._takes_any_host = ANY in self._hosts or (is_public and not self._hosts)
        self._is_known = lru_cache(256)(self._names_this_proxy)
        self._is_own_page = lru_cache(256)(self._is_trusted_page)

    def check(self, method: str, headers: RawHeaders) -> None:
        """Raise Forbidden or UnsupportedMedia for a request that a foreign page may have sent."""
        if not self.is_on:
            return
        host = content_type = b""
        origin: bytes | None = None
        for name, value in headers:
            if name == b"host":
                host = value
            elif name == b"origin":
                origin = value
            elif name == b"content-type":
                content_type = value
        if not self._is_known(host):
            shown = clipped(host.decode("latin-1"), _MOST_SHOWN)
            raise Forbidden(
                f"the proxy has no keys and does not know the host {shown!r}; add it to AUTOTTS_ALLOWED_HOSTS, or set "
                "AUTOTTS_KEYS",
                param="host",
                code="host_not_allowed",
            )
        if origin is not None and not self._is_own_page(origin, host):
            shown = clipped(origin.decode("latin-1"), _MOST_SHOWN)
            raise Forbidden(
                f"the proxy has no keys and does not serve pages of {shown!r}; add it to AUTOTTS_ALLOWED_ORIGINS, or "
                "set AUTOTTS_KEYS",
                param="origin",
                code="origin_not_allowed",
            )
        if content_type != _JSON and method == HTTPMethod.POST and not is_json(content_type):
            sent = clipped(content_type.decode("latin-1"), _MOST_SHOWN) or "not given"
            way = "send application/json (curl -H 'content-type: application/json')"
            raise UnsupportedMedia(
                f"the content type is {sent}; {way}",
                param="content-type",
                code="unsupported_media_type",
            )

    def _names_this_proxy(self, host: bytes) -> bool:
        """Return whether a Host header names this proxy. Every IP address is accepted: it cannot be rebound."""
        name = hostname(host.decode("latin-1"))
        if self._takes_any_host or is_loopback(name) or _is_address(name) or name in self._hosts:
            return True
        return any(known.startswith("*.") and name.endswith(known[1:]) for known in self._hosts)

    def _is_trusted_page(self, origin: bytes, host: bytes) -> bool:
        """Return whether pages of `origin` may send requests: this host's, this machine's and allowed origins."""
        page = origin.decode("latin-1").lower()
        if ANY in self._origins or page in self._origins:
            return True
        scheme, _, authority = page.partition("://")
        if scheme not in _DEFAULT_PORTS or not authority:
            return False
        port = _DEFAULT_PORTS[scheme]
        own_authority = host.decode().lower()
        return is_loopback(hostname(authority)) or authority.removesuffix(port) == own_authority.removesuffix(port)


def with_cors(app: ASGIApp, settings: Settings) -> ASGIApp:
    """Return `app` with CORS (preflights and response headers) for the allowed origins, if there are any."""
    origins = listed(settings.allowed_origins)
    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=sorted(origins),
        allow_methods=["GET", "POST"],
        allow_headers=[ANY],
        expose_headers=EXPOSED,
        allow_private_network=True,
    )


def listed(text: str | None) -> frozenset[str]:
    """Return the entries of a comma-separated setting, in lower case."""
    return frozenset(entry.strip().lower() for entry in (text or "").split(",") if entry.strip())


def hostname(authority: str) -> str:
    """Return the host of `HOST[:PORT]`, in lower case, without brackets or a final dot. Empty if invalid."""
    try:
        return (urlsplit(f"//{authority}").hostname or "").removesuffix(".")
    except ValueError:
        return ""


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine: `localhost`, a subdomain of it, 127.0.0.0/8 or ::1."""
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host.lower() == "localhost" or host.lower().endswith(".localhost")


def is_json(content_type: bytes) -> bool:
    """Return whether a content type is JSON. Its parameters are ignored."""
    media = content_type.partition(b";")[0].strip().lower()
    return media == _JSON or (media.startswith(b"application/") and media.endswith(b"+json"))


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True
