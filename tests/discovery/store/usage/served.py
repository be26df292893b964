"""Episodes for the tests of usage, and what their sums must be by plain counting."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from discovery.store import ServedEpisode, Store, StorePlace
from discovery.store.usage.facts import KINDS, latency_step
from discovery.store.usage.sums import Measure, rebuild
from tests.large_store import episodes

END = datetime(2026, 3, 10, 12, 34, 56, 789000, UTC)
NAMES: dict[Measure, Callable[[ServedEpisode], str]] = {
    Measure.STOP: lambda episode: episode.stop,
    Measure.CONTROLLER: lambda episode: episode.controller,
    Measure.BETA: lambda episode: str(int(episode.beta * 20 + 0.5)),
    Measure.LATENCY: lambda episode: str(latency_step(episode.about["seconds"])),
}
Counted = dict[tuple[str, str], tuple[int, int, float]]


def served(count: int = 200, **changes: Any) -> list[ServedEpisode]:
    """Return episodes of a month."""
    return [replace(episode, **changes) for episode in episodes(count, END)]


def counted(measure: Measure, served_episodes: Iterable[ServedEpisode], start_of: Callable[[str], str]) -> Counted:
    """Return requests, tokens and seconds by start and name."""
    sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0, 0.0])
    for episode in served_episodes:
        if measure is Measure.KIND:
            parts = {kind: episode.ledger[kind] for kind in KINDS if episode.ledger.get(kind)}
        else:
            parts = {NAMES[measure](episode): sum(episode.ledger.values())}
        for name, tokens in parts.items():
            known = sums[start_of(episode.created), name]
            sums[start_of(episode.created), name] = [
                known[0] + 1,
                known[1] + tokens,
                known[2] + episode.about["seconds"],
            ]
    return {key: (int(requests), int(tokens), round(seconds, 6)) for key, (requests, tokens, seconds) in sums.items()}


async def tables(store: Store) -> dict[str, set[tuple[Any, ...]]]:
    """Return the rows of every table of usage; sums of floating-point numbers are rounded."""
    content = {}
    for table in ("episode_facts", "usage_hours", "usage_days", "usage_summed"):
        rows = await store._read(f"SELECT * FROM {table}")
        content[table] = {
            tuple(round(value, 6) if isinstance(value, float) else value for value in row) for row in rows
        }
    return content


async def is_consistent(store: Store) -> bool:
    """Return whether the tables of usage are what they are when they are made anew from the episodes."""
    before = await tables(store)
    await store.write(rebuild)
    return before == await tables(store)


async def store_of(place: StorePlace, served_episodes: Iterable[ServedEpisode], until: str | None = None) -> None:
    """Make a store of episodes, whose usage is summed before the hour of a time."""
    async with Store.open(place, create=True) as store:
        await store.add_all(list(served_episodes))
        if until is not None:
            await store.sum_usage(until)
