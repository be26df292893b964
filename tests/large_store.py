"""Generator of a store that has served for a month: many episodes of several models, controllers and tenants.

python -m tests.large_store FILE [--episodes 100000] [--recordings 1000]
"""

from __future__ import annotations

import argparse
import asyncio
import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from controllers import Advanced, Probed, Round, advance, branch, probe
from discovery.data.packed_rounds import pack_rounds
from discovery.data.recordings import LabelSource, Origin, RecordedBranch, RecordedQuestion, Split, question_id
from discovery.store import Label, ServedEpisode, Store
from discovery.store.records import stored_time

EPISODES: Final = 100_000
RECORDINGS: Final = 1_000
DAYS: Final = 30
BATCH: Final = 5_000
MODELS: Final = ("Qwen3-1.7B", "Qwen3-8B", "embedded")
CONTROLLERS: Final = ("adaptive_consistency", "cmc", "found_72111d2a", "asc@64")
STOPS: Final = ("answered",) * 16 + ("max_tokens", "max_tokens", "deadline", "disconnected")
TENANTS: Final = ("", *(f"{number:016x}" for number in range(1, 12)))
BETAS: Final = (0.1, 0.25, 0.5, 0.5, 0.5, 0.75, 1.0)
BRANCHES: Final = 8
BENCHMARKS: Final = ("aime24", "arithmetic", "live")


def _trace() -> str:
    opened = Round([branch()] * BRANCHES, [Advanced(i, 1, 64, False) for i in range(BRANCHES)])
    moves = [move for i in range(BRANCHES) for move in (advance(i), probe(i))]
    facts = [fact for i in range(BRANCHES) for fact in (Advanced(i, 1, 64, False), Probed(i, 0, 12))]
    return pack_rounds([opened, *([Round(moves, facts)] * 5)])


def episodes(count: int, end: datetime) -> Iterator[ServedEpisode]:
    """Yield episodes in the order of time; the last one ends at `end`."""
    draw = random.Random(0)
    trace = _trace()
    step = timedelta(days=DAYS) / count
    for number in range(count):
        beta = draw.choice(BETAS)
        scale = int(100 + 900 * beta)
        kinds = {kind: draw.randrange(scale) for kind in ("winner", "agreeing", "losing", "probe", "finalise")}
        about = {"seconds": 2 * draw.random() * (1 + beta), "spent": scale, "answers": ["veiled:0123456789abcdef"]}
        if draw.random() < 0.01:
            about |= {"fallback": "timeout", "baseline": "adaptive_consistency"}
        request = f"{number:032d}"
        yield ServedEpisode(
            *(request, request, draw.choice(MODELS), draw.choice(CONTROLLERS), "d" * 64, beta, 6, BRANCHES),
            {**kinds, "pruned": 0, "aborted": 0},
            draw.choice(STOPS),
            created=stored_time(end - (count - 1 - number) * step),
            tenant=draw.choice(TENANTS),
            about=about,  # type: ignore[arg-type]
            trace=trace,
        )


def recordings(count: int) -> Iterator[RecordedQuestion]:
    """Yield recordings of several models, benchmarks and splits."""
    draw = random.Random(0)
    for number in range(count):
        benchmark, text = BENCHMARKS[number % len(BENCHMARKS)], f"question {number}"
        branches = [RecordedBranch([None, "7", "7"], 150 + draw.randrange(42), "7", [9, 9, 9]) for _ in range(BRANCHES)]
        yield RecordedQuestion(
            question_id(text),
            draw.choice(MODELS),
            benchmark,
            64,
            branches,
            "7" if number % 2 else None,
            LabelSource.REFERENCE,
            draw.choice(list(Split)),
            text,
            origin=Origin.COLLECTED if benchmark == "arithmetic" else Origin.IMPORTED,
        )


async def fill(path: Path, count: int, recorded: int) -> None:
    """Create a store at `path` and fill it."""
    async with Store.open(path, create=True) as store:
        batch: list[ServedEpisode] = []
        for episode in episodes(count, datetime.now(UTC)):
            batch.append(episode)
            if len(batch) == BATCH:
                await store.add_all(batch)
                batch.clear()
        await store.add_all(batch)
        await store.sum_usage()
        made = list(recordings(recorded))
        await store.add(made)
        consensus = [recording.question for recording in made if recording.reference is None]
        await store.set_labels([Label(question, LabelSource.CONSENSUS, "7", 0.8, 0.5) for question in consensus])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.large_store")
    parser.add_argument("file", type=Path)
    parser.add_argument("--episodes", type=int, default=EPISODES)
    parser.add_argument("--recordings", type=int, default=RECORDINGS)
    options = parser.parse_args()
    asyncio.run(fill(options.file, options.episodes, options.recordings))
