"""Who asks: which tenant's request it is, what it may use, and whether an admin makes it."""

from __future__ import annotations

import logging
import secrets
from enum import StrEnum
from hashlib import blake2b
from hmac import compare_digest, digest
from typing import Final, NamedTuple

from starlette.requests import Request

from proxy.admission import api_keys
from proxy.admission.token_budget import Caps, limit_below
from proxy.errors import Forbidden, SettingsError, Unauthorised
from proxy.http.json_edit import edit_members
from proxy.http.origins import is_loopback
from proxy.settings import Settings

logger = logging.getLogger(__name__)

FIXED_TOKENS: Final = 34
"""Tokens of the texts that close a thought and lead into an answer, two probes' and a reply's, in most families."""


class Access(StrEnum):
    """Who may call a route."""

    ANYONE = "anyone"
    CLIENT = "client"  # who has a key, where there are keys
    ADMIN = "admin"


class Caller(NamedTuple):
    """Whoever made a request."""

    tenant: str  # a hash of its key's name, or of the bearer token; empty if there was none
    is_admin: bool
    key: str = ""  # its key's name; empty without a file of keys
    caps: Caps = Caps()
    salt: str | None = None  # of its part of the upstream's prefix cache; None if that is shared

    def may_see(self, tenant: str) -> bool:
        """Whether it may know of a request that `tenant` made."""
        return self.is_admin or self.tenant == tenant

    def with_cache_salt(self, body: bytes) -> bytes:
        """Return a body for the upstream that is kept to this tenant's part of the prefix cache, if tenants have parts.

        `body` is empty, or a JSON object in which no key stands twice.
        """
        return body if self.salt is None or not body else edit_members(body, put={"cache_salt": self.salt})

    @property
    def holder(self) -> str:
        """Whose budgets its requests use."""
        return self.key or self.tenant


class Authenticator:
    """All who may call, as settings and the file of keys have it. Raises SettingsError if that cannot be read."""

    def __init__(self, settings: Settings) -> None:
        need = min_request_tokens(settings)
        self.keyring = api_keys.load_keyring(settings.keys, settings.client_keys, need)
        common = Caps(tokens=settings.max_total_tokens, tokens_per_minute=settings.tokens_per_minute)
        if limit := limit_below(common, need):
            logger.warning("the server's limit %s %s", limit, api_keys.too_small_warning(need))
        self._admin_key = settings.admin_key
        secret = settings.cache_secret
        self._secret = secrets.token_bytes(32) if secret is None else secret.get_secret_value().encode()

    def identify(self, request: Request) -> Caller:
        """Whoever makes `request`. Without a file of keys every bearer token is a tenant of its own.

        Raises Unauthorised where there are keys and it has none of them.
        """
        token = _token(request)
        admin = self._admin_key
        if admin is not None and compare_digest(token.encode(), admin.get_secret_value().encode()):
            tenant = _anonymous(token)
            return Caller(tenant, True, salt=self._salt(tenant))
        if self.keyring is None:
            return Caller(_anonymous(token), False)
        key = self.keyring.find(token) if token else None
        if key is None:
            raise Unauthorised(
                "the API key is not known here" if token else "there is no API key; send one as bearer token",
                code="invalid_api_key",
            )
        return Caller(key.tenant, key.is_admin, key.name, key.caps, self._salt(key.tenant))

    def is_authenticated(self, request: Request) -> bool:
        """Return whether `request` has a key that is known, or no key is needed."""
        try:
            self.identify(request)
        except Unauthorised:
            return False
        return True

    def authorise(self, request: Request, access: Access) -> Caller | None:
        """Whoever makes `request`, who may if this returns; None if anyone may. Raises Unauthorised or Forbidden."""
        if access is Access.ANYONE:
            return None
        caller = self.identify(request)
        if access is Access.ADMIN:
            self.require_admin(caller, request.url.path)
        return caller

    def require_admin(self, caller: Caller, what: str) -> None:
        """Raise Forbidden, naming `what` and the way out, unless an admin asks."""
        if caller.is_admin:
            return
        is_there = self._admin_key or (self.keyring and any(key.is_admin for key in self.keyring.keys))
        way = "send the admin key as bearer token" if is_there else "start the proxy with AUTOTTS_ADMIN_KEY"
        raise Forbidden(f"{what} is for admins; {way}", code="admin_only")

    def _salt(self, tenant: str) -> str | None:
        """A text only this proxy can make, so that no tenant can tell by its speed what another has asked."""
        return None if self.keyring is None else digest(self._secret, tenant.encode(), "sha256").hex()


def min_request_tokens(settings: Settings) -> int:
    """About what one interval and its answer need under a cap; `chat.plan` knows it exactly for a request."""
    texts = settings.interval + 2 * settings.probe_tokens + FIXED_TOKENS
    return texts + max(settings.probe_tokens, min(settings.finalise_tokens, texts // 3))


def _token(request: Request) -> str:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def _anonymous(token: str) -> str:
    return blake2b(token.encode(), digest_size=12).hexdigest() if token else ""


def check_host(settings: Settings) -> None:
    """Raise SettingsError if strangers could reach a proxy that asks nobody for a key."""
    has_keys = settings.keys is not None or settings.client_keys is not None
    if has_keys or settings.allow_anonymous or is_loopback(settings.host):
        return
    raise SettingsError(
        f"host {settings.host} can be reached by others and there are no keys: name a file of them in AUTOTTS_KEYS "
        "(`autotts keys new`), or say --allow-anonymous"
    )
