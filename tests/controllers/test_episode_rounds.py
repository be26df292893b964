"""Tests of the owner's side of episodes that sandbox processes decide."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

import pytest

from controllers import (
    Action,
    Advanced,
    Controller,
    Fact,
    IllegalAction,
    Limits,
    Probed,
    Round,
    State,
    Stop,
    advance,
    branch,
    probe,
    run_episode,
    run_sync,
)
from controllers.loading import Spec, make
from controllers.sandbox import frames
from controllers.sandbox.controller import SuspendingController
from controllers.sandbox.frames import Decision
from discovery.data.recordings import intern_answers
from discovery.evaluation.replay import ReplayEnvironment, shuffled_order
from tests.discovery.evaluation.test_evaluate import question

RECORDING = intern_answers(question(0, branches=16))
Rounds = list[tuple[list[Action], list[Fact]]]


def environment() -> ReplayEnvironment:
    return ReplayEnvironment(RECORDING, shuffled_order(16, 3))


def play_suspended(decide: Any, state: State) -> Rounds:
    """Play an episode whose decisions are sent to it; one that repeats the last is sent as None."""
    rounds, last = Rounds(), None

    def keep(_: State, played: Round) -> None:
        rounds.append((list(played.actions), list(played.facts)))

    async def run() -> None:
        await SuspendingController(0, 1.0, frames.FactCodes()).rounds(environment(), state, keep)

    running: Coroutine[Any, Decision, None] = run()
    try:
        running.send(None)
        while True:
            decided = list(decide(state))
            running.send(None if decided == last else decided)
            last = decided
    except StopIteration:
        return rounds


def play(controller: Controller, state: State) -> Rounds:
    rounds = Rounds()

    def keep(_: State, played: Round) -> None:
        rounds.append((list(played.actions), list(played.facts)))

    run_sync(run_episode(controller, environment(), state, keep))
    return rounds


@pytest.mark.parametrize("cap", [None, 150, 2_000])
@pytest.mark.parametrize("name", ["adaptive_consistency", "cmc", "parallel_probe", "sc@8"])
def test_a_suspended_episode_has_the_rounds_of_one_that_is_not(name: str, cap: int | None) -> None:
    limits = Limits(RECORDING.interval, 16, None if cap is None else 2_000, 20, cap)
    suspended, plain = State(limits), State(limits)
    controller = make(Spec(name), 1.0)
    assert play_suspended(controller.decide, suspended) == play(make(Spec(name), 1.0), plain)
    assert (suspended.stop, suspended.answer, suspended.spent) == (plain.stop, plain.answer, plain.spent)
    assert cap is not None or plain.stop is Stop.ANSWERED


def test_a_suspended_episode_ends_at_the_token_limit() -> None:
    state = State(Limits(RECORDING.interval, 16, 2_000, 20, 2_000))
    play_suspended(make(Spec("cmc"), 1.0).decide, state)
    assert state.stop is Stop.MAX_TOKENS


def test_a_suspended_episode_refuses_an_illegal_round() -> None:
    state = State(Limits(RECORDING.interval, 16))
    with pytest.raises(IllegalAction, match=r"advance\(\): there is no branch 4; 0 are open"):
        play_suspended(lambda _: [advance(4)], state)
    assert state.rounds == 0


def test_an_unchanged_first_decision_is_refused_as_empty() -> None:
    async def run() -> None:
        await SuspendingController(0, 1.0, frames.FactCodes()).rounds(environment(), State(Limits(10)))

    running = run()
    running.send(None)
    with pytest.raises(IllegalAction, match="an empty round makes no progress"):
        running.send(None)


def test_an_episode_that_has_ended_has_no_turn() -> None:
    state = State(Limits(RECORDING.interval, 16))
    state.end(Stop.DEADLINE)
    assert play_suspended(lambda _: [], state) == []


# Turns and decisions


def test_a_round_with_the_facts_of_the_one_before_is_sent_as_one_number() -> None:
    codes, decided = frames.FactCodes(), [advance(0), probe(0)]
    facts: list[Fact] = [Advanced(0, 1, 10, False), Probed(0, 1, 9)]
    turn = frames.encode_turn(3, decided, Round(decided, list(facts)), codes, facts)
    assert turn == [3, frames.AGAIN]
    assert frames.decode_turn(turn, 0, decided, [], facts) == (decided, facts, 2)
    other = frames.encode_turn(3, decided, Round(decided, [facts[0], Probed(0, 2, 9)]), codes, facts)
    assert other[:2] == [3, frames.FACTS]
    cut = frames.encode_turn(3, decided, Round(decided[:1], facts[:1]), codes, facts[:1])
    assert cut[:2] == [3, frames.ROUND]  # the same facts, of other actions


def test_a_round_without_facts_is_not_taken_for_a_repeated_one() -> None:
    turn = frames.encode_turn(3, [branch()], Round([], []), frames.FactCodes())
    assert turn == [3, frames.ROUND, 0, 0]


def test_an_unchanged_decision_decodes_to_none() -> None:
    assert frames.decode_decision([frames.UNCHANGED], 0, 9) == (None, 1)
    numbers = [1, frames.encode_action(branch()), frames.UNCHANGED, 0]
    assert frames.decode_decisions(numbers, 0, 3, 9) == ([[branch()], None, []], 4)


@pytest.mark.parametrize("number", [9, frames.MAX_NUMBERED - 1, frames.MAX_NUMBERED, frames.MAX_NUMBERED + 9])
def test_different_facts_of_one_number_have_codes_of_their_own(number: int) -> None:
    codes = frames.FactCodes()
    short, long = (Advanced(1, 1, tokens, False, number=number) for tokens in (10, 20))
    assert codes.codes_of([short, long, short, long]) == [0, 1, 0, 1]
    assert codes.codes_of([long, short]) == [1, 0]
    learnt: list[Fact] = []
    frames.decode_facts(codes.new_facts(), 0, learnt)
    assert learnt == [short, long]
