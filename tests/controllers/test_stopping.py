"""Stopping rules: their formulas against simulations, and the error rate that the certificate promises."""

from __future__ import annotations

import random
from math import inf

import pytest

from controllers.stopping import bayes_factor, e_value, is_certified


def test_the_bayes_factor_of_agreeing_votes_is_that_of_two_answers() -> None:
    for votes in range(1, 9):
        doubt = 0.5 ** (votes + 1)
        assert bayes_factor([votes]) == pytest.approx(2 * (1 - doubt) / doubt)
    assert bayes_factor([]) == bayes_factor([0]) == 0.0
    assert bayes_factor([2000]) == inf


@pytest.mark.parametrize("counts", [[6, 2], [8, 3, 2], [20, 9, 1, 1]])
def test_the_bayes_factor_is_near_one_by_random_draws_and_never_above(counts: list[int]) -> None:
    rng = random.Random(1)
    draws, leading = 20_000, 0
    for _ in range(draws):
        chances = [rng.gammavariate(count + 1, 1) for count in (*counts, 0)]
        leading += max(chances) == chances[0]
    posterior = leading / draws
    drawn = (len(counts) + 1) * posterior / (1 - posterior)
    assert 0.7 * drawn < bayes_factor(counts) < 1.05 * drawn


def test_a_tie_is_no_evidence_for_either_answer() -> None:
    assert bayes_factor([3, 3]) < 3
    assert bayes_factor([3, 3, 3, 3]) == 0.0
    assert e_value(5, 5) < 1
    assert e_value(0, 3) == 0.0


def test_evidence_grows_with_wins_and_falls_with_losses() -> None:
    assert [round(e_value(wins, 0), 2) for wins in (1, 2, 3, 8)] == [1.5, 2.33, 3.75, 56.78]
    for wins in range(1, 12):
        values = [e_value(wins, losses) for losses in range(12)]
        assert values == sorted(values, reverse=True)


def test_the_mean_evidence_for_an_answer_that_is_not_more_frequent_is_at_most_one() -> None:
    """Computed exactly: votes of a fair coin, whose evidence is the largest of all that do not favour the answer."""
    for throws in range(1, 14):
        mean = sum(e_value(bin(outcome).count("1"), throws - bin(outcome).count("1")) for outcome in range(2**throws))
        assert mean / 2**throws <= 1


def test_the_first_answer_needs_nine_agreeing_votes_at_an_error_of_a_twentieth() -> None:
    assert [votes for votes in range(12) if is_certified([votes], 0.05)] == [9, 10, 11]
    assert not is_certified([], 0.5)
    assert is_certified(votes=[9, 0], error=0.05)  # controllers of version 0.2.0 may name the arguments
    assert not is_certified([0, 9], 0.05)  # the second answer to appear needs more


@pytest.mark.parametrize("chances", [(0.34, 0.33, 0.33), (0.3, 0.3, 0.2, 0.2)])
def test_watching_every_vote_certifies_a_wrong_mode_less_often_than_promised(chances: tuple[float, ...]) -> None:
    rng, wrong, episodes, error = random.Random(3), 0, 600, 0.2
    for _ in range(episodes):
        votes: dict[int, int] = {}
        for _ in range(60):
            (label,) = rng.choices(range(len(chances)), chances)
            votes[label] = votes.get(label, 0) + 1
            if is_certified(votes.values(), error):
                leader = max(votes, key=lambda label: votes[label])
                wrong += chances[leader] < max(chances) or chances.count(max(chances)) > 1
                break
    assert wrong <= error * episodes


def test_votes_by_label_are_refused_where_counts_are_needed() -> None:
    votes = {0: 1, 1: 9}
    with pytest.raises(TypeError, match=r"counts must be vote counts such as state\.votes\.values\(\), not a mapping"):
        bayes_factor(votes)
    with pytest.raises(TypeError, match="not a mapping"):
        is_certified(votes, 0.05)


def test_a_clear_mode_is_certified_soon() -> None:
    rng = random.Random(4)
    needed = []
    for _ in range(100):
        votes: dict[int, int] = {}
        while not is_certified(votes.values(), 0.1):
            (label,) = rng.choices(range(4), (7, 1, 1, 1))
            votes[label] = votes.get(label, 0) + 1
        needed.append(sum(votes.values()))
    assert sum(needed) / len(needed) < 32
