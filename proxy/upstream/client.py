"""Client of one vLLM server, over HTTP only.

A prompt's text is tokenised once (`tokenise_chat`). After that, branches are continued by their token ids. Prefix
caching makes that cheap, and the chat template cannot change earlier tokens. Generation is streamed a few dozen tokens
at a time, so that the generated tokens are known when a request is cancelled. Closing the connection aborts the request
at the server.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from copy import copy
from http import HTTPStatus
from typing import Any, Final

import aiohttp

from proxy.errors import UpstreamError, UpstreamRefused
from proxy.types import Call, Model, UpstreamObserver
from proxy.upstream.branch_semaphore import BranchSemaphore
from proxy.upstream.circuit_breaker import Breaker
from proxy.upstream.completion_stream import (
    MAX_TOKEN_ID,
    add_chunk,
    check_token_ids,
    completion_request,
    finish_call,
    read_events,
)
from proxy.upstream.detokeniser import TokenEndings
from proxy.upstream.eager_task import EagerPayload
from proxy.upstream.load_metrics import UpstreamLoad, parse_load
from proxy.upstream.response_body import BYTES_PER_ID, MAX_PAGE_BYTES, MIN_BODY_BYTES, BodyTooLong, read_body
from proxy.upstream.transport import UpstreamTransport

TEXT_BYTES_PER_REQUEST_BYTE: Final = 64
"""Maximum bytes of text that `/detokenize` may return per byte of its request."""
MAX_MODELS: Final = 10_000
"""Maximum number of models that an upstream may list."""


class TooManyTokens(Exception):
    """A text has more tokens than were allowed."""


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
    ) -> None:
        """`on_event` is called with "retried" and "ejected" (the circuit breaker opened)."""
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
        self.read_timeout_s = read_timeout_s
        self.branch_semaphore = branch_semaphore or BranchSemaphore()
        self.token_endings = TokenEndings()
        self._suffix_ids: dict[tuple[str, str], list[int]] = {}  # by model and text
        self._takes_priority = True  # until the server refuses the field

    @property
    def breaker(self) -> Breaker:
        """The circuit breaker in front of the upstream."""
        return self._transport.breaker

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

    # Health and load

    async def check(self, seconds: float | None = None) -> None:
        """Run a health check, or join the one under way. Returns after `seconds` at the latest."""
        await self._transport.check(seconds)

    async def is_healthy(self) -> bool:
        """Return whether the upstream's `/health` answers 200."""
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
        cards = await self.model_cards(is_check=is_check)
        try:
            return [Model(card["id"], _model_length(card.get("max_model_len"))) for card in cards]
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
        body = _compact_json(request)
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
        body = _compact_json({"model": model, "tokens": list(ids)})
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
                try:
                    await self._generate(model, call)
                except UpstreamRefused as error:
                    if not call.priority or "priority" not in str(error).lower():
                        raise
                    self._takes_priority = False
                    await self._generate(model, call)

    async def _generate(self, model: str, call: Call) -> None:
        transport = self._transport
        body = completion_request(model, call, takes_priority=self._takes_priority)
        usage: Mapping[str, Any] | None = None
        headers = self.observer.headers()
        request = transport.request("POST", "/v1/completions", is_observed=False, json=body, headers=headers)
        async with request as response:
            await transport.raise_for_status(response)
            if response.content_type == "application/json":  # an error rather than a stream, whatever its status
                answer = await read_body(response, MAX_PAGE_BYTES, self.read_timeout_s)
                raise transport.refusal(response.status, transport.parse(answer))
            async with asyncio.timeout(self.read_timeout_s) as timeout:  # only tokens and finished outputs extend it
                received = 0
                async for payload in read_events(response, call):
                    chunk = transport.parse(payload)
                    if "error" in chunk:
                        raise transport.refusal(response.status, chunk)
                    usage = chunk.get("usage") or usage
                    ended = add_chunk(call, chunk, transport.protocol_error)
                    if (progress := call.progress) > received:  # computed once: it counts all outputs
                        received = progress
                        timeout.reschedule(asyncio.get_running_loop().time() + self.read_timeout_s)
                    for output in ended:
                        if call.on_finish is not None:
                            await call.on_finish(output)
        finish_call(call, usage, transport.protocol_error)

    # Pass-through

    def relay(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str], *, is_eager: bool = False
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        """Return a context manager around the upstream's unchanged response, whatever its status.

        Leaving it aborts the request. With `is_eager` the request's body is written at once, which brings the first
        event of a stream earlier.
        """
        payload = EagerPayload if is_eager else aiohttp.BytesPayload
        return self._transport.request(method, path, data=payload(body) if body else None, headers=headers)


def _compact_json(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, separators=(",", ":")).encode()


def _model_length(value: object) -> int:
    """Return a model's length in tokens; 0 if it is not reported. Raises TypeError or ValueError."""
    length = int(value) if isinstance(value, int | float | str) and value else 0
    if not 0 <= length < MAX_TOKEN_ID:
        raise ValueError
    return length
