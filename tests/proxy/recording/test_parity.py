"""Recorded episodes must agree with their controllers and with their replay."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest

from controllers import Fact, Limits, Round, State, run_episode
from controllers.loading import Spec
from controllers.signals import ALL_SIGNALS
from discovery.audit.explain import explain
from discovery.audit.parity import ServedRecords, check_parity, load_records
from discovery.data.packed_rounds import unpack_rounds
from discovery.data.recordings import intern_answers
from discovery.evaluation.replay import ReplayEnvironment
from discovery.store import Store
from tests.discovery.evaluation.test_replay_signals import WATCHER
from tests.fakes import FakeVLLM, chain
from tests.proxy.conftest import INTERVAL, backend
from tests.proxy.recording.test_episode_log import serving, until

__all__ = ["backend"]  # a fixture

REQUESTS = 4


@pytest.mark.slow
@pytest.mark.parametrize("text", ["none", "full"])
@pytest.mark.parametrize("controller", ["cmc", "asc@6", "parallel_probe@6", "short_m_at_k@6", "single"])
async def test_replay_reproduces_every_decision_of_recorded_episodes(
    backend: FakeVLLM, tmp_path: Path, controller: str, text: str
) -> None:
    path = tmp_path / "s.db"
    backend.chains = [
        chain("7" if i % 3 else "9", 100 + 31 * (i % 11), ["", "9" if i % 4 else "7", "7"], mark=chr(97 + i % 26))
        for i in range(60)
    ]
    settings = {"store_text": text, "record_fraction": 1.0, "record_branches": 10}

    kept = ServedRecords([], {}, {})

    async def recorded() -> ServedRecords | None:
        async with Store.open(path) as store:
            records = await load_records(store)
        return records if len(records.recordings) > len(kept.recordings) else None

    async with Store.open(path, create=True):
        pass  # the store must exist before it is read
    async with serving(backend, path, **settings) as proxy:
        for number in range(REQUESTS):
            backend.opened = 13 * number
            status, _, body = await proxy.ask("0.3", tts={"controller": controller})
            assert status == 200, body
            kept = await until(recorded)
    report = check_parity(kept)
    assert report.decisions.rounds == report.decisions.agreed >= 2 * REQUESTS
    assert report.decisions.unchecked == []
    assert (report.reproduced.episodes, report.reproduced.differing) == (REQUESTS, [])
    assert [group.recorded for group in report.groups] == [REQUESTS]
    for episode in kept.episodes:
        why = explain(episode)
        assert why["rounds"][-1]["tokens"] == episode.about["spent"]
        assert why["why"].startswith("The controller answered ")


async def check_facts(kept: ServedRecords, beta: float, interval: int) -> None:
    """Check that WATCHER's episodes are replayed fact by fact, with all signals."""
    for episode in kept.episodes:
        assert episode.about["signals"] == ["intervals", "probes"]
        recorded = kept.recordings[episode.request_id]
        assert all(part.confidences and part.lowests and None not in part.confidences for part in recorded.branches)
        width = len(recorded.branches)
        replay = ReplayEnvironment(intern_answers(recorded), range(width), signals=ALL_SIGNALS)
        rounds: list[Sequence[Fact]] = []
        state = State(Limits(interval, max_branches=width))
        await run_episode(Spec("watcher", WATCHER).factory(beta), replay, state, partial(add_facts, rounds))
        assert rounds == [list(played.facts) for played in unpack_rounds(episode.trace)]
        assert state.spent == episode.about["spent"]


def add_facts(rounds: list[Sequence[Fact]], _: State, played: Round) -> None:
    rounds.append(list(played.facts))


@pytest.mark.process
@pytest.mark.slow
async def test_replay_shows_a_controller_the_signals_that_it_was_served_with(backend: FakeVLLM, tmp_path: Path) -> None:
    path, file = tmp_path / "s.db", tmp_path / "watcher.py"
    file.write_text(WATCHER)
    backend.chains = [chain("7" if i % 3 else "9", 100 + 31 * (i % 5), ["9", "7"], mark=chr(97 + i)) for i in range(12)]
    settings = {"controller": str(file), "record_fraction": 1.0, "record_branches": 10, "decision_s": 5}

    async def recorded() -> ServedRecords | None:
        async with Store.open(path) as store:
            records = await load_records(store)
        return records if len(records.recordings) == REQUESTS else None

    async with Store.open(path, create=True):
        pass  # the store must exist before it is read
    async with serving(backend, path, **settings) as proxy:
        for number in range(REQUESTS):
            backend.opened = 5 * number
            status, _, body = await proxy.ask("0.3", tts={"answer": "boxed"})
            assert (status, body["tts"]["controller"], body["tts"]["fallback"]) == (200, "watcher", None)
        kept = await until(recorded)
        assert await proxy.metric("autotts_signals_total", signal="intervals", known="true") > 4 * REQUESTS
        assert await proxy.metric("autotts_signals_total", signal="probes", known="true") > 4 * REQUESTS
        assert await proxy.metric("autotts_signals_total", known="false") == 0
    await check_facts(kept, 0.3, INTERVAL)


async def read_episodes(path: Path) -> ServedRecords | None:
    """Return the records of a store once it holds an episode."""
    async with Store.open(path) as store:
        read = await load_records(store)
    return read if read.episodes else None


@pytest.mark.parametrize("controller", ["parallel_probe", "self_consistency"])
async def test_a_request_cut_short_by_max_tokens_is_not_a_disagreement(
    backend: FakeVLLM, tmp_path: Path, controller: str
) -> None:
    path = tmp_path / "s.db"

    async with Store.open(path, create=True):
        pass  # the store must exist before it is read
    async with serving(backend, path) as proxy:
        _, headers, _ = await proxy.ask("0.5", max_tokens=5, tts={"controller": controller})
        assert headers["x-tts-stop"] == "max_tokens"
        kept = await until(partial(read_episodes, path))
    report = check_parity(kept)
    assert report.decisions.disagreements == []
    assert [group.left_out for group in report.groups] in ([], [{"cut short": 1}])
    assert explain(kept.episodes[0])["why"] == (
        "The request's max_tokens cut the first branches before they answered, so no more were opened; "
        "no answer had been given."
    )


async def test_a_request_whose_branches_are_all_cut_is_not_a_disagreement(backend: FakeVLLM, tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    backend.chains = [chain("7", 400, mark=mark) for mark in "abcdefgh"]

    async with Store.open(path, create=True):
        pass  # the store must exist before it is read
    async with serving(backend, path) as proxy:
        tts = {"controller": "parallel_probe", "answer": "boxed"}
        _, headers, _ = await proxy.ask("0.25", max_tokens=60, tts=tts)
        assert headers["x-tts-stop"] == "max_tokens"
        kept = await until(partial(read_episodes, path))
    report = check_parity(kept)
    assert report.decisions.disagreements == []
    assert report.decisions.agreed == report.decisions.rounds > 0
    assert [group.left_out for group in report.groups] in ([], [{"all cut": 1}])
    assert explain(kept.episodes[0])["why"] == (
        "The request's max_tokens cut every branch before it answered; no answer had been given."
    )
