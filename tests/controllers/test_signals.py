"""Tests of the signals: their definition, their declaration, and how a state adds them up."""

import math

import pytest

from controllers import Advanced, BadFact, Limits, Probed, Signal, State, advance, branch, probe
from controllers.advice import advise, declared_signals
from controllers.loading import Spec
from controllers.signals import (
    MAX_CONFIDENCE,
    WINDOW,
    answer_confidence,
    combine,
    confidence_of,
    interval_signals,
    pack_signals,
    unpack_signals,
)

CERTAIN, HALF = 0.0, math.log(0.5)

FILE = """
from controllers import State, answer

class Mine:
    {declaration}

    def __init__(self, beta):
        pass

    def decide(self, state):
        return [answer(state.leader())]
"""


def test_confidence_is_the_geometric_mean_probability_in_per_mille() -> None:
    assert answer_confidence([math.log(0.2), math.log(0.8)]) == 400
    assert confidence_of(CERTAIN) == MAX_CONFIDENCE
    assert confidence_of(-50.0) == 0


def test_confidence_is_unknown_without_tokens_or_with_an_unknown_one() -> None:
    assert answer_confidence([]) is None
    assert answer_confidence([HALF, None]) is None
    assert answer_confidence([HALF, math.nan]) is None


def test_lowest_is_the_least_confident_window() -> None:
    doubtful = [HALF] * (WINDOW // 2) + [CERTAIN] * (WINDOW // 2)
    confidence, lowest = interval_signals([CERTAIN] * WINDOW + doubtful + [CERTAIN] * WINDOW)
    assert lowest == round(1000 * 0.5**0.5)
    assert confidence == round(1000 * 0.5 ** (WINDOW // 2 / (3 * WINDOW)))


def test_a_short_interval_is_a_single_window() -> None:
    assert interval_signals([HALF, CERTAIN]) == (round(1000 * 0.5**0.5),) * 2
    assert interval_signals([]) == (None, None)


def test_intervals_combine_by_their_tokens() -> None:
    assert combine([(10, 250, 100), (10, 1000, 900)]) == (500, 100)
    assert combine([(30, 1000, 900), (0, None, None)]) == (1000, 900)
    assert combine([(30, 1000, 900), (1, None, None)]) == (None, None)
    assert combine([]) == (None, None)


@pytest.mark.parametrize("tokens", [1, 7, 64, 500, 1000])
def test_a_single_interval_keeps_its_signals(tokens: int) -> None:
    for confidence in range(MAX_CONFIDENCE + 1):
        assert combine([(tokens, confidence, confidence)]) == (confidence, confidence)


def test_signals_are_packed_into_one_number() -> None:
    values = [None, 0, 1, 499, 1000]
    pairs = [(confidence, lowest) for confidence in values for lowest in values]
    packed = [pack_signals(*pair) for pair in pairs]
    assert [unpack_signals(number) for number in packed] == pairs
    assert packed[0] == 0
    assert len(set(packed)) == len(packed)
    assert max(packed) < 1 << 20


@pytest.mark.parametrize("number", [-1, 1002 * 1002, 1 << 40])
def test_a_number_that_packs_no_signals_is_refused(number: int) -> None:
    with pytest.raises(ValueError, match=f"{number} does not encode signals"):
        unpack_signals(number)


def test_a_state_adds_signals_up_alike_in_one_fact_and_in_two() -> None:
    parts = [(32, 700, 400), (20, 900, 300)]
    together, apart = State(Limits(32)), State(Limits(32))
    together.apply([branch(2)], [Advanced(0, 2, 52, False, None, *combine(parts))])
    apart.apply([branch()], [Advanced(0, 1, *(32, False, None, 700, 400))])
    apart.apply([advance(0)], [Advanced(0, 1, *(20, False, None, 900, 300))])
    assert together.branches[0].confidence == apart.branches[0].confidence == combine(parts)[0]
    assert together.branches[0].lowest == apart.branches[0].lowest == 300
    assert apart.branches[0].log_probability == pytest.approx(32 * math.log(0.7) + 20 * math.log(0.9))


@pytest.mark.parametrize("known", [True, False])
def test_a_partly_unknown_branch_has_no_signals(known: bool) -> None:
    state = State(Limits(32))
    signals = [(900, 800), (None, None)] if known else [(None, None), (900, 800)]
    state.apply([branch()], [Advanced(0, 1, 32, False, None, *signals[0])])
    state.apply([advance(0)], [Advanced(0, 1, 32, False, None, *signals[1])])
    state.apply([advance(0)], [Advanced(0, 1, 32, False, None, 900, 800)])
    chain = state.branches[0]
    assert (chain.log_probability, chain.confidence, chain.lowest) == (None, None, None)


def test_a_branch_without_signals_has_none() -> None:
    state = State(Limits(32))
    state.apply([branch(), branch()], [Advanced(0, 1, 32, False), Advanced(1, 1, 20, True, 0)])
    state.apply([probe(0)], [Probed(0, 1, 9)])
    for chain in state.branches:
        assert (chain.log_probability, chain.confidence, chain.lowest) == (None, None, None)
        assert chain.probe_confidence is None


def test_the_latest_probe_sets_the_confidence_of_the_answer() -> None:
    state = State(Limits(32))
    state.apply([branch(), probe(0)], [Advanced(0, 1, 32, False), Probed(0, 0, 9, 812)])
    assert state.branches[0].probe_confidence == 812
    state.apply([advance(0), probe(0)], [Advanced(0, 1, 32, False), Probed(0, None, 9)])
    assert state.branches[0].probe_confidence is None


def test_a_finished_branch_keeps_the_confidence_of_its_latest_probe() -> None:
    state = State(Limits(32))
    state.apply([branch(), probe(0)], [Advanced(0, 1, 32, False), Probed(0, 0, 9, 812)])
    state.apply([advance(0), probe(0)], [Advanced(0, 1, 20, True, 0), Probed(0, 0, 0)])
    assert state.branches[0].probe_confidence == 812


@pytest.mark.parametrize("value", [-1, 1001, 0.5, True])
def test_a_signal_out_of_range_is_a_bad_fact(value: object) -> None:
    with pytest.raises(BadFact, match="from 0 to 1000"):
        Advanced(0, 1, 32, False, None, value)
    with pytest.raises(BadFact, match="from 0 to 1000"):
        Advanced(0, 1, 32, False, None, 900, value)
    with pytest.raises(BadFact, match="from 0 to 1000"):
        Probed(0, None, 9, value)


@pytest.mark.parametrize(
    ("declaration", "signals"),
    [
        ('signals = ("intervals",)', {Signal.INTERVALS}),
        ('signals = ["intervals", "probes"]', {Signal.INTERVALS, Signal.PROBES}),
        ('signals: tuple = ("probes",)', {Signal.PROBES}),
        ("signals = ()", set()),
        ("other = 1", set()),
    ],
)
def test_a_file_declares_its_signals(declaration: str, signals: set[Signal]) -> None:
    source = FILE.format(declaration=declaration)
    assert advise(source) == []
    assert declared_signals(source) == Spec("mine", source).signals == signals


def test_a_class_inherits_the_declaration_of_its_base() -> None:
    base = 'class Base:\n    signals = ("probes",)\n'
    source = base + FILE.format(declaration="pass").replace("class Mine:", "class Mine(Base):")
    assert declared_signals(source) == {Signal.PROBES}


@pytest.mark.parametrize(
    ("declaration", "problem"),
    [
        ('signals = ("length",)', "'length' is not a signal; there are 'intervals', 'probes'"),
        ("signals = NAMES", "declare them as a literal tuple"),
        ('signals = "probes"', "declare them as a literal tuple"),
        ('signals = (f"{1}",)', "is not a signal"),
    ],
)
def test_an_invalid_declaration_is_reported_and_declares_nothing(declaration: str, problem: str) -> None:
    source = FILE.format(declaration=declaration)
    (finding,) = advise(source)
    assert "signals: " in finding
    assert problem in finding
    assert declared_signals(source) == set()


def test_a_file_that_is_not_python_declares_nothing() -> None:
    assert declared_signals("class") == set()


def test_built_in_controllers_without_a_declaration_read_no_signals() -> None:
    assert Spec("cmc").signals == Spec("asc@8").signals == frozenset()
