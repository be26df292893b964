"""Discrete-event simulation of proxies in front of vLLM replicas, and of the requests that arrive there.

A replica generates one token for each of its running sequences per step, and a step takes longer the more of them there
are (`BatchCurve`). Sequences beyond `max_sequences` wait in order. A proxy process works on one thing at a time. An
episode is a sequence of rounds (`EpisodePlan`): the branches of a round generate side by side on one replica, and the
next round begins when the last one has ended and a proxy process has decided. Budgets are those of the proxy itself.

Left out: time to read prompts, the prefix cache, the network, preemption for lack of KV memory, and retries of refused
requests.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

from proxy.admission.token_budget import BudgetExceeded, Reservation, TokenBudgets

WARM_UP: Final = 0.2
"""Share of the arrivals, the first ones, that no figure counts: the fleet is still empty."""


class BatchCurve(NamedTuple):
    """Duration of one step of a replica: a line over the number of running sequences."""

    base_s: float
    sequence_s: float  # in addition, per running sequence

    def step_s(self, sequences: int) -> float:
        """Return the seconds of one step with this many running sequences."""
        return self.base_s + self.sequence_s * sequences

    @classmethod
    def fit(cls, points: Sequence[tuple[int, float]]) -> BatchCurve:
        """Return the least-squares line through (sequences, seconds of a step), with no coefficient below 0."""
        mean_n, mean_s = (sum(values) / len(points) for values in zip(*points, strict=True))
        spread = sum((n - mean_n) ** 2 for n, _ in points)
        slope = sum((n - mean_n) * (s - mean_s) for n, s in points) / spread if spread else 0.0
        slope = max(0.0, slope)
        return cls(max(0.0, mean_s - slope * mean_n), slope)


class EpisodePlan(NamedTuple):
    """Tokens that an episode generates: for each round, those of every branch that runs in it."""

    rounds: Sequence[Sequence[int]]
    is_right: bool

    @property
    def tokens(self) -> int:
        """Tokens of all branches and probes."""
        return sum(map(sum, self.rounds))


class Fleet(NamedTuple):
    """Sizes and speeds of a fleet."""

    replicas: int
    curve: BatchCurve
    max_sequences: int  # that a replica runs at a time
    proxies: int = 1  # processes
    request_cpu_s: float = 0.0  # of a proxy process, per request
    round_cpu_s: float = 0.0  # per round, in addition
    spill_load: float = 1.0  # running and waiting sequences per `max_sequences` beyond which another replica is used


class Budget(NamedTuple):
    """API keys and the tokens a minute that each may spend. Requests belong to keys by Zipf's law."""

    keys: int
    tokens_per_minute: int
    request_tokens: int  # cap of one request, which is reserved


class Outcome(NamedTuple):
    """Figures of one simulated load, over the arrivals after the warm-up."""

    offered: int  # requests
    refused: int  # by budgets
    right: int
    tokens: int
    seconds: float  # from the first counted arrival to the last counted end
    latencies_s: Sequence[float]  # of the requests that were served, sorted
    replica_busy: float  # share of the time in which a replica runs something, averaged over replicas
    most_per_key: int  # most tokens that one key spent within a minute

    @property
    def goodput(self) -> float:
        """Right answers a second."""
        return self.right / self.seconds if self.seconds else 0.0

    @property
    def p95_s(self) -> float:
        """The 95th percentile of the latency, in seconds; 0 if nothing was served."""
        return self.latencies_s[int(0.95 * (len(self.latencies_s) - 1))] if self.latencies_s else 0.0


def poisson(rate: float, rng: random.Random) -> Iterator[float]:
    """Yield arrival times of a Poisson process, in seconds."""
    now = 0.0
    while True:
        now += rng.expovariate(rate)
        yield now


def bursty(rate: float, rng: random.Random, burst: float = 4.0, period_s: float = 20.0) -> Iterator[float]:
    """Yield arrival times of bursts: for 1/`burst` of each period `burst` times the mean rate, otherwise none."""
    length = period_s / burst
    for busy in poisson(rate * burst, rng):  # `busy` counts time within bursts only
        yield busy // length * period_s + busy % length


class _Clock:
    """Simulated time, and the events that are due."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def at(self, when: float, call: Callable[[], None]) -> None:
        """Call something at a time, and at equal times in the order in which this was asked."""
        heapq.heappush(self._due, (when, next(self._numbers), call))

    def run(self) -> None:
        """Run until nothing is due."""
        while self._due:
            self.now, _, call = heapq.heappop(self._due)
            call()


class Replica:
    """A vLLM server. All running sequences progress at the same speed, so one count of tokens serves all of them."""

    def __init__(self, clock: _Clock, curve: BatchCurve, max_sequences: int) -> None:
        self.busy_s = 0.0
        self._clock = clock
        self._curve = curve
        self._max = max_sequences
        self._generated = 0.0  # tokens that a sequence running from the start would have
        self._since = 0.0  # time up to which `_generated` counts
        self._running: list[tuple[float, int, Callable[[], None]]] = []  # by the count at which they end
        self._waiting: deque[tuple[int, Callable[[], None]]] = deque()
        self._numbers = itertools.count()
        self._version = 0  # of the running sequences; an event of an older version is void

    @property
    def load(self) -> float:
        """Running and waiting sequences, per sequence that can run."""
        return (len(self._running) + len(self._waiting)) / self._max

    def generate(self, tokens: int, on_end: Callable[[], None]) -> None:
        """Generate `tokens` for one more sequence, and call `on_end` when it has ended."""
        self._advance()
        if len(self._running) < self._max:
            heapq.heappush(self._running, (self._generated + tokens, next(self._numbers), on_end))
        else:
            self._waiting.append((tokens, on_end))
        self._schedule()

    def _advance(self) -> None:
        elapsed, self._since = self._clock.now - self._since, self._clock.now
        if self._running:
            self.busy_s += elapsed
            self._generated += elapsed / self._curve.step_s(len(self._running))

    def _schedule(self) -> None:
        """Look again when the next sequence ends, unless the sequences change before."""
        self._version += 1
        if self._running:
            left = max(0.0, self._running[0][0] - self._generated)
            when = self._clock.now + left * self._curve.step_s(len(self._running))
            version = self._version
            self._clock.at(when, lambda: self._end_first(version))

    def _end_first(self, version: int) -> None:
        if version != self._version:
            return
        self._advance()
        self._generated = max(self._generated, self._running[0][0])  # free of rounding
        ended = []
        while self._running and self._running[0][0] <= self._generated:
            ended.append(heapq.heappop(self._running)[2])
        while self._waiting and len(self._running) < self._max:
            tokens, on_end = self._waiting.popleft()
            heapq.heappush(self._running, (self._generated + tokens, next(self._numbers), on_end))
        self._schedule()
        for on_end in ended:
            on_end()


class _ProxyProcess:
    """A process that works on one thing at a time, in order."""

    def __init__(self, clock: _Clock) -> None:
        self._clock = clock
        self._free_at = 0.0

    def work(self, seconds: float, then: Callable[[], None]) -> None:
        """Work for `seconds` as soon as everything before is done, and call `then` after that."""
        self._free_at = max(self._free_at, self._clock.now) + seconds
        self._clock.at(self._free_at, then)


class _Request:
    """One request on its way through the fleet."""

    def __init__(self, run: Simulation, plan: EpisodePlan, process: _ProxyProcess, key: int) -> None:
        self.plan = plan
        self.arrived = run.clock.now
        self.ended: float | None = None
        self.key = key
        self._run = run
        self._replica: Replica | None = None
        self._process = process
        self._round = 0
        self._left = 0
        self._reservation: Reservation | None = None

    def start(self) -> None:
        """Reserve tokens and begin the first round, or refuse the request."""
        budget = self._run.budget
        if budget is not None:
            try:
                self._reservation = self._run.budgets.reserve(
                    str(self.key), budget.tokens_per_minute, budget.request_tokens, self._run.clock.now
                )
            except BudgetExceeded:
                return
        self._process.work(self._run.fleet.request_cpu_s, self._next_round)

    def _next_round(self) -> None:
        if self._round == len(self.plan.rounds):
            self.ended = self._run.clock.now
            if self._reservation is not None:
                self._reservation.settle(self.plan.tokens, self.ended)
            return
        if self._replica is None:
            self._replica = self._run.choose_replica()
        branches = [tokens for tokens in self.plan.rounds[self._round] if tokens > 0]
        self._round += 1
        self._left = len(branches)
        if not branches:
            self._decide()
        for tokens in branches:
            self._replica.generate(tokens, self._end_branch)

    def _end_branch(self) -> None:
        self._left -= 1
        if not self._left:
            self._decide()

    def _decide(self) -> None:
        self._process.work(self._run.fleet.round_cpu_s, self._next_round)


class Simulation:
    """One run of a fleet under a load."""

    def __init__(self, fleet: Fleet, budget: Budget | None = None, seed: int = 0) -> None:
        self.fleet = fleet
        self.budget = budget
        self.clock = _Clock()
        self.budgets = TokenBudgets(None)
        self._rng = random.Random(seed)
        self._replicas = [Replica(self.clock, fleet.curve, fleet.max_sequences) for _ in range(fleet.replicas)]
        self._processes = [_ProxyProcess(self.clock) for _ in range(fleet.proxies)]

    def serve(self, plans: Sequence[EpisodePlan], arrivals: Iterator[float], requests: int) -> Outcome:
        """Serve requests with plans drawn at random, until the last one has ended."""
        asked: list[_Request] = []

        def arrive() -> None:
            plan, process = self._rng.choice(plans), self._processes[len(asked) % len(self._processes)]
            request = _Request(self, plan, process, self._key())
            asked.append(request)
            request.start()

        for when in itertools.islice(arrivals, requests):
            self.clock.at(when, arrive)
        self.clock.run()
        return self._outcome(asked)

    def choose_replica(self) -> Replica:
        """Return the replica of a new request: a random one, as by hashing, or the least loaded if that is full."""
        wanted = self._rng.choice(self._replicas)
        if wanted.load < self.fleet.spill_load:
            return wanted
        return min(self._replicas, key=lambda replica: replica.load)

    def _key(self) -> int:
        if self.budget is None:
            return 0
        keys = range(self.budget.keys)
        return self._rng.choices(keys, [1 / (number + 1) for number in keys])[0]

    def _outcome(self, asked: Sequence[_Request]) -> Outcome:
        counted = asked[int(WARM_UP * len(asked)) :]
        served = [request for request in counted if request.ended is not None]
        ends = [request.ended for request in served if request.ended is not None]
        seconds = max(ends) - counted[0].arrived if ends else 0.0
        whole = max(self.clock.now, 1e-9)
        return Outcome(
            offered=len(counted),
            refused=len(counted) - len(served),
            right=sum(request.plan.is_right for request in served),
            tokens=sum(request.plan.tokens for request in served),
            seconds=seconds,
            latencies_s=sorted(end - request.arrived for end, request in zip(ends, served, strict=True)),
            replica_busy=sum(replica.busy_s for replica in self._replicas) / whole / len(self._replicas),
            most_per_key=_most_within_a_minute(asked),
        )


def _most_within_a_minute(asked: Sequence[_Request]) -> int:
    """Return the most tokens that requests of one key cost which ended within a minute."""
    most, ended = 0, sorted((r for r in asked if r.ended is not None), key=lambda r: r.ended or 0.0)
    windows: dict[int, deque[tuple[float, int]]] = {}
    for request in ended:
        window, now = windows.setdefault(request.key, deque()), request.ended or 0.0
        window.append((now, request.plan.tokens))
        while window[0][0] <= now - 60:
            window.popleft()
        most = max(most, sum(tokens for _, tokens in window))
    return most
