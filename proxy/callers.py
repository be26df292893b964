"""Who asks: which tenant's request it is, and whether an admin makes it."""

from __future__ import annotations

from hashlib import blake2b
from hmac import compare_digest
from typing import NamedTuple

from starlette.requests import Request

from proxy.errors import Forbidden
from proxy.settings import Settings


class Caller(NamedTuple):
    """Whoever made a request."""

    tenant: str  # a hash of the bearer token; empty if there was none
    is_admin: bool

    def may_see(self, tenant: str) -> bool:
        """Whether it may know of a request that `tenant` made."""
        return self.is_admin or self.tenant == tenant


def identify(settings: Settings, request: Request) -> Caller:
    """Whoever makes `request`. Every bearer token is a tenant of its own."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    token = token.strip() if scheme.lower() == "bearer" else ""
    key = settings.admin_key
    is_admin = key is not None and compare_digest(token.encode(), key.get_secret_value().encode())
    return Caller(blake2b(token.encode(), digest_size=12).hexdigest() if token else "", is_admin)


def require_admin(settings: Settings, caller: Caller, what: str) -> None:
    """Raise Forbidden, naming `what` and the way out, unless an admin asks."""
    if caller.is_admin:
        return
    way = "send the admin key as bearer token" if settings.admin_key else "start the proxy with AUTOTTS_ADMIN_KEY"
    raise Forbidden(f"{what} is for admins; {way}", code="admin_only")
