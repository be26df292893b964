"""The client of one vLLM server, over HTTP only.

Text becomes ids once (`tokenise_chat`); after that branches are continued by ids, which prefix caching makes cheap and
which is the same text to the token whatever the chat template does. Generation is streamed a few dozen tokens at a
time, so that what was generated is known when a request is cut; closing the connection is what aborts it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, NamedTuple

import aiohttp

from proxy.errors import UpstreamError, UpstreamNonsense, UpstreamRefused, UpstreamTimeout, UpstreamUnreachable

STREAM_INTERVAL = 64
"""Tokens vLLM gathers into one chunk: fewer costs CPU, more loses count when a request is aborted."""
WAITING = ("vllm:num_requests_waiting{", "vllm:num_requests_waiting ")
"""How the lines of vLLM's metrics begin that count requests in its queue."""


class Model(NamedTuple):
    """A model the upstream serves."""

    id: str
    max_length: int  # tokens, prompt included


@dataclass(slots=True)
class Output:
    """What one prompt has become so far; filled while it streams."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish: str | None = None  # "stop", "length" or, while running or cut, None
    at_eos: bool = False  # it ended by the model's end token, which is the last of `ids`


@dataclass(slots=True)
class Call:
    """One completion request: every prompt `n` times with the same sampling."""

    prompts: Sequence[Sequence[int]]
    max_tokens: int
    sampling: Mapping[str, Any]
    n: int = 1
    priority: int = 0  # larger is later, where the server schedules by priority
    outputs: list[Output] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int | None = None  # as the server reports it: of one prompt only when there are several
    on_finish: Callable[[Output], None] | None = None  # told of each output when it ends; may raise to cut the rest

    def __post_init__(self) -> None:
        self.outputs = [Output() for _ in range(len(self.prompts) * self.n)]


class Engine:
    """One upstream. Every method raises a kind of UpstreamError and nothing else."""

    def __init__(self, url: str, session: aiohttp.ClientSession, *, read_timeout_s: float = 600) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._session = session
        self._read_timeout_s = read_timeout_s
        self._takes_priority = True  # as far as is known
        self._suffixes: dict[tuple[str, str], list[int]] = {}

    async def models(self) -> list[Model]:
        """The models served now."""
        listing = await self._json("GET", "/v1/models")
        try:
            return [Model(card["id"], int(card.get("max_model_len") or 0)) for card in listing["data"]]
        except (KeyError, TypeError, ValueError):
            raise UpstreamNonsense(f"{self.url}/v1/models is not a list of models") from None

    async def healthy(self) -> bool:
        """Whether the upstream says it is well."""
        try:
            async with self._request("GET", "/health", timeout_s=5) as response:
                return response.status == HTTPStatus.OK
        except UpstreamError:
            return False

    async def waiting(self) -> int | None:
        """How many requests wait to be run; None if the upstream does not say."""
        try:
            async with self._request("GET", "/metrics", timeout_s=5) as response:
                page = await response.text() if response.status == HTTPStatus.OK else ""
        except UpstreamError:
            return None
        found = [line.rpartition(" ")[2] for line in page.splitlines() if line.startswith(WAITING)]
        try:
            return int(sum(map(float, found))) if found else None
        except (ValueError, OverflowError):
            return None

    async def tokenise_chat(self, body: Mapping[str, Any]) -> list[int]:
        """Ids of a chat prompt; `body` holds `model`, `messages` and what the chat template takes."""
        return self._ids(await self._json("POST", "/tokenize", {"add_generation_prompt": True, **body}))

    async def tokenise_suffix(self, model: str, text: str) -> list[int]:
        """Ids of a text of ours that follows generated ids. Cached."""
        known = self._suffixes.get((model, text))
        if known is None:
            request = {"model": model, "prompt": text, "add_special_tokens": False}
            known = self._suffixes[model, text] = self._ids(await self._json("POST", "/tokenize", request))
        return known

    async def detokenise(self, model: str, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens included."""
        reply = await self._json("POST", "/detokenize", {"model": model, "tokens": list(ids)})
        text = reply.get("prompt")
        if not isinstance(text, str):
            raise UpstreamNonsense(f"{self.url}/detokenize gave no text")
        return text

    async def generate(self, model: str, call: Call) -> None:
        """Fill `call.outputs`, in the order of the prompts, `n` for each. Cancelling aborts the request upstream."""
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
            "stream_interval": STREAM_INTERVAL,
            **({"priority": call.priority} if call.priority and self._takes_priority else {}),
        }
        usage: Mapping[str, Any] | None = None
        async with self._request("POST", "/v1/completions", json=body) as response:
            await self._raise_for_status(response)
            async for chunk in self._events(response):
                if "error" in chunk:
                    raise self._refusal(response.status, chunk)
                usage = chunk.get("usage") or usage
                self._take(call, chunk)
        self._settle(call, usage)

    @asynccontextmanager
    async def relay(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The upstream's own response, whatever its status. Leaving the context closes, and so aborts, it."""
        async with self._request(method, path, data=body or None, headers=headers) as response:
            yield response

    def _take(self, call: Call, chunk: Mapping[str, Any]) -> None:
        ended: list[Output] = []
        try:
            for choice in chunk["choices"]:
                output = call.outputs[choice["index"]]
                output.ids += choice["token_ids"]
                output.text += choice["text"]
                if choice["finish_reason"] is not None:
                    output.finish = choice["finish_reason"]
                    output.at_eos = output.finish == "stop" and choice.get("stop_reason") is None
                    ended.append(output)
        except (KeyError, IndexError, TypeError):
            raise UpstreamNonsense(
                f"{self.url}/v1/completions sent a chunk that is none of vLLM's; is it vLLM 0.10 or later?"
            ) from None
        if call.on_finish is not None:
            for output in ended:
                call.on_finish(output)

    def _settle(self, call: Call, usage: Mapping[str, Any] | None) -> None:
        """Hold the server's usage against what arrived: a bill must add up."""
        if usage is None or any(output.finish is None for output in call.outputs):
            raise UpstreamNonsense(f"{self.url} cut a stream before its end")
        try:
            generated, call.prompt_tokens = int(usage["completion_tokens"]), int(usage["prompt_tokens"])
            call.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UpstreamNonsense(f"{self.url} sent a usage without token counts") from None
        received = sum(len(output.ids) for output in call.outputs)
        if generated != received:
            raise UpstreamNonsense(f"{self.url} bills {generated} tokens and sent {received}")

    # The seam where foreign errors end

    @asynccontextmanager
    async def _request(
        self, method: str, path: str, *, timeout_s: float | None = None, **content: Any
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        timeout = aiohttp.ClientTimeout(
            total=timeout_s, sock_connect=self._session.timeout.sock_connect, sock_read=self._read_timeout_s
        )
        try:
            async with self._session.request(
                method, self.url + path, timeout=timeout, allow_redirects=False, **content
            ) as response:
                yield response
        except aiohttp.ConnectionTimeoutError:
            raise UpstreamUnreachable(f"upstream {self.url} does not accept connections") from None
        except TimeoutError:
            raise UpstreamTimeout(f"upstream {self.url} was silent for too long") from None
        except aiohttp.ClientConnectorError as error:
            raise UpstreamUnreachable(f"upstream {self.url} cannot be reached: {error.strerror}") from None
        except (aiohttp.ClientError, asyncio.IncompleteReadError, ValueError) as error:
            raise UpstreamNonsense(f"upstream {self.url} broke off: {type(error).__name__}") from None

    async def _json(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        async with self._request(method, path, json=body) as response:
            await self._raise_for_status(response)
            reply = self._parse(await response.read())
        return reply

    async def _raise_for_status(self, response: aiohttp.ClientResponse) -> None:
        if response.status >= HTTPStatus.BAD_REQUEST:
            raise self._refusal(response.status, self._parse(await response.read()))

    async def _events(self, response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
        """The JSON of each server-sent event until `[DONE]`."""
        buffer = b""
        async for data in response.content.iter_any():
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                if line.startswith(b"data: "):
                    payload = line[6:].strip()
                    if payload == b"[DONE]":
                        return
                    yield self._parse(payload)

    def _parse(self, payload: bytes) -> dict[str, Any]:
        try:
            parsed = json.loads(payload)
        except ValueError:
            parsed = None
        if not isinstance(parsed, dict):
            raise UpstreamNonsense(f"{self.url} sent {len(payload)} bytes that are no JSON object")
        return parsed

    def _refusal(self, status: int, reply: Mapping[str, Any]) -> UpstreamError:
        error = reply.get("error", reply)
        message = error.get("message") if isinstance(error, Mapping) else None
        if not isinstance(message, str):
            return UpstreamNonsense(f"{self.url} answered {status} without a message")
        if status < HTTPStatus.BAD_REQUEST and isinstance(error.get("code"), int):
            status = error["code"]
        return UpstreamRefused(status, message, param=error.get("param"))

    def _ids(self, reply: Mapping[str, Any]) -> list[int]:
        ids = reply.get("tokens")
        if not isinstance(ids, list) or not all(isinstance(i, int) for i in ids):
            raise UpstreamNonsense(f"{self.url}/tokenize gave no token ids")
        return ids
