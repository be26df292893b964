"""A request's turn: its place among those under way, and the tokens set aside for it; or the refusal, at once."""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import ExitStack
from http import HTTPStatus
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from proxy.admission import Admission, Full, Place
from proxy.callers import Caller
from proxy.errors import TooMany
from proxy.limits import Caps, OverBudget, Purses, Reserve, retry_after
from proxy.metrics import Metrics
from proxy.settings import Settings
from proxy.stream import Stream

GENERATES: Final = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
"""Paths whose answers cost tokens when they are handed on."""
_TAIL: Final = 4096
"""Bytes of an answer's end in which its usage stands."""
_USAGE: Final = re.compile(rb'"(?:completion|output)_tokens"\s{0,9}:\s{0,9}(\d{1,12})')


class Turn:
    """What one request was given. `async with` waits for its place; it is left once, settled or not."""

    def __init__(self, place: Place, reserve: Reserve, cap: int | None) -> None:
        self.cap = cap  # tokens it may spend
        self._place = place
        self._reserve = reserve

    async def __aenter__(self) -> None:
        await self._place.__aenter__()

    async def __aexit__(self, *_: object) -> None:
        self.leave()

    def metered(self, response: Response) -> Response:
        """A response that is handed on, whose end tells what it has cost."""
        if self.cap and isinstance(response, Stream) and response.status_code < HTTPStatus.BAD_REQUEST:
            response.source = _metered(response.source, self)
        return response

    def settle(self, cost: int) -> None:
        """It is over and has cost so many tokens."""
        self._reserve.settle(cost, time.monotonic())

    def leave(self) -> None:
        """It is over; what was set aside for it and not settled is free again."""
        self.settle(0)
        self._place.leave()


class Turns:
    """The turns of one proxy. Needs a running loop."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.episodes = Admission(settings.max_episodes, settings.queue)
        self.passed = Admission(settings.max_passed, settings.queue)
        self.purses = Purses(settings.tokens_per_minute)
        self._settings = settings
        self._metrics = metrics
        self._common = Caps(settings.max_branches, settings.max_total_tokens, settings.tokens_per_minute)
        for kind, admission in (("episode", self.episodes), ("passed", self.passed)):
            metrics.waiting.labels(kind).set_function(lambda admission=admission: admission.waiting)  # type: ignore[misc]

    def episode(self, request: Request, asked: int | None) -> Turn:
        """For a request that a controller serves and that caps its own tokens at `asked`. Raises TooMany."""
        caller: Caller = request.state.caller
        cap = caller.caps.within(self._common).cap(asked)
        return self._take(request, self.episodes, caller, cap)

    def passing(self, request: Request, body: bytes) -> Turn:
        """For a request that is handed on, and so not capped: what is set aside is a guess if it sets no bound itself.

        Raises TooMany.
        """
        caller: Caller = request.state.caller
        caps = caller.caps.within(self._common)
        asked = 0
        if caps.tokens_per_minute is not None and request.scope["path"] in GENERATES:
            asked = caps._replace(tokens=None).cap(_bound(json.loads(body))) or 0
        return self._take(request, self.passed, caller, asked)

    def settings_for(self, request: Request, turn: Turn) -> Settings:
        """The settings, as narrow as its caller's key and its turn make them."""
        caller: Caller = request.state.caller
        if turn.cap is None and caller.caps.branches is None:
            return self._settings
        branches = caller.caps.within(self._common).branches
        return self._settings.model_copy(update={"max_branches": branches, "max_total_tokens": turn.cap})

    def _take(self, request: Request, admission: Admission, caller: Caller, cap: int | None) -> Turn:
        now = time.monotonic()
        self.purses.forget(now)
        try:
            reserve = self.purses.reserve(caller.holder, caller.caps.tokens_per_minute, cap, now)
        except OverBudget as error:
            whose = f"key {caller.key}" if error.holder else "all together"
            words = f"{cap} tokens do not fit into what {whose} may spend in a minute; ask again later, or for less"
            raise self._refuse("tokens_per_minute", words, error.after_s) from None
        share = 2 if caller.key else 1
        try:
            place = admission.enter(caller.holder, caller.caps.episodes, share=share)
        except Full as error:
            reserve.settle(0, now)
            if error.own:
                words = f"{admission.waiting_of(caller.holder)} requests of key {caller.key} wait; ask again later"
                raise self._refuse("key_queue_full", words, error.after_s) from None
            words = f"{admission.in_flight} requests are under way and {admission.waiting} wait; ask again later"
            raise self._refuse("queue_full", words, error.after_s) from None
        turn = Turn(place, reserve, cap)
        held: ExitStack = request.state.held
        held.callback(turn.leave)
        return turn

    def _refuse(self, reason: str, words: str, after_s: float) -> TooMany:
        self._metrics.refusals.labels(reason).inc()
        code = "queue_full" if reason == "queue_full" else "rate_limit_exceeded"
        return TooMany(words, after=retry_after(after_s), code=code)

    def as_json(self, callers: Mapping[str, Caps]) -> dict[str, Any]:
        """What is under way and what the last minute has cost, for all together and for each of `callers`."""
        now = time.monotonic()

        def of(holder: str, caps: Caps) -> dict[str, Any]:
            window = self.purses.windows.get(holder)
            return {
                "limits": caps._asdict(),
                "episodes": self.episodes.taken[holder],
                "passed": self.passed.taken[holder],
                "waiting": self.episodes.waiting_of(holder) + self.passed.waiting_of(holder),
                "spent": 0 if window is None else window.spent(now),
                "reserved": 0 if window is None else window.reserved,
            }

        common = self.purses.common
        together = {
            "limits": self._common._replace(episodes=self.episodes.places)._asdict(),
            "episodes": self.episodes.in_flight,
            "passed": self.passed.in_flight,
            "waiting": self.episodes.waiting + self.passed.waiting,
            "spent": None if common is None else common.spent(now),
            "reserved": None if common is None else common.reserved,
        }
        return {"all": together, "keys": {name: of(name, caps) for name, caps in callers.items()}}


class Held(Response):
    """A response after which what its request holds is let go, however it ends."""

    def __init__(self, response: Response, held: ExitStack) -> None:
        self.response = response
        self.held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.held:
            await self.response(scope, receive, send)


async def _metered(source: AsyncGenerator[bytes], turn: Turn) -> AsyncGenerator[bytes]:
    """What `source` yields; the usage at its end is what `turn` has cost. Without one it is what was set aside."""
    tail, cost = b"", turn.cap or 0
    try:
        async for data in source:
            tail = (tail + data)[-_TAIL:]
            yield data
        if said := _USAGE.findall(tail):
            cost = int(said[-1])
    finally:
        turn.settle(cost)
        await source.aclose()


def _bound(body: Mapping[str, Any]) -> int | None:
    """Tokens a request that is handed on may generate at most by its own words."""
    given = [body.get(name) for name in ("max_completion_tokens", "max_output_tokens", "max_tokens")]
    most = next((one for one in given if type(one) is int and one > 0), None)
    n = body.get("n")
    return None if most is None else most * (n if type(n) is int and n > 0 else 1)
