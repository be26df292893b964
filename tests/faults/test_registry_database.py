"""A registry and a ledger in PostgreSQL, while their writers and the server are killed."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys

import pytest

from controllers.rollout_state import RolloutStage
from discovery.errors import PromotionError
from discovery.promotion.registry import Registry
from discovery.store import child_environment
from tests.discovery.promotion.examples import CARD, ME, WRITER, spec
from tests.discovery.promotion.test_registry import consistent
from tests.faults.processes import until
from tests.postgres_server import PostgresServer

pytestmark = pytest.mark.process
KILLS = 8


def test_a_writer_killed_at_any_time_leaves_a_consistent_registry(synced_postgres: PostgresServer) -> None:
    registry = Registry(synced_postgres.create_database())
    chance = random.Random(6)
    for _ in range(KILLS):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(registry.place), "0"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            env=child_environment(registry.place),
        ) as process:
            assert process.stdout is not None
            acknowledged = [int(process.stdout.readline()) for _ in range(3)][-1]
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(chance.uniform(0, 0.2))
            process.kill()
            acknowledged = max([acknowledged, *map(int, process.stdout.read().split("\n")[:-1])])
        assert consistent(registry).version >= acknowledged
        registry.install(spec(9), CARD, RolloutStage.CHAMPION, 0, ME)  # the lock is free again
        registry.roll_back(ME)
    consistent(registry)


async def test_no_acknowledged_change_is_lost_or_doubled_while_the_server_crashes(
    synced_postgres: PostgresServer,
) -> None:
    registry = Registry(synced_postgres.create_database())
    acknowledged: list[str] = []
    refused: list[str] = []
    is_over = asyncio.Event()

    def promote(number: int) -> None:
        """Promote a controller until that is acknowledged, as somebody would who gets errors."""
        while not is_over.is_set():
            try:
                registry.install(spec(number), CARD, RolloutStage.CHAMPION, 0, ME, f"model-{number}")
            except PromotionError as error:
                refused.append(str(error))
            else:
                acknowledged.append(spec(number).digest)
                return

    async def write(writer: int) -> None:
        for number in range(writer, 10**6, 3):
            if is_over.is_set():
                return
            await asyncio.to_thread(promote, number)

    writers = [asyncio.create_task(write(writer)) for writer in range(3)]
    for _ in range(3):
        count = len(acknowledged)
        await until(lambda: len(acknowledged) >= count + 10)  # noqa: B023
        await asyncio.to_thread(synced_postgres.crash)
        errors = len(refused)
        await until(lambda: len(refused) > errors)  # noqa: B023
        await asyncio.to_thread(synced_postgres.start)
    count = len(acknowledged)
    await until(lambda: len(acknowledged) >= count + 10)
    is_over.set()
    await asyncio.gather(*writers)
    state, audit = consistent(registry), registry.audit()
    installed = [line["digest"] for line in audit]
    assert len(installed) == len(set(installed)), "a promotion was made twice"
    assert set(acknowledged) <= set(installed)
    assert all(state.own(line["model"]).champion == line["digest"] for line in audit)
    assert all(str(registry.place) in error for error in refused)
