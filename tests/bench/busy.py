"""A busy server: many episodes at once against one vLLM with the embedded model, and which process is the bottleneck.

Right answers per minute and latencies of controllers, of self-consistency through the proxy, and of plain requests with
n = N to vLLM, whose votes this process counts. All answer the same questions. The proxy, its sandbox and vLLM are
processes of their own, whose processor time is read. The proxy's default controller is the discovered one, because
requests cannot name files.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

import aiohttp

from controllers.builtin import DEFAULT
from deploy.embedded.task import LENGTHS, Problem, held_back
from discovery.answers import canonical_answer
from tests.bench.live import MODEL, embedded_model
from tests.bench.process_usage import listener, processor_seconds, tree_seconds
from tests.bench.real_load import CHAMPION, SEED
from tests.bench.rows import Row, Size, percentile
from tests.bench.servers import ServerProcess, chat, lists_models, own_proxy

AT_ONCE: Final = (1, 4, 16, 64)
"""Numbers of concurrent episodes."""
QUICK_AT_ONCE: Final = (2,)
"""The number in a quick run: the smallest at which episodes are concurrent."""
QUICK_LENGTHS: Final = (4, 4)
"""Operations of the questions of a quick run."""
LEAST: Final = 10
"""Questions that are asked at each of them, if it is not a larger number itself."""
CHAINS: Final = 8
"""Chains of self-consistency and of the plain requests."""
BETA: Final = 0.25
"""On recordings, the controllers are about as accurate at this β as a vote of `CHAINS`."""
SETTINGS: Final = {
    "interval": "32",
    "finalise_tokens": "48",
    "probe_tokens": "8",
    "controller": str(CHAMPION / "champion.py"),
}
Ask = Callable[[Problem], Awaitable[bool]]
"""Asks a question and returns whether the answer is right."""


class Policy(NamedTuple):
    """A way to answer a question."""

    label: str
    tts: dict[str, Any] | None  # fields of `tts`; None: a plain request to vLLM


PLAIN: Final = Policy(f"raw n={CHAINS}", None)
VOTE: Final = Policy(f"SC@{CHAINS}", {"controller": f"self_consistency@{CHAINS}", "beta": BETA})
POLICIES: Final = (
    PLAIN,
    VOTE,
    Policy(f"default ({DEFAULT})", {"controller": DEFAULT, "beta": BETA}),
    Policy("cmc", {"controller": "cmc", "beta": BETA}),
    Policy("discovered (grammar-136-5)", {"beta": BETA}),
)


class Use(NamedTuple):
    """Processor seconds of each part of the server."""

    proxy: float
    sandbox: float
    vllm: float

    def since(self, earlier: Use) -> Use:
        """Return what was used between two readings."""
        return Use(*(late - early for late, early in zip(self, earlier, strict=True)))


class Outcome(NamedTuple):
    """Accuracy, duration, latencies and processor time of one policy at one number of concurrent episodes."""

    asked: int
    right: int
    seconds: float
    latencies_s: Sequence[float]
    use: Use

    @property
    def goodput(self) -> float:
        """Right answers per minute."""
        return 60 * self.right / self.seconds

    @property
    def p95_s(self) -> float:
        return percentile(self.latencies_s, 95)


async def rows(size: Size) -> list[Row]:
    """Return rows of goodput and latency, then rows of processor time."""
    outcomes: dict[tuple[int, str], Outcome] = {}
    levels = QUICK_AT_ONCE if size.is_quick else AT_ONCE
    warm_up = held_back(size.pick(1, 0))
    lengths = QUICK_LENGTHS if size.is_quick else LENGTHS
    async with (
        embedded_model(size) as upstream,
        own_proxy(upstream, SETTINGS, lists_models) as proxy,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http,
    ):
        read_use = partial(_use, proxy, listener(urlsplit(upstream).port or 0))
        asks = {policy.label: _ask(http, policy, upstream, proxy.url) for policy in POLICIES}
        await asyncio.gather(*(ask(problem) for ask in asks.values() for problem in warm_up))
        for at_once in levels:
            questions = held_back(max(at_once, size.pick(LEAST, 1)), SEED, lengths)
            for label, ask in asks.items():
                outcome = outcomes[at_once, label] = await serve(ask, questions, at_once, read_use)
                sys.stderr.write(f"busy: {at_once} at once, {label}: {outcome.seconds:.0f} s\n")
    return [
        *(_goodput_row(outcomes, at_once, policy.label) for at_once in levels for policy in POLICIES[1:]),
        *(_use_row(outcomes[levels[-1], policy.label], levels[-1], policy.label) for policy in POLICIES[1:]),
    ]


# Measurements


def _ask(http: aiohttp.ClientSession, policy: Policy, upstream: str, proxy: str) -> Ask:
    """Return the function that answers a question by a policy."""
    url, fields = (
        (upstream, {"n": CHAINS}) if policy.tts is None else (proxy, {"tts": policy.tts | {"answer": "boxed"}})
    )

    async def ask(problem: Problem) -> bool:
        message = {"role": "user", "content": problem.question}
        reply = await chat(http, url, {"model": MODEL, "messages": [message], **fields})
        answers = [canonical_answer(choice["message"]["content"] or "") for choice in reply["choices"]]
        votes = Counter(answer for answer in answers if answer is not None)
        return bool(votes) and votes.most_common(1)[0][0] == problem.answer

    return ask


async def serve(ask: Ask, questions: Sequence[Problem], at_once: int, read_use: Callable[[], Use]) -> Outcome:
    """Ask all questions, never more than `at_once` together."""
    latencies: list[float] = []
    waiting = iter(questions)
    right = 0

    async def client() -> None:
        nonlocal right
        for problem in waiting:
            asked = time.perf_counter()
            is_right = await ask(problem)  # `right` must not be read before
            right += is_right
            latencies.append(time.perf_counter() - asked)

    used, began = read_use(), time.perf_counter()
    async with asyncio.TaskGroup() as clients:
        for _ in range(at_once):
            clients.create_task(client())
    seconds = time.perf_counter() - began
    return Outcome(len(questions), right, seconds, latencies, read_use().since(used))


def _use(proxy: ServerProcess, vllm: int) -> Use:
    alone = processor_seconds(proxy.pid, is_alone=True)
    return Use(alone, tree_seconds(proxy.pid) - alone, tree_seconds(vllm))


# Rows


def _goodput_row(outcomes: dict[tuple[int, str], Outcome], at_once: int, label: str) -> Row:
    mine, plain = outcomes[at_once, label], outcomes[at_once, PLAIN.label]
    vote = outcomes[at_once, VOTE.label]
    others = f"{PLAIN.label}: {_figures(plain)}"
    if mine is not vote:
        others += f"; {VOTE.label}: {vote.goodput:,.0f}"
    return Row(f"busy, {at_once} at once, {label}, right/min, p95", _figures(mine), others, _ratio(mine, plain))


def _figures(outcome: Outcome) -> str:
    return f"{outcome.goodput:,.0f}, {outcome.p95_s:.1f} s ({100 * outcome.right / outcome.asked:.0f} %)"


def _ratio(mine: Outcome, other: Outcome) -> str:
    return f"{mine.goodput / other.goodput:.2f}" if other.right else ""


def _use_row(outcome: Outcome, at_once: int, label: str) -> Row:
    """Return the processor time of a request in each process, and the rate at which the proxy's one core is full.

    The ratio is the proxy's time over vLLM's. With a vLLM that is faster by its inverse, the proxy is the bottleneck.
    """
    proxy, sandbox, vllm = (1000 * seconds / outcome.asked for seconds in outcome.use)
    share = 100 * outcome.use.proxy / outcome.seconds
    full = f"; full at {1000 / proxy:,.0f} requests/s" if proxy else ""
    return Row(
        f"busy, {at_once} at once, {label}: processor time of the proxy for a request, share of a core",
        f"{proxy:.1f} ms, {share:.0f} %{full}",
        f"sandbox: {sandbox:z.1f} ms; vLLM: {vllm:.0f} ms",
        f"{proxy / vllm:.3f}" if vllm else "",
    )
