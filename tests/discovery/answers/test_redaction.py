"""Redacted answers are compared as readable ones are, units included, and hashes of earlier versions are still read."""

from __future__ import annotations

from itertools import permutations

import pytest

from discovery.answers import are_same_redacted, canonical, is_redacted, redacted
from discovery.answers.redaction import redacted_text
from discovery.data.recordings import NO_ANSWER, RecordedBranch, RecordedQuestion, intern_answers
from discovery.evaluation.evaluate import regrade


def recorded(*finals: str, reference: str | None = None) -> RecordedQuestion:
    return RecordedQuestion("q", "m", "b", 100, [RecordedBranch([], 10, final) for final in finals], reference)


def of_an_earlier_version(answer: str) -> str:
    form = canonical(answer)
    assert form is not None
    return redacted_text(f"{form.text}\0{form.unit}")


@pytest.mark.parametrize("answer", ["18", "007", r"\frac{1}{2}", "B", "x = 5", "yes"])
def test_the_hash_of_an_answer_without_a_unit_is_that_of_earlier_versions(answer: str) -> None:
    assert redacted(answer) == of_an_earlier_version(answer)
    assert redacted("18") == "veiled:15b29a2483c4f746325a2489"


@pytest.mark.parametrize("reference", ["18", redacted("18"), "18 dollars", redacted("$18")])
@pytest.mark.parametrize("first", ["18", "18 dollars"])
def test_a_redacted_answer_with_a_unit_equals_one_without(first: str, reference: str) -> None:
    recording = regrade(recorded(redacted(first), redacted("18"), redacted("18 dollars"), reference=reference))
    assert recording.finals.tolist() == [0, 0, 0]
    assert recording.reference == 0


def test_redacted_answers_with_different_units_are_different() -> None:
    assert is_redacted(redacted("5 cm"))
    for answer in ("5 m", redacted("5 m")):
        assert not are_same_redacted(redacted("5 cm"), answer)
        assert regrade(recorded(redacted("5 cm"), reference=answer)).reference == NO_ANSWER
    finals = ["5 cm", "5 m", "5", "5 metres", "5 km"]
    assert regrade(recorded(*map(redacted, finals))).finals.tolist() == regrade(recorded(*finals)).finals.tolist()


def test_exact_comparison_keeps_redacted_answers_with_and_without_a_unit_apart() -> None:
    finals = [redacted("5"), redacted("5 m"), redacted("5 cm"), redacted("5")]  # as a proxy numbered them
    assert intern_answers(recorded(*finals)).finals.tolist() == [0, 1, 2, 0]


def test_the_hash_by_an_earlier_version_equals_the_readable_answer_with_its_unit() -> None:
    old = of_an_earlier_version("18 dollars")
    assert is_redacted(old)
    assert old != redacted("18 dollars")
    assert are_same_redacted(old, "$18")
    assert not are_same_redacted(old, "18 cm")
    assert not are_same_redacted(old, "18")  # as before
    for finals in permutations([old, redacted("18 dollars"), redacted("18")]):
        recording = regrade(recorded(*finals, reference="18 dollars"))
        assert recording.finals.tolist() == [0, 0, 0]
        assert recording.reference == 0


def test_hashes_of_other_forms_are_ordinary_text() -> None:
    begin = redacted("5")
    for text in (f"{begin}:", f"{begin}:0123", f"{begin}:012345678", f"{begin}:0123456G", f"{begin} :01234567"):
        assert not is_redacted(text)
    assert is_redacted(f"{begin}:01234567")
