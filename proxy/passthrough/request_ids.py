"""Requests of the last while by every id they have: the proxy's, the client's own, and the one in the upstream's body.

It is kept in memory and bounded. Served episodes are in the store as well; requests that were handed on are only here.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Awaitable
from typing import Any, Final, NamedTuple

from proxy.upstream.body_tap import BodySink, BodySource

MOST: Final = 10_000
"""Requests that are remembered, and ids of theirs besides the proxy's."""
LOOKED_AT: Final = 4096
"""Bytes of a response's beginning in which its id is looked for."""
_ID: Final = re.compile(rb'"id"\s*:\s*"([!#-\[\]-~]{1,200})"')

_OWN_ID: Final = re.compile(r"(?:chatcmpl-|cmpl-|resp_|req-)[0-9a-f]{32}")


class ForwardedRequest(NamedTuple):
    """A request that was handed to the upstream."""

    request: str  # its id, as the response's x-request-id has it
    tenant: str
    created: str  # UTC, in ISO 8601
    endpoint: str
    model: str
    reason: str  # no controller served it
    status: int
    client_request_id: str | None

    def as_json(self, upstream_id: str | None) -> dict[str, Any]:
        """The record as `GET /v1/tts/requests/ID` returns it."""
        return {**self._asdict(), "applied": False, "upstream_id": upstream_id}


class RecentRequests:
    """The requests of the last while."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._passed: OrderedDict[str, ForwardedRequest] = OrderedDict()  # by the proxy's id
        self._ids: OrderedDict[tuple[str, str], str] = OrderedDict()  # the proxy's, by tenant and another id
        self._upstream_ids: OrderedDict[str, str] = OrderedDict()  # by the proxy's

    def add(self, passed: ForwardedRequest) -> None:
        """Remember a request that was handed on."""
        self._passed[passed.request] = passed
        _bound(self._passed, self._most)

    def name(self, tenant: str, other: str, request: str) -> None:
        """Remember that a tenant's `request` is also known as `other`; the latest request of that name counts."""
        self._ids.pop((tenant, other), None)
        self._ids[tenant, other] = request
        _bound(self._ids, self._most)

    def name_by_client(self, tenant: str, given: str, request: str) -> None:
        """Remember what a client calls its `request`, unless it sends an id of the proxy's own again."""
        if given and not _OWN_ID.fullmatch(given):
            self.name(tenant, given, request)

    def see(self, tenant: str, request: str, beginning: bytes) -> None:
        """Remember the upstream's own id of `request`, which the response's `beginning` may hold."""
        if match := _ID.search(beginning[:LOOKED_AT]):
            upstream_id = match[1].decode()
            self._upstream_ids[request] = upstream_id
            _bound(self._upstream_ids, self._most)
            self.name(tenant, upstream_id, request)

    def seeing(self, pour: BodySource, tenant: str, request: str) -> BodySource:
        """`pour`, whose first piece is looked at for the upstream's id."""

        async def poured(hand: BodySink) -> None:
            has_seen = False

            def first(piece: bytes, is_last: bool) -> Awaitable[None]:
                nonlocal has_seen
                if not has_seen and piece:
                    has_seen = True
                    self.see(tenant, request, piece)
                return hand(piece, is_last)

            await pour(first)

        return poured

    def resolve(self, tenant: str, name: str, *, is_admin: bool = False) -> str:
        """The proxy's id of the tenant's request called `name`, of anybody's for an admin; `name` if it is unknown."""
        if name in self._passed:
            return name
        if (tenant, name) in self._ids or not is_admin:
            return self._ids.get((tenant, name), name)
        return next((request for (_, other), request in reversed(self._ids.items()) if other == name), name)

    def find(self, request: str) -> ForwardedRequest | None:
        """The request with this id of the proxy's, if it was handed on."""
        return self._passed.get(request)

    def upstream_id(self, request: str) -> str | None:
        """Return the upstream's id of a request."""
        return self._upstream_ids.get(request)


def _bound(entries: OrderedDict[Any, Any], most: int) -> None:
    while len(entries) > most:
        entries.popitem(last=False)
