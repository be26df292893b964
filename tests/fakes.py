"""Hand-written fakes: a scripted environment, a vLLM with the same HTTP interface, and a raw upstream.

The environment and the vLLM run the same `Chain`s, so a controller must play the same episode over either.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from aiohttp import web

from controllers import Action, Advanced, Controller, Fact, Limits, Probed, State, Verb, answer, probe
from controllers.actions import TO_END
from controllers.signals import NO_SIGNALS, Signal, combine, interval_signals
from discovery.answers import Answer, Labels, read_answer
from proxy.probe_templates import LEAD, TEMPLATES, Family

LONGEST_CLOSING = TEMPLATES[Family.QWEN3].close
MODEL = "fake-model"
MAX_LENGTH = 2000
ASSISTANT = "<assistant>"
EOS = 0


def log_probability(token: int, position: int) -> float:
    """Return the log-probability that the fakes give to a token at a position of its branch."""
    return -((31 * token + 17 * position) % 89) / 50


@dataclass(frozen=True)
class Chain:
    """The text of one branch, one token per character, and its probe answers after each interval."""

    text: str
    probe_answers: tuple[str, ...] = ("",)  # after each interval; the last one repeats

    @property
    def tokens(self) -> int:
        """Number of characters plus the end token."""
        return len(self.text) + 1

    @property
    def log_probabilities(self) -> list[float]:
        """Log-probability of each token."""
        return [log_probability(token, at) for at, token in enumerate([*map(ord, self.text), EOS])]

    def probe_answer(self, tokens: int, interval: int) -> str:
        return self.probe_answers[min(max(tokens // interval, 1), len(self.probe_answers)) - 1]


def chain(answer: str, length: int, probe_answers: Sequence[str] = ("",), mark: str = "a") -> Chain:
    """Return a chain of `length` tokens that ends in `answer`. `mark` distinguishes chains of equal answers."""
    close = f"</think>\n\nIt is \\boxed{{{answer}}}"
    thought = "<think>" + mark * (length - 1 - len("<think>") - len(close))
    return Chain(thought + close, tuple(probe_answers))


class ScriptedEnvironment:
    """An environment without I/O that never suspends. `probe_cost` maps a branch's text to the cost of a probe.

    Facts of intervals have signals if `signals` has them; probes never do.
    """

    def __init__(
        self,
        chains: Sequence[Chain],
        interval: int,
        probe_cost: Callable[[str], int] = lambda _: 0,
        signals: frozenset[Signal] = NO_SIGNALS,
    ) -> None:
        self.chains = chains
        self.interval = interval
        self.probe_cost = probe_cost
        self.signals = signals
        self.at: list[int] = []
        self.labels = Labels()
        self.rounds: list[Sequence[Action]] = []

    async def execute(self, actions: Sequence[Action]) -> Sequence[Fact]:
        self.rounds.append(actions)
        return [fact for action in actions if (fact := self._one(action)) is not None]

    def _one(self, action: Action) -> Fact | None:
        if action.verb is Verb.BRANCH:
            self.at.append(0)
            return self._advance(len(self.at) - 1, action.intervals)
        if action.verb is Verb.CONTINUE:
            return self._advance(action.branch, action.intervals)
        if action.verb is Verb.PROBE:
            chain, at = self.chains[action.branch], self.at[action.branch]
            if at == chain.tokens:
                return Probed(action.branch, self._label(read_answer(chain.text)), 0)
            probe_answer = read_answer(LEAD + chain.probe_answer(at, self.interval) + "}")
            return Probed(action.branch, self._label(probe_answer), self.probe_cost(chain.text[:at]))
        return None

    def _advance(self, index: int, intervals: int) -> Advanced:
        chain, before = self.chains[index], self.at[index]
        self.at[index] = min(chain.tokens, before + min(intervals, TO_END) * self.interval)
        tokens = self.at[index] - before
        finished = self.at[index] == chain.tokens
        label = self._label(read_answer(chain.text)) if finished else None
        parts = self.interval_signals(index, self.at[index])[before // self.interval :] if tokens else ()
        lengths = [min(self.interval, self.at[index] - at) for at in range(before, self.at[index], self.interval)]
        signals = combine((length, *part) for length, part in zip(lengths, parts, strict=True)) if parts else ()
        return Advanced(index, -(-tokens // self.interval), tokens, finished, label, *signals)

    def interval_signals(self, index: int, tokens: int) -> list[tuple[int | None, int | None]]:
        """Return the signals of each interval in a branch's first tokens, if they are known."""
        if Signal.INTERVALS not in self.signals:
            return []
        values = self.chains[index].log_probabilities[:tokens]
        return [interval_signals(values[at : at + self.interval]) for at in range(0, tokens, self.interval)]

    def _label(self, answer: Answer | None) -> int | None:
        return None if answer is None else self.labels.label_of(answer.form, answer.written)


def episode(interval: int = 10, **limits: Any) -> State:
    """Return a fresh state with small limits."""
    return State(Limits(interval, **limits))


@asynccontextmanager
async def listening(app: web.Application, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[str]:
    """Serve an app and yield its URL. Its handlers are cancelled when their clients go, and at the end."""
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0)
    await runner.setup()
    await web.TCPSite(runner, host, port).start()
    try:
        yield f"http://{host}:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


class FakeVLLM:
    """The part of vLLM's HTTP interface the proxy uses. Ids are code points; generation follows `chains` in order.

    `fault` makes /v1/completions misbehave: "refuse", "garbage", "cut", "hang", "lie", "error_event", "foreign",
    "no_priority", "no_logprobs" (refused), "unsure" (no log-probabilities, though asked for), "unavailable" (503),
    "drop" (closed before an answer), "error_body" (an error with status 200), "echo" (an error that quotes the prompt),
    "babble" (the prompt where JSON should be), "broken" (500), "unmade" (501), "more" (ten times the tokens it may
    write), "short" and "shorter" (ended for its length after one token or two), "aborted" and "odd" (ended for another
    reason).
    "no_models" and "models_hang" make /v1/models misbehave instead.
    It applies from request number `fault_after` on, to `fault_times` requests if that is set.
    """

    def __init__(self, chains: Sequence[Chain] = (), interval: int = 10) -> None:
        self.chains = list(chains)
        self.interval = interval
        self.models = [MODEL]  # ids of the served models
        self.max_length = MAX_LENGTH  # that it reports
        self.opened = 0
        self.generated = 0
        self.running = 0
        self.branches = 0  # in flight
        self.most_branches = 0  # maximum of `branches`
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.fault = ""
        self.first = 1  # tokens of each output in its first chunk, after which most faults come
        self.fault_after = 0
        self.fault_times = 0
        self.decoded = 0  # requests for the text of token ids
        self.spares_text = False  # `fault` does not apply to requests whose prompt is a text
        self.growth = 0  # tokens added to the counters at each read of /metrics
        self.counted = 0
        self.health_checks = 0
        self.queued = 0  # queued requests that /metrics reports
        self.cache = 0.0  # share of the KV cache that /metrics reports as used
        self.looked = asyncio.Event()  # /metrics was read while `queued` was above 0
        self.is_polite = False  # invalid requests get status 400, as in vLLM; set before `serve`
        self.babble: Any = None  # extra event at the end of a stream
        self.usage: dict[str, Any] = {}  # overrides of the reported usage
        self.is_well = True  # /health returns 200, else 503
        self.greeting = ""  # text with which the chat template begins
        self.hanging = asyncio.Event()  # set while a request hangs
        self.gate = asyncio.Event()  # requests wait until it is set
        self.gate.set()
        self.busy = asyncio.Event()  # a request has begun
        self.idle = asyncio.Event()  # no request runs
        self.idle.set()
        self.url = ""

    @asynccontextmanager
    async def serve(self, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[FakeVLLM]:
        app = web.Application(middlewares=[_politely] if self.is_polite else [])
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_post("/tokenize", self._tokenise)
        app.router.add_post("/detokenize", self._detokenise)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_post("/v1/chat/completions", self._chat)
        async with listening(app, host, port) as self.url:
            yield self

    async def _models(self, _: web.Request) -> web.Response:
        if self.fault == "no_models":
            return web.Response(text="<html>")
        if self.fault == "models_hang":
            await asyncio.Event().wait()
        models = [{"id": model, "max_model_len": self.max_length} for model in self.models]
        return web.json_response({"object": "list", "data": models})

    async def _metrics(self, _: web.Request) -> web.Response:
        if self.queued:
            self.looked.set()
        labels = f'{{engine="0",model_name="{MODEL}"}}'
        self.counted += self.growth
        lines = [
            f"vllm:num_requests_waiting{labels} {self.queued}.0",
            f"vllm:kv_cache_usage_perc{labels} {self.cache}",
            f"vllm:generation_tokens_total{labels} {self.counted}.0",
        ]
        return web.Response(text="\n".join(lines) + "\n")

    async def _health(self, _: web.Request) -> web.Response:
        self.health_checks += 1
        return web.Response(status=200 if self.is_well else 503)

    async def _tokenise(self, request: web.Request) -> web.Response:
        body = await request.json()
        text = body.get("prompt")
        if text is None:
            text = self.greeting + "".join(f"<{m['role']}>{m['content']}" for m in body["messages"]) + ASSISTANT
        ids = [ord(char) for char in text]
        return web.json_response({"tokens": ids, "count": len(ids), "max_model_len": MAX_LENGTH})

    async def _detokenise(self, request: web.Request) -> web.Response:
        self.decoded += 1
        return web.json_response({"prompt": _text((await request.json())["tokens"])})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(await request.json())
        self.headers.append(dict(request.headers))
        if self.requests[-1].get("return_token_ids"):  # a branch; tests/chat_fake.py generates those
            error = {"message": "this fake generates no chat completions", "type": "BadRequestError", "code": 400}
            return web.json_response({"error": error}, status=400)
        return web.json_response({"id": "upstream", "choices": [], "echo": self.requests[-1]})

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        self.headers.append(dict(request.headers))
        branches = body.get("n", 1) * (len(body["prompt"]) if isinstance(body["prompt"][0], list) else 1)
        self.running += 1
        self.branches += branches
        self.most_branches = max(self.most_branches, self.branches)
        self.idle.clear()
        self.busy.set()
        try:
            return await self._generate(request, body)
        finally:
            self.running -= 1
            self.branches -= branches
            if not self.running:
                self.idle.set()

    async def _generate(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        await self.gate.wait()
        number = len(self.requests) - self.fault_after
        fault = self.fault if number > 0 and (not self.fault_times or number <= self.fault_times) else ""
        if self.spares_text and isinstance(body["prompt"], str):
            fault = ""
        if fault == "refuse":
            error = {"message": "no such thing", "type": "BadRequestError", "param": "top_k", "code": 400}
            return web.json_response({"error": error}, status=400)
        if fault == "unavailable":
            return web.json_response({"error": {"message": "not now", "code": 503}}, status=503)
        if fault in ("broken", "unmade"):
            status = 500 if fault == "broken" else 501
            return web.json_response({"error": {"message": "this went wrong", "code": status}}, status=status)
        if fault == "drop" and request.transport is not None:
            request.transport.abort()
            await asyncio.Event().wait()
        if fault == "error_body":
            return web.json_response({"error": {"message": "engine died", "code": 500}})
        if fault in ("echo", "babble"):
            quoted = str(body["prompt"])
            if not isinstance(body["prompt"], str):
                quoted = _text(prompts[0] if isinstance((prompts := body["prompt"])[0], list) else prompts)
            if fault == "echo":
                return web.json_response({"error": {"message": quoted, "code": 400}}, status=400)
            return web.Response(body=f"data: {quoted}\n\n".encode(), headers={"content-type": "text/event-stream"})
        if fault == "no_priority" and body.get("priority"):
            error = {"message": "Got priority 9 but Priority scheduling is not enabled.", "code": 400}
            return web.json_response({"error": error}, status=400)
        if fault == "no_logprobs" and "logprobs" in body:
            error = {"message": "logprobs are not supported", "type": "BadRequestError", "code": 400}
            return web.json_response({"error": error}, status=400)
        prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
        if isinstance(body["prompt"], str):  # a health check, which belongs to no chain
            written = [([ord("7")], "length")]
        else:
            written = [self._write(prompt, body) for prompt in prompts for _ in range(body.get("n", 1))]
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)

        def logprobs(index: int, ids: Sequence[int], since: int = 0) -> dict[str, Any] | None:
            if body.get("logprobs") is None or fault == "unsure":
                return None
            own = _text(prompts[index // body.get("n", 1)]).rpartition(ASSISTANT)[2]
            return completion_logprobs(ids, _text_of_ids(ids), len(own) + since, body)

        async def send(data: object) -> None:
            await response.write(b"data: " + json.dumps(data).encode() + b"\n\n")

        firsts = [self.first_of(ids) for ids, _ in written]
        for index, (ids, _) in enumerate(written):
            first = ids[: firsts[index]]
            await send({"choices": [_choice(index, first, None, logprobs(index, first))]})
        if fault == "hang":
            self.hanging.set()
            await asyncio.Event().wait()
        if fault == "garbage":
            await response.write(b"data: {not json\n\n")
            return response
        if fault == "foreign":
            await send({"choices": [{"index": 0, "delta": {"content": "x"}, "finish_reason": None}]})
        if fault == "error_event":
            await send({"error": {"message": "engine died", "type": "InternalServerError", "code": 500}})
            return response
        if fault == "cut":
            return response
        if fault in ("short", "shorter", "aborted", "odd"):
            finish: Any = {"aborted": "abort", "odd": {"a": 1}}.get(fault, "length")
            for index, _ in enumerate(written):
                await send({"choices": [_choice(index, [ord("x")] if fault == "shorter" else [], finish)]})
            generated = len(written) * (1 + (fault == "shorter"))
            await send(
                {"usage": {"prompt_tokens": sum(map(len, prompts)), "completion_tokens": generated}, "choices": []}
            )
            await response.write(b"data: [DONE]\n\n")
            return response
        if fault == "more":
            for _ in range(10):
                for index in range(len(written)):
                    await send({"choices": [_choice(index, [ord("m")] * body["max_tokens"], None)]})
                    self.generated += body["max_tokens"]
                await asyncio.sleep(0.01)
            return response
        for index, (ids, finish) in enumerate(written):
            at = firsts[index]
            await send({"choices": [_choice(index, ids[at:], finish, logprobs(index, ids[at:], at))]})
        total = sum(len(ids) for ids, _ in written)
        self.generated += total
        usage = {
            "prompt_tokens": sum(map(len, prompts)),
            "completion_tokens": total + (fault == "lie"),
            "prompt_tokens_details": {"cached_tokens": min(3, len(prompts[0]))},
            **self.usage,
        }
        await send({"choices": [], "usage": usage})
        if self.babble is not None:
            await send(self.babble)
        await response.write(b"data: [DONE]\n\n")
        return response

    def _write(self, prompt: list[int], body: dict[str, Any]) -> tuple[list[int], str]:
        text = _text(prompt).rpartition(ASSISTANT)[2]
        if text.endswith((LEAD, LONGEST_CLOSING)) or not any(chain.text.startswith(text) for chain in self.chains):
            return self._speak(text, body["max_tokens"])
        if not text:
            chain = self.chains[self.opened % len(self.chains)]
            self.opened += 1
        else:
            chain = self._find(text)
        ids = [*map(ord, chain.text), EOS][len(text) :][: body["max_tokens"]]
        return ids, "stop" if ids[-1] == EOS else "length"

    def first_of(self, ids: Sequence[int]) -> int:
        """Return how many tokens of an output are in its first chunk. The last one comes with the reason of its end."""
        return 1 if self.first == 1 else min(self.first, len(ids) - 1)

    def _speak(self, text: str, most: int) -> tuple[list[int], str]:
        """Return the answer to a probe, or the end of a reply that is being closed."""
        context, lead, begun = text.rpartition(LEAD)
        if not lead:
            context, begun = text, ""
        closings = ("", LONGEST_CLOSING, "\n\n")  # as `probing.closing` may have chosen
        thoughts = [context.removesuffix(closing) for closing in closings]
        if not lead and not any(c.text.startswith(t) for t in thoughts for c in self.chains):  # a reply that goes on
            context, _, begun = context.rpartition(LONGEST_CLOSING)
            thoughts = [context]
        thought, chain = next((t, c) for t in thoughts for c in self.chains if c.text.startswith(t))
        probe_answer = chain.probe_answer(len(thought), self.interval)
        reply = f"{probe_answer}}}" if lead else f"So \\boxed{{{probe_answer}}}"
        ids = [*map(ord, reply), EOS][len(begun) :][:most]
        return ids, "stop" if ids[-1] == EOS else "length"

    def _find(self, text: str) -> Chain:
        return next(chain for chain in self.chains if chain.text.startswith(text))


@web.middleware
async def _politely(request: web.Request, handler: Any) -> web.StreamResponse:
    try:
        response: web.StreamResponse = await handler(request)
        return response
    except web.HTTPException as error:
        status, message = error.status, error.reason
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError):
        status, message = 400, "this cannot be read"
    body = {"message": message, "type": "BadRequestError", "param": None, "code": status}
    return web.json_response({"error": body}, status=status)


def _choice(
    index: int, ids: Sequence[int], finish: str | None, logprobs: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {
        "index": index,
        "text": _text(ids),
        "logprobs": logprobs,
        "token_ids": list(ids),
        "finish_reason": finish,
        "stop_reason": None,
    }


def completion_logprobs(
    ids: Sequence[int], texts: Sequence[str], position: int, body: dict[str, Any]
) -> dict[str, Any]:
    """Return a choice's `logprobs` as vLLM sends it for new tokens; the first is at `position` of its branch."""
    tokens = [f"token_id:{token}" for token in ids] if body.get("return_tokens_as_token_ids") else list(texts)
    values = [log_probability(token, position + at) for at, token in enumerate(ids)]
    return {
        "text_offset": [sum(map(len, tokens[:at])) for at in range(len(tokens))],
        "token_logprobs": values,
        "tokens": tokens,
        "top_logprobs": [{token: value} for token, value in zip(tokens, values, strict=True)],
    }


def _text_of_ids(ids: Sequence[int]) -> list[str]:
    return ["<end>" if token == EOS else chr(token) for token in ids]


def _text(ids: Sequence[int]) -> str:
    return "".join(chr(i) for i in ids if i != EOS)


Decide = Callable[[State], list[Action]]


class Scripted:
    """A controller that plays given rounds, then answers with the leader."""

    def __init__(self, *rounds: Sequence[Action] | Decide) -> None:
        self.rounds = list(rounds)

    def decide(self, state: State) -> Sequence[Action]:
        if not self.rounds:
            return [answer(state.leader())]
        nxt = self.rounds.pop(0)
        return nxt(state) if callable(nxt) else nxt


class Eager:
    """Wrapper of a controller that probes every chain after every step."""

    def __init__(self, controller: Controller) -> None:
        self.controller = controller

    def decide(self, state: State) -> Sequence[Action]:
        while True:
            actions: list[Action] = []
            width = state.width
            for action in self.controller.decide(state):
                if action.verb is Verb.PROBE:
                    continue
                actions.append(action)
                if action.verb in (Verb.BRANCH, Verb.CONTINUE):
                    index = action.branch if action.verb is Verb.CONTINUE else width
                    width += action.verb is Verb.BRANCH
                    actions.append(probe(index))
            if actions:
                return actions


class Seen(NamedTuple):
    """A request as received."""

    method: str
    path: str
    headers: dict[str, str]  # names in lower case
    body: bytes


class RawUpstream:
    """An upstream that records requests byte for byte and replies with the given pieces of bytes.

    After each piece it waits for `go`; clear it to receive pieces one by one.
    """

    def __init__(self, pieces: Sequence[bytes] = (), status: int = 200, **headers: str) -> None:
        self.pieces = list(pieces)
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self.seen: list[Seen] = []
        self.is_well = False  # whether /health returns 200
        self.go = asyncio.Event()
        self.go.set()
        self.url = ""
        self.close: Callable[[], Awaitable[None]]  # afterwards connections are refused

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[RawUpstream]:
        app = web.Application(client_max_size=2**26)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        app.router.add_post("/{path:.*}", self._answer)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        self.close = runner.cleanup
        try:
            yield self
        finally:
            await runner.cleanup()

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": MODEL, "max_model_len": MAX_LENGTH}], "object": "list"})

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response(status=200 if self.is_well else 404)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.seen.append(Seen(request.method, request.path_qs, headers, await request.read()))
        response = web.StreamResponse(status=self.status, headers=self.headers)
        await response.prepare(request)
        for piece in self.pieces:
            await response.write(piece)
            await self.go.wait()
        return response
