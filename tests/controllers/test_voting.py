"""Vote counts and confidence, compared with exact values."""

from __future__ import annotations

import random
from math import exp, log

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controllers.voting import (
    STEEPEST,
    WeightedTally,
    agreement,
    confidence,
    lead_probability,
    own_and_next,
    plurality,
    softmax,
    tally,
    top_two,
    weighted_votes,
)


def test_tally_counts_labels_in_first_seen_order_and_skips_none() -> None:
    assert list(tally([2, None, 1, 2, None]).items()) == [(2, 2), (1, 1)]


@pytest.mark.parametrize(
    ("votes", "winner", "two"),
    [({}, None, (0, 0)), ({3: 2}, 3, (2, 0)), ({1: 2, 0: 2}, 1, (2, 2)), ({1: 1, 0: 3, 4: 2}, 0, (3, 2))],
)
def test_plurality_and_top_two_of_given_votes(votes: dict[int, int], winner: int | None, two: tuple[int, int]) -> None:
    assert plurality(votes) == winner
    assert top_two(votes) == two


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (0, 0, 0.0),
        (1, 0, 3 / 4),
        (2, 0, 7 / 8),
        (4, 0, 31 / 32),
        (1, 1, 1 / 2),
        (2, 1, 11 / 16),
        (30, 30, 1 / 2),
    ],
)
def test_confidence_is_the_exact_binomial_tail(first: int, second: int, expected: float) -> None:
    assert confidence(first, second) == expected


@given(st.integers(0, 60), st.integers(0, 60))
def test_confidence_rises_with_the_lead(first: int, second: int) -> None:
    assert 0 <= confidence(first, second) <= 1
    assert confidence(first + 1, second) > confidence(first, second) or confidence(first, second) > 0.999999
    if first:
        assert confidence(first, second) >= confidence(first, second + 1)


@pytest.mark.parametrize(
    ("votes", "label", "share", "probability"),
    [
        ({}, None, None, None),
        ({}, 0, None, None),
        ({0: 3}, None, None, None),
        ({0: 1}, 0, 1.0, 3 / 4),
        ({0: 5, 1: 2, 2: 1}, 0, 5 / 8, 219 / 256),
        ({0: 5, 1: 2, 2: 1}, 1, 2 / 8, 37 / 256),  # behind: counted against the leader
        ({0: 2}, 1, 0.0, 1 / 8),  # an answer of probes that no finished branch gives
        ({4: 1, 2: 1, 0: 1}, 2, 1 / 3, 1 / 2),
    ],
)
def test_agreement_is_the_share_of_votes_and_the_lead_a_beta_posterior(
    votes: dict[int, int], label: int | None, share: float | None, probability: float | None
) -> None:
    assert agreement(votes, label) == share
    assert lead_probability(votes, label) == probability


def test_the_votes_for_an_answer_and_for_the_strongest_other_one() -> None:
    votes = {0: 2, 1: 5, 2: 3}
    assert [own_and_next(votes, label) for label in (0, 1, 9, None)] == [(2, 5), (5, 3), (0, 5), (0, 5)]
    assert own_and_next({}, 0) == own_and_next({}, None) == (0, 0)


@given(st.integers(0, 30), st.integers(1, 30))
def test_the_probabilities_that_either_of_two_answers_leads_add_up_to_one(first: int, second: int) -> None:
    votes = {label: count for label, count in enumerate((first, second)) if count}
    both = (lead_probability(votes, 0), lead_probability(votes, 1))
    assert sum(value for value in both if value is not None) == pytest.approx(1)


def test_the_probability_to_lead_is_that_of_draws_from_the_beta_posterior() -> None:
    rng = random.Random(1)
    draws = [rng.betavariate(5 + 1, 3 + 1) > 0.5 for _ in range(40_000)]
    assert lead_probability({0: 3, 1: 5}, 1) == pytest.approx(sum(draws) / len(draws), abs=0.01)


def test_softmax_weights_relative_to_the_best_score() -> None:
    assert softmax([-8.0, 0.0, -16.0], 8.0) == pytest.approx([exp(-1), 1.0, exp(-2)])
    assert softmax([-1e6, 0.0], 1.0) == [exp(-STEEPEST), 1.0]
    assert softmax([], 1.0) == []


def test_an_unknown_score_counts_as_the_mean_and_unknown_scores_count_equally() -> None:
    assert softmax([None, None], 2.0) == [1.0, 1.0]
    assert softmax([0.0, None, -4.0], 2.0) == pytest.approx([1.0, exp(-1), exp(-2)])


def test_equal_weights_give_the_counts_and_others_the_number_of_equal_votes_that_tell_as_much() -> None:
    labels = [0, 1, None, 0]
    assert weighted_votes(labels, [0.25] * 4) == tally(labels)
    votes = weighted_votes([0, 1, 1], [1.0, 0.5, 0.5])
    assert sum(votes.values()) == pytest.approx(4 / 1.5)
    assert votes[0] == votes[1]
    assert weighted_votes([None], [1.0]) == {}


def test_a_weighted_tally_agrees_with_weighted_votes() -> None:
    labels, scores = [0, 1, 1, 0, 2], [-3.0, -1.0, -2.5, -3.5, 0.25]
    counted = WeightedTally()
    for label, score in zip(labels, scores, strict=True):
        counted.add(label, score)
    expected = weighted_votes(labels, softmax(scores, 1.0))
    assert counted.votes() == pytest.approx(expected)
    assert list(counted.votes()) == list(expected)


def test_a_weighted_tally_gives_unknown_scores_the_average_weight_so_far() -> None:
    counted = WeightedTally()
    assert counted.votes() == {}
    for label in (3, 3, 4):
        counted.add(label, None)
    assert counted.votes() == {3: 2.0, 4: 1.0}
    for score in (5.0, 5.0 + log(3.0), None):
        counted.add(4, score)
    assert counted.votes()[4] / counted.votes()[3] == pytest.approx((1 + 1 + 3 + 7 / 5) / 2)


def test_no_weight_overflows() -> None:
    counted = WeightedTally()
    for score in (0.0, 1e6, -1e6):
        counted.add(0, score)
    assert counted.votes() == pytest.approx({0: 1.0})
