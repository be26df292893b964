"""State: which rounds are legal, what facts change, token accounting, and that a refused round changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controllers import (
    TO_END,
    Action,
    Advanced,
    BadFact,
    Fact,
    IllegalAction,
    Limits,
    Probed,
    State,
    Stop,
    Verb,
    advance,
    answer,
    branch,
    probe,
    prune,
)
from controllers.core.action_types import number_code
from controllers.limits import branch_limit, free_tokens
from tests.fakes import episode


def snapshot(state: State) -> Any:
    return (
        [(b.intervals, b.tokens, b.probe_tokens, b.label, b.probed, b.finished, b.pruned) for b in state.branches],
        (list(state.finished), dict(state.votes), state.labels, state.rounds, state.spent, state.answer, state.stop),
    )


def grown(*, finished: int | None = None) -> State:
    """Return a state with branch 0 running and probed, 1 running, 2 finished and 3 pruned."""
    state = episode(max_branches=5)
    state.apply(
        [branch(), branch(), branch(), branch()],
        [Advanced(i, 1, 10, i == 2, finished if i == 2 else None) for i in range(4)],
    )
    new = 0 if finished is None else finished + 1
    state.apply([probe(0), prune(3)], [Probed(0, new, 4)])
    return state


def test_applied_facts_update_branches_votes_and_tokens() -> None:
    state = grown(finished=0)
    assert [b.tokens for b in state.branches] == [10, 10, 10, 10]
    assert state.spent == 44
    assert state.active == (0, 1)
    assert state.finished == [2]
    assert state.votes == {0: 1}
    assert state.labels == 2
    assert state.branches[0].label == 1
    assert state.branches[0].active
    assert not state.branches[3].active
    assert state.width == 4
    assert state.room == 1
    assert state.remaining is None
    assert state.rounds == 2


def test_a_branch_that_finishes_in_the_round_that_prunes_it_counts_as_finished() -> None:
    state = grown(finished=0)
    state.apply([advance(0), prune(0), prune(1)], [Advanced(0, 1, 5, True, 0)])
    assert [(branch.finished, branch.pruned) for branch in state.branches[:2]] == [(True, False), (False, True)]
    assert (state.active, state.votes) == ((), {0: 2})


def test_the_ledger_sums_to_the_tokens_spent() -> None:
    state = grown(finished=0)
    state.apply([advance(1)], [Advanced(1, 1, 7, True, 0)])
    assert state.ledger() == {"winner": 0, "agreeing": 0, "losing": 37, "pruned": 10, "probe": 4}
    state.apply([answer(0)], [])
    ledger = state.ledger(winner=2)
    assert ledger == {"winner": 10, "agreeing": 17, "losing": 10, "pruned": 10, "probe": 4}
    assert sum(ledger.values()) == state.spent


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: branch(0), r"branch\(\): intervals must be from 1 to TO_END, not 0"),
        (lambda: branch(TO_END + 1), "intervals"),
        (lambda: Action(Verb.BRANCH, -1, "2"), "intervals"),
        (lambda: advance("0"), "no branch '0'"),  # type: ignore[arg-type]
        (lambda: advance(7.0), "no branch 7.0"),  # type: ignore[arg-type]
        (lambda: advance(-1), "no branch -1"),
        (lambda: advance(0, 0), "intervals"),
        (lambda: answer("0"), "no label '0'"),  # type: ignore[arg-type]
        (lambda: Action(1), "1 is not a verb"),
    ],
)
def test_a_malformed_action_cannot_be_constructed(make: Callable[[], Action], why: str) -> None:
    with pytest.raises(IllegalAction, match=why):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Advanced(0, 1, -1, False),
        lambda: Advanced(0, -1, 1, False),
        lambda: Advanced(0, 1, 10, True, -1),
        lambda: Advanced(0, 1, 10, False, 0),
        lambda: Probed(0, -1, 0),
        lambda: Probed(0, None, -1),
    ],
)
def test_an_impossible_fact_cannot_be_constructed(make: Callable[[], Fact]) -> None:
    with pytest.raises(BadFact):
        make()


@pytest.mark.parametrize(
    ("actions", "why"),
    [
        ([], "empty"),
        ([branch(), branch()], "at most 5 branches"),
        ([advance(4)], "no branch 4"),
        ([advance(2)], "finished"),
        ([advance(3)], "pruned"),
        ([probe(0)], "not advanced"),
        ([probe(1), probe(1)], "not advanced"),
        ([probe(2)], "finished"),
        ([prune(2)], "finished"),
        ([prune(3)], "pruned"),
        ([prune(0), advance(0)], "pruned"),
        ([prune(0), prune(0)], "pruned"),
        ([answer(0), advance(0)], "only action of its round"),
        ([answer(7)], "there is no label"),
        ([answer(-1)], "there is no label"),
        ([answer(None)], "label 0 leads"),
        ([(Verb.CONTINUE, 0, 1, None)], "is not an action"),
        ("advance", "a round is a list of actions, not str"),
    ],
)
def test_illegal_rounds_are_refused_and_change_nothing(actions: list[Action], why: str) -> None:
    state = grown(finished=0)
    before = snapshot(state)
    with pytest.raises(IllegalAction, match=why):
        state.check(actions)
    assert snapshot(state) == before


@pytest.mark.parametrize(
    "actions",
    [
        [branch(), advance(4, TO_END), probe(4), advance(4), probe(4), prune(4)],
        [advance(0), probe(0), advance(1, 3), prune(1)],
        [probe(1), advance(1)],
        [prune(0), prune(1)],
        [answer(0)],
        [answer(1)],
    ],
)
def test_legal_rounds_pass_and_change_nothing(actions: list[Action]) -> None:
    state = grown(finished=0)
    before = snapshot(state)
    state.check(actions)
    assert snapshot(state) == before


@pytest.mark.parametrize("fact", [Advanced(0, 1, 10, False, number=3), Probed(0, None, 4, number=3)])
def test_facts_with_a_number_can_be_changed_like_other_dataclasses(fact: Advanced | Probed) -> None:
    changed = replace(fact, tokens=7, number=None)
    assert (changed.tokens, changed.number, changed.code) == (7, None, b"")
    assert fact.code == number_code(3)


def test_a_round_that_was_legal_is_checked_again_once_a_branch_of_it_has_left() -> None:
    state = grown()
    again: list[Action] = [advance(0), probe(0), advance(1)]
    state.check(again)
    state.check([*again, probe(1)])
    for more in (probe(0), advance(2), advance(4)):
        with pytest.raises(IllegalAction):
            state.check([*again, more])
    state.apply([advance(1), prune(0)], [Advanced(1, 1, 10, False)])
    with pytest.raises(IllegalAction, match="branch 0 is pruned"):
        state.check(again)


def test_a_probe_that_was_legal_before_its_round_is_refused_after_it() -> None:
    state = grown()
    state.check([probe(1)])
    state.apply([probe(1)], [Probed(1, None, 4)])
    with pytest.raises(IllegalAction, match="branch 1 has not advanced"):
        state.check([probe(1)])


def test_answering_none_is_legal_only_while_no_label_leads() -> None:
    state = episode()
    state.check([answer(None)])
    state.apply([branch()], [Advanced(0, 1, 3, True, None)])
    state.check([answer(None)])
    state.apply([answer(None)], [])
    assert state.stop is Stop.ANSWERED
    assert state.answer is None
    with pytest.raises(IllegalAction, match="has ended"):
        state.check([branch()])


@pytest.mark.parametrize(
    ("actions", "facts"),
    [
        ([advance(0)], []),
        ([advance(0)], [Probed(0, None, 1)]),
        ([probe(1)], [Advanced(1, 1, 10, False)]),
        ([advance(0)], [Advanced(1, 1, 10, False)]),
        ([advance(0)], [Advanced(0, 1, 10, True, 5)]),
        ([branch()], [Advanced(0, 1, 10, False)]),
        ([branch()], [Advanced(4, 1, 10, True, 5)]),
        ([branch()], [Probed(4, None, 0)]),
        ([probe(1)], [Probed(1, 5, 0)]),
        ([advance(0)], [Advanced(0, 1, 10, False), Advanced(1, 1, 10, False)]),
        ([prune(0)], [Probed(0, None, 0)]),
    ],
)
def test_facts_that_do_not_match_their_actions_are_refused_and_change_nothing(
    actions: list[Action], facts: list[Fact]
) -> None:
    state = grown(finished=0)
    before = snapshot(state)
    with pytest.raises(BadFact):
        state.apply(actions, facts)
    assert snapshot(state) == before


def test_a_branch_that_finishes_early_in_a_round_votes_once() -> None:
    state = episode()
    state.apply(
        [branch(), advance(0), probe(0)], [Advanced(0, 1, 7, True, 0), Advanced(0, 0, 0, True, 0), Probed(0, 0, 0)]
    )
    assert state.finished == [0]
    assert state.votes == {0: 1}
    assert state.spent == 7


def test_the_leader_is_of_finished_branches_else_of_latest_labels_of_unpruned_ones() -> None:
    state = episode()
    state.apply([branch(), branch(), branch()], [Advanced(i, 1, 10, False) for i in range(3)])
    assert (state.leader(), state.deciding_votes()) == (None, {})
    state.apply([probe(0), probe(1), probe(2)], [Probed(0, 0, 1), Probed(1, 1, 1), Probed(2, 1, 1)])
    assert (state.leader(), state.deciding_votes()) == (1, {0: 1, 1: 2})
    state.apply([prune(1), prune(2)], [])
    assert (state.leader(), state.deciding_votes()) == (0, {0: 1})
    state.apply([advance(0)], [Advanced(0, 1, 2, True, 2)])
    assert (state.leader(), state.deciding_votes()) == (2, {2: 1})


def test_ending_from_outside_keeps_the_first_reason() -> None:
    state = grown(finished=0)
    state.end(Stop.DEADLINE)
    state.end(Stop.UPSTREAM_ERROR)
    assert state.stop is Stop.DEADLINE
    assert state.answer == 0


def test_affordable_keeps_the_actions_that_fit_the_cap_and_shortens_one() -> None:
    state = episode(interval=10, max_tokens=65, branch_tokens=25, probe_tokens=4)
    plan = [branch(), probe(0), branch(2), branch(2), branch(2)]
    assert state.affordable(plan) == [branch(), probe(0), branch(2), branch(2), branch(1)]  # 10 + 4 + 20 + 20, 11 left
    assert state.affordable([branch(TO_END)] * 3) == [branch(TO_END), branch(TO_END), branch(1)]
    state.apply([branch()], [Advanced(0, 1, 10, False)])
    assert state.remaining == 55
    assert state.affordable([advance(0, TO_END), prune(0)]) == [advance(0, TO_END), prune(0)]
    assert state.affordable([advance(0), advance(0, 9), branch(TO_END), branch(TO_END)]) == [
        advance(0),
        advance(0, 9),  # the branch itself ends at 25
        branch(TO_END),
        branch(1),
    ]
    state.apply([branch()] * 5, [Advanced(i, 1, 10, False) for i in range(1, 6)])
    assert state.remaining == 5
    assert state.affordable([probe(1), probe(2)]) == [probe(1)]
    assert state.affordable([advance(1)]) == []


def test_without_a_cap_every_action_is_affordable() -> None:
    state = episode()
    plan = [branch(TO_END)] * 10
    assert state.affordable(plan) is plan
    assert state.worst_case(0, 3) == 30


@pytest.mark.parametrize(
    "limits", [{"interval": 0}, {"interval": 5, "max_branches": 0}, {"interval": 5, "max_tokens": 9}]
)
def test_invalid_limits_are_refused(limits: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"Limits\."):
        Limits(**limits)


def test_the_repr_of_a_branch_shows_whether_it_runs_finished_or_was_pruned() -> None:
    state = grown(finished=0)
    assert [repr(b).split()[1] for b in state.branches] == ["running", "running", "finished", "pruned"]
    assert copy.copy(state.limits) == state.limits


def test_without_probes_a_probe_is_illegal_and_all_else_legal() -> None:
    state = episode(has_probes=False)
    state.check([branch(), advance(0), prune(0)])
    before = snapshot(state)
    with pytest.raises(IllegalAction, match="has no probes"):
        state.check([branch(), probe(0)])
    assert snapshot(state) == before


def test_without_pauses_an_open_branch_keeps_the_tokens_to_its_end_reserved() -> None:
    state = episode(branch_tokens=100, max_tokens=250, has_pauses=False)
    assert state.affordable([branch()] * 3) == [branch()] * 2
    state.apply([branch(), branch()], [Advanced(0, 1, 10, False), Advanced(1, 1, 10, False)])
    assert state.affordable([advance(0), advance(1), branch()]) == [advance(0), advance(1)]
    state.apply([advance(0), prune(1)], [Advanced(0, 2, 20, True, 0)])
    assert (state.spent, state.remaining) == (40, 210)
    assert state.affordable([branch()] * 2) == [branch()]  # the pruned branch may have cost 90 more
    state.apply([branch()], [Advanced(2, 1, 10, True, 0)])
    assert state.affordable([branch()] * 2) == [branch()]  # 250 - 50 - 90 = 110


@given(st.data(), st.integers(1, 60), st.integers(1, 200))
def test_without_pauses_no_play_costs_more_than_the_cap_even_if_every_branch_runs_to_its_end(
    data: st.DataObject, most: int, cap: int
) -> None:
    """Branches cost their whole length once they are open, whatever facts reveal, and also if they are pruned."""
    state = episode(branch_tokens=min(most, cap), max_tokens=cap, has_pauses=False, max_branches=6)
    lengths: list[int] = []
    most_of: list[int] = []
    for _ in range(12):
        moves = [branch()] * data.draw(st.integers(0, state.room), "opened")
        for index in state.active:
            moves += data.draw(st.sampled_from([[], [advance(index)], [advance(index, 3)], [prune(index)]]))
        if not moves:
            continue
        state.check(moves)
        actions = state.affordable(moves)
        facts, opened = [], sum(action.verb is Verb.BRANCH for action in actions)
        limits = list(
            zip(most_of, [b.tokens for b in state.branches], [b.finished for b in state.branches], strict=True)
        )
        limit = (
            branch_limit(min(most, cap), free_tokens(cap, limits), opened) if opened else 0
        )  # as an environment does
        for action in actions:
            if action.verb is Verb.PRUNE:
                continue
            index = action.branch
            if action.verb is Verb.BRANCH:
                index = len(lengths)
                most_of.append(limit)
                lengths.append(data.draw(st.integers(1, limit), "length"))
            known = state.branches[index].tokens if index < state.width else 0
            tokens = min(10 * action.intervals, lengths[index] - known)
            finished = known + tokens == lengths[index]
            label = data.draw(st.sampled_from([None, 0])) if finished and (state.labels or index == 0) else None
            facts.append(Advanced(index, -(-tokens // 10), tokens, finished, label))
        if actions:
            state.apply(actions, facts)
        assert sum(lengths) <= cap
        assert state.spent <= cap


def test_without_pauses_further_branches_share_what_is_left_once_one_has_voted() -> None:
    """The first branch may use the whole cap. Later ones get twice the tokens of the longest, and an interval."""
    state = episode(branch_tokens=100, max_tokens=100, has_pauses=False)
    assert state.affordable([branch()] * 4) == [branch()]
    state.apply([branch()], [Advanced(0, 1, 10, True, 0)])
    assert state.affordable([branch()] * 4) == [branch()] * 3  # 90 tokens are left, and each needs 30
    state.apply([branch()] * 3, [Advanced(i, 1, 10, False) for i in (1, 2, 3)])
    assert state.affordable([advance(1), branch()]) == [advance(1)]
    unread = episode(branch_tokens=100, max_tokens=150, has_pauses=False)
    unread.apply([branch()], [Advanced(0, 1, 10, True)])
    assert unread.affordable([branch()] * 4) == [branch()]  # it has not voted, so its length says nothing


def test_flags_of_limits_are_booleans_whatever_they_were_stored_as() -> None:
    """The compiled core would refuse a number where it expects a boolean."""
    limits = Limits(4, has_probes=1, has_pauses=0)  # type: ignore[arg-type]
    assert (limits.has_probes, limits.has_pauses) == (True, False)
    assert type(limits.has_probes) is type(limits.has_pauses) is bool
    state = State(limits)
    state.check([branch()])
    assert state.width == 0
