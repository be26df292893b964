"""Every store command, run beside proxies that record into the store, loses and corrupts nothing."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families
from typer.main import get_command

from discovery.data.importers import format_recording_line
from discovery.data.recordings import RecordedBranch, RecordedQuestion, Split, question_id
from discovery.store import Store
from proxy.cli import app
from proxy.recording.store_connection import STORED
from proxy.recording.store_writer import RECOVERED, StoreWriter
from proxy.settings import load
from proxy.spill_paths import candidate_paths
from proxy.telemetry.metrics import Metrics
from tests.faults.processes import Command, Forker, forking, until
from tests.proxy.conftest import SMALL, backend

__all__ = ["backend"]  # a fixture

ROUNDS = int(os.environ.get("SOAK_CYCLES", "6")) // 6
"""Number of rounds of all commands beside proxies that are ended; `make soak` uses 50."""
STORE: Final = "s.db"
ADMIN: Final = "admin-key-of-this-test"
CLIENTS: Final = 2
"""Concurrent clients of each proxy."""
PATIENCE_S: Final = 180
"""How long a busy machine may take for one step."""

SERVING: Final = {"serve", "demo", "config show", "config check"}
"""Commands that run a proxy themselves or only show its settings."""


def recorded(number: int, split: Split) -> RecordedQuestion:
    """A question with branches that mostly agree."""
    lengths = [k % 3 + 1 for k in range(8)]
    branches = [
        RecordedBranch(["7"] * length, 100 * length + 50, "7" if (k + number) % 3 else "8", [])
        for k, length in enumerate(lengths)
    ]
    return RecordedQuestion(question_id(f"{split} {number}"), "m", "b", 100, branches, "7", split=split)


class Load:
    """Clients of one proxy that send requests and feedback until it ends."""

    def __init__(self, proxy: Command, url: str, http: aiohttp.ClientSession) -> None:
        self.proxy = proxy
        self.url = url
        self.accepted: set[str] = set()  # requests whose feedback will be on disk unless the proxy is killed
        self.acknowledged: set[str] = set()  # requests whose feedback is said to be on disk
        self._http = http
        self._tasks: list[asyncio.Task[None]] = []

    def begin(self) -> None:
        """Start the clients."""
        self._tasks = [asyncio.create_task(self._ask(number)) for number in range(CLIENTS)]

    async def end(self) -> None:
        """Stop the clients. Raises their errors, except those caused by the end of the proxy."""
        for task in self._tasks:
            task.cancel()
        for outcome in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome

    async def more(self, count: int = 1) -> None:
        """Wait until feedback on `count` more requests is accepted."""
        enough = len(self.accepted) + count
        await until(lambda: len(self.accepted) >= enough or self.proxy.status is not None, PATIENCE_S)
        assert self.proxy.status is None, self.proxy.output

    async def _ask(self, number: int) -> None:
        body = {"model": "fake-model", "messages": [{"role": "user", "content": f"hi {number}"}], "tts": {"beta": 0.5}}
        with suppress(aiohttp.ClientError, ConnectionError):
            while True:
                status, reply = await self._post("/v1/chat/completions", body)
                if status >= 500:  # the proxy is ending, or the upstream is slow on a busy machine
                    await asyncio.sleep(0.05)
                    continue
                assert status == 200, reply
                request = reply["id"]
                status, reply = await self._post("/v1/tts/feedback", {"request_id": request, "correct": True})
                if status in (200, 202):
                    self.accepted.add(request)
                if status == 200:
                    self.acknowledged.add(request)
                await asyncio.sleep(0.05)  # leaves the processor to the commands

    async def _post(self, path: str, body: object) -> tuple[int, Any]:
        async with self._http.post(self.url + path, json=body) as response:
            return response.status, await response.json(content_type=None)

    async def counted(self) -> int:
        """Return the number of records written to the store, by the proxy's own metrics."""
        async with self._http.get(f"{self.url}/metrics") as response:
            families = text_string_to_metric_families(await response.text())
            samples = [sample for family in families for sample in family.samples]
        in_store = [sample for sample in samples if sample.labels.get("outcome") in (STORED, RECOVERED)]
        return sum(int(sample.value) for sample in in_store if sample.name == "autotts_recorder_records_total")


@asynccontextmanager
async def loaded(forker: Forker, upstream: str, count: int) -> AsyncIterator[list[Load]]:
    """Run proxies on one store, each with clients."""
    given = {**SMALL, "read_timeout_s": 60, "record_fraction": 0.2, "record_branches": 4, "admin_key": ADMIN}
    flags = ["--port=0", f"--upstream={upstream}", f"--store={STORE}", *(f"--set={k}={v}" for k, v in given.items())]
    proxies = [forker.start("serve", *flags) for _ in range(count)]
    async with aiohttp.ClientSession() as http:
        loads = [Load(proxy, await proxy.url(), http) for proxy in proxies]
        try:
            for load in loads:
                load.begin()
            for load in loads:
                await load.more(5)
            yield loads
        finally:
            for load in loads:
                await load.end()


def begin(folder: Path) -> None:
    """Write the files that commands read."""
    release = folder / "release" / "Qwen3-0.6B" / "aime24.json"
    release.parent.mkdir(parents=True)
    branches = [[["7", "7"], 1100, "7"], [["8"], 700, "7"]]
    release.write_text(json.dumps([{"question": "Q", "gold_answer": "7", "probe_freq": 500, "each_branch": branches}]))
    numbers = range(12)
    (folder / "lines.jsonl").write_text(
        "".join(format_recording_line(recorded(n, split)) for n in numbers for split in Split)
    )
    (folder / "q.jsonl").write_text(json.dumps({"question": "Q1", "reference": "7"}) + "\n")
    (folder / "mine.py").write_text(
        "from controllers import advance, answer, branch\n"
        "class Mine:\n"
        "    def __init__(self, beta): pass\n"
        "    def decide(self, state):\n"
        "        return [answer(state.leader())] if state.width else [branch(1)]\n"
    )


def commands(url: str, request: str, gone: str) -> Iterator[list[str]]:
    """Yield every store command with arguments with which it succeeds. Request `gone` is forgotten."""
    few = ["--shuffles=2", "--max-branches=8", "--models=m", "--benchmarks=b"]
    yield ["import", "jsonl", "lines.jsonl", f"--store={STORE}"]
    yield ["import", "autotts-release", "release", f"--store={STORE}"]
    yield ["store", "info", f"--store={STORE}"]
    yield ["store", "verify", f"--store={STORE}"]
    yield ["store", "export", "out.jsonl", f"--store={STORE}"]
    yield ["store", "prune", f"--store={STORE}", "--models=Qwen3-0.6B"]
    yield ["store", "prune", f"--store={STORE}", "--corrupt"]
    yield ["store", "forget", f"--store={STORE}", f"--request-id={gone}"]
    yield ["label", f"--store={STORE}", "--references=q.jsonl"]
    yield ["requests", "list", f"--store={STORE}"]
    yield ["keys", "usage", f"--store={STORE}"]
    yield ["trace", "show", request, f"--store={STORE}"]
    yield ["parity", f"--store={STORE}", "--shuffles=2"]
    yield ["evaluate", f"--recordings={STORE}", "--controllers=asc@8", "--betas=0.5", *few]
    yield ["signals", f"--recordings={STORE}", "--orders=1", "--models=m", "--benchmarks=b"]
    yield ["calibrate", f"--recordings={STORE}", "--controllers=asc@8", "--out=c.json", *few, "--engine=local"]
    searching = ["--rounds=1", "--shuffles=1", "--workers=1", "--models=m", "--out=run"]
    yield ["discover", f"--recordings={STORE}", f"--store={STORE}", *searching]
    judging = ["--ledger=ledger", "--betas=0,0.5", "--champion=self_consistency", "--engine=local"]
    yield ["gate", "asc@4", f"--recordings={STORE}", *judging, *few]
    promoting = ["--registry=registry", "--ledger=ledger", "--as=shadow", "--champion=self_consistency"]
    yield ["promote", "mine.py", f"--recordings={STORE}", *promoting, "--shuffles=1", "--force"]
    yield ["collect", "q.jsonl", "--out=collected.jsonl", "--branches=2", f"--url={url}"]
    yield ["import", "jsonl", "collected.jsonl", f"--store={STORE}"]


def rows(path: Path, statement: str) -> list[Any]:
    """Return the rows that an SQL statement selects."""
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(statement).fetchall()


def requests_with_feedback(path: Path) -> set[str]:
    """Return the requests with feedback in the store."""
    return {request for (request,) in rows(path, "SELECT request_id FROM feedback")}


async def read_back(path: Path) -> None:
    """Write the records in spill files to the store."""
    recorder = StoreWriter(load(upstream="http://127.0.0.1:1", store=path), Metrics())
    await recorder.open()
    try:
        spills = list(candidate_paths(path.with_name(f"{path.name}.spill")))
        await until(lambda: not any(place.exists() for place in spills), PATIENCE_S)
        assert recorder.lost == 0
    finally:
        await recorder.close()


async def run(forker: Forker, arguments: list[str]) -> None:
    """Run a command. It must succeed, or report that a busy proxy prevents it from erasing removed rows."""
    done = forker.start(*arguments, AUTOTTS_ADMIN_KEY=ADMIN)
    status = await done.ended(PATIENCE_S)
    is_busy = arguments[:2] in (["store", "prune"], ["store", "forget"]) and "run the command again" in done.output
    assert status == 0 or is_busy, (arguments, done.output)


async def go_round(forker: Forker, folder: Path, upstream: str, count: int, *signals: signal.Signals) -> None:
    """Run every command beside `count` proxies, end each by its signal, and check the store."""
    path = folder / STORE
    begin(folder)
    await run(forker, ["import", "jsonl", "lines.jsonl", f"--store={STORE}"])
    async with loaded(forker, upstream, count) as loads:
        await until(lambda: len(loads[-1].accepted & requests_with_feedback(path)) >= 2, PATIENCE_S)
        request, gone = sorted(loads[-1].accepted & requests_with_feedback(path))[:2]
        for arguments in commands(loads[0].url, request, gone):
            await run(forker, arguments)
            for load in loads:
                await load.more()
                assert load.proxy.deleted == [], arguments
        counted = sum(
            [await load.counted() for load in loads]
        )  # without records in spill files, which are counted twice
        for ended, (load, number) in enumerate(zip(loads, signals, strict=True)):
            await load.proxy.signal(number)
            await run(forker, ["store", "info", f"--store={STORE}"])
            for other in loads[ended + 1 :]:
                await other.more(3)
                assert other.proxy.deleted == []
    await read_back(path)
    assert rows(path, "PRAGMA integrity_check") == [("ok",)]
    async with Store.open(path) as store:
        assert (await store.verify()).bad == []
    served = {request_id for (request_id,) in rows(path, "SELECT request_id FROM episodes")}
    for load, number in zip(loads, signals, strict=True):
        expected = (load.acknowledged if number is signal.SIGKILL else load.accepted) - {gone}
        assert len(load.accepted) > len(list(commands("", "", "")))
        assert expected <= served & requests_with_feedback(path)
    live = rows(path, "SELECT COUNT(*) FROM provenance WHERE request_id <> ''")[0][0]
    forgotten = 3  # at most: an episode, its feedback, its recording
    assert counted <= len(rows(path, "SELECT 1 FROM episodes UNION ALL SELECT 1 FROM feedback")) + live + forgotten


@pytest.mark.process
@pytest.mark.timeout(120 + 240 * ROUNDS)
async def test_store_commands_beside_proxies_lose_and_corrupt_nothing(tmp_path: Path, backend: Any) -> None:
    kill, end = signal.SIGKILL, signal.SIGTERM
    endings = itertools.cycle([(end, kill), (kill,), (end,), (kill, end), (kill, kill)])
    with forking(tmp_path) as forker:
        for number, signals in zip(range(ROUNDS), endings, strict=False):
            folder = tmp_path / str(number)
            folder.mkdir()
            forker.folder = folder
            await go_round(forker, folder, backend.url, len(signals), *signals)


def test_every_command_with_a_store_option_is_among_those_run_beside_a_proxy() -> None:
    named = {"store", "place", "recordings"}

    def walk(command: Any, name: str) -> Iterator[str]:
        for sub, child in getattr(command, "commands", {}).items():
            yield from walk(child, f"{name} {sub}".strip())
        if not hasattr(command, "commands") and named & {param.name for param in command.params}:
            yield name

    run = {
        " ".join(itertools.takewhile(lambda part: not part.startswith("-"), args)) for args in commands("", "r", "g")
    }
    missing = [
        name for name in walk(get_command(app), "") if not any(f"{verb} ".startswith(f"{name} ") for verb in run)
    ]
    assert set(missing) - SERVING == set()
