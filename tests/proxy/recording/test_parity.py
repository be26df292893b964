"""Recorded episodes must agree with their controllers and with their replay."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from discovery.audit.explain import explain
from discovery.audit.parity import ServedRecords, check_parity, load_records
from discovery.store import Store
from tests.fakes import FakeVLLM, chain
from tests.proxy.conftest import backend
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
