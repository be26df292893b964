"""Replays of a request's recorded branches under other controllers: answers, votes, tokens and limits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from controllers import Stop
from controllers.loading import Spec
from discovery.audit.what_if import what_if
from discovery.data.recordings import Origin, RecordedBranch, RecordedQuestion
from discovery.store import EpisodeDetails, ServedEpisode, Store

ANSWERS = ["7", "7", "9", "7", "9", "7", "7", "7"]


def episode(max_branches: int = 8, **limits: int | None) -> ServedEpisode:
    about = EpisodeDetails(limits={"interval": 10, "max_branches": max_branches, **limits})
    return ServedEpisode("i", "r", "m", "cmc", "d", 0.5, 1, 4, {}, "answered", "7", about=about)


def recorded(answers: list[str]) -> RecordedQuestion:
    branches = [RecordedBranch(tokens=25, probes=[answer, answer], final=answer) for answer in answers]
    return RecordedQuestion("q", "m", "live", 10, branches)


def test_self_consistency_votes_among_the_recorded_branches_and_pays_for_each() -> None:
    result = what_if(episode(), recorded(ANSWERS), Spec("self_consistency"), 1.0)
    assert (result.answer, result.branches, result.tokens) == ("7", 8, 8 * 25)
    assert result.votes == [("7", 6), ("9", 2)]
    assert result.stop is Stop.ANSWERED


def test_one_chain_takes_the_first_recorded_branch() -> None:
    result = what_if(episode(), recorded(["9", "7", "7"]), Spec("single"), 0.0)
    assert (result.answer, result.branches, result.tokens) == ("9", 1, 25)
    assert not result.is_exhausted


@pytest.mark.parametrize(("most", "expected"), [(64, True), (8, False)])
def test_it_says_whether_the_controller_ran_out_of_recorded_branches(most: int, expected: bool) -> None:
    result = what_if(episode(most), recorded(ANSWERS), Spec("self_consistency"), 1.0)
    assert result.branches == 8
    assert result.is_exhausted is expected


def test_the_cap_of_the_request_holds() -> None:
    result = what_if(episode(max_tokens=60, branch_tokens=25), recorded(ANSWERS), Spec("self_consistency"), 1.0)
    assert result.tokens <= 60
    assert result.stop is Stop.MAX_TOKENS


async def test_a_store_finds_the_recording_of_a_request(tmp_path: Path) -> None:
    mine = recorded(ANSWERS)
    live = [replace(mine, question=f"q{i}", request=request, origin=Origin.LIVE) for i, request in enumerate("rs")]
    async with Store.open(tmp_path / "s.db", create=True) as store:
        await store.add(live)
        found = await store.recording_of("s")
        assert found is not None
        assert (found.question, found.request) == ("q1", "s")
        assert [branch.final for branch in found.branches] == ANSWERS
        assert await store.recording_of("t") is None


def test_a_larger_beta_spends_more() -> None:
    low, high = (what_if(episode(), recorded(ANSWERS), Spec("self_consistency"), beta).tokens for beta in (0.0, 1.0))
    assert low < high
