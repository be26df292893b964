"""Decide who looks at the dashboard: anyone on this machine if there are no keys, else whoever signed in."""

from __future__ import annotations

import ipaddress
from typing import Final

from starlette.requests import Request

from proxy.admission.api_keys import hash_key
from proxy.admission.auth import Authenticator, Caller
from proxy.errors import TooMany, Unauthorised
from proxy.http.origins import is_loopback
from proxy.settings import Settings
from proxy.ui.page import Viewer
from proxy.ui.protection import COOKIE, is_local
from proxy.ui.sessions import CsrfTokens, Sessions, SignInLimiter

_NOBODY = Caller("", False)
_IPV6_PREFIX: Final = 64
"""Bits of an IPv6 address that name a network. One customer has at least one, with any number of addresses."""


class Doorkeeper:
    """Sessions, CSRF tokens and the sign-in of one dashboard."""

    def __init__(self, settings: Settings) -> None:
        self.sessions = Sessions(settings.ui_session_s)
        self.csrf = CsrfTokens()
        self.limiter = SignInLimiter()
        self.nobody = Viewer(_NOBODY, False, is_known=False)
        self._is_on_loopback = is_loopback(settings.host)

    def cookie(self, request: Request) -> str:
        """Return the value of the request's cookie; empty without one."""
        return request.cookies.get(COOKIE, "")

    def viewer(self, request: Request, authenticator: Authenticator) -> Viewer | None:
        """Return who sent a request, or None if they must sign in first.

        The key of a session is looked up at each request, so that a revoked key has no session any more.
        """
        if self.is_open(request, authenticator):
            return Viewer(_NOBODY, True, is_open=True)
        cookie = self.cookie(request)
        session = self.sessions.find(cookie) if cookie else None
        if session is None:
            return None
        caller = authenticator.identify_hash(session.token_hash)
        if caller is None:
            self.sessions.close(cookie)
            return None
        return Viewer(caller, caller.is_admin)

    def is_open(self, request: Request, authenticator: Authenticator) -> bool:
        """Return whether nobody has to sign in: there are no keys, and the request comes from this machine."""
        return self._is_on_loopback and not authenticator.has_keys and is_local(request)

    def sign_in(self, request: Request, authenticator: Authenticator, token: str) -> str:
        """Begin a session for a key, and return the session's id. Raises TooMany or Unauthorised."""
        address = _network(request.client.host if request.client else "")
        wait_s = self.limiter.retry_after(address)
        if wait_s > 0:
            after = str(int(wait_s) + 1)
            raise TooMany(f"too many failed attempts; wait {after} s", after=after, code="rate_limit_exceeded")
        token_hash = hash_key(token)
        if not token or authenticator.identify_hash(token_hash) is None:
            self.limiter.count_failure(address)
            raise Unauthorised("this is no key of this proxy", code="invalid_api_key")
        self.sessions.close(self.cookie(request))
        return self.sessions.open(token_hash)


def _network(host: str) -> str:
    """Return whom failed attempts from an address count for: itself, or its network if it is IPv6."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv4Address) or address.ipv4_mapped is not None:
        return host
    return str(ipaddress.ip_network((int(address), _IPV6_PREFIX), strict=False))
