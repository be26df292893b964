"""The baselines: how each behaves on chains with known answers, and that a larger β never spends less."""

from __future__ import annotations

import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from controllers import (
    TO_END,
    BetaError,
    Controller,
    State,
    Stop,
    UnknownController,
    Verb,
    advance,
    branch,
    run_episode,
    run_sync,
)
from controllers.baselines import CMC, ParallelProbe, SelfConsistency, ShortestFirst
from controllers.builtin import ADMIN_ONLY, BUILT_IN, PINNABLE, create, find, is_admin_only
from controllers.dial import linear
from tests.fakes import Chain, Eager, ScriptedEnvironment, chain, episode

INTERVAL = 40


def play(
    name: str, beta: float, chains: list[Chain], interval: int = INTERVAL, **limits: int
) -> tuple[State, ScriptedEnvironment]:
    environment = ScriptedEnvironment(chains, interval, probe_cost=lambda _: 3)
    state = episode(interval, **limits)
    run_sync(run_episode(create(name, beta), environment, state))
    return state, environment


OPENED_FIRST = ("adaptive_consistency", "self_consistency", "asc", "esc", "cisc", "parallel_probe")
FINISHED_FIRST = ("confident", "mars")


@pytest.mark.parametrize("name", [*OPENED_FIRST, *FINISHED_FIRST])
def test_a_tie_goes_to_the_branch_that_was_opened_or_that_finished_first(name: str) -> None:
    tied = [chain("8" if i % 2 else "7", 60 if i % 2 else 200, mark=chr(97 + i % 26)) for i in range(64)]
    state, environment = play(name, 1, tied)
    assert sorted(state.votes.values()) == [32, 32]
    assert state.stop is Stop.ANSWERED
    assert answered(state, environment) == ("7" if name in OPENED_FIRST else "8")


def answered(state: State, environment: ScriptedEnvironment) -> str | None:
    return None if state.answer is None else environment.labels.written(state.answer)


def crowd(seed: int, right: float = 0.6) -> list[Chain]:
    """Return 64 chains of one question: mostly 7, of varied length, with readable probe answers from half-way on."""
    rng = random.Random(seed)
    chains = []
    for i in range(64):
        label = "7" if rng.random() < right else str(rng.randint(10, 14))
        length = rng.randint(60, 480)
        probe_answers = [""] * (length // INTERVAL // 2) + [label] * (length // INTERVAL + 1)
        chains.append(chain(label, length, probe_answers, mark=chr(ord("a") + i % 26)))
    return chains


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("beta", [0, 0.5, 1])
def test_each_baseline_answers_what_all_chains_answer(name: str, beta: float) -> None:
    state, environment = play(name, beta, crowd(seed=1, right=1.0))
    assert state.stop is Stop.ANSWERED
    assert answered(state, environment) == "7"


@pytest.mark.parametrize("name", BUILT_IN)
def test_mean_tokens_of_each_baseline_do_not_fall_as_beta_rises(name: str) -> None:
    # CMC's schedule is made for chains of many intervals; on short ones all have finished before it may widen.
    spend = [sum(play(name, b / 4, crowd(seed), interval=8)[0].spent for seed in range(12)) for b in range(5)]
    assert spend == sorted(spend)


@pytest.mark.parametrize("name", BUILT_IN)
def test_replaying_the_same_chains_gives_the_same_rounds_and_tokens(name: str) -> None:
    first, second = play(name, 0.7, crowd(3)), play(name, 0.7, crowd(3))
    assert first[1].rounds == second[1].rounds
    assert first[0].spent == second[0].spent


@settings(max_examples=60, deadline=None)
@example(name="parallel_probe", beta=1.0, seed=0, cap=498, width=4)  # a cap that cuts between a step and its probe
@given(
    name=st.sampled_from(list(BUILT_IN)),
    beta=st.floats(0, 1),
    seed=st.integers(0, 1000),
    cap=st.integers(INTERVAL, 4000),
    width=st.integers(1, 64),
)
def test_each_baseline_ends_within_any_token_and_branch_limits(
    name: str, beta: float, seed: int, cap: int, width: int
) -> None:
    limits = {"max_tokens": cap, "branch_tokens": 500, "probe_tokens": 3, "max_branches": width}
    state, _ = play(name, beta, crowd(seed), **limits)
    assert state.stop in (Stop.ANSWERED, Stop.MAX_TOKENS)
    assert state.spent <= cap
    assert state.width <= width


@pytest.mark.parametrize("name", BUILT_IN)
def test_each_baseline_ends_without_an_answer_when_no_chain_gives_one(name: str) -> None:
    mute = [Chain("<think>hm" * (i + 1)) for i in range(64)]
    state, _ = play(name, 1, mute)
    assert state.stop is Stop.ANSWERED
    assert state.answer is None


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("beta", [-0.1, 1.1, float("nan"), float("inf"), "0.5", None, True])
def test_an_invalid_beta_is_refused(name: str, beta: float) -> None:
    with pytest.raises(BetaError, match="from 0 to 1"):
        create(name, beta)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cmcc", f"there are {', '.join(BUILT_IN)}"),
        ("cmcc@8", "no controller 'cmcc@8'"),
        ("cmc@8", "cmc takes no number of chains; asc, cisc, esc"),
        ("asc@", "from 1 to 1024, not ''"),
        ("asc@x", "from 1 to 1024, not 'x'"),
        ("asc@0", "from 1 to 1024, not '0'"),
        ("asc@1025", "from 1 to 1024"),
        ("asc@٤", "from 1 to 1024"),
    ],
)
def test_unknown_controller_names_and_chain_counts_are_refused(name: str, message: str) -> None:
    with pytest.raises(UnknownController, match=message):
        find(name)


def test_only_the_controller_everything_is_for_admins() -> None:
    assert {name for name in BUILT_IN if is_admin_only(name)} == ADMIN_ONLY == {"everything"}
    assert is_admin_only("everything@4")
    assert not any(map(is_admin_only, ("", "sc", "sc@4", "everythin", "nothing@everything")))


def test_sc_is_an_alias_of_self_consistency() -> None:
    assert find("sc") is find("self_consistency")
    pinned = create("sc@40", 0)
    assert isinstance(pinned, SelfConsistency)
    assert pinned.samples == 40


@pytest.mark.parametrize("name", sorted(PINNABLE))
def test_a_chain_count_in_the_name_overrides_beta(name: str) -> None:
    opened = {beta: play(f"{name}@5", beta, [chain("7", 90, mark=m) for m in "abcdefgh"])[0].width for beta in (0, 1)}
    assert len(set(opened.values())) == 1
    assert 1 <= opened[0] <= 5
    with pytest.raises(BetaError):
        create(f"{name}@5", 2)


def test_everything_runs_all_chains_to_their_ends_in_one_round() -> None:
    chains = [chain("7", length, ["", "7"]) for length in (39, 40, 130, 300)]
    state, environment = play("everything@4", 0, chains)
    assert environment.rounds[:-1] == [[branch(TO_END)] * 4]
    assert [branch.tokens for branch in state.branches] == [one.tokens for one in chains]
    assert all(branch.finished for branch in state.branches)
    assert answered(state, environment) == "7"


def test_everything_continues_a_chain_that_the_cap_shortened() -> None:
    """A cap reserves the longest chain for each, so a chain may fit only after another has ended early."""
    limits = {"max_tokens": 500, "branch_tokens": 400}
    state, environment = play("everything@2", 0, [chain("7", 100, ["7"]), chain("7", 390, ["7"])], **limits)
    assert environment.rounds[:-1] == [[branch(TO_END), branch(2)], [advance(1, TO_END)]]
    assert (state.stop, state.spent) == (Stop.ANSWERED, 490)


def test_esc_stops_at_the_first_unanimous_window() -> None:
    mixed = [chain("7" if i else "9", 60 + i) for i in range(8)]
    agreed = [chain("7", 80 + i) for i in range(8)]
    state, environment = play("esc", 1, [*mixed, *agreed, *crowd(1)])
    assert (state.width, answered(state, environment)) == (16, "7")
    state, _ = play("esc@12", 1, [*mixed, *agreed])
    assert state.width == 12  # half a window is no agreement, and no chains are left


def test_esc_does_not_stop_at_a_window_without_answers() -> None:
    state, environment = play("esc", 1, [*[Chain("<think>hm" * (i + 1)) for i in range(8)], *crowd(1)])
    assert state.width > 8
    assert answered(state, environment) == "7"


def test_answer_consistency_stops_its_chain_when_probe_answers_repeat() -> None:
    wandering = chain("9", 2000, ["1", "2", "", "", "7", "7", "7"])
    state, environment = play("answer_consistency", 0, [wandering])
    assert (state.width, state.branches[0].intervals, answered(state, environment)) == (1, 6, "7")
    state, environment = play("answer_consistency", 1, [chain("9", 300, ["1", "2", "3", "7"])])
    assert (state.branches[0].finished, answered(state, environment)) == (True, "9")


def test_short_m_at_k_votes_on_the_shortest_chains_only() -> None:
    short = [chain("7", 60 + i, mark=chr(97 + i)) for i in range(4)]
    state, environment = play("short_m_at_k@8", 0, [*[chain("9", 500 + i) for i in range(4)], *short])
    assert answered(state, environment) == "7"
    assert len(state.finished) == 4
    assert sum(branch.tokens for branch in state.branches) < 8 * 2 * INTERVAL


def test_short_m_at_k_waits_for_the_published_number_of_chains() -> None:
    assert [ShortestFirst(0, k).enough for k in (1, 8, 24, 64)] == [1, 4, 8, 16]


def test_self_consistency_doubles_its_chains_with_each_sixth_of_beta() -> None:
    assert [SelfConsistency(b / 6).samples for b in range(7)] == [1, 2, 4, 8, 16, 32, 64]


def test_asc_stops_at_the_first_confidence_above_its_threshold() -> None:
    state, _ = play("asc", 1, [chain("7", 60 + i, mark=chr(97 + i)) for i in range(26)])
    assert state.width == 4  # 31/32 is the first confidence past 0.95


def run(controller: Controller, chains: list[Chain]) -> tuple[object, int]:
    """Play an episode with free probes. Return `(outcome, number of probes)`."""
    environment, state = ScriptedEnvironment(chains, INTERVAL), episode()
    run_sync(run_episode(controller, environment, state))
    what = answered(state, environment), [(b.tokens, b.finished, b.pruned) for b in state.branches]
    return what, sum(action.verb is Verb.PROBE for actions in environment.rounds for action in actions)


@pytest.mark.parametrize("name", ["cmc", "parallel_probe"])
@pytest.mark.parametrize("beta", [0, 0.3, 0.6, 1])
def test_controllers_that_probe_lazily_decide_as_with_every_probe(name: str, beta: float) -> None:
    asked = eagerly = 0
    for seed in range(8):
        # half of the chains are slow; all change their answer on the way, and some probes are unreadable
        chains = [*crowd(seed, right=0.5)[::2], *(wavering(seed * 64 + i) for i in range(32))]
        random.Random(seed).shuffle(chains)
        lazy, probes = run(create(name, beta), chains)
        eager, all_probes = run(Eager(create(name, beta)), chains)
        assert lazy == eager
        assert probes <= all_probes
        asked, eagerly = asked + probes, eagerly + all_probes
    assert asked < eagerly or (name, beta) == (
        "parallel_probe",
        0,
    )  # which probes every time


def wavering(seed: int) -> Chain:
    """Return a long chain whose probes mostly give 7, with other and unreadable answers in between."""
    rng = random.Random(seed)
    probe_answers = [rng.choice(["", "7", "7", "7", "8", "12"]) for _ in range(200)]
    return chain(rng.choice(["7", "7", "8"]), rng.randint(300, 1900), probe_answers, mark=chr(ord("a") + seed % 26))


def test_parallel_probe_reaches_no_consensus_while_most_chains_give_no_answer() -> None:
    mute = [chain("7", 1500, [""], mark=chr(97 + i)) for i in range(3)]
    state, environment = play("parallel_probe", 0, [*mute, chain("9", 1500, ["9"], mark="z")], max_branches=4)
    assert answered(state, environment) != "9" or state.spent > 4 * 1000


def test_parallel_probe_at_beta_1_has_the_published_settings() -> None:
    controller = ParallelProbe(1)
    assert (controller.width, controller.stable, controller.patience, controller.warm_up) == (64, 40, 7, 15)
    assert (ParallelProbe(1, 8).width, ParallelProbe(0, 8).width) == (8, 8)


def test_parallel_probe_prunes_a_deviating_chain_and_stops_on_a_stable_consensus() -> None:
    steady = [chain("7", 2000, ["7"], mark=m) for m in "abc"]
    state, environment = play("parallel_probe", 0, [*steady, chain("9", 2000, ["9"], mark="z")])
    assert [b.pruned for b in state.branches] == [False, False, False, True]
    # Votes begin with the second interval; the first of them makes the consensus, the others confirm it.
    assert state.branches[0].intervals == 2 + ParallelProbe(0).stable
    assert state.branches[3].intervals == 1 + ParallelProbe(0).patience
    assert answered(state, environment) == "7"


def test_parallel_probe_counts_only_consecutive_deviations_after_warm_up() -> None:
    warm_up = ParallelProbe(0.4).warm_up  # 6 votes; patience is 4, stable 17
    steady = [chain("7", 4000, ["7"], mark=m) for m in "abc"]
    astray = [chain("9", 4000, ["9"] * 99, mark="y"), chain("9", 4000, ["9", "9", "7"] * 99, mark="z")]
    state, _ = play("parallel_probe@5", 0.4, [*steady, *astray])
    assert [b.pruned for b in state.branches] == [False, False, False, True, False]
    assert state.branches[3].intervals == 1 + warm_up + ParallelProbe(0.4).patience


def test_parallel_probe_breaks_ties_in_favour_of_the_chain_opened_first() -> None:
    chains = [chain(label, 4000, [label], mark=mark) for label, mark in ("7a", "8b", "8c", "7d")]
    state, environment = play("parallel_probe", 0, chains)
    assert [b.pruned for b in state.branches] == [False, True, True, False]
    assert answered(state, environment) == "7"


def test_parallel_probe_ends_when_only_deviating_chains_still_run() -> None:
    chains = [chain("7", 100, ["7"], mark="a"), chain("7", 110, ["7"], mark="b"), chain("8", 900, ["8"], mark="c")]
    state, environment = play("parallel_probe@3", 0, chains)
    assert (state.branches[2].intervals, state.rounds) == (3, 3)
    assert answered(state, environment) == "7"


def test_cmc_at_beta_one_half_has_the_published_settings() -> None:
    half = CMC(0.5)
    assert (half.first_branches, half.most_branches, half.warm_up, half.patience, half.window.maxlen) == (
        5,
        34,
        6,
        8,
        5,
    )
    assert (half.burst, half.widen, half.min_finished) == (2, 2, 4)
    assert (half.alpha, half.threshold, half.slack, half.trend) == pytest.approx((0.5, 0.91, 0.025, 0.025))


def test_cmc_prunes_deviating_chains_and_bursts_an_agreeing_one() -> None:
    short = [chain("7", 90, ["7"], mark="a"), chain("7", 95, ["7"], mark="b")]
    agreeing = chain("7", 3000, ["7"], mark="c")
    deviants = [chain("9", 3000, ["9"], mark=m) for m in "defgh"]
    # Confidence of two equal votes, 0.875, stays under β = 1's threshold, so the long chains are reached.
    state, environment = play("cmc", 1, [*short, agreeing, *deviants, *deviants, *crowd(1)])
    assert sum(b.pruned for b in state.branches) >= 1
    bursts = {a.branch for r in environment.rounds for a in r if a.verb is Verb.CONTINUE and a.intervals == 3}
    assert 2 in bursts
    assert not bursts & {3, 4, 5, 6, 7}


def test_linear_interpolates_between_both_ends() -> None:
    assert [linear(2, 8, b) for b in (0, 0.5, 1)] == [2, 5, 8]


def test_cmc_ends_when_every_chain_finishes_in_its_first_interval() -> None:
    state, environment = play("cmc", 0, [chain("7", INTERVAL, mark=m) for m in "ab"])
    assert answered(state, environment) == "7"
    assert len(environment.rounds) == 2


def test_a_cap_that_cuts_the_first_chain_stops_with_max_tokens() -> None:
    for name in ("single", "asc", "self_consistency"):
        state, _ = play(name, 0, [chain("7", 300)], max_tokens=210, branch_tokens=400)
        assert (state.stop, state.spent, state.answer) == (Stop.MAX_TOKENS, 200, None), name


def test_a_probe_that_the_cap_refused_does_not_count_as_agreement() -> None:
    # After 40 tokens 2 are left: too few for a probe, enough for the last token a branch may have.
    chains = [chain("7", 41, ["7"])]
    state, environment = play("answer_consistency", 0, chains, max_tokens=42, branch_tokens=41, probe_tokens=3)
    assert [[a.verb for a in r] for r in environment.rounds] == [[Verb.BRANCH], [Verb.CONTINUE], [Verb.ANSWER]]
    assert (answered(state, environment), state.spent) == ("7", 41)


@pytest.mark.parametrize("name", ["self_consistency@2", "esc@2"])
def test_a_chain_cut_by_the_cap_continues_when_other_chains_cost_less_than_reserved(name: str) -> None:
    chains = [chain("7", 100, mark="a"), chain("7", 300, mark="b")]
    state, environment = play(name, 0, chains, max_tokens=450, branch_tokens=400)
    assert [[a.verb for a in r] for r in environment.rounds] == [
        [Verb.BRANCH, Verb.BRANCH],
        [Verb.CONTINUE],
        [Verb.ANSWER],
    ]
    assert state.votes == {0: 2}
