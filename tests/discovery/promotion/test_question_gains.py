"""Values of single questions: their means are the curve's figures, and their spread is its sampling error."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from discovery.evaluation.afs import Anchor, accuracy_at, area_under
from discovery.evaluation.paired_statistics import bootstrap_bounds
from discovery.promotion.question_gains import QuestionFigures, afs_values, equal_token_gains

BETAS = (0.0, 0.5, 1.0)


def figures(tokens: list[float], right: list[float], chain: float = 1000, chain_right: float = 40) -> QuestionFigures:
    """Return the figures of two questions, half and one and a half times the given means."""
    spread = np.array([0.5, 1.5])
    return QuestionFigures(
        BETAS[: len(tokens)],
        np.array([chain, *tokens])[:, None] * spread,
        np.array([chain_right, *right])[:, None] * spread,
    )


def area(some: QuestionFigures) -> float:
    tokens, right = some.tokens.mean(axis=1), some.right.mean(axis=1)
    anchor = Anchor(float(tokens[0]), float(right[0]), 1)
    return area_under(list(zip(tokens[1:].tolist(), right[1:].tolist(), strict=True)), anchor)


@settings(max_examples=50, deadline=None)
@given(tokens=st.lists(st.integers(1, 90_000), min_size=1, max_size=5), seed=st.integers(0, 999))
def test_the_mean_of_the_afs_values_is_the_afs(tokens: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    means = np.array([1000.0, *tokens])
    spread = rng.uniform(0.2, 1.8, (len(means), 7))
    of_questions = means[:, None] * spread / spread.mean(axis=1, keepdims=True)
    some = QuestionFigures(tuple(map(float, range(len(tokens)))), of_questions, 100 * rng.random((len(means), 7)))
    assert afs_values(some).mean() == pytest.approx(area(some), abs=1e-6)


def population(rng: np.random.Generator, questions: int) -> tuple[QuestionFigures, QuestionFigures]:
    """Return two controllers' figures on random questions: hard ones cost more, and the first needs fewer tokens."""
    hard = rng.random(questions)
    chain = 1000 * (1 + 2 * hard)
    ease = 100 * (1 - hard)
    sides = []
    for factor in (0.6, 1.0):
        tokens = np.array([chain, *(factor * scale * chain * rng.uniform(0.7, 1.3, questions) for scale in (2, 8, 32))])
        gains = (0, 3, 8, 12)
        right = np.array([np.clip(ease + gain + rng.normal(0, 10, questions), 0, 100) for gain in gains])
        right[0] = ease
        sides.append(QuestionFigures(BETAS, tokens, right))
    return sides[0], sides[1]


def test_the_spread_of_the_values_is_the_sampling_error_of_the_figures() -> None:
    """Over many samples of questions, the figures vary as the values of one large sample say, tokens included."""
    rng = np.random.default_rng(1)
    finalist, champion = population(rng, 4000)
    afs, equal = [], []
    for _ in range(400):
        drawn = rng.integers(0, 4000, 50)
        own, other = finalist.select(drawn), champion.select(drawn)
        afs.append(area(own) - area(other))
        points = list(zip(other.axis.tokens[1:], other.axis.right[1:], strict=True))
        anchor = Anchor(other.axis.tokens[0], other.axis.right[0], 1)
        equal.append(own.axis.right[2] - accuracy_at(points, anchor, own.axis.tokens[2]))
    expected = (afs_values(finalist) - afs_values(champion)).std(ddof=1) / np.sqrt(50)
    assert np.std(afs) == pytest.approx(expected, rel=0.12)
    values = equal_token_gains(finalist, champion, 0.5)
    assert np.std(equal) == pytest.approx(values.std(ddof=1) / np.sqrt(50), rel=0.12)
    low, high = bootstrap_bounds(equal_token_gains(finalist.select(drawn), champion.select(drawn), 0.5))
    assert high - low == pytest.approx(2 * 1.645 * np.std(equal), rel=0.3)


def test_below_beta_0_a_question_counts_with_its_own_chains() -> None:
    late = figures([4000, 8000, 16000], [40, 40, 40])  # as accurate as its chains, so that nothing differs
    early = figures([1000, 8000, 16000], [40, 40, 40])
    assert afs_values(late) - afs_values(early) == pytest.approx([0, 0], abs=1e-6)


def test_values_on_a_given_axis_do_not_depend_on_the_other_questions() -> None:
    rng = np.random.default_rng(2)
    finalist, champion = population(rng, 40)
    axes = (finalist.axis, champion.axis)
    for chosen in (np.array([0]), np.array([0, 5, 9])):
        own, other = finalist.select(chosen), champion.select(chosen)
        assert afs_values(own, axes[0]) == pytest.approx(afs_values(finalist)[chosen])
        gains = equal_token_gains(finalist, champion, 0.5)
        assert equal_token_gains(own, other, 0.5, axes) == pytest.approx(gains[chosen])


@pytest.mark.parametrize(
    ("tokens", "champion_at"),
    [
        (8000, 60.0),  # at β = 0.5
        (6000, 55.0),  # between β = 0 and 0.5
        (2500, 45.0),  # between one chain and β = 0
        (500, 40.0),  # less than one chain
        (99_000, 70.0),  # beyond β = 1
    ],
)
def test_accuracy_is_compared_at_equal_tokens_on_the_champions_curve(tokens: float, champion_at: float) -> None:
    champion = figures([4000, 8000, 16000], [50, 60, 70])
    finalist = figures([tokens, tokens, tokens], [65, 65, 65])
    gains = equal_token_gains(finalist, champion, 0.5)
    assert gains.mean() == pytest.approx(65 - champion_at)


def test_a_champion_cheaper_than_one_chain_is_compared_from_its_beta_0() -> None:
    champion = figures([800, 8000, 16000], [50, 60, 70])
    finalist = figures([800, 900, 900], [50, 50, 50])
    expected: NDArray[np.float64] = np.array([0.0, 0.0])
    assert equal_token_gains(finalist, champion, 0.0) == pytest.approx(expected)


def test_a_beta_that_costs_no_more_takes_the_place_of_the_one_before() -> None:
    champion = figures([4000, 3000, 16000], [50, 60, 70])
    finalist = figures([4000, 10_000, 16000], [60, 65, 70])
    assert equal_token_gains(finalist, champion, 0.5).mean() == pytest.approx(0)
