"""Examples in requests, fenced blocks in replies, and the vote on what functions return."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from discovery.answers.code import MAX_EXAMPLES, Behaviour, CodeExample, CodeTask, code_blocks, finalists, read_examples
from discovery.answers.code.blocks import MAX_BLOCKS, MAX_CHARS
from discovery.answers.code.examples import MAX_ARGUMENT_CHARS

DOCTEST = """Write f.
    >>> f(1, [2])
    [3]
    >>> f(2, b=3)
    >>> other(1)
    4
    >>> f(x, 1)
    5
    >>> len([1])
    1
    >>> f(0, 0)
    Traceback (most recent call last):
"""


@pytest.mark.parametrize(
    ("text", "function", "examples"),
    [
        (DOCTEST, "f", [("((1, [2]), {})", "[3]"), ("((2,), {'b': 3})", None), ("((0, 0), {})", None)]),
        ("assert add(1, 2) == 3\nassert add(0, -1) == -1.0", "add", [("((1, 2), {})", "3"), ("((0, -1), {})", "-1")]),
        ("So `g(1) == (1, True)` and\n- `g(2) == None`.", "g", [("((1,), {})", "(1, True)"), ("((2,), {})", "None")]),
        ("  assert f(2) == 4, 'four'  # even", "f", [("((2,), {})", "4")]),
        ("x = f(2) == 4\nf(1) == 2; f(2) == 3", "", []),
        (">>> f(2) == 4\nTrue", "f", [("((2,), {})", "4")]),
        (">>> f(2)\n>>> f(2)\n4\n>>> f(2)\n5", "f", [("((2,), {})", "4")]),
        ("Input: nums = [2, 7], target = 9\nOutput: [0, 1]", "", [("(([2, 7], 9), {})", "[0, 1]")]),
        ("def solve(n):\n**Input:** `3`\n\n**Output:** `6`.", "solve", [("((3,), {})", "6")]),
        ('Input: "a", 2 Output: "aa"', "", [("(('a', 2), {})", "'aa'")]),
        ("Input: 1, 2, Output: 3\nInput: 2, 2 -> Output: 4", "", [("((1, 2), {})", "3"), ("((2, 2), {})", "4")]),
        ("Input: 1, 2\nOutput: 3\nInput: 1\nOutput: 1", "", []),  # they differ in the number of arguments
        ("Input: 3 4\nOutput: 7", "", []),
        ("Input: two numbers\nOutput: their sum", "", []),
        ("Input: 3", "", []),
        ("f(1) is 2, and f(2) != 3, f(1) == x", "", []),
        ("__import__('os').system('ls') == 0\nf(open('x')) == 1\nf(9**9**9) == 1", "", []),
        (r">>> f('\d')", "f", [(r"(('\\d',), {})", None)]),  # Python warns about such an escape
        ("Write a poem.", "", []),
        ("(" * 5000, "", []),
        (">>> f(" + "-" * 900 + "1)\n" + ">>> f(" + "[" * 400 + "]" * 400 + ")", "", []),
    ],
)  # fmt: skip
def test_examples_are_read_as_literals(text: str, function: str, examples: list[tuple[str, str | None]]) -> None:
    assert read_examples(text) == CodeTask(function, [CodeExample(*each) for each in examples])


def test_the_name_that_the_request_gives_counts() -> None:
    assert read_examples(DOCTEST, "other").examples == [CodeExample("((1,), {})", "4")]
    assert read_examples(DOCTEST, "absent") == CodeTask("absent", [])


@given(st.text(alphabet="f(1)=> Input:Output[]'\"\n,`-{}", max_size=200))
def test_any_text_is_read_without_an_error(text: str) -> None:
    read_examples(text)


def test_the_number_of_examples_is_bounded() -> None:
    assert len(read_examples("\n".join(f">>> f({n})" for n in range(99))).examples) == MAX_EXAMPLES


def test_the_arguments_of_all_examples_are_bounded_even_if_their_literals_grow() -> None:
    task = read_examples("\n".join(f">>> f('{chr(0x200B) * 900}{n}')" for n in range(32)))
    assert 0 < len(task.examples) < 32
    assert sum(len(example.arguments) for example in task.examples) <= MAX_ARGUMENT_CHARS


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("```python\na\n```\ntext\n~~~\nb\n~~~\n```js\nc\n```", ["a\n", "b\n"]),
        ("```py\na\n```\n```Python title=x\nb\n", ["a\n"]),
        ("def f(): pass", ["def f(): pass"]),
        ("```js\nx\n```", []),
        ("".join(f"```\n{n}\n```\n" for n in range(20)), [f"{n}\n" for n in range(20 - MAX_BLOCKS, 20)]),
        (f"```\n{'x' * MAX_CHARS}\n```\n```\ny\n```", ["y\n"]),
    ],
)
def test_complete_blocks_of_python_are_read(text: str, blocks: list[str]) -> None:
    assert code_blocks(text) == blocks


TASK = CodeTask("f", [CodeExample("((1,), {})", "1"), CodeExample("((2,), {})", None)])


def behaviour(outcomes: str, size: int = 1) -> Behaviour:
    read = Behaviour.of(outcomes.split(), TASK, "x" * size)
    assert read is not None
    return read


def test_replies_that_satisfy_more_examples_lead_then_larger_classes_then_the_shortest() -> None:
    right, wrong, other = "=1 =4", "=0 =4", "=1 !ValueError"
    assert finalists({0: behaviour(wrong), 1: behaviour(wrong), 2: behaviour(right)}) == [2]
    assert finalists({0: behaviour(other), 1: behaviour(right, 9), 2: behaviour(right, 3)}) == [2]
    assert finalists({3: behaviour(other), 1: behaviour(right)}) == [1, 3]
    assert finalists({}) == []


def test_a_function_that_raises_for_every_example_has_no_behaviour() -> None:
    assert Behaviour.of(["!A", "!B"], TASK, "") is None
    assert behaviour("=1 !ValueError").satisfied == 1
    assert behaviour("=1 !ValueError").written == "1, !ValueError"


def test_the_vote_on_behaviour_is_right_as_often_as_the_arithmetic_says() -> None:
    """Five replies are right with probability 1/2 each, and wrong ones all differ. Nothing states the output."""
    task = CodeTask("f", [CodeExample("((1,), {})")])
    right = 0.0
    for pattern in product((True, False), repeat=5):
        outcomes = ["=7" if is_right else f"={at}" for at, is_right in enumerate(pattern)]
        votes = {at: read for at, each in enumerate(outcomes) if (read := Behaviour.of([each], task, ""))}
        leading = finalists(votes)
        right += (pattern[leading[0]] if len(leading) == 1 else pattern[0]) / 32
    assert right == pytest.approx(1 - 0.5**5 - 5 * 0.5**5 + 0.5**5)  # two right ones suffice, or the first alone
