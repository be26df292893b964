"""Client of one vLLM server, over HTTP only.

A prompt's text is tokenised once (`tokenise_chat`). After that, branches are continued by their token ids. Prefix
caching makes that cheap, and the chat template cannot change earlier tokens. Tokens are streamed a few dozen at a time,
so that those generated are known when a request is cancelled. Closing the connection aborts it at the server.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from typing import Any, Final

import aiohttp

from proxy.errors import UpstreamDisconnected, UpstreamError, UpstreamRefused
from proxy.gateway_headers import gateway_headers
from proxy.types import Call, Model, ReplicaStatus
from proxy.upstream.branch_semaphore import BranchSemaphore
from proxy.upstream.chat_stream import BYTES_PER_LOGPROB, add_chat_chunk, chat_request, finish_chat
from proxy.upstream.circuit_breaker import Breaker
from proxy.upstream.completion_stream import (
    BYTES_PER_TOKEN,
    MAX_TOKEN_ID,
    AddChunk,
    OptionalFields,
    add_chunk,
    check_token_ids,
    compact_json,
    completion_body,
    finish_call,
    parse_chunk,
    read_events,
    without_refused,
)
from proxy.upstream.connections.pooled_request import UpstreamResponse
from proxy.upstream.detokeniser import MOST_SUFFIXES, BoundedCache, TokenEndings
from proxy.upstream.load_metrics import UpstreamLoad, parse_load
from proxy.upstream.relayed_body import RelayedBody
from proxy.upstream.response_body import BYTES_PER_ID, MAX_PAGE_BYTES, MIN_BODY_BYTES, BodyTooLong, read_body
from proxy.upstream.transport import UpstreamTransport
from proxy.upstream_observer import UpstreamObserver

logger = logging.getLogger(__name__)

TEXT_BYTES_PER_REQUEST_BYTE: Final = 64
"""Maximum bytes of text that `/detokenize` may return per byte of its request."""
MAX_MODELS: Final = 10_000
"""Maximum number of models that an upstream may list."""


class TooManyTokens(Exception):
    """A text has more tokens than were allowed."""


@dataclass(slots=True)
class _Learnt:
    """Properties of a server that its first replies showed. Copies of a client share them."""

    fields: OptionalFields = field(default_factory=OptionalFields)  # all, until the server refuses one
    logged_missing: bool = False  # whether it has been logged that the server sends no log-probabilities


class UpstreamClient:
    """Client of one upstream. Every method raises a kind of UpstreamError and nothing else."""

    def __init__(
        self,
        url: str,
        session: aiohttp.ClientSession,
        *,
        read_timeout_s: float = 600,
        breaker: Breaker | None = None,
        branch_semaphore: BranchSemaphore | None = None,
        observer: UpstreamObserver | None = None,
        on_event: Callable[[str], object] = lambda _: None,
        session_header: str | None = None,
    ) -> None:
        """`on_event` is called with "retried" and "ejected" (the circuit breaker opened).

        `session_header` is the name of the header that carries the id of an episode; without it none is sent.
        """
        self.observer = observer or UpstreamObserver()
        self._transport = UpstreamTransport(
            url,
            session,
            read_timeout_s=read_timeout_s,
            breaker=breaker or Breaker(),
            observer=self.observer,
            on_event=on_event,
        )
        self.display_url = self._transport.display_url  # without credentials
        self.addresses: Sequence[str] = (self.display_url,)
        self.read_timeout_s = read_timeout_s
        self.branch_semaphore = branch_semaphore or BranchSemaphore()
        self.token_endings = TokenEndings()
        self._suffix_ids = BoundedCache[tuple[str, str], list[int]](MOST_SUFFIXES)  # by model and text
        self._learnt = _Learnt()
        self._session_header = session_header
        self._session: Mapping[str, str] = {}  # header with the id of the episode, if it is sent

    @property
    def breaker(self) -> Breaker:
        """The circuit breaker in front of the upstream."""
        return self._transport.breaker

    @property
    def is_available(self) -> bool:
        """Whether requests may go out: the circuit breaker is closed."""
        return self.breaker.is_closed

    @property
    def circuit_breaker(self) -> str:
        """State of the circuit breaker: `closed`, `open` or `half-open`."""
        return self.breaker.state.value

    @property
    def branches_in_flight(self) -> int:
        """Number of branches that are being generated."""
        return self.branch_semaphore.taken

    @property
    def calls_waiting(self) -> int:
        """Number of calls that wait for branch slots."""
        return self.branch_semaphore.waiting

    def replica_states(self) -> Sequence[ReplicaStatus]:
        """Return no states: there is one server."""
        return ()

    def route(self, model: str, key: Callable[[], bytes], session: str = "") -> UpstreamClient:
        """Return this client, or one that sends the id of the session with every generation."""
        if self._session_header is None or not session:
            return self
        other = copy(self)
        other._session = {self._session_header: session}
        return other

    def can_continue(self, error: UpstreamError) -> bool:
        """Return False: there is no other server that could continue a call."""
        return False

    def for_background(self) -> UpstreamClient:
        """Return a client of the same upstream for background work.

        Its failures do not count against the upstream, and its retries do not use up those of other requests.
        """
        other = copy(self)
        other._transport = self._transport.for_background()
        return other

    async def close(self) -> None:
        """Cancel a health check that is under way."""
        await self._transport.close()

    def reset(self) -> None:
        """Forget all failures: the upstream has been restarted."""
        self._transport.reset()
        self._learnt.fields = OptionalFields()

    # Health and load

    async def is_healthy(self) -> bool:
        """Return whether the upstream's `/health` answers 200, and requests may go out.

        An open circuit breaker closes if the upstream has come back. While nothing is sent, nothing else closes it.
        """
        await self._transport.try_to_close()
        try:
            async with self._transport.request("GET", "/health", is_check=True) as response:
                return response.status == HTTPStatus.OK
        except UpstreamError:
            return False

    async def queue_length(self) -> int | None:
        """Return how many requests wait in the upstream's queues; None if it does not report that."""
        return (await self.read_load()).waiting

    async def read_load(self) -> UpstreamLoad:
        """Return how busy the upstream is, as far as it reports that."""
        try:
            async with self._transport.request("GET", "/metrics", is_check=True) as response:
                content = await read_body(response, MAX_PAGE_BYTES)
                page = content.decode("utf-8", "replace") if response.status == HTTPStatus.OK else ""
        except UpstreamError:
            page = ""
        return parse_load(page)

    # Models

    async def models(self, *, is_check: bool = False) -> list[Model]:
        """Return the models that are served now."""
        return self.parse_models(await self.model_cards(is_check=is_check))

    def parse_models(self, cards: Sequence[Mapping[str, Any]]) -> list[Model]:
        """Return the models that cards describe. Raises UpstreamProtocolError."""
        try:
            return [card_model(card) for card in cards]
        except (TypeError, ValueError, OverflowError):
            raise self._transport.protocol_error("returned an invalid list of models from /v1/models") from None

    async def model_cards(self, *, is_check: bool = False) -> list[dict[str, Any]]:
        """Return the models as the upstream describes them. Each card has an `id`."""
        reply = await self._transport.request_json("GET", "/v1/models", is_check=is_check, max_bytes=MAX_PAGE_BYTES)
        cards = reply.get("data")
        if isinstance(cards, list) and len(cards) > MAX_MODELS:
            raise self._transport.protocol_error(f"lists more than {MAX_MODELS} models at /v1/models")
        if not isinstance(cards, list) or not all(isinstance(c, dict) and isinstance(c.get("id"), str) for c in cards):
            raise self._transport.protocol_error("returned an invalid list of models from /v1/models")
        return cards

    # Tokens

    async def tokenise_chat(self, body: Mapping[str, Any], max_tokens: int | None = None) -> list[int]:
        """Return the token ids of a chat. `body` holds `model`, `messages` and fields for the chat template.

        Raises TooManyTokens if there are far more than `max_tokens`.
        """
        return await self._tokenise({"add_generation_prompt": True, **body}, max_tokens)

    async def tokenise_prompt(self, model: str, text: str, max_tokens: int | None = None) -> list[int]:
        """Return the token ids of a text prompt. Raises TooManyTokens if there are far more than `max_tokens`."""
        return await self._tokenise({"model": model, "prompt": text}, max_tokens)

    async def tokenise_suffix(self, model: str, text: str) -> list[int]:
        """Return the token ids of a text that the proxy appends to generated ids. Cached."""
        ids = self._suffix_ids.get((model, text))
        if ids is None:
            ids = self._suffix_ids[model, text] = await self.tokenise_plain(model, text)
        return ids

    async def tokenise_plain(self, model: str, text: str, *, is_observed: bool = True) -> list[int]:
        """Return the token ids of a text without the special tokens that begin a prompt."""
        request = {"model": model, "prompt": text, "add_special_tokens": False}
        return await self._tokenise(request, is_observed=is_observed)

    async def _tokenise(
        self, request: Mapping[str, Any], max_tokens: int | None = None, *, is_observed: bool = True
    ) -> list[int]:
        """Return the ids for a request to `/tokenize`. Raises TooManyTokens if there are far more than `max_tokens`."""
        body = compact_json(request)
        likely_tokens = len(body) if max_tokens is None else min(len(body), max_tokens)  # a token is mostly ≥ 1 byte
        max_bytes = MIN_BODY_BYTES + BYTES_PER_ID * likely_tokens
        try:
            reply = await self._transport.request_json(
                "POST", "/tokenize", body, max_bytes=max_bytes, is_observed=is_observed
            )
        except BodyTooLong:
            if max_tokens is not None and len(body) > max_tokens:
                raise TooManyTokens from None
            raise
        try:
            return check_token_ids(reply.get("tokens"))
        except TypeError:
            raise self._transport.protocol_error("returned no token ids from /tokenize") from None

    async def detokenise(self, model: str, ids: Sequence[int], *, is_observed: bool = True) -> str:
        """Return the text of `ids`, special tokens included."""
        max_bytes = MIN_BODY_BYTES + TEXT_BYTES_PER_REQUEST_BYTE * BYTES_PER_ID * len(ids)
        body = compact_json({"model": model, "tokens": list(ids)})
        reply = await self._transport.request_json(
            "POST", "/detokenize", body, max_bytes=max_bytes, is_observed=is_observed
        )
        text = reply.get("prompt")
        if not isinstance(text, str):
            raise self._transport.protocol_error("returned no text from /detokenize")
        return text

    # Generation

    async def generate(self, model: str, call: Call) -> None:
        """Generate `call.n` outputs for each prompt and fill `call.outputs` in the order of the prompts.

        Waits until the branch semaphore has room for all branches. Calls without a priority go first. Cancelling
        aborts the request upstream.
        """
        async with self.branch_semaphore.hold(len(call.outputs), is_background=call.priority > 0):
            with self.observer.generation(model, call):
                fields = self._learnt.fields
                while True:
                    try:
                        await self._generate(model, call, fields)
                        break
                    except UpstreamRefused as error:
                        without = without_refused(call, fields, str(error))
                        if without is None:
                            raise
                        fields = without
                self._learnt.fields = fields
        if not self._learnt.logged_missing and call.lacks_log_probabilities:
            self._learnt.logged_missing = True
            logger.warning(
                "upstream %s sends no log-probabilities, so confidences are unknown to controllers", self.display_url
            )

    async def _generate(self, model: str, call: Call, fields: OptionalFields) -> None:
        longest = max(map(len, call.prompts))
        encode = partial(completion_body, model, call, fields)
        read = partial(parse_chunk, parse=self._transport.parse)
        usage = await self._stream("/v1/completions", encode, call, read, add_chunk, longest, BYTES_PER_TOKEN)
        if usage is None:
            message = f"upstream {self.display_url} ended a stream before all completions had finished"
            raise UpstreamDisconnected(message)
        finish_call(call, usage, self._transport.protocol_error)

    async def chat(self, model: Model, call: Call, body: Mapping[str, Any], messages: bytes) -> None:
        """Send a chat completion and fill the only output of `call`, a ChatOutput, while it arrives.

        `body` has the fields but `messages`, which is JSON already: calls share it, and images take long to encode.
        Waits until the branch semaphore has room. Calls without a priority go first; the upstream is not told of it,
        because many refuse one. Cancelling aborts the request upstream.
        """
        longest = model.max_length + call.max_tokens  # arguments of a tool may come in one chunk
        logprobs = body.get("top_logprobs")
        per_token = BYTES_PER_TOKEN + BYTES_PER_LOGPROB * (logprobs if type(logprobs) is int and logprobs > 0 else 0)
        async with self.branch_semaphore.hold(1, is_background=call.priority > 0):
            with self.observer.generation(model.id, call):
                encode = partial(_chat_json, chat_request(body, call), messages)
                read, path = self._transport.parse, "/v1/chat/completions"
                usage = await self._stream(path, encode, call, read, add_chat_chunk, longest, per_token)
                finish_chat(call, usage, self._transport.protocol_error)

    async def _stream(
        self,
        path: str,
        encode: Callable[[], bytes],
        call: Call,
        read: Callable[[bytes], Mapping[str, Any]],
        add: AddChunk,
        longest: int,
        per_token: int,
    ) -> Mapping[str, Any] | None:
        """Send a body, and `add` the chunks of its stream, which `read` parses. Return the server's usage report."""
        transport = self._transport
        usage: Mapping[str, Any] | None = None
        headers = {**self.observer.headers(), **gateway_headers(), **self._session, "content-type": "application/json"}
        request = transport.request("POST", path, is_generation=True, is_observed=False, encode=encode, headers=headers)
        async with request as response:
            await transport.raise_for_status(response)
            if response.content_type == "application/json":  # an error rather than a stream, whatever its status
                answer = await read_body(response, MAX_PAGE_BYTES, self.read_timeout_s)
                raise transport.refusal(response.status, transport.parse(answer))
            async with asyncio.timeout(self.read_timeout_s) as timeout:  # only tokens and finished outputs extend it
                received = 0

                def extend_timeout() -> None:
                    nonlocal received
                    if (progress := call.progress) > received:  # it counts all outputs, so it is not asked for often
                        received = progress
                        timeout.reschedule(asyncio.get_running_loop().time() + self.read_timeout_s)

                async for payloads in read_events(response, call, longest, per_token):
                    for payload in payloads:
                        chunk = read(payload)
                        if "error" in chunk:
                            raise transport.refusal(response.status, chunk)
                        usage = chunk.get("usage") or usage
                        ended = add(call, chunk, transport.protocol_error)
                        if ended:
                            extend_timeout()
                        for output in ended:
                            if call.on_finish is not None:
                                await call.on_finish(output)
                    extend_timeout()
        return usage

    # Pass-through

    def relay(
        self, method: str, path: str, body: RelayedBody, headers: Mapping[str, str], model: str = ""
    ) -> AbstractAsyncContextManager[UpstreamResponse]:
        """Return a context manager around the upstream's unchanged response. Leaving it aborts the request."""
        own = {**headers, **gateway_headers(), **self._session}
        return self._transport.request(method, path, headers=own, generated_by=model, relayed=body)


def _chat_json(fields: Mapping[str, Any], messages: bytes) -> bytes:
    """Return a chat completion as JSON. `messages` is JSON already."""
    return b'%b,"messages":%b}' % (compact_json(fields).removesuffix(b"}"), messages)


def card_model(card: Mapping[str, Any]) -> Model:
    """Return the model that a card describes. Raises TypeError, ValueError or OverflowError."""
    return Model(card["id"], _model_length(card.get("max_model_len")))


def _model_length(value: object) -> int:
    """Return a model's length in tokens; 0 if it is not reported. Raises TypeError or ValueError."""
    length = int(value) if isinstance(value, int | float | str) and value else 0
    if not 0 <= length < MAX_TOKEN_ID:
        raise ValueError
    return length
