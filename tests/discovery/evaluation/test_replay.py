"""Replay of recordings: immutability, probe costs, and the ends of recordings."""

from __future__ import annotations

from typing import Any

import pytest

from controllers import Limits, Probed, State, advance, branch, probe, run_episode, run_sync
from discovery.data.recordings import RecordedBranch, RecordedQuestion, Recording, intern_answers
from discovery.errors import BranchCensored
from discovery.evaluation.replay import ReplayEnvironment, branch_order
from tests.fakes import Scripted


def recording_of(branches: list[RecordedBranch]) -> Recording:
    return intern_answers(RecordedQuestion("q", "m", "b", 10, branches, "7"))


def test_the_arrays_of_a_recording_are_read_only() -> None:
    recording = recording_of([RecordedBranch(["1", None], 25, "7")])
    assert recording.answers == ("1", "7")
    with pytest.raises(ValueError, match="read-only"):
        recording.probes[0] = 3


def test_a_probe_costs_its_recorded_tokens_or_the_configured_price() -> None:
    recording = recording_of([RecordedBranch(["7"], 25, "7", [4])])
    for supposed, spent in ((None, 14), (9, 19)):
        state = State(Limits(10))
        script = Scripted([branch(), probe(0)])
        run_sync(run_episode(script, ReplayEnvironment(recording, [0], probe_tokens=supposed), state))
        assert state.spent == spent


@pytest.mark.parametrize("supposed", [None, 9])
def test_a_probe_of_a_branch_that_has_just_finished_shows_its_answer_at_no_cost(supposed: int | None) -> None:
    environment = ReplayEnvironment(recording_of([RecordedBranch(["3"], 25, "7")]), [0], supposed)
    opened, finished, probed = environment.carry_out([branch(), advance(0), probe(0)])
    assert (opened.tokens, finished.tokens, environment.critical_path) == (10, 15, 25)
    assert probed == Probed(0, 0, 0)


def test_opening_more_branches_than_recorded_raises_branch_censored() -> None:
    recording = recording_of([RecordedBranch(["1"], 25, "7")])
    with pytest.raises(BranchCensored, match="only 1 branches"):
        run_sync(run_episode(Scripted([branch(), branch()]), ReplayEnvironment(recording, [0]), State(Limits(10))))


def test_advancing_past_the_end_of_a_censored_branch_raises_branch_censored() -> None:
    recording = recording_of([RecordedBranch(["1", "7"], 25, None, complete=False)])
    state = State(Limits(10))
    script = Scripted([branch(2), probe(0)], [advance(0)])
    with pytest.raises(BranchCensored, match="branch 0 was recorded for 2 intervals and not to its end"):
        run_sync(run_episode(script, ReplayEnvironment(recording, [0]), state))
    assert (state.spent, state.branches[0].label) == (20, 0)


@pytest.mark.parametrize(
    ("sampling", "greedy_first"),
    [({"temperature": 0.0, "branch_temperature": "default"}, True), ({"temperature": 0.7}, False), ({}, False)],
)
def test_a_greedy_first_branch_is_opened_first_under_every_shuffle(
    sampling: dict[str, Any], greedy_first: bool
) -> None:
    branches = [RecordedBranch([], 25, "7")] * 8
    recording = intern_answers(RecordedQuestion("q", "m", "b", 10, branches, "7", sampling=sampling))
    orders = {tuple(branch_order(recording, seed)) for seed in range(20)}
    assert len(orders) == 20
    assert all(sorted(order) == list(range(8)) for order in orders)
    assert all(order[0] == 0 for order in orders) is greedy_first
