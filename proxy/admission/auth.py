"""Authentication and authorisation: identify the tenant of a request, its limits and whether it is an admin."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Collection, Mapping
from enum import StrEnum
from hmac import compare_digest, digest
from typing import Final, NamedTuple

from starlette.requests import Request

from proxy.admission import api_keys
from proxy.admission.token_budget import Caps, limit_below
from proxy.errors import Forbidden, SettingsError, Unauthorised
from proxy.http.json_edit import edit_members
from proxy.http.origins import is_loopback
from proxy.requests import field_table
from proxy.settings import Settings

logger = logging.getLogger(__name__)

FIXED_TOKENS: Final = 34
"""Approximate tokens of the fixed texts around two probes and a final answer, in most model families."""


class Access(StrEnum):
    """Access that a route requires."""

    ANYONE = "anyone"
    CLIENT = "client"  # anyone with a key, or anyone at all if no keys are configured
    ADMIN = "admin"


class Caller(NamedTuple):
    """The sender of a request."""

    tenant: str  # hash of its key's name, or of the bearer token if there is no key; empty without a token
    is_admin: bool
    key: str = ""  # name of its key; empty if no keys are configured
    caps: Caps = Caps()
    salt: str | None = None  # isolates its entries in the upstream's prefix cache; None if the cache is shared
    has_priority: bool = False  # its key may set `priority` and the headers of inference gateways
    beta: float | None = None  # its key's, for requests that set none

    def may_see(self, tenant: str) -> bool:
        """Return whether it may see the requests of `tenant`."""
        return self.is_admin or self.tenant == tenant

    @property
    def may_prioritise(self) -> bool:
        """Whether it may set `priority` and the headers of inference gateways."""
        return self.is_admin or self.has_priority

    def fields_to_drop(self, fields: Mapping[str, object]) -> Collection[str]:
        """Return the names of a request's fields that are not forwarded. Raises Forbidden."""
        return field_table.fields_to_drop(fields, is_admin=self.is_admin, may_prioritise=self.may_prioritise)

    def with_cache_salt(self, body: bytes) -> bytes:
        """Return the body for the upstream, with this tenant's cache salt if tenants are isolated.

        `body` is empty, or a JSON object without duplicate keys.
        """
        return body if self.salt is None or not body else edit_members(body, put={"cache_salt": self.salt})

    @property
    def holder(self) -> str:
        """Name under which its token budgets and its places in the queue are counted."""
        return self.key or self.tenant


class Authenticator:
    """Identifies callers by the configured keys. Raises SettingsError if the keys cannot be read."""

    def __init__(self, settings: Settings) -> None:
        needed, processes = min_request_tokens(settings), limit_processes(settings)
        self.keyring = api_keys.load_keyring(settings.keys, settings.client_keys, needed, processes)
        common = Caps(tokens=settings.max_total_tokens, tokens_per_minute=settings.tokens_per_minute)
        if limit := limit_below(common, needed, processes):
            logger.warning("the server's limit %s %s", limit, api_keys.too_small_warning(needed))
        self._processes = processes
        self._admin_key = settings.admin_key
        self._refuse_shared_admin_key()
        secret = settings.cache_secret
        self._secret = secrets.token_bytes(32) if secret is None else secret.get_secret_value().encode()

    def _refuse_shared_admin_key(self) -> None:
        """Raise SettingsError if a client has the admin's key: it would be an admin."""
        if self._admin_key is None or self.keyring is None:
            return
        key = self.keyring.find(self._admin_key.get_secret_value())
        if key is not None and not key.is_admin:
            raise SettingsError(f"admin_key: the same key as that of the client {key.name}; give each its own")

    def identify(self, request: Request) -> Caller:
        """Return the sender of `request`. If no keys are configured, each bearer token is its own tenant.

        Raises Unauthorised if keys are configured and the request has none of them.
        """
        token = _token(request)
        admin = self._admin_key
        if admin is not None and compare_digest(token.encode(), admin.get_secret_value().encode()):
            tenant = api_keys.anonymous_tenant(token)
            return Caller(tenant, True, salt=self._salt(tenant))
        if self.keyring is None:
            return Caller(api_keys.anonymous_tenant(token), False)
        key = self.keyring.find(token) if token else None
        if key is None:
            problem = "unknown API key; send a key of this proxy" if token else "missing API key; send it"
            raise Unauthorised(f"{problem} as a bearer token", code="invalid_api_key")
        return self._caller(key)

    def identify_hash(self, token_hash: str) -> Caller | None:
        """Return the caller whose token has this hash (`api_keys.hash_key`); None if no key has it, or none any more.

        Unlike `identify`, it knows no callers without keys.
        """
        admin = None if self._admin_key is None else self._admin_key.get_secret_value()
        if admin is not None and compare_digest(api_keys.hash_key(admin), token_hash):
            tenant = api_keys.anonymous_tenant(admin)
            return Caller(tenant, True, salt=self._salt(tenant))
        key = None if self.keyring is None else self.keyring.find_hash(token_hash)
        return None if key is None else self._caller(key)

    @property
    def has_keys(self) -> bool:
        """Whether there is any key: of a client or of an admin."""
        return self._admin_key is not None or self.keyring is not None

    def is_authenticated(self, request: Request) -> bool:
        """Return whether `request` has a known key or needs none."""
        try:
            self.identify(request)
        except Unauthorised:
            return False
        return True

    def authorise(self, request: Request, access: Access) -> Caller | None:
        """Return the caller of a route with `access`, or None if anyone may call it.

        Raises Unauthorised or Forbidden.
        """
        if access is Access.ANYONE:
            return None
        caller = request.state.caller = self.identify(request)  # for the log, also if the caller may not go on
        if access is Access.ADMIN:
            self.require_admin(caller, request.url.path)
        return caller

    def require_admin(self, caller: Caller, target: str) -> None:
        """Raise Forbidden unless the caller is an admin. The message names `target` and what to do."""
        if caller.is_admin:
            return
        has_admin = self._admin_key or (self.keyring and any(key.is_admin for key in self.keyring.keys))
        advice = "send an admin key as the bearer token" if has_admin else "start the proxy with AUTOTTS_ADMIN_KEY"
        if not has_admin and self.keyring is not None:
            advice += ", or add `admin = true` to a key of its key file"
        raise Forbidden(f"{target} is for admins only; {advice}", code="admin_only")

    def _caller(self, key: api_keys.Key) -> Caller:
        caps = key.caps if self._processes == 1 else key.caps.share(self._processes)
        return Caller(key.tenant, key.is_admin, key.name, caps, self._salt(key.tenant), key.has_priority, key.beta)

    def _salt(self, tenant: str) -> str | None:
        """Return the tenant's cache salt. Only this proxy can compute it, so cache hits reveal no other's prompts."""
        return None if self.keyring is None else digest(self._secret, tenant.encode(), "sha256").hex()


def limit_processes(settings: Settings) -> int:
    """Return the number of processes over which tokens per minute and the limits of a key are divided."""
    return 1 if settings.limits else settings.workers


def min_request_tokens(settings: Settings) -> int:
    """Return about how many tokens one interval and its answer need. `proxy.episode.plan` computes it exactly."""
    texts = settings.interval + 2 * settings.probe_tokens + FIXED_TOKENS
    return texts + max(settings.probe_tokens, min(settings.finalise_tokens, texts // 3))


def _token(request: Request) -> str:
    """Return the API key of a request: its bearer token or, without an `authorization` header, its `x-api-key`."""
    given = request.headers.get("authorization")
    if given is None:
        return request.headers.get("x-api-key", "").strip()  # as clients of Anthropic's API send it
    scheme, _, token = given.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def check_host(settings: Settings) -> None:
    """Raise SettingsError if other machines could reach a proxy that requires no key."""
    has_keys = settings.keys is not None or settings.client_keys is not None
    if has_keys or settings.allow_anonymous or is_loopback(settings.host):
        return
    raise SettingsError(
        f"host {settings.host} is reachable from other machines and no API keys are configured; set AUTOTTS_KEYS to a "
        "key file (`autotts keys new` adds a key), or pass --allow-anonymous"
    )
