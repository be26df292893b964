"""Vote counts and confidence, compared with exact values."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controllers.voting import confidence, plurality, tally, top_two


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
