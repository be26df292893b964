"""Cycles of the soak: traffic under disturbances, then calm, in which everything is compared and counted."""

from __future__ import annotations

import asyncio
import json
import random
import sqlite3
import sys
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from itertools import repeat, takewhile
from pathlib import Path
from typing import Any, Final

import aiohttp

from discovery.store import Store
from discovery.store.records import utc_now
from tests.bench.process_usage import resident_bytes
from tests.proxy.environment.test_votable import STEPS_UNTIL_ABORTED
from tests.soak.disturbances import DISTURBANCES, restart_vllm
from tests.soak.measurements import CounterTotals, HealthProbe, idle_resources, metrics, p99_ms, wait_until_idle
from tests.soak.stack import SoakStack, running_stack
from tests.soak.traffic import KINDS, WARM_UP, Client, Tally

UPSTREAM_FAULTS: Final = 0.05
"""Share of the generation requests that the relay spoils."""
WARM_UP_CYCLES: Final = 2
WARM_UP_EPISODES: Final = 1600
"""Cycles, and episodes in the store, after which memory, descriptors, tasks, processes and metrics may not grow.

SQLite's page cache, 2 MB for a connection, grows until 800 to 1,600 episodes are stored. However long the soak is, the
warm-up ends there, and the minutes of the soak begin.
"""
FILLERS: Final = 16
"""Clients that fill the store at once."""
LEAST_SERVED: Final = 0.75
"""Share of the short-lived canaries that must have served a request. Otherwise a leak of theirs would not show."""
MOST_GROWTH: Final = 0.05
"""Share by which memory may still grow."""
MOST_HEALTH_MS: Final = 50.0
"""Limit of the p99 of `/health`, beyond that of an idle server."""
STEADY_READINGS: Final = 4
"""Equal readings of vLLM's counter in a row, a quarter of a second apart, after which it counts as settled."""


@dataclass
class SoakReport:
    """Counts, bills and faults of the whole soak."""

    faults: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    sent: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    bills: dict[str, tuple[int, int]] = field(default_factory=dict)

    def say(self, line: str) -> None:
        """Add a line, and print it now."""
        self.lines.append(line)
        sys.stderr.write(line + "\n")

    def text(self) -> str:
        verdict = [f"WRONG: {fault}" for fault in self.faults] or ["nothing was wrong"]
        return "\n".join([*self.lines, *verdict]) + "\n"

    def add(self, tally: Tally) -> None:
        """Add what clients saw. Every request that was sent must have ended once."""
        self.sent += tally.sent
        self.outcomes += tally.outcomes
        self.faults += tally.faults
        if tally.sent.total() != tally.answers:
            self.faults.append(f"{tally.sent.total()} requests were sent and {tally.answers} ended")
        twice = set(self.bills) & set(tally.bills)
        self.faults += [f"the id {key} was answered twice" for key in twice]
        self.bills |= tally.bills


async def soak(folder: Path, seconds: float, clients: int, dice: random.Random) -> SoakReport:
    """Run for about so many seconds after the warm-up, at least two cycles."""
    report = SoakReport()
    async with running_stack(folder, dice) as stack:
        if not stack.has_small_disk:
            report.say("no disk can be mounted here: the store is never full")
        async with stack.serving(), aiohttp.ClientSession(connector=_connector()) as http:
            with HealthProbe(stack.url) as health:
                await _cycles(stack, http, report, seconds, clients, dice)
            p99, control = p99_ms(health.seconds), p99_ms(health.control_seconds)
            report.say(
                f"/health: p99 {p99:.1f} ms of {len(health.seconds)} requests; {control:.1f} ms of an idle server"
            )
            report.faults += [f"/health: {failure}" for failure in health.failures]
            if p99 > MOST_HEALTH_MS + control:
                report.faults.append(
                    f"the p99 of /health is {p99:.1f} ms, above {MOST_HEALTH_MS:.0f} + {control:.1f} ms"
                )
        await _check_store(stack, report)
        report.faults += [f"log: {each}" for each in tracebacks(stack.log.read_text())]
    report.faults += stack.faults
    report.say(f"{report.sent.total()} requests by kind: {dict(report.sent)}")
    report.say(f"outcomes: {dict(report.outcomes)}; upstream faults: {dict(stack.relay.faults)}")
    return report


async def _cycles(
    stack: SoakStack,
    http: aiohttp.ClientSession,
    report: SoakReport,
    seconds: float,
    clients: int,
    dice: random.Random,
) -> None:
    end, number, first = time.monotonic() + seconds, 0, None
    most_rss = 0.0
    while first is None or number < WARM_UP_CYCLES + 2 or time.monotonic() < end:
        number += 1
        restarts = number == WARM_UP_CYCLES + 1
        await _disturbed(stack, http, report, clients, dice, restarts)
        await _calm(stack, http, report, dice)
        now = await idle_resources(http, stack.url, stack.pid, stack.tasks, first)
        report.say(
            f"cycle {number}: {now.descriptors} descriptors, {len(now.tasks)} tasks, {now.processes} processes, "
            f"{now.rss_mb:.0f} MB, {now.reserved} reserved; {now.series} series name {now.controllers} of "
            f"{stack.installed} controllers from files; {report.sent.total()} requests so far"
        )
        if now.reserved:
            report.faults.append(f"cycle {number}: {now.reserved} tokens or slots are held while nothing runs")
        if number == WARM_UP_CYCLES:
            await _fill(stack, report, dice, seconds)
            first = await idle_resources(http, stack.url, stack.pid, stack.tasks, now)
            end = time.monotonic() + seconds
        elif first is not None:
            most_rss = max(most_rss, now.rss_mb)
            report.faults += [f"cycle {number}: {grown}" for grown in now.growth(first)]
    assert first is not None
    growth = most_rss / first.rss_mb - 1
    installed, served = stack.brief["installed"], stack.brief["served"]
    report.say(f"{served} of {installed} short-lived canaries served a request")
    if served < LEAST_SERVED * installed:
        report.faults.append(f"only {served} of {installed} short-lived canaries served a request")
    report.say(f"memory after warm-up: {first.rss_mb:.0f} MB, later at most {most_rss:.0f} MB ({growth:+.1%})")
    if growth > MOST_GROWTH:
        report.faults.append(f"memory grew by {growth:.1%}, above {MOST_GROWTH:.0%}")


async def _fill(stack: SoakStack, report: SoakReport, dice: random.Random, seconds: float) -> None:
    """Ask cheap requests until enough episodes are stored that SQLite's page cache is full."""
    tally, is_over = Tally(), asyncio.Event()
    async with aiohttp.ClientSession(connector=_connector()) as session:
        clients = [Client(stack.url, session, random.Random(dice.random()), tally) for _ in range(FILLERS)]
        asking = [asyncio.create_task(client.repeat(WARM_UP, is_over)) for client in clients]
        said = stored = await asyncio.to_thread(_stored, stack.store)
        while stored < WARM_UP_EPISODES:
            await asyncio.sleep(0.5)
            stored = await asyncio.to_thread(_stored, stack.store)
            if stored >= said + 200:
                said = stored
                report.say(f"warm-up: {stored} episodes are stored, {resident_bytes(stack.pid) / 2**20:.0f} MB")
        is_over.set()
        await asyncio.gather(*asking)
        if busy := await wait_until_idle(session, stack.url, stack.vllm.url):
            report.faults.append(f"two minutes after the warm-up there was still: {busy}")
    report.add(tally)
    size = stack.store.stat().st_size / 2**20
    report.say(
        f"warm-up: ended after {WARM_UP_CYCLES} cycles and {stored} stored episodes ({size:.1f} MB); every run stores "
        f"{WARM_UP_EPISODES} or more; the {seconds / 60:g} minutes begin now"
    )


def _stored(store: Path) -> int:
    with closing(sqlite3.connect(store)) as connection:
        return int(connection.execute("SELECT count(*) FROM episodes").fetchone()[0])


async def _disturbed(
    stack: SoakStack,
    http: aiohttp.ClientSession,
    report: SoakReport,
    clients: int,
    dice: random.Random,
    restarts: bool,
) -> None:
    """Let clients ask while everything is disturbed, and compare the bills with vLLM's counters."""
    tally, is_over, began = Tally(), asyncio.Event(), utc_now()
    totals = CounterTotals()
    before, generated = await totals.read(http, stack.url), await metrics(http, stack.vllm.url)
    reading = asyncio.create_task(totals.keep_reading(http, stack.url))
    stack.relay.share, checks = UPSTREAM_FAULTS, stack.relay.checks
    async with aiohttp.ClientSession(connector=_connector()) as session:
        asking = [
            asyncio.create_task(Client(stack.url, session, random.Random(dice.random()), tally).run(is_over))
            for _ in range(clients)
        ]
        try:
            for name, disturb in DISTURBANCES.items():
                if stack.has_small_disk or name != "full disk":
                    await disturb(stack, http)
            if restarts:
                await restart_vllm(stack, http)
        finally:
            is_over.set()
            await asyncio.gather(*asking)
    stack.relay.share = 0.0
    if busy := await wait_until_idle(http, stack.url, stack.vllm.url):
        report.faults.append(f"two minutes after the last request there was still: {busy}")
    reading.cancel()
    await asyncio.wait({reading})
    if not reading.cancelled():
        reading.result()
    report.add(tally)
    if restarts:
        return  # vLLM's counters began anew
    after, now = await totals.read(http, stack.url), await metrics(http, stack.vllm.url)
    unseen = _difference(after, before, "autotts_unseen_tokens_total")
    total = _difference(now, generated, "vllm:generation_tokens_total")
    billed = _difference(after, before, "autotts_tokens_total")
    answered = sum(total_tokens - completion for total_tokens, completion in tally.bills.values())
    own = await asyncio.to_thread(_unanswered, stack.store, set(report.bills), began)
    cut = own["branches"] + tally.outcomes["left"]
    late = STEPS_UNTIL_ABORTED * cut + stack.relay.checks - checks
    report.say(
        f"disturbed: billed {billed:.0f}, of which {answered} were read; vLLM generated {total:.0f}; "
        f"unseen at most {unseen:.0f}"
    )
    if not billed - answered - own["read"] - tally.bounds <= total <= billed + unseen + late:
        report.faults.append(
            f"vLLM generated {total:.0f} tokens, and {billed:.0f} were billed ({answered} to {answered + own['read']} "
            f"of them were read, not generated, and {tally.bounds} were bounds of requests without a reply), with "
            f"at most {unseen:.0f} + {late} unseen"
        )


async def _calm(stack: SoakStack, http: aiohttp.ClientSession, report: SoakReport, dice: random.Random) -> None:
    """Ask one request of each kind without a disturbance: all must be answered, and be billed to the token."""
    for kind in KINDS:
        for _ in range(30):  # a circuit breaker may still be open
            tally, before = Tally(), await _settled_tokens(stack, http)
            async with aiohttp.ClientSession(connector=_connector()) as session:
                await Client(stack.url, session, dice, tally).ask(kind)
            if busy := await wait_until_idle(http, stack.url, stack.vllm.url):
                report.faults.append(f"two minutes after a calm request there was still: {busy}")
            report.add(tally)
            if tally.outcomes["answered"]:
                break
            await asyncio.sleep(2)
        else:
            report.faults.append(f"calm: {kind.name} was not answered: {dict(tally.statuses)}")
            continue
        generated = await _settled_tokens(stack, http) - before
        billed = tally.passed + sum(completion for _, completion in tally.bills.values())
        if generated != billed:
            report.faults.append(f"calm: {kind.name}: vLLM generated {generated:.0f} tokens, and {billed} were billed")


async def _settled_tokens(stack: SoakStack, http: aiohttp.ClientSession) -> float:
    """Return vLLM's counter of tokens, less those of the proxy's own checks, once both stand still for a second.

    The counter is behind by a step when the last request has gone.
    """
    last, equal = -1.0, 0
    for _ in repeat(None):
        generated = (await metrics(http, stack.vllm.url))["vllm:generation_tokens_total"] - stack.relay.checks
        equal = equal + 1 if generated == last else 0
        if equal == STEADY_READINGS:
            return generated
        last = generated
        await asyncio.sleep(0.25)
    raise AssertionError


def tracebacks(log: str) -> list[str]:
    """Return the end of each traceback in a log, down to its error, because the log is removed with its folder."""
    lines, ends = log.splitlines(), []
    for begin, line in enumerate(lines):
        if "Traceback" in line:
            frames = list(takewhile(lambda frame: frame.startswith(" "), lines[begin + 1 :]))
            ends.append("\n".join([line, *frames[-12:], *lines[begin + 1 + len(frames) :][:1]]))
    return ends


def _difference(after: dict[str, float], before: dict[str, float], name: str) -> float:
    return after.get(name, 0.0) - before.get(name, 0.0)


def _unanswered(store: Path, answered: set[str], since: str) -> Counter[str]:
    """Return the branches of stored episodes without a reply, and the tokens that they may have read only."""
    sums: Counter[str] = Counter()
    with closing(sqlite3.connect(store)) as connection:
        statement = "SELECT request_id, branches, ledger FROM episodes WHERE created >= ?"
        for request, branches, ledger in connection.execute(statement, (since,)):
            if request not in answered:
                kinds: dict[str, Any] = json.loads(ledger)
                sums["branches"] += branches
                sums["read"] += kinds.get("probe", 0) + kinds.get("finalise", 0) + kinds.get("aborted", 0)
    return sums


async def _check_store(stack: SoakStack, report: SoakReport) -> None:
    """Compare the bill of every reply with the stored one, after the proxy has ended."""
    async with Store.open(stack.store) as store:
        stored = Counter[str]()
        ledgers = {}
        for episode in await store.episodes():
            stored[episode.request_id] += 1
            ledgers[episode.request_id] = sum(episode.ledger.values())
        verified = await store.verify()
    wrong = [key for key, (total, _) in report.bills.items() if ledgers.get(key) != total]
    report.faults += [f"store: {fault}" for fault in verified.bad]
    report.faults += [
        f"{key} was billed {report.bills[key][0]} tokens, and {ledgers.get(key)} in the store" for key in wrong
    ]
    report.faults += [f"{key} is stored {times} times" for key, times in stored.items() if times > 1]
    report.say(
        f"{len(report.bills)} bills compared with the store, {len(wrong)} wrong; {stored.total()} episodes stored"
    )


def _connector() -> aiohttp.TCPConnector:
    return aiohttp.TCPConnector(limit=0)
