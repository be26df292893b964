"""Index of recent requests by all of their ids: the proxy's, the client's and the upstream's.

The index is in memory and bounded. Episodes are in the store as well. Forwarded requests are in this index only.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

MAX_REQUESTS: Final = 10_000
"""Maximum number of forwarded requests in the index, and of ids other than the proxy's."""
ID_SEARCH_BYTES: Final = 4096
"""Bytes at the beginning of a response that are searched for its id."""
_ID: Final = re.compile(rb'"id"\s*:\s*"([!#-\[\]-~]{1,200})"')

_OWN_ID: Final = re.compile(r"(?:chatcmpl-|cmpl-|resp_|req-)[0-9a-f]{32}")


class ForwardedRequest(NamedTuple):
    """A request that was forwarded to the upstream without a controller."""

    request: str  # the proxy's id, as in the response's x-request-id
    tenant: str
    created: float  # seconds since the epoch
    endpoint: str
    model: str
    reason: str  # why no controller served it
    status: int
    client_request_id: str | None

    def as_json(self, upstream_id: str | None) -> dict[str, Any]:
        """Return the record in the format of `GET /v1/tts/requests/ID`."""
        created = datetime.fromtimestamp(self.created, UTC).isoformat(timespec="milliseconds")
        return {**self._asdict(), "created": created, "applied": False, "upstream_id": upstream_id}


class RecentRequests:
    """Bounded index of recent requests by their ids."""

    def __init__(self, max_requests: int = MAX_REQUESTS) -> None:
        self._max_requests = max_requests
        self._forwarded: OrderedDict[str, ForwardedRequest] = OrderedDict()  # by the proxy's id
        self._aliases: OrderedDict[tuple[str, str], str] = OrderedDict()  # (tenant, other id) → the proxy's id
        self._upstream_ids: OrderedDict[str, str] = OrderedDict()  # by the proxy's id

    def add(self, request: ForwardedRequest) -> None:
        """Add a forwarded request."""
        self._forwarded[request.request] = request
        _evict_oldest(self._forwarded, self._max_requests)

    def add_alias(self, tenant: str, alias: str, request: str) -> None:
        """Add another id of a tenant's request. If several requests have the same alias, the latest one keeps it."""
        self._aliases.pop((tenant, alias), None)
        self._aliases[tenant, alias] = request
        _evict_oldest(self._aliases, self._max_requests)

    def add_client_id(self, tenant: str, client_id: str, request: str) -> None:
        """Add the client's id of `request`, unless it is empty or has the format of the proxy's own ids."""
        if client_id and not _OWN_ID.fullmatch(client_id):
            self.add_alias(tenant, client_id, request)

    def note_upstream_id(self, tenant: str, request: str, beginning: bytes) -> None:
        """Add the upstream's id of `request`, if the `beginning` of the response contains it."""
        if match := _ID.search(beginning[:ID_SEARCH_BYTES]):
            upstream_id = match[1].decode()
            self._upstream_ids[request] = upstream_id
            _evict_oldest(self._upstream_ids, self._max_requests)
            self.add_alias(tenant, upstream_id, request)

    def resolve(self, tenant: str, name: str, *, is_admin: bool = False) -> str:
        """Return the proxy's id of the tenant's request called `name`, or `name` itself if it is unknown.

        An admin may also use the names of other tenants' requests.
        """
        if name in self._forwarded:
            return name
        if (tenant, name) in self._aliases or not is_admin:
            return self._aliases.get((tenant, name), name)
        return next((request for (_, alias), request in reversed(self._aliases.items()) if alias == name), name)

    def find(self, request: str) -> ForwardedRequest | None:
        """Return the forwarded request with this proxy id, or None."""
        return self._forwarded.get(request)

    def upstream_id(self, request: str) -> str | None:
        """Return the upstream's id of a request, or None if it is not known."""
        return self._upstream_ids.get(request)


def _evict_oldest(entries: OrderedDict[Any, Any], limit: int) -> None:
    while len(entries) > limit:
        entries.popitem(last=False)
