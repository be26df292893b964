"""Request slots: a permit to run and a reservation of tokens for one request."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any, Final, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from proxy.admission.auth import Caller, limit_processes
from proxy.admission.fair_queue import FairQueue, Permit, QueueFull
from proxy.admission.limits import LimitUsage, Place, RequestLimits
from proxy.admission.token_bound import GENERATES_NOTHING, TokenBound, bound_request, check_prompts
from proxy.admission.token_budget import (
    BudgetExceeded,
    Caps,
    EpisodeCaps,
    Reservation,
    TokenLimit,
    in_each,
    request_limit,
    retry_after,
)
from proxy.admission.usage_meter import (
    PASSED_THROUGH,
    TAIL_BYTES,
    BoundedReplyMeter,
    UnboundedReplyMeter,
    last_reported_prompt,
    last_reported_tokens,
)
from proxy.admission.usage_tally import KeyTally, UsageTally
from proxy.errors import BadRequest, TooMany
from proxy.http.leases import Leases
from proxy.http.sse import StreamedResponse
from proxy.requests.generation_request import GenerationRequest
from proxy.settings import Settings
from proxy.telemetry.metrics import Metrics
from proxy.types import Model
from proxy.upstream.body_tap import BodySink, BodySource, nothing
from proxy.upstream.relayed_body import RelayedBody

logger = logging.getLogger(__name__)

T = TypeVar("T", bound="RequestSlot")

_REDIRECTION: Final = int(HTTPStatus.MULTIPLE_CHOICES)
_REFUSALS: Final = range(_REDIRECTION, HTTPStatus.INTERNAL_SERVER_ERROR)
"""Statuses of requests for which nothing was generated. RelayedBody knows about those that were not processed."""


class RequestSlot:
    """The permit and reserved tokens of one request. `async with` waits for the permit and releases the slot."""

    def __init__(
        self,
        permit: Permit,
        place: Place,
        reservation: Reservation,
        caps: EpisodeCaps,
        tally: KeyTally,
    ) -> None:
        self.caps = caps
        self.due = 0  # tokens charged if the slot is released without being settled
        self._permit = permit
        self._place = place
        self._reservation = reservation
        self._tally = tally
        self._is_tallied = False

    async def __aenter__(self) -> None:
        if not self._permit.is_ready:
            await self._place.wait()
            self._permit.make_ready()
        if not self._permit.granted.is_set():
            await self._permit.__aenter__()

    async def __aexit__(self, *_: object) -> None:
        self.release()

    def settle(self, cost: int) -> None:
        """Charge `cost` tokens. Only the first call counts."""
        self._reservation.settle(cost, time.monotonic())
        if cost > 0 and not self._is_tallied:
            self._add(cost)
        self._is_tallied = True

    def add_prompt(self, tokens: int) -> None:
        """Record the tokens of the prompt, which budgets do not count, for the usage of the key."""
        self._tally.add_prompt(tokens)

    def _add(self, cost: int) -> None:
        self._tally.add_served(cost)

    def release(self) -> None:
        """Charge the tokens that are due, unless the slot is settled, and free the rest and the permit."""
        self.settle(self.due)
        self._place.release()
        self._permit.release()


class PassthroughSlot(RequestSlot):
    """Slot of a forwarded request. Once it is sent, its bound is due, unless the reply shows a lower cost."""

    def __init__(
        self,
        permit: Permit,
        place: Place,
        reservation: Reservation,
        caps: EpisodeCaps,
        tally: KeyTally,
        bound: TokenBound,
        count: Callable[[int, str], object],
    ) -> None:
        super().__init__(permit, place, reservation, caps, tally)
        self._bound = bound
        self._count: Callable[[int, str], object] | None = count  # called once with the cost and its kind

    async def metered(self, response: Awaitable[Response], body: RelayedBody) -> Response:
        """Await the upstream's `response` to `body`, and return it, changed so that its end settles the cost."""
        bound = self._bound.max_tokens or 0
        try:
            answered = await response
        except BaseException:
            self.due = bound if body.is_sent else 0
            raise
        status = answered.status_code
        self.due = bound if body.is_lost or (body.is_sent and status not in _REFUSALS) else 0
        if self.due and isinstance(answered, StreamedResponse) and status < _REDIRECTION:
            bounded = BoundedReplyMeter(self._bound, is_stream=_is_event_stream(answered))
            answered.source = _metered(answered.source, self, bounded)
        if self.caps.tokens is None and isinstance(answered, StreamedResponse):
            unbounded = UnboundedReplyMeter(is_stream=_is_event_stream(answered))
            answered.source = _metered(answered.source, self, unbounded)
        elif self.caps.tokens is None:
            tail = bytes(answered.body[-TAIL_BYTES:])
            self.settle(last_reported_tokens(tail) or 0, PASSED_THROUGH, last_reported_prompt(tail))
        return answered

    def _add(self, cost: int) -> None:
        self._tally.add_passed(cost, self._prompt_tokens)

    def settle(self, cost: int, kind: str = PASSED_THROUGH, prompt_tokens: int = 0) -> None:
        self._prompt_tokens = prompt_tokens
        super().settle(cost)
        count, self._count = self._count, None
        if count is not None and cost > 0:
            count(cost, kind)


class RequestSlots:
    """Creates the request slots of one proxy. It needs a running event loop."""

    def __init__(self, settings: Settings, metrics: Metrics, limits: RequestLimits) -> None:
        self.episodes = FairQueue(settings.max_episodes, settings.queue)
        self.passthrough = FairQueue(settings.max_passed, settings.queue)
        self._limits = limits
        self._max_branches = settings.max_branches
        self._common = Caps(settings.max_branches, settings.max_total_tokens, settings.tokens_per_minute)
        self._processes = limit_processes(settings)
        self._metrics = metrics
        self.tally = UsageTally(metrics.count_key_tokens if settings.key_metrics else None)
        self._warned: set[str] = set()  # sources of caps that a warning has named
        self._queues = {"episode": self.episodes, "passed": self.passthrough}
        for kind, queue in self._queues.items():
            metrics.queue.labels(kind).set_function(lambda queue=queue: queue.waiting)  # type: ignore[misc]

    async def acquire_episode(self, request: Request, max_tokens: int | None) -> RequestSlot:
        """Return a slot for an episode. `max_tokens` is the request's own limit. Raises TooMany or LimitsAway."""
        caller: Caller = request.state.caller
        limit = self._request_limit(caller, max_tokens)
        return await self._acquire_episode(request, caller, EpisodeCaps(self.branch_cap(caller), *limit))

    async def acquire_episodes(self, request: Request, max_tokens: int | None, count: int) -> Sequence[RequestSlot]:
        """Return slots for `count` episodes of one request, one for each prompt. They share its limit evenly.

        Raises TooMany or LimitsAway, and BadRequest for more prompts than can ever be admitted or paid for at once.
        """
        caller: Caller = request.state.caller
        self._check_count(caller, count)
        limit = self._request_limit(caller, max_tokens)
        tokens, source = limit
        check_prompts(limit, count, is_clients=source == "tts.max_total_tokens")
        share = None if tokens is None else max(1, tokens // count)
        caps = EpisodeCaps(self.branch_cap(caller), share, f"the share of each of {count} prompts in {source}", count)
        return [await self._acquire_episode(request, caller, caps) for _ in range(count)]

    def token_bound(self, request: Request, parsed: GenerationRequest, model: Model) -> TokenBound:
        """Return the token bound of a forwarded request. Raises BadRequest if it exceeds the caller's limits."""
        caller: Caller = request.state.caller
        caps = caller.caps.within(self._common)
        requested = parsed.tts.max_total_tokens
        return bound_request(parsed, caps, model.max_length, caller.key, caller.caps, requested, self._processes)

    async def acquire_passthrough(self, request: Request, model: str, bound: TokenBound | None) -> PassthroughSlot:
        """Return a slot for a forwarded request. Without `bound` the request generates nothing.

        Raises TooMany or LimitsAway.
        """
        caller: Caller = request.state.caller

        def count(tokens: int, kind: str) -> None:
            request.state.passed_tokens = tokens  # for the access log
            self._metrics.child(self._metrics.tokens, model, "", "", kind).inc(tokens)

        bound = GENERATES_NOTHING if bound is None else bound
        caps = EpisodeCaps(self.branch_cap(caller), bound.max_tokens)
        return await self._acquire(
            request,
            "passed",
            caller,
            TokenLimit(bound.max_tokens, "as many as it may generate"),
            "set a smaller max_tokens",
            lambda permit, place, reservation: PassthroughSlot(
                permit, place, reservation, caps, self.tally.adder(caller.key), bound, count
            ),
        )

    def warn_of_cut(self, caps: EpisodeCaps) -> None:
        """Log that a cap ended an episode early, once per key, if the cap is only a share of a minute's tokens."""
        source = caps.share_source
        if source is None or source in self._warned:
            return
        self._warned.add(source)
        logger.warning(
            "a request ended early, at its cap of %s tokens: %s; set the key's limit `tokens`, or tts.max_total_tokens "
            "in requests, to choose the cap",
            caps.tokens,
            source,
        )

    def branch_cap(self, caller: Caller) -> int:
        """Return how many branches a request of the caller may open."""
        own = caller.caps.branches
        return self._max_branches if own is None else min(own, self._max_branches)

    def _request_limit(self, caller: Caller, max_tokens: int | None) -> TokenLimit:
        """Return the limit of a request of the caller whose own is `max_tokens`."""
        return request_limit(max_tokens, caller.key, caller.caps, self._common, self._processes)

    def _check_count(self, caller: Caller, count: int) -> None:
        """Raise BadRequest if `count` episodes of one request could not be admitted though there were no others."""
        most = self.episodes.most(caller.caps.episodes, share=_share(caller))
        if count <= most:
            return
        own = f"the limit `episodes` of key {caller.key}"
        raise BadRequest(
            f"prompt has {count} prompts, but at most {most} can run and wait at once; send fewer in a request, or ask "
            f"the operator to raise AUTOTTS_QUEUE or {'AUTOTTS_MAX_EPISODES' if caller.caps.episodes is None else own}",
            param="prompt",
        )

    async def _acquire_episode(self, request: Request, caller: Caller, caps: EpisodeCaps) -> RequestSlot:
        return await self._acquire(
            request,
            "episode",
            caller,
            TokenLimit(caps.tokens, caps.source),
            "set tts.max_total_tokens or the key's limit `tokens`" if caller.key else "set tts.max_total_tokens",
            lambda permit, place, reservation: RequestSlot(
                permit, place, reservation, caps, self.tally.adder(caller.key)
            ),
        )

    async def _acquire(
        self,
        request: Request,
        kind: str,
        caller: Caller,
        limit: TokenLimit,
        advice: str,
        make: Callable[[Permit, Place, Reservation], T],
    ) -> T:
        """Reserve the tokens of `limit` and a permit, and make a slot that is released with the request's leases.

        `advice` ends the message of a refusal: it says how the request could reserve fewer tokens.
        """
        try:
            reservation = await self._limits.reserve(caller.holder, caller.caps.tokens_per_minute, limit.tokens)
        except BudgetExceeded as error:
            message = f"{_budget_state(error, self._processes)}; {_reserves(limit)}; retry later, or {advice}"
            raise self._refuse("tokens_per_minute", message, error.after_s) from None
        try:
            place = await self._limits.place(kind, caller.holder, caller.caps.episodes)
        except BaseException:
            reservation.settle(0, time.monotonic())
            raise
        queue = self._queues[kind]
        try:
            permit = queue.enter(caller.holder, caller.caps.episodes, share=_share(caller), is_ready=place.is_held)
        except QueueFull as error:
            reservation.settle(0, time.monotonic())
            place.release()
            if error.own:
                message = f"{queue.waiting_of(caller.holder)} requests of key {caller.key} are waiting; retry later"
                raise self._refuse("key_queue_full", message, error.after_s) from None
            message = f"{queue.in_flight} requests are running and {queue.waiting} are waiting; retry later"
            raise self._refuse("queue_full", message, error.after_s) from None
        slot = make(permit, place, reservation)
        leases: Leases = request.state.leases
        leases.callback(slot.release)
        return slot

    def _refuse(self, reason: str, message: str, after_s: float) -> TooMany:
        self._metrics.refusals.labels(reason).inc()
        return TooMany(
            message,
            after=retry_after(after_s),
            code="queue_full" if reason == "queue_full" else "rate_limit_exceeded",
        )

    async def as_json(self, callers: Mapping[str, Caps]) -> dict[str, Any]:
        """Return running requests and spent tokens, in total and for each of `callers` by key name.

        `spent` has the last minute's tokens of keys that limit them, `since_start` those of each key in this process.
        With shared limits `spent` is over all proxies, and so are the running requests of keys that limit them.
        """
        used = await self._limits.usage(callers)

        def usage(holder: str, caps: Caps) -> dict[str, Any]:
            running = used[holder].running or {}
            return {
                "limits": caps._asdict(),
                "episodes": running.get("episode", self.episodes.taken[holder]),
                "passed": running.get("passed", self.passthrough.taken[holder]),
                "waiting": self.episodes.waiting_of(holder) + self.passthrough.waiting_of(holder),
                **_tokens(used[holder]),
                "since_start": self.tally.of(holder).as_json(),
            }

        total = {
            "limits": self._common._replace(episodes=self.episodes.places)._asdict(),
            "episodes": self.episodes.in_flight,
            "passed": self.passthrough.in_flight,
            "waiting": self.episodes.waiting + self.passthrough.waiting,
            **_tokens(used[""]),
            "since_start": self.tally.total.as_json(),
        }
        return {"all": total, "keys": {name: usage(name, caps) for name, caps in callers.items()}}


def _share(caller: Caller) -> int:
    """Return the divisor of the queue that gives the places in which requests of the caller may wait."""
    return 2 if caller.key else 1


def _budget_state(error: BudgetExceeded, processes: int) -> str:
    """Return why a budget has no room. The numbers of the common budget are for admins only."""
    if not error.holder:
        return "the requests of all clients leave too little of the server's limit AUTOTTS_TOKENS_PER_MINUTE"
    state = error.state
    return (
        f"key {error.holder} has spent {state.spent} of its {state.cap} tokens of this minute{in_each(processes)}, and "
        f"its running requests have reserved {state.reserved}"
    )


def _tokens(usage: LimitUsage) -> dict[str, int | None]:
    state = usage.tokens
    return {"spent": None if state is None else state.spent, "reserved": None if state is None else state.reserved}


def _reserves(limit: TokenLimit) -> str:
    """Return how many tokens a request reserves and what decides that."""
    return f"this request would reserve {limit.tokens} ({limit.source.rstrip(',')})"


def _is_event_stream(response: Response) -> bool:
    return response.headers.get("content-type", "").startswith("text/event-stream")


def _metered(source: BodySource, slot: PassthroughSlot, meter: BoundedReplyMeter | UnboundedReplyMeter) -> BodySource:
    """Wrap `source` so that `meter` reads the reply and the slot is settled at its end, also after an error."""

    feed = meter.feed

    async def metered(sink: BodySink) -> None:
        def take(piece: bytes, is_last: bool) -> Awaitable[None]:
            passed = feed(piece)
            if is_last:
                passed += meter.finish()
                slot.settle(*meter.charge)
            return sink(passed, is_last) if passed or is_last else nothing()

        try:
            await source(take)
        except BaseException:
            slot.settle(*meter.charge)
            raise

    return metered
