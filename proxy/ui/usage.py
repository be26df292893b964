"""Usage of a store as pages show it: periods by name, and names of keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Final

from discovery.store.usage.periods import Bucket, Period, Scope
from proxy.admission import api_keys
from proxy.api.service import Service
from proxy.ui.page import PageContext

YESTERDAY: Final = "yesterday"
RANGES: Final[Mapping[str, tuple[str, timedelta, Bucket]]] = MappingProxyType(
    {
        "hour": ("Last hour", timedelta(hours=1), Bucket.MINUTE),
        "day": ("Last day", timedelta(days=1), Bucket.HOUR),
        YESTERDAY: ("Yesterday, UTC", timedelta(days=1), Bucket.HOUR),
        "week": ("Last week", timedelta(days=7), Bucket.DAY),
    }
)
"""Periods by the name that URLs have: title, duration and buckets."""


def period_of(name: str) -> Period:
    """Return the period with a name of RANGES. All but yesterday end now."""
    _, duration, bucket = RANGES[name]
    if name == YESTERDAY:
        midnight = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        return Period(midnight - duration, midnight - bucket.width, bucket)
    return Period.until_now(duration, bucket)


def scope_of(context: PageContext) -> Scope:
    """Return whose requests the viewer may see."""
    return Scope(tenant=context.viewer.tenant_scope)


def tenant_names(service: Service, tenants: Iterable[str]) -> dict[str, str]:
    """Return the name of each tenant's key; the beginning of its hash if it has none any more."""
    keyring = service.authenticator.keyring
    admin_key = service.settings.admin_key
    known = None if admin_key is None else admin_key.get_secret_value()
    return api_keys.tenant_names(() if keyring is None else keyring.keys, tenants, known)
