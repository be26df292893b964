"""Word overlap: which texts are similar, and which is most similar to the others."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from discovery.answers.overlap import MAX_COMPARED, MAX_WORDS, medoid, word_counts, word_overlap


def overlap(first: str, second: str) -> float:
    return word_overlap(word_counts(first), word_counts(second))


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("The cat sat.", "the CAT, sat", 1.0),
        ("a a b", "a b b", 2 * 2 / 6),
        ("a b c", "a", 2 * 1 / 4),
        ("a", "b", 0.0),
        ("", "…!", 1.0),
        ("", "a", 0.0),
        ("今日は晴れ", "今日は雨", 2 * 3 / 9),
    ],
)
def test_the_overlap_is_the_f1_score_of_the_words(first: str, second: str, expected: float) -> None:
    assert overlap(first, second) == overlap(second, first) == pytest.approx(expected)


@given(st.text(), st.text())
def test_overlaps_are_shares_and_equal_texts_overlap_completely(first: str, second: str) -> None:
    assert 0 <= overlap(first, second) == overlap(second, first) <= 1
    assert overlap(first, first) == 1


def test_the_medoid_is_the_text_nearest_to_the_others_and_of_equals_the_first() -> None:
    assert medoid(["x y z", "a b c", "a b d", "a b"]) == 3
    assert medoid(["x", "a b", "b a"]) == 1
    assert medoid(["x", "y"]) == 0
    assert medoid(["x"]) == 0


def test_only_the_first_words_of_a_long_text_are_compared() -> None:
    assert overlap("a " * MAX_WORDS + "b " * 9, "a " * MAX_WORDS) == 1


def test_the_more_texts_the_fewer_words_of_each_are_compared() -> None:
    words = MAX_COMPARED // (64 * 63 // 2)
    same, other = "a " * words, "b " * words
    assert medoid([other, *[same + "c " * 9] * 62, same]) == 1  # what follows is not read, so that the first wins
    assert medoid(["b c", *["a " * 9 + "b"] * 2, "a " * 10]) == 1
