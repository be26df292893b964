"""Measure what one hostile client does to another client of the same proxy.

For each attack a proxy runs in a process of its own, in front of a scripted upstream in a second process. A victim with
its own key asks `/health` every 50 ms and sends requests with and without β. An attacker, in a third process, does its
worst for a few seconds. The table says how long the victim waited, how many of its requests were served, and how
far the proxy's memory grew.

    python -m tests.faults.noisy_neighbour [--seconds N] [ATTACK ...]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import resource
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

import aiohttp
from rich.console import Console
from rich.table import Table

from proxy.admission import api_keys
from proxy.upstream.embedded import free_port
from tests.bench.process_usage import peak_bytes, resident_bytes
from tests.faults.attackers import ATTACKS, DOUBTFUL, INTERVAL, SPINNER, Target, chat

ROOT: Final = Path(__file__).parents[2]
HEALTH_EVERY_S: Final = 0.05
REQUEST_EVERY_S: Final = 0.25
WARM_UP_S: Final = 1.0
HEADINGS: Final = (
    "attack",
    "health p50, p99, max (ms)",
    "served",
    "p50, max (ms)",
    "failures",
    "memory (MiB)",
    "attacker's statuses",
)
DESCRIPTORS: Final = 1024  # the usual soft limit of a process
SETTINGS: Final = {
    "AUTOTTS_PROBE_TOKENS": "8",
    "AUTOTTS_FINALISE_TOKENS": "60",
    "AUTOTTS_MAX_PASSED": "16",
    "AUTOTTS_WRITE_S": "2",
}
CONTROLLERS: Final = {"stalled_loop": ROOT / "controllers" / "discovered" / "lockstep_lead.py"}
"""Controllers from files, by the attack they are served in; other attacks meet the default."""


# The victim


@dataclass
class Victim:
    """Another client: what it asked, what it got and how long it waited."""

    url: str
    token: str
    health_s: list[float] = field(default_factory=list)
    served_s: list[float] = field(default_factory=list)
    asked: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    fallbacks: int = 0

    async def run(self, seconds: float) -> None:
        """Ask for `seconds`."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        timeout = aiohttp.ClientTimeout(30)
        headers = {"authorization": f"Bearer {self.token}"}
        connector = aiohttp.TCPConnector(force_close=True)  # whether new connections are served is the question
        async with (
            aiohttp.ClientSession(timeout=timeout, headers=headers, connector=connector) as http,
            asyncio.TaskGroup() as tasks,
        ):
            tasks.create_task(self._ask_health(http, end))
            count = 0
            while loop.time() < end:
                question = DOUBTFUL if count % 4 == 3 else f"question {count}"
                beta = {"tts": {"beta": 0.5, "answer": "boxed"}} if count % 2 else {}
                tasks.create_task(self._ask(http, chat(question, **beta)))
                count += 1
                await asyncio.sleep(REQUEST_EVERY_S)

    async def _ask_health(self, http: aiohttp.ClientSession, end: float) -> None:
        loop = asyncio.get_running_loop()
        while (began := loop.time()) < end:
            try:
                async with http.get(f"{self.url}/health") as response:
                    await response.read()
                    if response.status != 200:
                        self.failures[f"health {response.status}"] += 1
            except (aiohttp.ClientError, OSError) as error:
                self.failures[f"health {type(error).__name__}"] += 1
            self.health_s.append(loop.time() - began)
            await asyncio.sleep(max(0.0, began + HEALTH_EVERY_S - loop.time()))

    async def _ask(self, http: aiohttp.ClientSession, body: bytes) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        self.asked += 1
        try:
            sent = {"content-type": "application/json"}
            async with http.post(f"{self.url}/v1/chat/completions", data=body, headers=sent) as response:
                reply = await response.read()
                if response.status == 200:
                    self.served_s.append(loop.time() - began)
                    self.fallbacks += "x-tts-fallback" in response.headers
                else:
                    self.failures[f"{response.status} {_code(reply)}"] += 1
        except (aiohttp.ClientError, OSError) as error:
            self.failures[type(error).__name__] += 1


def _code(reply: bytes) -> str:
    with suppress(ValueError, KeyError, TypeError):
        return str(json.loads(reply)["error"]["code"])
    return "?"


# One run


class Outcome(NamedTuple):
    """The effect of one attack on the victim and the proxy."""

    attack: str
    victim: Victim
    memory_mib: tuple[int, int]  # resident before, and the highest since
    attacker: str  # statuses it was answered with
    died: bool  # the proxy exited

    @property
    def health_p99_s(self) -> float:
        """The 99th percentile of the victim's waits for `/health`, in seconds."""
        return statistics.quantiles(self.victim.health_s, n=100, method="inclusive")[98]


@asynccontextmanager
async def _process(*command: str, **variables: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", *command),
        cwd=ROOT,
        env={**os.environ, **variables},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                async with asyncio.timeout(5):
                    await process.communicate()
            except TimeoutError:
                process.kill()
                await process.communicate()


async def _read_line(process: asyncio.subprocess.Process) -> bytes:
    return b"" if process.stdout is None else (await process.stdout.readline()).strip()


async def measure(attack: str, seconds: float, folder: Path) -> Outcome:
    """Run one attack against a fresh proxy."""
    attacker_token, victim_token = api_keys.generate_key(), api_keys.generate_key()
    key_file = folder / "keys.toml"
    key_file.write_text(
        api_keys.key_file_entry("attacker", attacker_token)
        + "\n"
        + api_keys.key_file_entry("victim", victim_token)
        + "\n"
    )
    port = free_port()
    if attack == "spinning_children":
        (folder / "spinner.py").write_text(SPINNER)
    spinner = folder / "spinner.py"
    controller = spinner if spinner.exists() else CONTROLLERS.get(attack, Path("cmc"))
    async with _process("tests.faults.attackers", "upstream") as upstream:
        upstream_url = (await _read_line(upstream)).decode()
        serve = ("proxy.cli", "serve", "--upstream", upstream_url, "--port", str(port))
        sizes = ("--interval", str(INTERVAL), "--store", str(folder / "s.db"), "--controller", str(controller))
        settings = {"AUTOTTS_KEYS": str(key_file), **SETTINGS}
        async with _process(*serve, *sizes, **settings) as proxy:
            url = f"http://127.0.0.1:{port}"
            await _wait_until_ready(url, proxy)
            victim = Victim(url, victim_token)
            await victim.run(WARM_UP_S)
            before = resident_bytes(proxy.pid) >> 20
            victim = Victim(url, victim_token)
            target = json.dumps(Target("127.0.0.1", port, attacker_token, proxy.pid))
            async with _process("tests.faults.attackers", attack, target) as attacker:
                await victim.run(seconds)
                is_dead = proxy.returncode is not None
                peak = 0 if is_dead else peak_bytes(proxy.pid) >> 20
                attacker.terminate()
                statuses = (await _read_line(attacker)).decode()
            return Outcome(attack, victim, (before, peak), statuses, is_dead)


async def _wait_until_ready(url: str, proxy: asyncio.subprocess.Process) -> None:
    async with aiohttp.ClientSession() as http:
        for _ in range(600):
            if proxy.returncode is not None:
                break
            with suppress(aiohttp.ClientError, OSError):
                async with http.get(f"{url}/ready") as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(0.1)
    raise RuntimeError("the proxy does not start")


def show(outcomes: list[Outcome]) -> None:
    """Print the table."""
    table = Table(title="A victim beside an attacker", title_justify="left")
    for heading in HEADINGS:
        table.add_column(heading)
    for outcome in outcomes:
        victim = outcome.victim
        served = victim.served_s or [math.inf]
        worst = (statistics.median(victim.health_s), outcome.health_p99_s, max(victim.health_s))
        fallbacks = f", {victim.fallbacks} by the fallback" if victim.fallbacks else ""
        table.add_row(
            outcome.attack,
            ", ".join(f"{1e3 * each:.0f}" for each in worst),
            f"{len(victim.served_s)} of {victim.asked}{fallbacks}",
            ", ".join(f"{1e3 * each:.0f}" for each in (statistics.median(served), max(served))),
            ", ".join(f"{count} × {kind}" for kind, count in victim.failures.items()) or "none",
            "died" if outcome.died else " → ".join(map(str, outcome.memory_mib)),
            outcome.attacker,
        )
    Console(width=170).print(table)


async def main(attacks: list[str], seconds: float) -> None:
    """Run `attacks` one after the other and print what they did."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    outcomes = []
    for attack in attacks:
        with tempfile.TemporaryDirectory() as folder:
            outcomes.append(await measure(attack, seconds, Path(folder)))
            show(outcomes[-1:])
    show(outcomes)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.faults.noisy_neighbour", description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("attacks", nargs="*", metavar="ATTACK", help=f"of {', '.join(ATTACKS)}")
    options = parser.parse_args()
    if wrong := set(options.attacks) - set(ATTACKS):
        parser.error(f"no attack {', '.join(sorted(wrong))}; there are {', '.join(ATTACKS)}")
    asyncio.run(main(options.attacks or list(ATTACKS), options.seconds))
