"""State: a fact that an environment returns as the same object again is not checked again, and counts as before."""

from __future__ import annotations

import copy
import pickle

import pytest

from controllers import Advanced, BadFact, Fact, Probed, State, advance, branch, probe
from tests.fakes import episode

STEPS = [Advanced(index, 1, 10, False) for index in range(2)]
PROBES = [Probed(index, 0, 4) for index in range(2)]


def repeated(rounds: int = 2) -> State:
    """Return a state with two branches after so many rounds that advanced and probed both, with the same facts."""
    state = episode(max_branches=5)
    state.apply([branch(), branch()], list(STEPS))
    for _ in range(rounds):
        play(state, [STEPS[0], PROBES[0], STEPS[1], PROBES[1]])
    return state


def play(state: State, facts: list[Fact]) -> None:
    actions = [advance(0), probe(0), advance(1), probe(1)]
    state.check(actions)
    state.apply(actions, facts)


def test_the_same_facts_count_in_every_round() -> None:
    state = repeated(3)
    assert [(b.intervals, b.tokens, b.probe_tokens, b.probed, b.label) for b in state.branches] == [
        (4, 40, 12, 4, 0),
        (4, 40, 12, 4, 0),
    ]
    assert (state.spent, state.labels) == (104, 1)


@pytest.mark.parametrize(
    "facts",
    [
        [STEPS[1], PROBES[0], STEPS[1], PROBES[1]],
        [STEPS[0], PROBES[1], STEPS[1], PROBES[1]],
        [STEPS[0], PROBES[0], PROBES[1], STEPS[1]],
        [PROBES[0], STEPS[0], STEPS[1], PROBES[1]],
    ],
)
def test_a_known_fact_in_the_place_of_another_is_refused(facts: list[Fact]) -> None:
    with pytest.raises(BadFact, match="does not match"):
        play(repeated(), facts)


def test_other_facts_between_known_ones_count() -> None:
    state = repeated()
    play(state, [Advanced(0, 1, 7, False, None, 900, 800), Probed(0, 1, 5), STEPS[1], PROBES[1]])
    play(state, [STEPS[0], PROBES[0], STEPS[1], PROBES[1]])
    assert [(b.tokens, b.probe_tokens, b.label) for b in state.branches] == [(47, 17, 0), (50, 16, 0)]
    assert state.labels == 2


def test_a_finished_branch_keeps_its_final_label_when_its_round_repeats_a_probe() -> None:
    state = repeated()
    play(state, [Advanced(0, 1, 3, True, 1), PROBES[0], STEPS[1], PROBES[1]])
    assert (state.branches[0].label, state.votes, state.branches[0].probe_tokens) == (1, {1: 1}, 12)


def test_copies_check_facts_anew() -> None:
    state = repeated()
    for again in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        play(again, [STEPS[0], PROBES[0], STEPS[1], PROBES[1]])
        assert (again.spent, again.branches[0].tokens) == (state.spent + 28, 40)
        with pytest.raises(BadFact, match="does not match"):
            play(again, [STEPS[1], PROBES[0], STEPS[1], PROBES[1]])
