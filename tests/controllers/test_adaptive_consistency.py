"""Adaptive consistency: its waves, that the length of chains decides nothing, and that it continues from any state."""

from __future__ import annotations

import random
from collections.abc import Sequence
from inspect import getsource

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from controllers import Action, State, Stop, Verb, advance, answer, branch, probe, prune, run_episode, run_sync
from controllers.advice import advise
from controllers.baselines import adaptive_consistency
from controllers.baselines.adaptive_consistency import gain, what_follows
from controllers.builtin import BASELINE, DEFAULT, create
from controllers.voting import plurality, tally, top_two
from tests.controllers.test_baselines import INTERVAL, answered, crowd, play
from tests.fakes import Chain, ScriptedEnvironment, chain, episode

NAME = "adaptive_consistency"
ANSWERS = "789"


def test_it_is_the_default_and_the_fallback() -> None:
    assert DEFAULT == BASELINE == NAME


def test_its_source_passes_the_static_check_so_that_explorers_may_start_from_it() -> None:
    assert advise(getsource(adaptive_consistency)) == []


def test_adaptive_consistency_stops_on_agreement_and_doubles_its_waves_on_a_split_vote() -> None:
    agreeing = [chain("7", 60 + i, mark=chr(97 + i)) for i in range(26)]
    state, environment = play(NAME, 1, agreeing)
    assert (state.width, answered(state, environment)) == (8, "7")
    split = [chain(str(7 + i % 2), 60 + i % 26, mark=chr(97 + i)) for i in range(64)]
    state, environment = play(NAME, 1, split)
    assert state.width == 64
    opened = [sum(action.verb is Verb.BRANCH for action in actions) for actions in environment.rounds]
    assert [count for count in opened if count] == [8, 8, 16, 32]


def test_adaptive_consistency_stops_early_on_scattered_votes() -> None:
    scattered = [chain(str(i // 2), 80, mark=chr(97 + i)) for i in range(64)]
    assert play(NAME, 0.5, scattered)[0].width == 32
    assert play("asc@64", 0.5, scattered)[0].width == 64


def test_adaptive_consistency_waits_only_for_long_chains_that_can_change_the_vote() -> None:
    wrong, short, long = chain("9", 60), chain("7", 60), chain("7", 600, mark="z")
    state, environment = play(NAME, 1, [wrong] * 3 + [long] * 5 + [short] * 56)
    assert answered(state, environment) == "7"
    assert len(state.finished) == state.width
    state, environment = play(NAME, 1, [wrong] * 7 + [long])
    assert (answered(state, environment), state.width, len(state.finished)) == ("9", 8, 7)


def test_adaptive_consistency_never_spends_more_on_a_question_at_a_smaller_beta() -> None:
    for seed in range(12):
        spent = [play(NAME, b / 16, crowd(seed), interval=480)[0].spent for b in range(17)]
        assert spent == sorted(spent)


@pytest.mark.parametrize(
    ("votes", "expected"),
    [((8, 0, 8, 56), 0.0), ((4, 4, 8, 56), 0.1), ((1, 1, 32, 32), 0.01), ((40, 10, 50, 14), 0.0)],
)
def test_the_gain_of_more_chains_equals_a_simulated_mean(votes: tuple[int, int, int, int], expected: float) -> None:
    first, second, sampled, left = votes
    rng = random.Random(0)
    total = sampled + 2
    p, q = (first + 1) / total, (second + 1) / total
    spread = ((p + q - (p - q) ** 2) / total * left / (sampled + left)) ** 0.5
    drawn = [max(0.0, -rng.gauss(p - q, spread)) for _ in range(20_000)]
    assert gain(*votes) == pytest.approx(sum(drawn) / len(drawn), abs=2e-3)
    assert gain(*votes) == pytest.approx(expected, abs=0.02)


# Length decides nothing


def with_lengths(labels: str, seed: int) -> list[Chain]:
    """Return chains that answer `labels`, in order, with lengths drawn by `seed`; "-" gives no answer."""
    rng = random.Random(seed)
    lengths = [rng.choice([60, 90, 200, 450, 900]) for _ in labels]
    return [
        Chain("<think>" + "m" * length) if label == "-" else chain(label, length, mark=chr(97 + i % 26))
        for i, (label, length) in enumerate(zip(labels, lengths, strict=True))
    ]


@settings(max_examples=25, deadline=None)
@given(
    beta=st.sampled_from([0.0, 0.2, 0.4, 0.7, 1.0]),
    labels=st.text(ANSWERS + "-", min_size=64, max_size=64),
    seeds=st.tuples(st.integers(0, 9), st.integers(10, 19)),
)
def test_the_answer_and_the_number_of_chains_do_not_depend_on_lengths(
    beta: float, labels: str, seeds: tuple[int, int]
) -> None:
    first, second = (play(NAME, beta, with_lengths(labels, seed)) for seed in seeds)
    assert answered(*first) == answered(*second)
    assert first[0].width == second[0].width


@settings(max_examples=80, deadline=None)
@given(
    beta=st.sampled_from([0.2, 0.5, 1.0]),
    votes=st.text(ANSWERS, max_size=40),
    unfinished=st.text(ANSWERS + "abc-", min_size=1, max_size=24),
    waves=st.integers(0, 3),
)
def test_a_decision_made_early_is_that_of_the_finished_wave(
    beta: float, votes: str, unfinished: str, waves: int
) -> None:
    """Draw the votes of unfinished chains: whatever they are, the finished wave decides the same."""
    worth, left = create(NAME, beta).worth, (0, 8, 16, 32)[waves]  # type: ignore[attr-defined]
    sampled = len(votes) + len(unfinished)
    before, after = (tally(None if v == "-" else ord(v) for v in text) for text in (votes, votes + unfinished))
    early = what_follows(top_two(before), len(unfinished), sampled, left, worth)
    final = what_follows(top_two(after), 0, sampled, left, worth)
    assert final != "undecided"
    assert early in (final, "undecided")
    if early == "stop":
        assert plurality(before) == plurality(after)


def test_the_next_wave_joins_unfinished_chains_that_cannot_prevent_it() -> None:
    labels = ("78" * 4)[:7] + "9"
    chains = [chain(label, 60, mark=chr(97 + i)) for i, label in enumerate(labels[:7])] + [chain("9", 900)]
    state, environment = play(NAME, 1, [*chains, *[chain("7", 60, mark=chr(110 + i % 9)) for i in range(56)]])
    opened = [sum(action.verb is Verb.BRANCH for action in actions) for actions in environment.rounds]
    assert opened[:3] == [8, 0, 8]  # in the third round, in which the long chain has most of its tokens to go
    assert not state.branches[7].finished
    assert (answered(state, environment), state.width) == ("7", 16)


def test_ties_go_to_the_chain_opened_first_not_to_the_shortest() -> None:
    tied = [chain("8" if i % 2 else "7", 60 if i % 2 else 200, mark=chr(97 + i % 26)) for i in range(64)]
    state, environment = play(NAME, 1, tied)
    assert environment.labels.written(plurality(state.votes) or 0) == "8"
    assert answered(state, environment) == "7"


# It continues from any state


def take_over(state: State, environment: ScriptedEnvironment, beta: float) -> list[Sequence[Action]]:
    """Continue an episode with the fallback. Return its rounds."""
    before = len(environment.rounds)
    run_sync(run_episode(create(BASELINE, beta), environment, state))
    return environment.rounds[before:]


def random_round(state: State, rng: random.Random) -> list[Action]:
    """Return a random legal round, such as a failing controller may leave behind."""
    actions: list[Action] = [branch()] * min(rng.choice([0, 0, 1, 4, 20]), state.room)
    for index in state.active:
        fate = rng.random()
        if fate < 0.1:
            actions.append(prune(index))
        elif fate < 0.7:
            actions += [advance(index, rng.choice([1, 1, 3])), *[probe(index)] * (rng.random() < 0.3)]
    return actions or [branch() if state.room else answer(state.leader())]


@settings(max_examples=50, deadline=None)
@example(beta=1.0, seed=1, rounds=5, cap=None, room=40, mute=False)
@given(
    beta=st.sampled_from([0.0, 0.3, 0.5, 1.0]) | st.floats(0, 1),
    seed=st.integers(0, 10_000),
    rounds=st.integers(0, 12),
    cap=st.none() | st.integers(INTERVAL, 20_000),
    room=st.integers(1, 64),
    mute=st.booleans(),
)
def test_the_fallback_continues_from_any_state_and_ends_soon(
    beta: float, seed: int, rounds: int, cap: int | None, room: int, mute: bool
) -> None:
    rng = random.Random(seed)
    labels = "-" * 64 if mute else "".join(rng.choice("77789-") for _ in range(64))
    environment = ScriptedEnvironment(with_lengths(labels, seed), INTERVAL, probe_cost=lambda _: 3)
    state = episode(INTERVAL, max_branches=room, max_tokens=cap, branch_tokens=1000, probe_tokens=3)
    for _ in range(rounds):
        actions = random_round(state, rng)
        state.check(actions)
        affordable = state.affordable(actions)
        if actions[0].verb is Verb.ANSWER or not affordable:
            break
        state.apply(affordable, run_sync(environment.execute(affordable)))
    finished, width, pruned = len(state.finished), state.width, sum(b.pruned for b in state.branches)
    played = take_over(state, environment, beta)
    assert state.stop in (Stop.ANSWERED, Stop.MAX_TOKENS)
    assert cap is None or state.spent <= cap
    assert (state.answer is None) == (state.leader() is None)
    assert all(action.verb is not Verb.PROBE for actions in played for action in actions)
    wanted = max(create(NAME, beta).samples, finished)  # type: ignore[attr-defined]
    assert state.width <= max(width, wanted + pruned)
    advanced = {action.branch for actions in played for action in actions if action.verb is Verb.CONTINUE}
    assert len(advanced) <= wanted
    if cap is None:  # the longest chain in each wave, and no more waves than doublings
        assert len(played) <= 1 + 7 * (1000 // INTERVAL)


def opened_and_advanced(chains: Sequence[Chain], rounds: int) -> tuple[State, ScriptedEnvironment]:
    """Return an episode in which `chains` were opened and advanced together for `rounds` rounds."""
    environment, state = ScriptedEnvironment(chains, INTERVAL), episode(INTERVAL)
    for number in range(rounds):
        actions = [advance(i) for i in state.active] if number else [branch()] * 40
        state.apply(actions, run_sync(environment.execute(actions)))
    return state, environment


def test_of_forty_running_branches_it_advances_no_more_than_a_wave() -> None:
    state, environment = opened_and_advanced(crowd(1, right=1.0), 1)
    played = take_over(state, environment, 1.0)
    assert state.width == 40
    assert {action.branch for actions in played[:-1] for action in actions} == set(range(8))
    assert (state.stop, answered(state, environment)) == (Stop.ANSWERED, "7")


def test_it_counts_as_many_votes_as_have_finished_but_of_long_chains_too() -> None:
    """A failed controller at β = 0 left twelve short chains that say 9 among forty, most of which will say 7."""
    chains = [chain("9", 60, mark=chr(97 + i % 26)) if i % 3 == 2 else chain("7", 400) for i in range(36)]
    state, environment = opened_and_advanced([*chains, *[chain("7", 400)] * 28], 2)
    assert (len(state.finished), environment.labels.written(0)) == (12, "9")
    take_over(state, environment, 0.0)
    assert answered(state, environment) == "7"
    assert len(state.finished) == 12 + 8  # the first twelve branches have eight long chains


def test_from_one_running_branch_it_opens_the_rest_of_a_wave() -> None:
    environment, state = ScriptedEnvironment(crowd(1, right=1.0), INTERVAL), episode(INTERVAL)
    state.apply([branch()], run_sync(environment.execute([branch()])))
    played = take_over(state, environment, 1.0)
    assert list(played[0]) == [advance(0), *[branch()] * 7]
    assert answered(state, environment) == "7"


def test_it_answers_what_a_probe_said_if_nothing_else_answered() -> None:
    mute = Chain("<think>" + "m" * 400, ("7",))
    environment, state = ScriptedEnvironment([mute, mute], INTERVAL), episode(INTERVAL)
    state.apply([branch(), branch(), probe(1)], run_sync(environment.execute([branch(), branch(), probe(1)])))
    take_over(state, environment, 0.0)
    assert answered(state, environment) == "7"


def test_it_ends_without_an_answer_if_all_branches_were_pruned_and_no_more_may_open() -> None:
    environment, state = ScriptedEnvironment(crowd(1), INTERVAL), episode(INTERVAL, max_branches=1)
    state.apply([branch(), prune(0)], run_sync(environment.execute([branch(), prune(0)])))
    take_over(state, environment, 1.0)
    assert (state.stop, state.answer) == (Stop.ANSWERED, None)


def test_under_a_cap_it_finishes_a_few_chains_instead_of_half_of_many() -> None:
    chains = [chain("7", 400, mark=chr(97 + i % 26)) for i in range(64)]
    state, environment = play(NAME, 1, chains, max_tokens=1300, branch_tokens=450)
    assert (state.stop, answered(state, environment)) == (Stop.MAX_TOKENS, "7")
    assert len(state.finished) == 3
    assert max(map(len, environment.rounds)) == 2  # two chains of 450 tokens fit under 1300, a third does not
