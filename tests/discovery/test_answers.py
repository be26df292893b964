"""Text → canonical answer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from discovery.answers import Kind, boxed, read


@pytest.mark.parametrize(
    ("text", "inner"),
    [
        (r"\boxed{7}", "7"),
        (r"first \boxed{1}, then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} and an open \boxed{2", "1"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{\{1\}}", r"\{1\}"),
        (r"}} \boxed{4}", "4"),
        (r"{\boxed{5}}", "5"),
        (r"\boxed{}", ""),
        ("none", None),
        (r"\boxed{", None),
    ],
)
def test_the_last_complete_box(text: str, inner: str | None) -> None:
    assert boxed(text) == inner


@pytest.mark.parametrize(
    ("text", "kind", "answer"),
    [
        (r"So \boxed{007}.", Kind.AUTO, "7"),
        (r"\boxed{7.0}", Kind.AUTO, "7"),
        (r"\boxed{1,234.50}", Kind.AUTO, "1234.5"),
        (r"\boxed{-0}", Kind.AUTO, "0"),
        (r"\boxed{+3}", Kind.AUTO, "3"),
        (r"\boxed{ \dfrac{1}{2} }", Kind.AUTO, r"\frac{1}{2}"),
        (r"\boxed{\left(1,\,2\right)}", Kind.AUTO, "(1,2)"),
        (r"\boxed{\text{yes}}", Kind.AUTO, "yes"),
        (r"\boxed{$12$}", Kind.AUTO, "12"),
        (r"\boxed{}", Kind.AUTO, None),
        ("The answer is (C).", Kind.AUTO, "C"),
        ("Answer: **B**", Kind.AUTO, "B"),
        ("The final answer is 42.", Kind.AUTO, "42"),
        ("the answer is $1,000", Kind.AUTO, "1000"),
        ("the answer is A good one", Kind.AUTO, None),
        ("It rained for 3 days.", Kind.AUTO, None),
        (r"\boxed{x+1}", Kind.BOXED, "x+1"),
        ("the answer is 5", Kind.BOXED, None),
        ("(d)", Kind.CHOICE, None),
        ("(D)", Kind.CHOICE, "D"),
        (r"\boxed{E}", Kind.CHOICE, "E"),
        ("I pick: the answer is D", Kind.CHOICE, "D"),
        ("there are 3 of 12", Kind.NUMBER, "12"),
        (r"\boxed{17} of 20", Kind.NUMBER, "17"),
        ("answer: 8, not 9", Kind.NUMBER, "8"),
        ("x12 or v1.2.3", Kind.NUMBER, None),
        ("nothing", Kind.NUMBER, None),
    ],
)
def test_read(text: str, kind: Kind, answer: str | None) -> None:
    assert read(text, kind) == answer


@given(st.text(alphabet="\\boxed{}$ (ABC).,0123-frac answer is", max_size=200), st.sampled_from(Kind))
def test_any_text_is_read_without_raising_and_what_is_read_reads_the_same(text: str, kind: Kind) -> None:
    answer = read(text, kind)
    assert answer != ""
    if answer is not None and boxed(f"\\boxed{{{answer}}}") == answer:
        assert read(f"\\boxed{{{answer}}}", kind) == answer


def test_a_hundred_thousand_braces_are_no_trouble() -> None:
    assert read("\\boxed{" * 100_000) is None
    assert read("{" * 100_000 + "}" * 100_000) is None
