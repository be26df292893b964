"""Interface of upstreams: one vLLM server (`UpstreamClient`), or a fleet of them (`FleetClient`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from proxy.errors import UpstreamError
from proxy.types import Call, Model, ReplicaStatus
from proxy.upstream.connections.pooled_request import UpstreamResponse
from proxy.upstream.detokeniser import TokenEndings
from proxy.upstream.load_metrics import UpstreamLoad
from proxy.upstream.relayed_body import RelayedBody
from proxy.upstream_observer import UpstreamObserver


class Upstream(Protocol):
    """Servers that generate. Every method raises a kind of UpstreamError and nothing else."""

    observer: UpstreamObserver
    read_timeout_s: float
    token_endings: TokenEndings

    @property
    def display_url(self) -> str:
        """Address without credentials, for logs and clients."""

    @property
    def addresses(self) -> Sequence[str]:
        """Address of each server without credentials; the name to look them up by if none is known."""

    @property
    def is_available(self) -> bool:
        """Whether requests may go out: a circuit breaker is closed."""

    @property
    def circuit_breaker(self) -> str:
        """State of the circuit breaker: `closed`, `open` or `half-open`; of several, the best."""

    @property
    def branches_in_flight(self) -> int:
        """Number of branches that are being generated."""

    @property
    def calls_waiting(self) -> int:
        """Number of calls that wait for branch slots."""

    def replica_states(self) -> Sequence[ReplicaStatus]:
        """Return the state of each replica; empty if there is one server only."""

    def route(self, model: str, key: Callable[[], bytes], session: str = "") -> Upstream:
        """Return the upstream for one request, all of whose calls go to one replica while that works.

        Requests with the same key and model go to the same replica, so that its prefix cache is used. `session` is the
        id of the request, which is sent along if the settings name a header for it.
        """

    def can_continue(self, error: UpstreamError) -> bool:
        """Return whether a call that failed with `error` may be continued by another replica, which is next then."""

    def for_background(self) -> Upstream:
        """Return the same upstream for background work, whose failures do not affect other requests."""

    async def close(self) -> None:
        """Cancel health checks that are under way."""

    def reset(self) -> None:
        """Forget all failures: the upstream has been restarted."""

    async def is_healthy(self) -> bool:
        """Return whether a server is healthy."""

    async def queue_length(self) -> int | None:
        """Return how many requests wait in a server's queues on average; None if that is not reported."""

    async def read_load(self) -> UpstreamLoad:
        """Return how busy the servers are on average, as far as they report that."""

    async def models(self, *, is_check: bool = False) -> list[Model]:
        """Return the models that are served now."""

    async def model_cards(self, *, is_check: bool = False) -> list[dict[str, Any]]:
        """Return the models as the servers describe them."""

    async def tokenise_chat(self, body: Mapping[str, Any], max_tokens: int | None = None) -> list[int]:
        """Return the token ids of a chat. Raises TooManyTokens."""

    async def tokenise_prompt(self, model: str, text: str, max_tokens: int | None = None) -> list[int]:
        """Return the token ids of a text prompt. Raises TooManyTokens."""

    async def tokenise_suffix(self, model: str, text: str) -> list[int]:
        """Return the token ids of a text that the proxy appends to generated ids."""

    async def tokenise_plain(self, model: str, text: str, *, is_observed: bool = True) -> list[int]:
        """Return the token ids of a text without the special tokens that begin a prompt."""

    async def detokenise(self, model: str, ids: Sequence[int], *, is_observed: bool = True) -> str:
        """Return the text of `ids`, special tokens included."""

    async def generate(self, model: str, call: Call) -> None:
        """Run a completion of token ids and fill the outputs of `call`."""

    async def chat(self, model: Model, call: Call, body: Mapping[str, Any], messages: bytes) -> None:
        """Send a chat completion and fill the only output of `call`."""

    def relay(
        self, method: str, path: str, body: RelayedBody, headers: Mapping[str, str], model: str = ""
    ) -> AbstractAsyncContextManager[UpstreamResponse]:
        """Return a context manager around a server's unchanged response, whatever its status.

        `model` is that of a generation, which the observer counts; empty for other requests.
        """
