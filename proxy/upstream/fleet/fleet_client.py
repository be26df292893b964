"""Client of a fleet of upstreams. Calls go to one replica while it works, and else to another.

A call moves to another replica only if nothing was generated for it. `proxy/environment/call_continuation.py` continues
calls that had begun.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from copy import copy
from math import ceil
from typing import Any, Final, TypeVar

from proxy.errors import UpstreamError, UpstreamUnreachable
from proxy.types import Call, Model, ReplicaStatus
from proxy.upstream.circuit_breaker import BreakerState
from proxy.upstream.client import UpstreamClient, card_model
from proxy.upstream.connections.pooled_request import UpstreamResponse
from proxy.upstream.detokeniser import TokenEndings
from proxy.upstream.fleet.dns_poller import DnsPoller
from proxy.upstream.fleet.fleet import MAX_ATTEMPTS, Fleet, is_replica_failure
from proxy.upstream.fleet.replica import Replica
from proxy.upstream.load_metrics import UpstreamLoad
from proxy.upstream.relayed_body import RelayedBody
from proxy.upstream.retry import UNPROCESSED_STATUSES
from proxy.upstream_observer import UpstreamObserver

BEST_FIRST: Final = (BreakerState.CLOSED, BreakerState.HALF_OPEN, BreakerState.OPEN)
T = TypeVar("T")


class FleetClient:
    """Implements `Upstream` over a fleet. The client that `route` returns keeps the calls of one request together."""

    def __init__(
        self, fleet: Fleet, observer: UpstreamObserver, read_timeout_s: float, poller: DnsPoller | None = None
    ) -> None:
        """`poller` resolves the replicas, unless they are always the same."""
        self.observer = observer
        self.read_timeout_s = read_timeout_s
        self.token_endings = TokenEndings()  # replicas of a model have the same tokens
        self._fleet = fleet
        self._poller = poller
        self._model = ""  # model of the request; empty for any
        self._key = b""
        self._session = ""  # id of the request, for the session header
        self._is_background = False
        self._current: Replica | None = None  # replica that the latest call went to
        # Replicas that failed during a call of the request, with the health checks that each had passed by then.
        self._failed: dict[Replica, int] = {}

    @property
    def display_url(self) -> str:
        """Addresses without credentials, for logs and clients."""
        return ", ".join(self.addresses)

    @property
    def addresses(self) -> Sequence[str]:
        """Address of each replica without credentials; the name to look them up by if none is known."""
        names = [replica.name for replica in self._fleet.replicas]
        return names if names or self._poller is None else [self._poller.name]

    @property
    def is_available(self) -> bool:
        """Whether a replica takes requests."""
        return any(replica.is_available for replica in self._fleet.replicas)

    @property
    def circuit_breaker(self) -> str:
        """State of the circuit breaker that is closest to closed."""
        states = {replica.client.circuit_breaker for replica in self._fleet.replicas}
        return next((state.value for state in BEST_FIRST if state.value in states), BreakerState.CLOSED.value)

    @property
    def branches_in_flight(self) -> int:
        """Number of branches that are being generated."""
        return sum(replica.client.branches_in_flight for replica in self._fleet.replicas)

    @property
    def calls_waiting(self) -> int:
        """Number of calls that wait for branch slots."""
        return sum(replica.client.calls_waiting for replica in self._fleet.replicas)

    def replica_states(self) -> Sequence[ReplicaStatus]:
        """Return the state of each replica."""
        return [replica.state for replica in self._fleet.replicas]

    def route(self, model: str, key: Callable[[], bytes], session: str = "") -> FleetClient:
        """Return a client for one request, all of whose calls go to one replica while that works."""
        other = copy(self)
        other._model, other._key, other._session = model, key(), session
        other._current, other._failed = None, {}
        return other

    def can_continue(self, error: UpstreamError) -> bool:
        """Return whether another replica may continue a call that failed with `error`."""
        return is_replica_failure(error) and self._fleet.has_other(self._model, [*self._failed][-1:])

    def for_background(self) -> FleetClient:
        """Return the same client for background work, whose failures do not affect other requests."""
        other = copy(self)
        other._is_background = True
        return other

    async def close(self) -> None:
        """Cancel health checks that are under way, and stop to resolve replicas."""
        if self._poller is not None:
            await self._poller.close()
        await self._fleet.close()

    def reset(self) -> None:
        """Forget all failures: the upstreams have been restarted."""
        for replica in self._fleet.replicas:
            replica.reset()

    # Health, load and models

    async def is_healthy(self) -> bool:
        """Check all replicas. Return as soon as one is healthy and serves a model."""
        try:
            await self._resolve()
        except UpstreamError:
            return False
        return await self._fleet.check()

    async def queue_length(self) -> int | None:
        """Return how many requests wait in a replica's queues on average; None if none reports that."""
        return (await self.read_load()).waiting

    async def read_load(self) -> UpstreamLoad:
        """Return the load of a replica on average over those that are up and report it."""
        loads = await asyncio.gather(*(replica.client.read_load() for replica in self._fleet.available))
        waiting = [load.waiting for load in loads if load.waiting is not None]
        cache = [load.cache for load in loads if load.cache is not None]
        return UpstreamLoad(
            ceil(sum(waiting) / len(waiting)) if waiting else None, sum(cache) / len(cache) if cache else None
        )

    async def models(self, *, is_check: bool = False) -> list[Model]:
        """Return the models that any replica serves now, with the length that all replicas of a model allow."""
        models: dict[str, Model] = {}
        for model in map(card_model, await self._all_cards(is_check=is_check)):
            known = models.get(model.id, model)
            lengths = [length for length in (known.max_length, model.max_length) if length]
            models[model.id] = Model(model.id, min(lengths, default=0))
        return list(models.values())

    async def model_cards(self, *, is_check: bool = False) -> list[dict[str, Any]]:
        """Return the models that any replica serves, as the first that lists each describes it."""
        cards: dict[str, dict[str, Any]] = {}
        for card in await self._all_cards(is_check=is_check):
            cards.setdefault(card["id"], card)
        return list(cards.values())

    async def _all_cards(self, *, is_check: bool) -> list[dict[str, Any]]:
        """Return the cards of the replicas that are up; with `is_check` those of the latest checks, if any."""
        await self._resolve()
        replicas = self._fleet.available
        lists = [replica.cards for replica in replicas if is_check and replica.is_up and replica.cards]
        if not lists:
            results = await asyncio.gather(*(replica.read_cards() for replica in replicas), return_exceptions=True)
            lists = [result for result in results if not isinstance(result, BaseException)]
            errors = [result for result in results if isinstance(result, BaseException)]
            if errors and not lists:
                raise errors[0]
        return [card for cards in lists for card in cards]

    # Tokens

    async def tokenise_chat(self, body: Mapping[str, Any], max_tokens: int | None = None) -> list[int]:
        """Return the token ids of a chat. Raises TooManyTokens."""
        return await self._call(body["model"], lambda client: client.tokenise_chat(body, max_tokens))

    async def tokenise_prompt(self, model: str, text: str, max_tokens: int | None = None) -> list[int]:
        """Return the token ids of a text prompt. Raises TooManyTokens."""
        return await self._call(model, lambda client: client.tokenise_prompt(model, text, max_tokens))

    async def tokenise_suffix(self, model: str, text: str) -> list[int]:
        """Return the token ids of a text that the proxy appends to generated ids. Cached by each replica's client."""
        return await self._call(model, lambda client: client.tokenise_suffix(model, text))

    async def tokenise_plain(self, model: str, text: str, *, is_observed: bool = True) -> list[int]:
        """Return the token ids of a text without the special tokens that begin a prompt."""
        return await self._call(model, lambda client: client.tokenise_plain(model, text, is_observed=is_observed))

    async def detokenise(self, model: str, ids: Sequence[int], *, is_observed: bool = True) -> str:
        """Return the text of `ids`, special tokens included."""
        return await self._call(model, lambda client: client.detokenise(model, ids, is_observed=is_observed))

    # Generation

    async def generate(self, model: str, call: Call) -> None:
        """Run a completion on one replica, or on another if it failed before any token arrived."""
        await self._call(model, lambda client: client.generate(model, call), call)

    async def chat(self, model: Model, call: Call, body: Mapping[str, Any], messages: bytes) -> None:
        """Send a chat completion to one replica, or to another if it failed before any token arrived."""
        await self._call(model.id, lambda client: client.chat(model, call, body, messages), call)

    @asynccontextmanager
    async def relay(
        self, method: str, path: str, body: RelayedBody, headers: Mapping[str, str], model: str = ""
    ) -> AsyncIterator[UpstreamResponse]:
        """Return a context manager around a replica's unchanged response, whatever its status.

        The request goes to another replica only if a replica had not begun a response, or answered 502 or 503.
        """
        await self._resolve()
        tried: list[Replica] = []
        while True:
            await self._fleet.revive(self._model, self._avoided(tried))
            replica = self._pick(self._model, tried)
            tried.append(replica)
            is_last = len(tried) == MAX_ATTEMPTS or not self._fleet.has_other(self._model, tried)
            async with AsyncExitStack() as stack:
                stack.enter_context(replica.occupied(1))
                relayed = self._client(replica).relay(method, path, body, headers, model)
                try:
                    response = await stack.enter_async_context(relayed)
                except UpstreamError as error:
                    if is_last or not error.is_unanswered:
                        raise
                else:
                    if is_last or response.status not in UNPROCESSED_STATUSES:
                        yield response
                        return
            self._fleet.count_move(replica, "failed")

    async def _call(self, model: str, send: Callable[[UpstreamClient], Awaitable[T]], call: Call | None = None) -> T:
        """Return what `send` returns for one replica's client, or for another's if the replica failed.

        A `call` for which anything has arrived is not sent again.
        """
        await self._resolve()
        tried: list[Replica] = []
        while True:
            await self._fleet.revive(model, self._avoided(tried))
            replica = self._pick(model, tried)
            tried.append(replica)
            try:
                with replica.occupied(0 if call is None else len(call.outputs)):
                    return await send(self._client(replica))
            except UpstreamError as error:
                if not is_replica_failure(error):
                    raise
                if call is not None and call.progress:
                    self._failed.pop(replica, None)
                    self._failed[replica] = replica.checks_passed  # the latest is the last
                    self._fleet.count_move(replica, "failed")
                    raise
                if len(tried) == MAX_ATTEMPTS or not self._fleet.has_other(model, tried):
                    raise
            self._fleet.count_move(replica, "failed")

    async def _resolve(self) -> None:
        """Wait until replicas are known. Raises UpstreamUnreachable if none is."""
        if self._poller is not None:
            await self._poller.start()

    def _pick(self, model: str, tried: Sequence[Replica]) -> Replica:
        """Return the replica for the next call. Raises UpstreamUnreachable if there is none."""
        current, avoided = self._current, self._avoided(tried)
        if current is not None and current not in avoided and current.is_available and current.serves(model):
            return current
        self._current = self._fleet.choose(model, self._key, avoided)
        if self._current is None:
            raise UpstreamUnreachable(f"no upstream serves {model or 'any model'}; retry later")
        return self._current

    def _avoided(self, tried: Sequence[Replica]) -> list[Replica]:
        """Return the replicas that a call must not go to, which was sent to those `tried` before.

        These are also those that failed during a call of the request and have passed no health check since. If no other
        is left, it is only the latest of them, or none.
        """
        failed = [replica for replica, passed in self._failed.items() if replica.checks_passed == passed]
        choices = ([*tried, *failed], [*tried, *failed[-1:]])
        return next((each for each in choices if self._fleet.has_other(self._model, each)), list(tried))

    def _client(self, replica: Replica) -> UpstreamClient:
        client = replica.background if self._is_background else replica.client
        return client.route(self._model, bytes, self._session)
