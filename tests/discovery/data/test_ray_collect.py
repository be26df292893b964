"""Collecting from the workers of a real Ray cluster: the same records, lost workers, the budget and the admin key."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from discovery.data.collect import collect
from discovery.data.collection_client import Send
from discovery.data.questions import read_questions
from discovery.data.ray_senders import ray_senders
from discovery.errors import CollectError
from proxy.server import running
from proxy.settings import load
from tests.discovery.data.test_collect import (
    ALL,
    BRANCHES,
    CHAINS,
    INTERVAL,
    ORDER,
    QUESTIONS,
    SETTINGS,
    check_complete,
    lines,
    spent,
    verb,
)
from tests.fakes import FakeVLLM
from tests.faults.processes import until
from tests.ray_cluster import worker_processes

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.xdist_group("ray")]

KEY = "sesame-Qk7-on-ray"


@pytest_asyncio.fixture
async def backend() -> AsyncIterator[FakeVLLM]:
    async with FakeVLLM(CHAINS, INTERVAL).serve() as fake:
        yield fake


@pytest_asyncio.fixture
async def url(backend: FakeVLLM) -> AsyncIterator[str]:
    async with running(load(upstream=backend.url, **{**SETTINGS, "admin_key": KEY})) as url:
        yield url


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    """Return a file of questions."""
    path = tmp_path / "hard.jsonl"
    numbered = ({"id": f"q{i}", "question": f"question {i}", "reference": "7"} for i in range(QUESTIONS))
    path.write_text("".join(json.dumps(line) + "\n" for line in numbered))
    return path


@pytest.fixture
def send(ray_cluster: str, url: str) -> Iterator[Send]:
    with ray_senders(ray_cluster, 1, 2, url, KEY) as send:
        yield send


def branches(out: Path) -> list[Any]:
    return sorted(json.dumps(line["branches"], sort_keys=True) for line in lines(out))


async def test_the_command_collects_from_a_cluster_what_it_collects_from_here(
    ray_cluster: str, backend: FakeVLLM, url: str, asked: Path, tmp_path: Path
) -> None:
    here, there = tmp_path / "here.jsonl", tmp_path / "there.jsonl"
    on_ray = ("--engine", "ray", "--address", ray_cluster)
    async with verb(url, asked, here, key=KEY) as command:
        await command.ends(0)
    backend.opened = 0  # the next branches are those that the first ones were
    backend.gate.clear()
    async with verb(url, asked, there, *on_ray, key=KEY) as command:
        await until(lambda: backend.branches == ALL)
        assert [name for name in commands() if KEY in name] == []
        backend.gate.set()
        output = await command.ends(0)
    assert f"{ALL} of {ALL} branches, {ALL} of them in this run; {spent(there):,} tokens in " in output
    check_complete(there)
    assert branches(there) == branches(here)
    async with verb(url, asked, there, "--resume", *on_ray, key=KEY) as command:
        assert f"{ALL} of {ALL} branches, 0 of them in this run" in await command.ends(0)
    assert files_with_key() == []


def files_with_key() -> list[Path]:
    """Return the files of Ray, its logs among them, that hold the key."""
    files = [path for path in Path(os.environ["RAY_TMPDIR"]).rglob("*") if path.is_file()]
    assert len(files) > 10
    return [path for path in files if KEY.encode() in path.read_bytes()]


def commands() -> list[str]:
    """Return the command lines of all processes."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().decode(errors="replace"))
        except OSError:  # it has ended
            continue
    assert found
    return found


async def test_killed_workers_lose_no_branch_and_their_requests_count_in_full(
    backend: FakeVLLM, url: str, send: Send, asked: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    caps: list[int | None] = []
    killed: list[int] = []

    async def send_and_kill(body: dict[str, Any], cap: int | None) -> Any:
        """Send a request. Kill all workers with SIGKILL while the second one is generated."""
        caps.append(cap)
        if len(caps) != 2:
            return await send(body, cap)
        backend.gate.clear()
        reply = asyncio.ensure_future(send(body, cap))
        await until(lambda: backend.branches > 0)
        for process in worker_processes("ray::RequestSender"):
            os.kill(process, signal.SIGKILL)
            killed.append(process)
        await backend.idle.wait()  # the proxy has noticed
        backend.gate.set()
        return await reply

    progress = await collect(url, KEY, read_questions(asked), ORDER, out, BRANCHES, 10**6, send=send_and_kill)
    assert len(killed) == 2
    check_complete(out)
    lost = [json.loads(line)["tokens"] for line in out.with_name("out.jsonl.lost").read_text().splitlines()]
    assert caps[1] in lost  # other requests may have been on the workers too
    assert (progress.mine, progress.skipped, progress.spent) == (ALL, [], spent(out) + sum(lost))


async def test_errors_of_the_proxy_arrive_unchanged(ray_cluster: str, url: str, asked: Path, tmp_path: Path) -> None:
    with ray_senders(ray_cluster, 1, 1, url, "wrong-key") as send:
        with pytest.raises(CollectError, match="AUTOTTS_ADMIN_KEY must be the proxy's admin key") as raised:
            await collect(url, KEY, read_questions(asked), ORDER, tmp_path / "out.jsonl", send=send)
        assert "wrong-key" not in str(raised.value)
