"""From text to label: reading answers, deciding which are equal, and robustness against hostile text."""

from __future__ import annotations

import itertools
import os
import random
import string
from collections.abc import Iterator

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from discovery.answers import (
    CanonicalForm,
    FormType,
    Judge,
    Labels,
    boxed,
    canonical,
    canonical_answer,
    parse_kind,
    read_answer,
)
from discovery.errors import UnknownAnswerKind
from tests.discovery.answers.answer_pairs import DIFFERENT, SAME, UNREADABLE


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    with Judge(seconds=20) as made:
        yield made


def same(first: str, second: str, judge: Judge) -> bool:
    """Return whether an episode gives both answers one label."""
    labels = Labels(judge)
    forms = [canonical(written) for written in (first, second)]
    numbers = [None if f is None else labels.label_of(f, w) for f, w in zip(forms, (first, second), strict=True)]
    return None not in numbers and numbers[0] == numbers[1]


@pytest.mark.process
@pytest.mark.parametrize("group", SAME)
def test_equal_answers_get_one_label_in_either_order(group: str, judge: Judge) -> None:
    pairs = [pair for spellings in SAME[group] for pair in itertools.combinations(spellings, 2)]
    apart = [pair for pair in pairs if not (same(*pair, judge) and same(*pair[::-1], judge))]
    assert not apart


@pytest.mark.process
@pytest.mark.parametrize("group", DIFFERENT)
def test_different_answers_never_get_one_label(group: str, judge: Judge) -> None:
    merged = [pair for pair in DIFFERENT[group] if same(*pair, judge) or same(*pair[::-1], judge)]
    assert not merged


@pytest.mark.process
def test_answers_of_different_classes_never_get_one_label(judge: Judge) -> None:
    """Compare the first spellings of all classes with each other: thousands of pairs across all groups."""
    firsts = [(group, number, spellings[0]) for group in SAME for number, spellings in enumerate(SAME[group])]
    known = {frozenset(("9", "x=9")), frozenset((r"\frac{1}{2}", "0.5"))}  # listed in two groups
    for (first_group, _, first), (second_group, _, second) in itertools.combinations(firsts, 2):
        texts = [form.text for spelled in (first, second) if (form := canonical(spelled)) is not None]
        if same(first, second, judge) and frozenset((first, second)) not in known:
            assert texts[0] == texts[1] or "symbolic" in (first_group, second_group), (first, second)


def test_the_table_of_answer_pairs_has_at_least_300_pairs() -> None:
    equal = sum(len(list(itertools.combinations(s, 2))) for group in SAME.values() for s in group)
    assert equal + sum(map(len, DIFFERENT.values())) >= 300


@pytest.mark.parametrize("written", UNREADABLE)
def test_unreadable_text_has_no_canonical_form(written: str) -> None:
    assert canonical(written) is None


# Properties

NUMBERS = st.integers(-(10**6), 10**6).map(str)
LEAVES = NUMBERS | st.sampled_from(
    ["x", "y", r"\pi", "n", "2.5", ".75", r"\frac{1}{3}", r"\sqrt{2}", r"\sqrt{12}", "a_1", "i"]
)
EXPRESSIONS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", r"\cdot ", "*"]), inner).map(lambda t: f"{t[0]}{t[1]}({t[2]})"),
        st.tuples(inner, inner).map(lambda t: rf"\frac{{{t[0]}}}{{{t[1]}}}"),
        inner.map(lambda t: f"({t})^2"),
        inner.map(lambda t: rf"\sqrt{{{t}}}"),
        inner.map(lambda t: rf"\sin({t})"),
    ),
    max_leaves=8,
)
ANSWERS = st.one_of(
    EXPRESSIONS,
    st.lists(EXPRESSIONS, min_size=2, max_size=4).map(lambda parts: f"({','.join(parts)})"),
    st.lists(EXPRESSIONS, min_size=2, max_size=4).map(lambda parts: rf"\{{{','.join(parts)}\}}"),
    st.sampled_from([one for group in SAME.values() for spellings in group for one in spellings]),
    st.text(alphabet=string.printable, max_size=60),
    st.text(max_size=60),
    st.text(alphabet="\\{}[]()$^_.,0123456789xyz frac sqrt pm text in cup le", max_size=80),
)


@pytest.mark.slow
@given(ANSWERS)
@settings(max_examples=400, deadline=None)
def test_canonical_forms_are_stable_and_any_text_is_read_without_raising(written: str) -> None:
    form = canonical(written)
    assert form == canonical(written)
    if form is not None:
        assert form.text
        again = canonical(form.text)
        if again is None or again.text != form.text:
            # Unparsed text and words may contain a part that has a meaning once it stands alone.
            assert form.type in (FormType.OTHER, FormType.WORDS) or not form.exact or form.type is FormType.COLLECTION


@pytest.mark.slow
@given(EXPRESSIONS)
@example(r"\sqrt{\frac{44563}{85903}}")  # two primes whose product is too large to factor
@settings(max_examples=400, deadline=None)
def test_the_canonical_form_of_an_expression_is_idempotent(written: str) -> None:
    form = canonical(written)
    assume(form is not None and form.exact and len(form.text) < 1000)
    assert form is not None
    again = canonical(form.text)
    assert again is not None
    assert (again.text, again.type) == (form.text, form.type)


@pytest.mark.slow
@given(ANSWERS, ANSWERS, ANSWERS)
@settings(max_examples=200, deadline=None)
def test_equality_of_canonical_forms_is_an_equivalence_relation(a: str, b: str, c: str) -> None:
    forms = [canonical(written) for written in (a, b, c)]
    assume(None not in forms)
    first, second, third = forms
    assert first == canonical(a)
    assert (first == second) is (second == first)
    assert first == third or not (first == second and second == third)


@given(st.lists(ANSWERS, max_size=12))
@settings(max_examples=100, deadline=None)
def test_labels_are_numbered_in_order_of_appearance_and_never_change(texts: list[str]) -> None:
    labels, seen = Labels(), -1
    for written in texts:
        form = canonical(written)
        if form is None:
            continue
        label = labels.label_of(form, written)
        assert 0 <= label <= seen + 1
        seen = max(seen, label)
        assert labels.label_of(form, written) == label
    assert len(labels) == seen + 1


@given(
    st.text(alphabet="\\boxed{}$ (ABC).,0123-frac answer is\n*#", max_size=300),
    st.sampled_from(["auto", "boxed", "choice", "number", "json", "regex:(\\d+)", "text:words", "code:lines", "text"]),
)
@settings(deadline=None)
def test_any_text_is_read_without_raising_and_contains_the_answer_as_written(text: str, kind: str) -> None:
    answer = read_answer(text, parse_kind(kind))
    if answer is not None:
        assert answer.written in text
        assert answer.form.text


@pytest.mark.parametrize(
    ("text", "kind", "spelled"),
    [
        ("The answer is **18** dollars.", "auto", "18 dollars"),
        ("The answer is **18** square meters.", "number", "18 square meters"),
        ("The answer is **50**%.", "auto", "50%"),
        ("The answer is 18 in total.", "auto", "18"),
        ("The answer is **x = 18** cm.", "auto", "x = 18 cm"),
        ("The answer is **x = 2** or **x = 3**.", "auto", "x = 2 or x = 3"),
        (r"**Answer: \(x > 2\)** in total", "auto", "x > 2"),
        (r"\boxed{b}", "choice", "B"),
        ("(b)", "choice", "B"),
        (r"\boxed{18\text{ cm}}", "boxed", r"18\text{ cm}"),
        (r"\boxed{2} and \boxed{3}", "boxed", r"\boxed{2} and \boxed{3}"),
    ],
)
def test_the_text_that_is_recorded_is_read_as_the_same_answer(text: str, kind: str, spelled: str) -> None:
    answer = read_answer(text, parse_kind(kind))
    assert answer is not None
    labels = Labels()
    recorded = labels.recorded(labels.label_of(answer.form, answer.written))
    assert recorded == spelled
    assert canonical(recorded) == answer.form
    assert labels.written(0) == answer.written


@pytest.mark.parametrize(
    ("text", "kind"),
    [("Label: unknown", r"regex:Label: (\w+)"), ("Label: Bug", r"regex:Label: (\w+)"), ("A b. " * 300, "text:words")],
)
def test_an_answer_that_no_text_is_read_as_is_recorded_as_it_is_written(text: str, kind: str) -> None:
    answer = read_answer(text, parse_kind(kind))
    assert answer is not None
    labels = Labels()
    assert labels.recorded(labels.label_of(answer.form, answer.written)) == answer.written


@given(
    st.text(alphabet="\\boxed{}$ (ABC).,0123-frac answer is\n*#", max_size=300),
    st.sampled_from(["auto", "boxed", "choice", "number"]),
)
@settings(deadline=None)
def test_the_text_that_is_recorded_of_a_number_or_choice_is_read_as_the_same(text: str, kind: str) -> None:
    answer = read_answer(text, parse_kind(kind))
    if answer is not None and answer.form.type in (FormType.NUMBER, FormType.CHOICE):
        labels = Labels()
        form = canonical(labels.recorded(labels.label_of(answer.form, answer.written)))
        assert form is not None
        assert (form.text, form.type) == (answer.form.text, answer.form.type)


# Labels


def number(labels: Labels, written: str) -> int:
    form = canonical(written)
    assert form is not None
    return labels.label_of(form, written)


def test_an_answer_without_a_unit_joins_the_first_unit_and_units_are_never_merged() -> None:
    labels = Labels()
    assert [number(labels, text) for text in ("5 cm", "5 m", "5", "5 metres", "5 km")] == [0, 1, 0, 1, 2]
    assert [labels.written(i) for i in range(3)] == ["5 cm", "5 m", "5 km"]
    labels = Labels()
    assert [number(labels, text) for text in ("5", "5 m", "5 cm", "x=5", "y=5 m")] == [0, 0, 1, 0, 2]


def test_without_a_judge_only_equal_canonical_forms_share_a_label() -> None:
    labels = Labels()
    assert number(labels, r"\log_2 8") != number(labels, "3")


def test_the_judge_is_asked_only_about_answers_of_equal_numeric_value() -> None:
    class Asked:
        pairs: list[tuple[str, str]] = []  # noqa: RUF012 - used by this test only

        def same(self, first: str, second: str) -> bool:
            self.pairs.append((first, second))
            return True

    asked = Asked()
    labels = Labels(asked)
    for written in ("3", "8", "yes", r"\log_2 7", r"\sqrt{9}", "A"):
        form = canonical(written)
        assert form is not None
        assert not labels.undecided(form)
        labels.label_of(form, written)
    assert asked.pairs == []
    doubtful = canonical(r"\log_2 8")
    assert doubtful is not None
    assert labels.undecided(doubtful)
    assert labels.label_of(doubtful, r"\log_2 8") == 0
    assert asked.pairs == [(r"\log_2 8", "3")]


# The judge


@pytest.mark.process
def test_an_endless_comparison_is_killed_and_not_repeated() -> None:
    with Judge(seconds=1) as judge:
        assert judge.same("1+x", "x+1")
        assert not judge.same(r"9^{9^{9^9}}", "5")
        assert judge.killed == 1
        assert not judge.same("6", r"9^{9^{9^9}}")
        assert judge.killed == 1
        assert judge.same(r"\frac{2}{4}", r"\frac12")


@pytest.mark.process
def test_the_judge_runs_no_python_from_answers_and_has_no_environment_variables(
    judge: Judge, monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setenv("SECRET_KEY", "hunter2")
    target = os.path.join(str(tmp_path), "written")
    code = f"__import__('os').system('touch {target}')"
    for evil in (code, f"$ {code} $", f"\\text{{{code}}}"):
        judge.same(evil, "1")
    assert not os.path.exists(target)
    worker = judge._workers[0]._process
    assert worker is not None
    with open(f"/proc/{worker.pid}/environ", "rb") as file:
        assert b"hunter2" not in file.read()


@pytest.mark.process
def test_a_judge_process_that_died_is_replaced(judge: Judge) -> None:
    assert judge.same("y+2", "2+y")
    assert judge._workers[0]._process is not None
    judge._workers[0]._process.kill()
    judge._workers[0]._process.wait()
    assert judge.same("z+3", "3+z")


# Reading


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
        (r"\boxed {6}", "6"),
        (r"\boxed{}", ""),
        ("none", None),
        (r"\boxed{", None),
    ],
)
def test_the_content_of_the_last_complete_box_is_returned(text: str, inner: str | None) -> None:
    assert boxed(text) == inner


@pytest.mark.parametrize(
    ("text", "kind", "answer"),
    [
        (r"So \boxed{007}.", "auto", "7"),
        (r"\boxed{1,234.50}", "auto", "2469/2"),
        (r"\boxed{\left(1,\,2\right)}", "auto", "(1,2)"),
        (r"\boxed{\text{yes}}", "auto", "yes"),
        (r"The roots are \boxed{3} and \boxed{5}.", "auto", r"\{3,5\}"),
        (r"The roots are $\boxed{3}$, $\boxed{5}$.", "auto", r"\{3,5\}"),
        (r"At first \boxed{3}. But then \boxed{5}.", "auto", "5"),
        (r"\boxed{}", "auto", None),
        (r"the answer is 5, or \boxed{?}", "auto", None),
        ("The answer is (C).", "auto", "C"),
        ("Answer: **B**", "auto", "B"),
        ("The correct option is D.", "auto", "D"),
        ("**Answer: C) 15**", "auto", "C"),
        ("The final answer is 42.", "auto", "42"),
        ("**Final Answer:** 42", "auto", "42"),
        ("The answer is **$\\frac{1}{2}$**.", "auto", "1/2"),
        ("so\n#### 1,234", "auto", "1234"),
        ("the answer is $1,000", "auto", "1000"),
        ("The answer is 3. No, the answer is 4.", "auto", "4"),
        ("My answer is no.", "auto", "no"),
        ("42", "auto", "42"),
        ("(B)", "auto", "B"),
        ("Yes.", "auto", "yes"),
        ("$x = 7$", "auto", "7"),
        ("the answer is A good one", "auto", None),
        ("the answer is 5 + 3", "auto", "8"),
        ("It rained for 3 days.", "auto", None),
        ("Hello! How can I help you today?", "auto", None),
        ("Paris", "auto", None),
        ("```python\nprint(42)\n```", "auto", None),
        ('<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>', "auto", None),
        # read completely, or not at all
        ("The answer is 4 4/9.", "auto", "40/9"),
        ("The answer is 3:20.", "auto", None),
        ("The answer is 3 hours 20 minutes.", "auto", None),
        ("The answer is 15 million.", "auto", "15000000"),
        ("The answer is 6.02 x 10^23.", "auto", "602000000000000000000000"),
        ("The answer is 3√2.", "auto", "3*sqrt(2)"),
        ("The answer is 4 + √3.", "auto", "4+sqrt(3)"),
        ("The answer is 3 - i.", "auto", "3-i"),
        ("The answer is 5 or -2.", "auto", r"\{-2,5\}"),
        ("The answer is 5 to 10.", "auto", None),
        ("The answer is 10-3.", "auto", None),
        ("The answer is 1/2/2020.", "auto", None),
        ("The answer is $5$ or $7$.", "auto", r"\{5,7\}"),
        ("The answer is (B) or (C).", "auto", None),
        ("The answer is 5 times as large.", "auto", None),
        ("The answer is 5 squared.", "auto", None),
        ("The answer is 4. Rather, the answer is 3:20.", "auto", None),
        ("The answer is 5 feet 3 inches.", "auto", None),
        ("The answer is 2 thirds.", "auto", "2/3"),
        ("The answer is 2**5.", "auto", "32"),
        ("The answer is **2**.", "auto", "2"),
        ("The answer is (**5**).", "auto", "5"),
        ("The answer is 12 (or so we think).", "auto", None),
        ("The answer is 2 or more.", "auto", None),
        ("The answer is ½.", "auto", "1/2"),
        ("The answer is 42 because 6*7=42.", "auto", "42"),
        ("The answer is 42, as shown above.", "auto", "42"),
        ("The answer is 42 (see above).", "auto", "42"),
        ("The answer is 42 and not 43.", "auto", "42"),
        ("The answer is 42 apples in total.", "auto", "42"),
        ("The result is 5; the rest is noise.", "auto", "5"),
        ("The answer is 1,234.50 dollars.", "auto", "2469/2"),
        ("The answer is 5, or maybe 6.", "auto", None),
        ("The answer is 5 (or 6).", "auto", None),
        ("The answer is 5? No, 6.", "auto", None),
        ("The answer is 5; 6.", "auto", r"\{5,6\}"),
        ("The answer is 5! = 120.", "auto", "120"),
        ("The answer is 3.14159...", "auto", None),
        ("answer: 5\nanswer: six", "auto", None),
        ("The answer is 5! It was easy.", "auto", "5"),
        ("The answer is 5 > 3.", "auto", None),
        ("The answer is between 5 and 6.", "auto", None),
        ("The answer is not 5.", "auto", None),
        ("The answer is 3 out of 4.", "auto", None),
        ("#### 3 hours 20 minutes", "auto", None),
        ("1 + 1 = 2 or 3", "auto", None),
        ("x^2 + 3 = 12", "auto", None),
        ("The answer is up to you.", "auto", None),
        ("The answer is not clear.", "auto", None),
        # the style of small and base models
        ("12 + 15 = 27", "auto", "27"),
        ("So 12 + 15 = 27.", "auto", "27"),
        ("First, 12 + 15 = 27. Then 27 + 3 = 30.", "auto", "30"),
        ("$12 + 15 = 27$", "auto", "27"),
        (r"\(3 \times 4 = 12\)", "auto", "12"),
        ("3 x 4 = 12", "auto", "12"),
        ("12 apples + 15 apples = 27 apples", "auto", "27"),
        ("12 + 15 = 27, so she has 27 apples.", "auto", "27"),
        ("She has 3 * 4 = 12 and 12 - 5 = 7.", "auto", "7"),
        ("2 * 3 = 6 + 1 = 7", "auto", "7"),
        (r"The answer is \Box{53}.", "auto", "53"),
        ("So x = 5.", "auto", "5"),
        ("The sum of 12 and 15 is 27.", "auto", "27"),
        ("12 plus 15 equals 27.", "auto", "27"),
        ("<think>12 and 15</think>\n<answer>27</answer>", "auto", "27"),
        ("Q: 12 + 15?\nA: 27", "auto", "27"),
        ("2x + 3 = 7", "auto", None),
        ("y = a*2 + 3", "auto", None),
        ("a[1] + b[2] = 3", "auto", None),
        ("if x + 1 == 2", "auto", None),
        ("total += 3", "auto", None),
        ("It was 3 - 2 = 3:20.", "auto", None),
        ("12 + 15 =", "auto", None),
        ("It was 1984 - a year like any other.", "auto", None),
        ("They scored 3-2 in 2020.", "auto", None),
        # boxes
        (r"\boxed 5", "auto", "5"),
        (r"\boxed5", "auto", "5"),
        (r"so $\boxed5.$", "auto", "5"),
        (r"\boxed 12 apples", "auto", "12"),
        (r"\boxed\frac{1}{2}", "auto", "1/2"),
        (r"\boxed 4 4/9", "auto", None),
        (r"\boxed{3}\text{ and }\boxed{5}", "auto", r"\{3,5\}"),
        (r"\(\boxed{3}\) and \(\boxed{5}\)", "auto", r"\{3,5\}"),
        (r"\boxed{3} or \boxed{5}", "auto", r"\{3,5\}"),
        (r"\boxed{x+1}", "boxed", "1+x"),
        ("the answer is 5", "boxed", None),
        ("(d)", "choice", "D"),
        (r"\boxed{E}", "choice", "E"),
        (r"\boxed{\text{(B) 12}}", "choice", "B"),
        ("I pick: the answer is D", "choice", "D"),
        ("All fit, but one.\n\nB) 15", "choice", "B"),
        ("A good story", "choice", None),
        ("there are 3 of 12", "number", "12"),
        (r"\boxed{17} of 20", "number", "17"),
        (r"\boxed{\frac{3}{4}\text{ m}}", "number", "3/4"),
        ("answer: 8, not 9", "number", "8"),
        ("The answer is 4 4/9.", "number", "40/9"),
        ("It is 4 4/9 of it", "number", "40/9"),
        ("The answer is 3√2.", "number", None),
        ("The answer is 3 - i.", "number", None),
        ("It took 3 hours 20 minutes", "number", None),
        ("5 to 10", "number", None),
        ("5 or -2", "number", None),
        ("about 15 million people", "number", "15000000"),
        ("6.02 x 10^23", "number", "602000000000000000000000"),
        ("at 3:20", "number", None),
        ("the score was 3-1", "number", None),
        ("page 3. 27 of them", "number", "27"),
        ("x12 or v1.2.3", "number", None),
        ("nothing", "number", None),
        ('{"b": [1, 2.0], "a": 1.50}', "json", '{"a":1.5,"b":[1,2]}'),
        ('Here:\n```json\n{"a": 1.5, "b": [1e0, 2]}\n```', "json", '{"a":1.5,"b":[1,2]}'),
        ('{"a": 1} or rather {"a": true, "b": null}', "json", '{"a":true,"b":null}'),
        ('{"a": NaN}', "json", None),
        ("[" * 5000, "json", None),
        ("no json", "json", None),
        ("As in [1], " * 64 + 'so {"answer": 5}', "json", '{"answer":5}'),
        ("x_{n}, " * 64 + 'so {"answer": 5}', "json", '{"answer":5}'),
        ("in [0, 1), " * 50_000 + 'so {"answer": [[5], {"b": "[6]"}]}', "json", '{"answer":[[5],{"b":"[6]"}]}'),
        ('[NaN, "' + "x" * 1_100_000 + '"] so {"answer": [5]} [or', "json", '{"answer":[5]}'),
        ("[1] " + "[1, " * 5_000 + "so", "json", "[1]"),
        ('[[1], [2], "[3]"] in [0, 1)', "json", '[[1],[2],"[3]"]'),
        ("[" + ",".join(["[1]"] * 5_000) + "]", "json", "[" + ",".join(["[1]"] * 5_000) + "]"),
        ("released as v12, then v13.", r"regex:v(\d+)", "13"),
        ("ticket ABC-7", "regex:[A-Z]+-[0-9]+", "ABC-7"),
        ("none", r"regex:v(\d+)", None),
        ("A  poem, short.", "text:words", "a poem short"),
        ("A poem", "text", None),
        ("So:\n```python\nx = 1  \n\ny = 2\n```\nDone.", "code:lines", "x = 1\ny = 2"),
        ("x = 1", "code", None),
    ],
)  # fmt: skip
def test_each_answer_kind_reads_the_expected_answer(text: str, kind: str, answer: str | None) -> None:
    result = read_answer(text, parse_kind(kind))
    assert canonical_answer(text, parse_kind(kind)) == answer
    if result is not None:
        assert result.written in text


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("prose", "auto, boxed"),
        ("boxed:7", "unknown answer kind 'boxed:7'; use boxed"),
        ("text:poem", "text:words"),
        ("regex:", "1 to 500"),
        ("regex:" + "a" * 501, "1 to 500"),
        ("regex:(a", "missing"),
        ("regex:(?=a)", "RE2"),
    ],
)
def test_an_unknown_answer_kind_is_refused_with_the_reason(spec: str, message: str) -> None:
    with pytest.raises(UnknownAnswerKind) as error:
        parse_kind(spec)
    assert message in str(error.value)


HOSTILE = [
    r"\boxed{9^{9^{9^9}}}",
    "\\boxed{" * 20_000,
    "{" * 50_000 + "}" * 50_000,
    "answer is" + " " * 100_000,
    "\\boxed{1}" + " " * 100_000 + "\\boxed{2}",
    "[" * 100_000,
    "1 " * 50_000,
    "answer = " * 10_000,
    "```a\n" * 20_000,
    "\\boxed{" + "\\sqrt{" * 150 + "2" + "}" * 151,
    "\\boxed{" + "(" * 400 + ")" * 401,
    "\\boxed{" + "-" * 900 + "1}",
    "\\boxed{" + "x=" * 400 + "1}",
    "\\boxed{" + "\\frac{1}{1+" * 80 + "1" + "}" * 81,
    "\\boxed{300!^{300!}}",
    r"\boxed{(\sqrt2+\sqrt3+\sqrt5+\sqrt7)^{6}}",
    r"\boxed{\sqrt{99999999999999999999999999999999977}}",
    "\\boxed{" + "a b " * 200 + "}",
]


@pytest.mark.timeout(60)  # all take seconds; one bad pattern would take hours
@pytest.mark.parametrize("kind", ["auto", "number", "choice", "json", "text:words", "code:lines", "regex:(a+)+b"])
def test_no_hostile_text_hangs_or_crashes_the_reader(kind: str) -> None:
    for text in HOSTILE:
        read_answer(text, parse_kind(kind))


def test_random_latex_is_read_without_raising() -> None:
    rng = random.Random(0)
    tokens = [
        r"\frac",
        r"\sqrt",
        "{",
        "}",
        "(",
        ")",
        "[",
        "]",
        "^",
        "_",
        "+",
        "-",
        "1",
        "x",
        r"\pm",
        ",",
        r"\text{a}",
        "!",
        "|",
        "=",
    ]
    for _ in range(3000):
        form = canonical("".join(rng.choices(tokens, k=rng.randrange(1, 30))))
        assert form is None or isinstance(form, CanonicalForm)
