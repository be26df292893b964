"""A request's turn: its permit among those under way, and the tokens set aside for it; or the refusal, at once."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack
from http import HTTPStatus
from typing import Any, Final, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from proxy.admission.auth import Caller
from proxy.admission.fair_queue import FairQueue, Permit, QueueFull
from proxy.admission.token_bound import GENERATES_NOTHING, TokenBound, bound_request
from proxy.admission.token_budget import BudgetExceeded, Caps, Reservation, TokenBudgets, request_limit, retry_after
from proxy.admission.usage_meter import (
    PASSED_THROUGH,
    TAIL,
    BoundedReplyMeter,
    UnboundedReplyMeter,
    last_reported_tokens,
)
from proxy.errors import TooMany, UpstreamCircuitOpen, UpstreamUnreachable
from proxy.http.sse import StreamedResponse
from proxy.requests.generation_request import GenerationRequest
from proxy.settings import Settings
from proxy.telemetry.metrics import Metrics
from proxy.types import Model
from proxy.upstream.body_tap import BodySink, BodySource

T = TypeVar("T", bound="RequestSlot")

_UNSEEN: Final = (HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE)
"""Statuses of an upstream's failures before which it has generated nothing."""


class RequestSlot:
    """What one request was given. `async with` waits for its permit; it is left once, settled or not."""

    def __init__(self, permit: Permit, reserve: Reservation, cap: int | None, cap_source: str = "") -> None:
        self.cap = cap  # tokens it may spend
        self.cap_source = cap_source  # who set the cap, as messages name it
        self.due = 0  # tokens it is taken to have cost if it is left without being settled
        self._place = permit
        self._reserve = reserve

    async def __aenter__(self) -> None:
        await self._place.__aenter__()

    async def __aexit__(self, *_: object) -> None:
        self.release()

    def settle(self, cost: int) -> None:
        """It is over and has cost so many tokens."""
        self._reserve.settle(cost, time.monotonic())

    def release(self) -> None:
        """It is over; what was set aside for it, and is neither settled nor due, is free again."""
        self.settle(self.due)
        self._place.release()


class PassthroughSlot(RequestSlot):
    """The turn of a request that is handed on. From when it is sent it is due in full, until its reply says less."""

    def __init__(
        self, permit: Permit, reserve: Reservation, bound: TokenBound, count: Callable[[int, str], object]
    ) -> None:
        super().__init__(permit, reserve, bound.most)
        self._bound = bound
        self._count: Callable[[int, str], object] | None = count  # told once what it has cost, and as which kind

    async def metered(self, asked: Awaitable[Response]) -> Response:
        """The response that comes of `asked`, which asks the upstream; its end tells what it has cost."""
        self.due = self._bound.most or 0
        try:
            response = await asked
        except (UpstreamUnreachable, UpstreamCircuitOpen):
            self.due = 0
            raise
        status = response.status_code
        if HTTPStatus.MULTIPLE_CHOICES <= status < HTTPStatus.INTERNAL_SERVER_ERROR or status in _UNSEEN:
            self.due = 0
        elif self.due and isinstance(response, StreamedResponse) and status < HTTPStatus.MULTIPLE_CHOICES:
            bounded = BoundedReplyMeter(self._bound, is_stream=_is_stream(response))
            response = response.with_source(_metered(response.source, self, bounded))
        if self.cap is None and isinstance(response, StreamedResponse):
            unbounded = UnboundedReplyMeter(is_stream=_is_stream(response))
            response = response.with_source(_metered(response.source, self, unbounded))
        elif self.cap is None:
            self.settle(last_reported_tokens(bytes(response.body[-TAIL:])) or 0)
        return response

    def settle(self, cost: int, kind: str = PASSED_THROUGH) -> None:
        super().settle(cost)
        count, self._count = self._count, None
        if count is not None and cost > 0:
            count(cost, kind)


class RequestSlots:
    """The turns of one proxy. Needs a running loop."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.episodes = FairQueue(settings.max_episodes, settings.queue)
        self.passthrough = FairQueue(settings.max_passed, settings.queue)
        self.budgets = TokenBudgets(settings.tokens_per_minute)
        self._settings = settings
        self._metrics = metrics
        self._common = Caps(settings.max_branches, settings.max_total_tokens, settings.tokens_per_minute)
        for kind, admission in (("episode", self.episodes), ("passed", self.passthrough)):
            metrics.queue.labels(kind).set_function(lambda admission=admission: admission.waiting)  # type: ignore[misc]

    def acquire_episode(self, request: Request, asked: int | None) -> RequestSlot:
        """For a request that a controller serves and that caps its own tokens at `asked`. Raises TooMany."""
        caller: Caller = request.state.caller
        cap, source = request_limit(asked, caller.key, caller.caps, self._common)
        return self._take(
            request, self.episodes, caller, cap, lambda permit, reserve: RequestSlot(permit, reserve, cap, source)
        )

    def acquire_episodes(self, request: Request, asked: int | None, count: int) -> Sequence[RequestSlot]:
        """Return turns for `count` episodes of one request, which share its cap evenly. Raises TooMany."""
        caller: Caller = request.state.caller
        cap, source = request_limit(asked, caller.key, caller.caps, self._common)
        share = None if cap is None else max(1, cap // count)
        source = f"the share of each of {count} prompts in {source}"

        def make(permit: Permit, reserve: Reservation) -> RequestSlot:
            return RequestSlot(permit, reserve, share, source)

        return [self._take(request, self.episodes, caller, share, make) for _ in range(count)]

    def token_bound(self, request: Request, parsed: GenerationRequest, model: Model) -> TokenBound:
        """What a request may generate that is handed on. Raises BadRequest if that may be more than its caller may."""
        caller: Caller = request.state.caller
        return bound_request(parsed, caller.caps.within(self._common), model.max_length, caller.key, caller.caps)

    def acquire_passthrough(self, request: Request, model: str, bound: TokenBound | None) -> PassthroughSlot:
        """For a request that is handed on; without a bound it generates nothing. Raises TooMany."""
        caller: Caller = request.state.caller

        def count(tokens: int, kind: str) -> None:
            self._metrics.tokens.labels(model, "", "", kind).inc(tokens)

        bound = GENERATES_NOTHING if bound is None else bound
        return self._take(
            request,
            self.passthrough,
            caller,
            bound.most,
            lambda permit, reserve: PassthroughSlot(permit, reserve, bound, count),
        )

    def settings_for(self, request: Request, turn: RequestSlot) -> Settings:
        """The settings, as narrow as its caller's key and its turn make them."""
        caller: Caller = request.state.caller
        if turn.cap is None and caller.caps.branches is None:
            return self._settings
        branches = caller.caps.within(self._common).branches
        return self._settings.model_copy(update={"max_branches": branches, "max_total_tokens": turn.cap})

    def _take(
        self,
        request: Request,
        admission: FairQueue,
        caller: Caller,
        cap: int | None,
        make: Callable[[Permit, Reservation], T],
    ) -> T:
        now = time.monotonic()
        self.budgets.forget(now)
        try:
            reserve = self.budgets.reserve(caller.holder, caller.caps.tokens_per_minute, cap, now)
        except BudgetExceeded as error:
            whose = f"key {caller.key}" if error.holder else "all together"
            words = f"{cap} tokens do not fit into what {whose} may spend in a minute; ask again later, or for less"
            raise self._refuse("tokens_per_minute", words, error.after_s) from None
        share = 2 if caller.key else 1
        try:
            permit = admission.enter(caller.holder, caller.caps.episodes, share=share)
        except QueueFull as error:
            reserve.settle(0, now)
            if error.own:
                words = f"{admission.waiting_of(caller.holder)} requests of key {caller.key} wait; ask again later"
                raise self._refuse("key_queue_full", words, error.after_s) from None
            words = f"{admission.in_flight} requests are under way and {admission.waiting} wait; ask again later"
            raise self._refuse("queue_full", words, error.after_s) from None
        turn = make(permit, reserve)
        leases: ExitStack = request.state.leases
        leases.callback(turn.release)
        return turn

    def _refuse(self, reason: str, words: str, after_s: float) -> TooMany:
        self._metrics.refusals.labels(reason).inc()
        code = "queue_full" if reason == "queue_full" else "rate_limit_exceeded"
        return TooMany(words, after=retry_after(after_s), code=code)

    def as_json(self, callers: Mapping[str, Caps]) -> dict[str, Any]:
        """What is under way and what the last minute has cost, for all together and for each of `callers`."""
        now = time.monotonic()

        def of(holder: str, caps: Caps) -> dict[str, Any]:
            window = self.budgets.windows.get(holder)
            nothing = None if caps.tokens_per_minute is None else 0  # only what has a cap is counted
            return {
                "limits": caps._asdict(),
                "episodes": self.episodes.taken[holder],
                "passed": self.passthrough.taken[holder],
                "waiting": self.episodes.waiting_of(holder) + self.passthrough.waiting_of(holder),
                "spent": nothing if window is None else window.spent(now),
                "reserved": nothing if window is None else window.reserved,
            }

        common = self.budgets.common
        together = {
            "limits": self._common._replace(episodes=self.episodes.places)._asdict(),
            "episodes": self.episodes.in_flight,
            "passed": self.passthrough.in_flight,
            "waiting": self.episodes.waiting + self.passthrough.waiting,
            "spent": None if common is None else common.spent(now),
            "reserved": None if common is None else common.reserved,
        }
        return {"all": together, "keys": {name: of(name, caps) for name, caps in callers.items()}}


class LeaseResponse(Response):
    """A response after which what its request holds is let go, however it ends."""

    def __init__(self, response: Response, leases: ExitStack) -> None:
        self.response = response
        self.leases = leases

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.leases:
            await self.response(scope, receive, send)


def _is_stream(response: Response) -> bool:
    return response.headers.get("content-type", "").startswith("text/event-stream")


def _metered(source: BodySource, turn: PassthroughSlot, bill: BoundedReplyMeter | UnboundedReplyMeter) -> BodySource:
    """What of `source` is the client's; `bill` reads all of it and is what `turn` has cost, however it ends."""

    async def metered(hand: BodySink) -> None:
        def read(piece: bytes, is_last: bool) -> Awaitable[None]:
            passed = bill.take(piece)
            if is_last:
                passed += bill.rest()
                turn.settle(*bill.booking)
            return hand(passed, is_last) if passed or is_last else _nothing()

        try:
            await source(read)
        except BaseException:
            turn.settle(*bill.booking)
            raise

    return metered


async def _nothing() -> None:
    pass
