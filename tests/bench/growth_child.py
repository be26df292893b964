"""Work of one size for `tests/bench/growth.py`, in a process of its own, whose time and memory nothing else adds to.

python -m tests.bench.growth_child recordings|episodes|keys COUNT

It prints the processor seconds of each step, and the most bytes held beyond those of the program, as one line of JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Final

from fastapi import Request

from controllers.builtin import DEFAULT
from controllers.loading import parse_spec
from discovery.data.recordings import LabelSource, RecordedQuestion, Split
from discovery.evaluation.engines import EngineName, make_engine
from discovery.evaluation.evaluate import Evaluation
from discovery.evaluation.sources import StoreSource
from discovery.store import Label, ServedEpisode, Store
from discovery.store.checksums import with_checksum
from discovery.store.records import utc_now
from discovery.store.rows import tombstone
from discovery.store.usage.periods import Bucket, Period
from discovery.store.usage.reader import UsageReader
from discovery.store.usage.requests import RequestFilter
from discovery.store.usage.sums import Measure
from proxy.admission.auth import Caller
from proxy.admission.limits import LocalLimits
from proxy.admission.request_slot import RequestSlots
from proxy.admission.token_budget import Caps
from proxy.settings import load
from proxy.telemetry.metrics import Metrics
from tests import large_store
from tests.bench.process_usage import peak_bytes, resident_bytes

HERE: Final = Path(__file__).parent
"""Folder of the stores: on disk, because the temporary folder may be in memory."""
GROUP: Final = 256
"""Records of a transaction of the proxy's writer."""
MORE: Final = 8 * GROUP
"""Episodes that are added to a store once it is full."""
READS: Final = 3
FORGOTTEN: Final = 0.01
"""Share of the requests that clients had erased."""
ADMITTED: Final = 2_000
TOKENS_PER_MINUTE: Final = 100_000

Seconds = dict[str, float]
"""Processor time by step."""


@contextmanager
def timed(seconds: Seconds, step: str, times: int = 1) -> Iterator[None]:
    """Set the processor time of a step, divided by how often the block repeats it."""
    began = time.process_time()
    yield
    seconds[step] = (time.process_time() - began) / times


async def recordings(folder: Path, count: int) -> Seconds:
    """Add recordings of so many questions to a store, read them, and replay the default controller on them."""
    seconds: Seconds = {}
    path = folder / "recordings.db"
    made = [_of_one_cell(each) for each in large_store.recordings(count)]
    async with Store.open(path, create=True) as store:
        with timed(seconds, "store them"):
            for start in range(0, count, GROUP):
                await store.add(made[start : start + GROUP])
    await asyncio.to_thread(_replay, path, seconds)
    return seconds


def _of_one_cell(recorded: RecordedQuestion) -> RecordedQuestion:
    model, *_ = large_store.MODELS
    return replace(recorded, model=model, benchmark="growth", split=Split.SEARCH, reference="7")


def _replay(path: Path, seconds: Seconds) -> None:
    source = StoreSource(path)
    with timed(seconds, "read and replay them"):
        Evaluation(source, source.cells(), [parse_spec(DEFAULT)], [0.5], 1).run(make_engine(EngineName.LOCAL))


async def episodes(folder: Path, count: int) -> Seconds:
    """Fill a store with so many episodes, and do what a proxy and its dashboard do with a store of that size."""
    seconds: Seconds = {}
    path = folder / "episodes.db"
    served = large_store.episodes(count + MORE, datetime.now(UTC))
    made = (replace(episode, question=episode.request_id) for episode in served)
    async with Store.open(path, create=True) as store:
        with timed(seconds, "store them"):
            await _add(store, islice(made, count), large_store.BATCH)
        erased = [tombstone("request", f"erased {number}") for number in range(int(FORGOTTEN * count))]
        tombstones = [with_checksum((each, utc_now())) for each in erased]
        await store.write(lambda connection: connection.insert_rows("forgotten", tombstones))
        await store.sum_usage()
        added = list(made)
        with timed(seconds, f"add {MORE:,} episodes"):
            await _add(store, iter(added), GROUP)
        labels = [Label(each.question or "", LabelSource.CONSENSUS, "7", 0.9) for each in added[:GROUP]]
        with timed(seconds, f"set {GROUP} labels"):
            await store.set_labels(labels)
    async with UsageReader(path) as reader:
        await _look(reader, seconds)
    return seconds


async def _add(store: Store, made: Iterator[ServedEpisode], at_once: int) -> None:
    while batch := list(islice(made, at_once)):
        await store.add_all(batch)


async def _look(reader: UsageReader, seconds: Seconds) -> None:
    """Read what the dashboard shows."""
    now = datetime.now(UTC)
    week = Period(now - timedelta(days=7), now, Bucket.HOUR)
    month = Period(now - timedelta(days=30), now, Bucket.DAY)
    await reader.choices()  # opens the store
    with timed(seconds, "a week of latencies by hour", READS):
        for _ in range(READS):
            await reader.series(Measure.LATENCY, week)
    with timed(seconds, "a month of latencies by day", READS):
        for _ in range(READS):
            await reader.series(Measure.LATENCY, month)
    with timed(seconds, "the latest requests", READS):
        for _ in range(READS):
            await reader.requests(RequestFilter())


async def keys(folder: Path, count: int) -> Seconds:
    """Let a request of each of so many keys run and another wait for it, then admit more requests of one key."""
    seconds: Seconds = {}
    settings = load(max_episodes=count + 1, queue=2 * count + 4)  # a key may fill half of the queue
    slots = RequestSlots(settings, Metrics(), LocalLimits(count * TOKENS_PER_MINUTE))
    for number in range(2 * count):
        await slots.acquire_episode(_sent_by(f"key {number % count}"), 1)
    with timed(seconds, f"admit {ADMITTED:,} requests"):
        for _ in range(ADMITTED):
            (await slots.acquire_episode(_sent_by("key 0"), 1)).release()
    return seconds


def _sent_by(key: str) -> Request:
    caller = Caller(key, False, key, Caps(episodes=1, tokens_per_minute=TOKENS_PER_MINUTE))
    return Request({"type": "http", "state": {"caller": caller, "leases": ExitStack()}})


WORK: Final = {"recordings": recordings, "episodes": episodes, "keys": keys}


def main(arguments: Sequence[str]) -> int:
    """Do the work and print the figures."""
    work, count = WORK[arguments[0]], int(arguments[1])
    held = resident_bytes(os.getpid())
    with tempfile.TemporaryDirectory(dir=HERE) as folder:
        seconds = asyncio.run(work(Path(folder), count))
    # resource.getrusage would count the memory of the process that forked this one.
    memory = peak_bytes(os.getpid()) - held
    sys.stdout.write(json.dumps({"seconds": seconds, "memory": memory}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
