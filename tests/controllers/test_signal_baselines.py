"""Baselines with signals of confidence and with statistical stopping rules, on chains with known answers."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from controllers import (
    Action,
    Advanced,
    Fact,
    Limits,
    Probed,
    State,
    Verb,
    advance,
    branch,
    probe,
    run_episode,
    run_sync,
)
from controllers.baselines.confident import WARM_UP, ConfidentWaves, spread
from controllers.baselines.mars import MarginAdversarial, ProbeHistory
from controllers.builtin import create
from controllers.core.branch_facts import Branch
from controllers.loading import Spec
from controllers.signals import Signal
from tests.controllers.signalled import SignalledEnvironment
from tests.controllers.test_baselines import INTERVAL, answered, crowd, play
from tests.fakes import Chain, chain, episode

SIGNAL_BASELINES = {"cisc": Signal.INTERVALS, "confident": Signal.INTERVALS, "mars": Signal.PROBES}


def observe(
    name: str,
    beta: float,
    chains: Sequence[Chain],
    confidences: Sequence[Sequence[int | None]],
    interval: int = INTERVAL,
) -> tuple[State, SignalledEnvironment]:
    """Play an episode whose chains report these confidences."""
    environment, state = SignalledEnvironment(chains, interval, confidences), episode(interval)
    run_sync(run_episode(create(name, beta), environment, state))
    return state, environment


@pytest.mark.parametrize("name", SIGNAL_BASELINES)
def test_each_of_them_declares_what_it_reads(name: str) -> None:
    assert Spec(name).signals == {SIGNAL_BASELINES[name]}


@pytest.mark.parametrize("name", ["cisc", "confident"])
def test_equal_confidences_change_no_decision_of_weighted_votes(name: str) -> None:
    for seed in range(4):
        without, same = play(name, 0.7, crowd(seed)), observe(name, 0.7, crowd(seed), [[900]] * 64)
        assert without[1].rounds == same[1].rounds


@pytest.mark.parametrize("name", ["cisc", "confident"])
def test_a_confident_minority_outweighs_a_doubtful_majority(name: str) -> None:
    chains = [chain("7" if i % 4 == 0 else "9", 400) for i in range(64)]
    confidences = [[950] if i % 4 == 0 else [500] for i in range(64)]
    assert answered(*observe(name, 0.5, chains, confidences)) == "7"
    assert answered(*play(name, 0.5, chains)) == "9"


@pytest.mark.parametrize("name", ["cisc", "confident"])
def test_a_chain_does_not_count_more_for_being_short(name: str) -> None:
    chains = [chain("7" if i % 3 == 0 else "9", 80 if i % 3 == 0 else 1600) for i in range(64)]
    assert answered(*observe(name, 0.5, chains, [[900]] * 64, interval=2000)) == "9"


@pytest.mark.parametrize("name", SIGNAL_BASELINES)
def test_partly_absent_signals_are_survived(name: str) -> None:
    confidences: list[list[int | None]] = [[None] if i % 3 == 0 else [0] if i % 3 == 1 else [1000] for i in range(64)]
    state, environment = observe(name, 1, crowd(1, right=1.0), confidences)
    assert answered(state, environment) == "7"


def test_confident_gives_up_later_chains_below_the_limit_of_the_first() -> None:
    first = [chain(str(i % 4), 200, mark=chr(97 + i)) for i in range(WARM_UP)]
    later = [chain("7", 800, mark=chr(97 + i % 26)) for i in range(56)]
    confidences = [[900 - 10 * i] for i in range(WARM_UP)] + [[950, 100] if i % 2 else [950] for i in range(56)]
    state, environment = observe("confident", 1, [*first, *later], confidences)
    given_up = [i for i, one in enumerate(state.branches) if one.pruned]
    assert given_up
    assert all(i >= WARM_UP and i % 2 for i in given_up)
    assert all(state.branches[i].intervals == 2 for i in given_up)
    assert answered(state, environment) == "7"
    # the least confident of the first chains do not vote either
    assert ConfidentWaves(1).kept == 0.9


def test_confident_keeps_at_least_the_configured_share_and_never_gives_up_without_signals() -> None:
    assert [ConfidentWaves(beta).kept for beta in (0, 0.5, 1)] == pytest.approx([0.6, 0.75, 0.9])
    for seed in range(4):
        state, _ = play("confident", 1, crowd(seed, right=0.4))
        assert not any(one.pruned for one in state.branches)


def test_spread_is_the_standard_deviation_of_what_is_known() -> None:
    assert spread([1.0, None, 3.0]) == 1.0
    assert spread([None]) == spread([]) == 0.0


@pytest.mark.parametrize("name", ["best_of_infinity", "certified"])
def test_statistical_rules_sample_in_doubling_waves_until_the_leader_is_safe(name: str) -> None:
    agreeing = [chain("7", 60 + i % 26, mark=chr(97 + i % 26)) for i in range(64)]
    state, environment = play(name, 1, agreeing)
    assert answered(state, environment) == "7"
    assert state.width == {"best_of_infinity": 8, "certified": 16}[name]
    split = [chain(str(7 + i % 2), 60 + i % 26, mark=chr(97 + i % 26)) for i in range(64)]
    _, environment = play(name, 1, split)
    opened = [sum(action.verb is Verb.BRANCH for action in actions) for actions in environment.rounds]
    assert [count for count in opened if count] == [8, 8, 16, 32]


@pytest.mark.parametrize("name", ["best_of_infinity", "certified"])
def test_statistical_rules_do_not_wait_for_chains_that_cannot_change_the_leader(name: str) -> None:
    """With one chain left of 64, 40 votes against 23 are decided; the chain is not waited for."""
    chains = [chain("7" if i % 8 < 5 else "9", 60, mark=chr(97 + i % 26)) for i in range(63)]
    state, environment = play(name, 1, [*chains, chain("9", 4000)], max_branches=64)
    assert answered(state, environment) == "7"
    assert len(state.finished) < 64


def test_certified_needs_more_votes_for_an_answer_that_appeared_late() -> None:
    votes = [chain("9", 60), *[chain("7", 61, mark=chr(97 + i % 26)) for i in range(63)]]
    first = [chain("7", 61, mark=chr(97 + i % 26)) for i in range(64)]
    assert play("certified", 0.6, first)[0].width < play("certified", 0.6, votes)[0].width


# MARS


def probed_chain(*labels: int | None, confidences: Sequence[int | None] = ()) -> ProbeHistory:
    """Return the history of a chain whose probes gave these labels."""
    history, state = ProbeHistory(), Branch()
    for at, label in enumerate(labels):
        state.label = label
        state.probe_confidence = confidences[at] if confidences else None
        history.add(state)
    return history


def test_a_switch_is_less_likely_the_longer_probes_agree_and_more_likely_after_flips() -> None:
    agreeing = [probed_chain(*[7] * count).switch for count in (1, 2, 4, 8)]
    assert agreeing == sorted(agreeing, reverse=True)
    assert probed_chain(7, 7, 7).switch < probed_chain(7, 9, 7, 7, 7).switch
    assert probed_chain().switch == probed_chain(None).switch == 1.0


def test_a_switch_is_less_likely_with_a_high_or_rising_confidence() -> None:
    assert probed_chain(7, 7, confidences=(900, 900)).switch < probed_chain(7, 7).switch
    assert probed_chain(7, 7, confidences=(500, 900)).switch < probed_chain(7, 7, confidences=(900, 900)).switch
    assert probed_chain(7, 7, confidences=(300, 300)).switch > probed_chain(7, 7, confidences=(None, None)).switch


def two_answers(controller: MarginAdversarial, leading: int, others: int, probes: int) -> State:
    """Return a state in which running chains gave the same answers at all probes, and one chain has finished."""
    state = State(Limits(INTERVAL))
    for at in range(probes):
        actions: list[Action] = []
        facts: list[Fact] = []
        for i in range(leading + others):
            actions += [branch() if not at else advance(i), probe(i)]
            facts += [Advanced(i, 1, INTERVAL, False), Probed(i, int(i >= leading), 3)]
        state.apply(actions, facts)
        controller.decide(state)
    state.apply([branch()], [Advanced(state.width, 1, 9, True, 0)])
    return state


def test_mars_stops_once_the_leader_survives_the_worst_case() -> None:
    controller = MarginAdversarial(0, 8)
    state = two_answers(controller, leading=14, others=2, probes=8)
    assert [action.verb for action in controller.decide(state)] == [Verb.ANSWER]
    controller = MarginAdversarial(0, 8)
    state = two_answers(controller, leading=14, others=2, probes=1)  # any chain may still switch
    assert Verb.ANSWER not in [action.verb for action in controller.decide(state)]
    controller = MarginAdversarial(0, 8)
    state = two_answers(controller, leading=9, others=8, probes=8)
    assert Verb.ANSWER not in [action.verb for action in controller.decide(state)]


def test_mars_learns_from_finished_chains_that_probes_are_left() -> None:
    """Chains that gave one answer at every probe and another at the end make the rule wait."""
    steady = [chain("7", 900, ["7"], mark=chr(97 + i % 26)) for i in range(56)]
    fickle = [chain("9", 300 + i, ["7"]) for i in range(8)]
    loyal = [chain("7", 300 + i, ["7"]) for i in range(8)]
    waited, _ = play("mars", 1, [*fickle, *steady], max_branches=64)
    stopped, _ = play("mars", 1, [*loyal, *steady], max_branches=64)
    assert stopped.spent < waited.spent


def test_mars_probes_every_chain_after_each_interval() -> None:
    state, environment = play("mars@4", 1, [chain("7", 300, [""], mark=mark) for mark in "abcd"])
    asked = [action.branch for actions in environment.rounds for action in actions if action.verb is Verb.PROBE]
    assert [asked.count(i) for i in range(4)] == [8] * 4
    assert answered(state, environment) == "7"
