"""The client of one vLLM server, over HTTP only.

Text becomes ids once (`tokenise_chat`); after that branches are continued by ids, which prefix caching makes cheap and
which is the same text to the token whatever the chat template does. Generation is streamed a few dozen tokens at a
time, so that what was generated is known when a request is cut; closing the connection is what aborts it.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import (
    AbstractAsyncContextManager,
)
from copy import copy
from functools import partial
from http import HTTPStatus
from textwrap import shorten
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

import aiohttp

from proxy.errors import (
    UpstreamCircuitOpen,
    UpstreamError,
    UpstreamProtocolError,
    UpstreamRefused,
    UpstreamTimeout,
    UpstreamUnreachable,
    detail,
)
from proxy.types import Call, Model, ObservedRequest, Output, UpstreamObserver
from proxy.upstream.branch_semaphore import BranchSemaphore
from proxy.upstream.circuit_breaker import BackgroundBreaker, Breaker, RetryBudget
from proxy.upstream.detokeniser import TokenEndings
from proxy.upstream.eager_task import EagerPayload
from proxy.upstream.health_check import HealthCheck, is_failure
from proxy.upstream.response_body import BodyTooLong, ByteAllowance, LineSplitter, parse_object, read_body

logger = logging.getLogger(__name__)

WAITING = ("vllm:num_requests_waiting{", "vllm:num_requests_waiting ")
"""How the lines of vLLM's metrics begin that count requests in its queue."""
CACHE = ("vllm:kv_cache_usage_perc{", "vllm:kv_cache_usage_perc ")
"""How those begin that tell which share of the KV cache is in use."""
CHECK_S: Final = 5.0
"""Seconds a check may take."""
UNAVAILABLE: Final = (HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT)
"""Statuses that say a request was not looked at."""
PAUSES_S: Final = (0.05, 0.5)
"""Seconds before a request that nothing came of is repeated, and again."""
NOTHING_CAME: Final = (
    aiohttp.ClientConnectorError,
    aiohttp.ClientOSError,
    aiohttp.ServerDisconnectedError,
    aiohttp.ConnectionTimeoutError,
)
"""What aiohttp raises when a request was not answered at all."""
OUT_OF_RESOURCES: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL})
"""Errors of a connection that say that this machine has no room for it."""
LEAST_BYTES: Final = 2**20
"""Bytes of a response that are read whatever was asked for."""
BYTES_PER_ID: Final = 16
"""Bytes that a token id may take in JSON."""
BYTES_PER_TOKEN: Final = 4096
"""Bytes of a stream that a token may take: a chunk of its own, with its text."""
BYTES_PER_TEXT: Final = 64
"""Bytes of text that a byte of a request for the text of token ids may bring."""
PAGE_BYTES: Final = 8 * 2**20
"""Bytes of a list of models, a page of metrics or an error that are read."""
MOST_MODELS: Final = 10_000
"""Models that an upstream may list."""
MOST_ID: Final = 2**31
"""Token ids, and lengths of models in tokens, are smaller."""
ENDS: Final = ("stop", "length")
"""Reasons for which a completion may end; with any other one it failed."""


_Ask = Callable[[], Awaitable[aiohttp.ClientResponse]]


class TooManyTokens(Exception):
    """A text has more tokens than were allowed for."""


class UpstreamLoad(NamedTuple):
    """How busy an upstream is; None is what it does not say."""

    waiting: int | None  # requests in its queues
    cache: float | None  # share of the KV cache in use, of the fullest engine


class UpstreamClient:
    """One upstream. Every method raises a kind of UpstreamError and nothing else."""

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
        self._url = url.rstrip("/").removesuffix("/v1")  # a password in it is sent as basic authentication
        self.display_url = _without_user(self._url)  # what may be told of it
        self._session = session
        self.read_timeout_s = read_timeout_s  # seconds without a byte after which a response is given up
        connect = session.timeout.sock_connect
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect, sock_read=read_timeout_s)
        self._check_timeout = aiohttp.ClientTimeout(total=CHECK_S, sock_connect=connect, sock_read=read_timeout_s)
        self._takes_priority = True  # as far as is known
        self.breaker = breaker or Breaker()
        self.branch_semaphore = branch_semaphore or BranchSemaphore()
        self._health_check = HealthCheck(self._url, session)
        self._checking: asyncio.Task[None] | None = None
        self._budget = RetryBudget()
        self.on_event = on_event  # called with "retried" and "ejected"
        self._suffixes: dict[tuple[str, str], list[int]] = {}
        self.token_endings = TokenEndings()
        self.observer = observer or UpstreamObserver()

    def for_background(self) -> UpstreamClient:
        """Return an engine of the same upstream for work that nobody waits for.

        Its failures do not count against the upstream, and its retries do not use up those of other requests.
        """
        other = copy(self)
        other.breaker, other._budget = BackgroundBreaker(), RetryBudget()
        return other

    async def close(self) -> None:
        """Give up a health check that is under way."""
        if self._checking is not None:
            self._checking.cancel()
            await asyncio.gather(self._checking, return_exceptions=True)

    def reset(self) -> None:
        """Take in that the upstream has been started anew: what it did before counts no more."""
        if self._checking is not None:
            self._checking.cancel()
        self.breaker.reset()

    async def check(self, seconds: float | None = None) -> None:
        """Find out whether the upstream is up, by requests of our own. Waits for a check under way, so long at most."""
        await asyncio.wait([self._begin_check()], timeout=seconds)

    def _begin_check(self) -> asyncio.Task[None]:
        if self._checking is None or self._checking.done():
            self.breaker.begin_check()
            self._checking = asyncio.create_task(self._check())
        return self._checking

    async def _check(self) -> None:
        is_up = await self._health_check.is_up()
        was_closed = self.breaker.is_closed
        if self.breaker.end_check(is_up=is_up):
            self._tell_ejected()
        elif is_up and was_closed:
            logger.warning("upstream %s failed several requests in a row but passes the health check", self.display_url)

    async def models(self, *, is_check: bool = False) -> list[Model]:
        """The models served now."""
        cards = await self.model_cards(is_check=is_check)
        try:
            return [Model(card["id"], _length(card.get("max_model_len"))) for card in cards]
        except (TypeError, ValueError, OverflowError):
            raise UpstreamProtocolError(f"{self.display_url}/v1/models is not a list of models") from None

    async def model_cards(self, *, is_check: bool = False) -> list[dict[str, Any]]:
        """The same as the upstream tells them; each has an `id`."""
        cards = (await self._json("GET", "/v1/models", is_check=is_check, most=PAGE_BYTES)).get("data")
        if isinstance(cards, list) and len(cards) > MOST_MODELS:
            raise UpstreamProtocolError(f"{self.display_url}/v1/models lists more than {MOST_MODELS} models")
        if not isinstance(cards, list) or not all(isinstance(c, dict) and isinstance(c.get("id"), str) for c in cards):
            raise UpstreamProtocolError(f"{self.display_url}/v1/models is not a list of models")
        return cards

    async def is_healthy(self) -> bool:
        """Whether the upstream says it is well."""
        try:
            async with self._request("GET", "/health", is_check=True) as response:
                return response.status == HTTPStatus.OK
        except UpstreamError:
            return False

    async def queue_length(self) -> int | None:
        """How many requests wait to be run; None if the upstream does not say."""
        return (await self.read_load()).waiting

    async def read_load(self) -> UpstreamLoad:
        """How busy the upstream is, as far as it says."""
        try:
            async with self._request("GET", "/metrics", is_check=True) as response:
                content = await read_body(response, PAGE_BYTES)
                page = content.decode("utf-8", "replace") if response.status == HTTPStatus.OK else ""
        except UpstreamError:
            page = ""
        waiting, cache = _gauges(page, WAITING), _gauges(page, CACHE)
        in_all = sum(waiting)
        return UpstreamLoad(int(in_all) if waiting and math.isfinite(in_all) else None, max(cache) if cache else None)

    async def tokenise_chat(self, body: Mapping[str, Any], most: int | None = None) -> list[int]:
        """Return the ids of a chat prompt; `body` holds `model`, `messages` and what the chat template takes.

        Raises TooManyTokens if they are far more than `most`.
        """
        return await self._tokenise({"add_generation_prompt": True, **body}, most)

    async def tokenise_prompt(self, model: str, text: str, most: int | None = None) -> list[int]:
        """Return the ids of a prompt that is a text. Raises TooManyTokens if they are far more than `most`."""
        return await self._tokenise({"model": model, "prompt": text}, most)

    async def tokenise_suffix(self, model: str, text: str) -> list[int]:
        """Ids of a text of ours that follows generated ids. Cached."""
        known = self._suffixes.get((model, text))
        if known is None:
            known = self._suffixes[model, text] = await self.tokenise_plain(model, text)
        return known

    async def tokenise_plain(self, model: str, text: str, *, is_observed: bool = True) -> list[int]:
        """Ids of a text, without the special tokens that a prompt begins with."""
        request = {"model": model, "prompt": text, "add_special_tokens": False}
        return await self._tokenise(request, is_observed=is_observed)

    async def _tokenise(
        self, request: Mapping[str, Any], most: int | None = None, *, is_observed: bool = True
    ) -> list[int]:
        """Return the ids that the upstream has for a request. Raises TooManyTokens if `most` do not nearly suffice."""
        sent = _as_json(request)
        longest = len(sent) if most is None else min(len(sent), most)  # a token is a byte at least, on the whole
        bound = LEAST_BYTES + BYTES_PER_ID * longest
        try:
            return self._ids(await self._json("POST", "/tokenize", sent, most=bound, is_observed=is_observed))
        except BodyTooLong:
            if most is not None and len(sent) > most:
                raise TooManyTokens from None
            raise

    async def detokenise(self, model: str, ids: Sequence[int], *, is_observed: bool = True) -> str:
        """The text of `ids`, special tokens included."""
        most = LEAST_BYTES + BYTES_PER_TEXT * BYTES_PER_ID * len(ids)
        sent = _as_json({"model": model, "tokens": list(ids)})
        reply = await self._json("POST", "/detokenize", sent, most=most, is_observed=is_observed)
        text = reply.get("prompt")
        if not isinstance(text, str):
            raise UpstreamProtocolError(f"{self.display_url}/detokenize gave no text")
        return text

    async def generate(self, model: str, call: Call) -> None:
        """Fill `call.outputs`, in the order of the prompts, `n` for each. Cancelling aborts the request upstream.

        It waits until there is room for so many branches; live calls go before those that have a priority.
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
        body = {
            **call.sampling,
            "model": model,
            "prompt": call.prompts[0] if len(call.prompts) == 1 else call.prompts,
            "n": call.n,
            "max_tokens": call.max_tokens,
            "return_token_ids": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "stream_interval": call.stream_interval,
            **({"priority": call.priority} if call.priority and self._takes_priority else {}),
            **({"cache_salt": call.salt} if call.salt else {}),
        }
        usage: Mapping[str, Any] | None = None
        told = self.observer.headers()
        async with self._request("POST", "/v1/completions", is_observed=False, json=body, headers=told) as response:
            await self._raise_for_status(response)
            if response.content_type == "application/json":  # no stream, whatever its status says
                answer = await read_body(response, PAGE_BYTES, self.read_timeout_s)
                raise self._refusal(response.status, self._parse(answer))
            async with asyncio.timeout(self.read_timeout_s) as silence:  # whatever it sends that brings nothing
                brought = 0
                async for chunk in self._events(response, call):
                    if "error" in chunk:
                        raise self._refusal(response.status, chunk)
                    usage = chunk.get("usage") or usage
                    ended = self._take(call, chunk)
                    if call.progress > brought:
                        brought = call.progress
                        silence.reschedule(asyncio.get_running_loop().time() + self.read_timeout_s)
                    for output in ended:
                        if call.on_finish is not None:
                            await call.on_finish(output)
        self._settle(call, usage)

    def relay(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str], *, is_urgent: bool = False
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        """The upstream's own response, whatever its status. Leaving the context closes, and so aborts, it."""
        payload = EagerPayload if is_urgent else aiohttp.BytesPayload
        return self._request(method, path, data=payload(body) if body else None, headers=headers)

    def _take(self, call: Call, chunk: Mapping[str, Any]) -> list[Output]:
        """Add a chunk to the outputs and return those that have ended.

        Tokens beyond the limit are kept: they were generated, and so are billed.
        """
        ended: list[Output] = []
        longest = 0
        try:
            for choice in chunk["choices"]:
                index = choice["index"]
                output = call.outputs[index if index >= 0 else len(call.outputs)]
                output.ids += _ids_of(choice["token_ids"])
                longest = max(longest, len(output.ids))
                if output.server_text is None:
                    output.text += choice["text"]
                else:
                    output.server_text += choice["text"]
                if choice["finish_reason"] is not None:
                    output.finish = choice["finish_reason"]
                    output.ended_by_token = output.finish == "stop" and not isinstance(choice.get("stop_reason"), str)
                    ended.append(output)
        except (KeyError, IndexError, TypeError):
            raise UpstreamProtocolError(
                f"{self.display_url}/v1/completions sent a chunk that is none of vLLM's; is it vLLM 0.10 or later?"
            ) from None
        if longest > call.max_tokens:
            words = f"sent {longest} tokens of a completion that may have {call.max_tokens}"
            raise UpstreamProtocolError(f"{self.display_url} {words}")
        return ended

    def _settle(self, call: Call, usage: Mapping[str, Any] | None) -> None:
        """Check that each completion came to a proper end and that the server's usage is what arrived."""
        if usage is None or any(output.finish is None for output in call.outputs):
            raise UpstreamProtocolError(f"{self.display_url} cut a stream before its end")
        for output in call.outputs:
            if output.finish not in ENDS:
                raise UpstreamProtocolError(
                    f"{self.display_url} ended a completion by {shorten(str(output.finish), 40)!r}"
                )
            if output.finish == "length" and len(output.ids) != call.max_tokens:  # who goes on with it would never end
                problem = f"ended a completion for its length after {len(output.ids)} of {call.max_tokens} tokens"
                raise UpstreamProtocolError(f"{self.display_url} {problem}")
        try:
            generated, prompt = usage["completion_tokens"], usage["prompt_tokens"]
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        except (KeyError, TypeError, AttributeError):
            generated = prompt = cached = None
        if not (type(generated) is int and type(prompt) is int and (cached is None or type(cached) is int)):
            raise UpstreamProtocolError(f"{self.display_url} sent a usage without token counts")
        if generated != call.generated:
            raise UpstreamProtocolError(f"{self.display_url} bills {generated} tokens and sent {call.generated}")
        sent = sum(map(len, call.prompts))  # each prompt once, whatever `n`; to ids vLLM adds nothing
        if prompt != sent:
            raise UpstreamProtocolError(f"{self.display_url} bills {prompt} tokens of prompts that have {sent}")
        if cached is not None and not 0 <= cached <= prompt:
            raise UpstreamProtocolError(f"{self.display_url} had {cached} tokens cached of prompts that have {prompt}")
        call.prompt_tokens, call.cached_tokens = prompt, cached

    # The seam where foreign errors end

    def _request(
        self,
        method: str,
        path: str,
        *,
        is_check: bool = False,
        is_telling: bool = True,
        is_observed: bool = True,
        **content: Any,
    ) -> _Exchange:
        """The upstream's response. A check is not repeated, its failure tells nothing of whether requests are served,
        and no watcher hears of it; nor does a success that is not `is_telling` tell anything."""
        timeout = self._check_timeout if is_check else self._timeout
        url = self._url + path
        ask = partial(self._session.request, method, url, timeout=timeout, allow_redirects=False, **content)
        watched = path if is_observed and not is_check else ""
        return _Exchange(self, ask, is_check, is_telling and not is_check, method, watched)

    async def open(self, ask: _Ask, *, is_check: bool) -> aiohttp.ClientResponse:
        """Return the response to `ask`, of which nothing has been read. Retries within the budget what nothing came of.

        Raises UpstreamCircuitOpen, or what aiohttp does.
        """
        await self._admit()
        self._budget.earn()
        for pause in (*(() if is_check else PAUSES_S), None):
            failed: Exception | None = None
            try:
                async with asyncio.timeout(self.read_timeout_s + CHECK_S):  # however slowly its head comes
                    response = await ask()
            except NOTHING_CAME as error:
                failed = error
            if failed is None and not is_failure(response.status):
                break
            if not is_check:
                self.fail(failed)
            if failed is None and response.status not in UNAVAILABLE:
                break  # it was looked at
            if pause is None or not self.breaker.is_closed or not self._budget.spend():
                break
            if failed is None:
                response.release()
            self.on_event("retried")
            await asyncio.sleep(pause)
            await self._admit()
        if failed is not None:
            raise failed
        return response

    async def _admit(self) -> None:
        """Return if requests may go out now. Raises UpstreamCircuitOpen."""
        if self.breaker.is_due:
            await self.check(CHECK_S)
        if not self.breaker.is_closed:
            message = f"upstream {self.display_url} has failed too often and is left alone for a while"
            raise UpstreamCircuitOpen(message, after=self.breaker.wait_s)

    def fail(self, error: BaseException | None = None) -> None:
        """Take in a request that came to nothing, by `error` or by what the upstream answered."""
        if isinstance(error, aiohttp.ClientConnectorError) and error.errno in OUT_OF_RESOURCES:
            return
        if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
            if self.breaker.fail_to_connect():
                self._tell_ejected()
        elif self.breaker.suspect():
            self._begin_check()

    def _tell_ejected(self) -> None:
        self.on_event("ejected")
        logger.error("upstream %s is down; it is left alone for %.0f s", self.display_url, self.breaker.wait_s)

    def check_head(self, response: aiohttp.ClientResponse) -> None:
        """Raise UpstreamProtocolError for a response that cannot be read, or handed on."""
        encoding = response.headers.get("content-encoding", "identity").lower()
        if encoding != "identity":
            raise UpstreamProtocolError(
                f"{self.display_url} sent content encoded as {encoding[:40]!r}, which was not asked for"
            )
        if not 200 <= response.status < 600:
            raise UpstreamProtocolError(f"{self.display_url} answered with status {response.status}")

    def mapped(self, error: Exception) -> UpstreamError:
        """A foreign error as one of ours."""
        if isinstance(error, aiohttp.ConnectionTimeoutError):
            return UpstreamUnreachable(f"upstream {self.display_url} does not accept connections")
        if isinstance(error, TimeoutError):
            return UpstreamTimeout(f"upstream {self.display_url} was silent for too long")
        if isinstance(error, aiohttp.ClientConnectorError):
            return UpstreamUnreachable(f"upstream {self.display_url} cannot be reached: {error.strerror}")
        return UpstreamProtocolError(f"upstream {self.display_url} broke off: {type(error).__name__}")

    async def _json(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        is_check: bool = False,
        is_observed: bool = True,
        most: int,
    ) -> dict[str, Any]:
        """Return the JSON object that the upstream answers the JSON `body` with, which may have `most` bytes."""
        flags = {"is_check": is_check, "is_telling": False, "is_observed": is_observed}
        content: dict[str, Any] = {}
        if body is not None:
            content = {"data": body, "headers": {"content-type": "application/json"}}
        async with self._request(method, path, **flags, **content) as response:
            await self._raise_for_status(response)
            reply = self._parse(await read_body(response, most, self.read_timeout_s))
            if reply.get("error"):
                raise self._refusal(response.status, reply)
        return reply

    async def _raise_for_status(self, response: aiohttp.ClientResponse) -> None:
        if response.status >= HTTPStatus.BAD_REQUEST:
            raise self._refusal(
                response.status, self._parse(await read_body(response, PAGE_BYTES, self.read_timeout_s))
            )

    async def _events(self, response: aiohttp.ClientResponse, call: Call) -> AsyncIterator[dict[str, Any]]:
        """Yield the JSON of each server-sent event until `[DONE]`, within bounds set by what `call` has brought."""
        longest = max(map(len, call.prompts))  # the server sends them back, to each completion
        lines = LineSplitter(LEAST_BYTES + BYTES_PER_ID * longest)
        least = LEAST_BYTES + BYTES_PER_ID * longest * len(call.outputs)
        allowance = ByteAllowance(least, BYTES_PER_TOKEN)
        async for data in response.content.iter_any():
            allowance.spend(len(data))
            for line in lines.take(data):
                if line.startswith(b"data: "):
                    payload = line[6:].strip()
                    if payload == b"[DONE]":
                        return
                    yield self._parse(payload)
            allowance.earn(call.progress)

    def _parse(self, payload: bytes) -> dict[str, Any]:
        try:
            return parse_object(payload)
        except UpstreamProtocolError as error:
            raise UpstreamProtocolError(f"{self.display_url}: {error}") from None

    def _refusal(self, status: int, reply: Mapping[str, Any]) -> UpstreamError:
        if "detail" in reply and "error" not in reply:  # FastAPI's own form
            if status == HTTPStatus.NOT_FOUND:
                return UpstreamProtocolError(f"{self.display_url} answered 404 to a path that vLLM has; is it vLLM?")
            return UpstreamRefused(status, detail(reply["detail"]))
        error = reply.get("error", reply)
        message = error.get("message") if isinstance(error, Mapping) else None
        if not isinstance(message, str):
            return UpstreamProtocolError(f"{self.display_url} answered {status} without a message")
        if status < HTTPStatus.BAD_REQUEST and isinstance(error.get("code"), int):
            status = error["code"]
        param = error.get("param")
        return UpstreamRefused(status, message, param=param if isinstance(param, str) else None)

    def _ids(self, reply: Mapping[str, Any]) -> list[int]:
        ids = reply.get("tokens")
        try:
            return _ids_of(ids)
        except TypeError:
            raise UpstreamProtocolError(f"{self.display_url}/tokenize gave no token ids") from None


class _Exchange(AbstractAsyncContextManager[aiohttp.ClientResponse]):
    """A request to an upstream, which learns from how it ends. Within it there is the response."""

    def __init__(
        self, engine: UpstreamClient, ask: partial[Any], is_check: bool, is_telling: bool, method: str, watched: str
    ) -> None:
        self._engine = engine
        self._ask = ask
        self._is_check = is_check
        self._is_telling = is_telling
        self._method = method
        self._watched = watched  # the path, if a watcher is to hear of it
        self._seen: ObservedRequest | None = None
        self._response: aiohttp.ClientResponse | None = None

    async def __aenter__(self) -> aiohttp.ClientResponse:
        if self._watched and (seen := self._engine.observer.request(self._method, self._watched)) is not None:
            self._seen = seen
            self._ask = partial(self._ask, headers={**self._ask.keywords.get("headers", {}), **seen.headers})
        try:
            self._response = await self._engine.open(self._ask, is_check=self._is_check)
        except BaseException as error:
            self._fail(error, is_counted=isinstance(error, NOTHING_CAME))
            raise
        try:
            self._engine.check_head(self._response)
        except UpstreamProtocolError as error:
            await self.__aexit__(None, error, None)
            raise
        return self._response

    async def __aexit__(self, _: object, error: BaseException | None, __: object) -> None:
        response = self._response
        if response is None:
            return
        response.release()  # what has not come to its end is closed
        if error is not None:
            self._fail(error, is_counted=is_failure(response.status))
            return
        if self._is_telling and not is_failure(response.status):
            self._engine.breaker.succeed()
        if self._seen is not None:
            self._seen.on_end(response.status, None)

    def _fail(self, error: BaseException, *, is_counted: bool) -> None:
        """Take in a failure, which may be counted already. Raises what is foreign as a kind of UpstreamError."""
        engine, response = self._engine, self._response
        is_foreign = isinstance(error, aiohttp.ClientError | TimeoutError | asyncio.IncompleteReadError)
        is_ours = is_foreign or isinstance(error, ValueError)
        ours = engine.mapped(error) if is_ours and isinstance(error, Exception) else error
        if self._seen is not None:
            self._seen.on_end(None if response is None else response.status, ours)
        is_failed = is_foreign or (response is not None and response.ok and _is_broken(error))
        if is_failed and not is_counted and not self._is_check:
            engine.fail(error)
        if ours is not error:
            raise ours from None


def _is_broken(error: BaseException) -> bool:
    """Whether what came in a response that began well says that the upstream failed."""
    if isinstance(error, UpstreamRefused):
        return is_failure(error.upstream_status)
    return isinstance(error, UpstreamProtocolError)


def _without_user(url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _ids_of(found: object) -> list[int]:
    """Return `found`, if it is token ids. Raises TypeError."""
    if not isinstance(found, list) or not all(type(one) is int for one in found):
        raise TypeError
    if found and not 0 <= min(found) <= max(found) < MOST_ID:
        raise TypeError
    return found


def _as_json(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, separators=(",", ":")).encode()


def _length(value: object) -> int:
    """Return a model's length in tokens; 0 if it is not told. Raises TypeError or ValueError."""
    length = int(value) if isinstance(value, int | float | str) and value else 0
    if not 0 <= length < MOST_ID:
        raise ValueError
    return length


def _gauges(page: str, beginnings: tuple[str, ...]) -> list[float]:
    """The values of a metric in a page of Prometheus'; none if one of them is no number."""
    found = [line.rpartition(" ")[2] for line in page.splitlines() if line.startswith(beginnings)]
    try:
        values = [float(one) for one in found]
    except ValueError:
        return []
    return values if all(map(math.isfinite, values)) else []
