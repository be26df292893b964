"""Functions of foreign code: which are called, how their results are compared, and what becomes of hostile ones."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controllers.errors import BadController, BoundaryViolation
from controllers.sandbox.deadline import Clock
from controllers.sandbox.frames import BadFrame, decode_texts, encode_texts
from controllers.sandbox.functions import MAX_TEXT, NotCallable, call_function, decode_outcomes, plain_text, short_text
from controllers.sandbox.spawner import SandboxSpawner, spawner

ONE = "((1,), {})"


@pytest.mark.parametrize(
    ("first", "second", "equal"),
    [
        (2, 2.0, True),
        (0.0, -0.0, True),
        (0.1 + 0.2, 0.3, True),
        (1, True, False),
        (0, None, False),
        ([1], (1,), False),
        ("1", 1, False),
        ("a", b"a", False),
        ({"a": 1, "b": [2]}, {"b": [2.0], "a": 1}, True),
        ({1: "x"}, {"1": "x"}, False),
        ({3, 1, 2}, frozenset({2, 3, 1}), True),
        (math.inf, -math.inf, False),
        (math.nan, math.nan, True),
        (10**400, 10**400 + 1, False),
        ([], {}, False),
    ],
)
def test_plain_values_are_compared_by_their_texts(first: object, second: object, equal: bool) -> None:
    assert (plain_text(first) == plain_text(second)) is equal


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
VALUES = st.recursive(PLAIN, lambda each: st.lists(each) | st.dictionaries(st.text(), each), max_leaves=5)


@settings(max_examples=40)
@given(VALUES)
def test_texts_of_values_are_printable_and_short(value: object) -> None:
    text = short_text(value)
    assert len(text) <= MAX_TEXT
    assert text.isascii()
    assert text.isprintable()


@settings(max_examples=40)
@given(VALUES, VALUES)
def test_json_values_with_different_texts_differ(first: object, second: object) -> None:
    if json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True):
        assert short_text(first) == short_text(second)


def test_long_texts_differ_by_their_hash() -> None:
    assert short_text("x" * 10**6 + "a") != short_text("x" * 10**6 + "b")


@pytest.mark.parametrize("value", [object(), iter([]), len, [object()], {"a": int}, 1j])
def test_other_objects_cannot_be_compared(value: object) -> None:
    with pytest.raises(NotCallable):
        plain_text(value)


def test_nesting_is_bounded() -> None:
    value: list[object] = []
    for _ in range(200):
        value = [value]
    with pytest.raises(NotCallable, match="deeply"):
        plain_text(value)


@pytest.mark.parametrize(
    ("blocks", "name", "outcome"),
    [
        (["def f(x): return x + 1"], "f", "=2"),
        (["def f(x): return 1", "def f(x): return 2"], "f", "=2"),  # the last block that defines it
        (["def f(x): return 1", "print(f(3))"], "f", "=1"),
        (["def f(x): return 1", "not Python"], "f", "=1"),
        (["def g(x): return 1\ndef h(x): return g(x) + 1"], "", "=2"),  # the last function
        (["BIG: int = 10 ** 3\nclass Box:\n    size = BIG\ndef f(x): return Box().size"], "f", "=1000"),
        (["from typing import List\nimport typing\ndef f(x: List[int]) -> Set[Any]: return x"], "f", "=1"),
        (["def f(x): return x\nassert f(1) == 2\nraise SystemExit\nf(5)"], "f", "=1"),
        (["def f(x): raise KeyError(x)"], "f", "!KeyError"),
        (["def f(x): raise SystemExit"], "f", "!SystemExit"),
        (["def f(x, y): return x"], "f", "!TypeError"),
        (["def f(x):\n    print(x)\n    return x"], "f", "!NameError"),
        (["def f(x): return open('/etc/passwd').read()"], "f", "!NameError"),
        (["def f(x): return eval('1')"], "f", "!NameError"),
        (["def f(x): return __import__('os').getpid()"], "f", "!NameError"),
        (["def f(x): return f(x)"], "f", "!RecursionError"),
    ],
)  # fmt: skip
def test_the_function_of_a_reply_is_called(blocks: list[str], name: str, outcome: str) -> None:
    assert call_function(blocks, name, [ONE]) == [outcome]


@pytest.mark.parametrize(
    ("block", "problem"),
    [
        ("import math\ndef f(x): return x", "imports"),
        ("from os import path\ndef f(x): return x", "imports"),
        ("def f(x):\n    import math\n    return x", "imports"),
        ("def g(x): return x", "no such function"),
        ("async def f(x): return x", "no such function"),
        ("f = lambda x: x", "no such function"),
        ("def f(x): return x\nf = 3", "replaced"),
        ("def f(x): yield x", "generator cannot be compared"),
        ("def f(x): return [len]", "cannot be compared"),
        ("", "no such function"),
    ],
)
def test_other_code_cannot_be_called(block: str, problem: str) -> None:
    with pytest.raises(NotCallable, match=problem):
        call_function([block], "f", [ONE])


def test_each_call_gets_its_own_arguments() -> None:
    block = "def f(x, y=()):\n    x.append(9)\n    return x, y"
    assert call_function([block], "f", ["(([1],), {})", "(([1],), {'y': 2})"]) == ["=([1, 9], ())", "=([1, 9], 2)"]


def test_texts_are_read_back_and_bounded() -> None:
    texts = ["", "é\ud800", "x" * 9]
    assert decode_texts([7, *encode_texts(texts)], 1, 3, 9)[0] == texts
    for most, longest in ((2, 9), (3, 8)):
        with pytest.raises(BadFrame):
            decode_texts(encode_texts(texts), 0, most, longest)
    with pytest.raises(BadFrame):
        decode_texts([], 0, 1, 1)
    with pytest.raises(BadFrame):
        decode_texts([-1], 0, 1, 1)


# In sealed processes


def run(block: str, made: SandboxSpawner, seconds: float = 0.3) -> list[str]:
    handle = made.spawn(seconds, Clock.CPU)
    try:
        return handle.call([block], "f", [ONE, "((2,), {})"])
    finally:
        handle.close()


@pytest.mark.process
def test_a_function_is_called_in_a_sealed_process() -> None:
    assert run("def f(x): return {x: 'é'}", spawner()) == ["={1: '\\xe9'}", "={2: '\\xe9'}"]


LOOP = "def f(x):\n    while True: pass"


@pytest.mark.process
@pytest.mark.parametrize(
    ("block", "error"),
    [
        (LOOP, BoundaryViolation),
        ("TOO_LATE = sum(0 for _ in iter(int, 1))\ndef f(x): return x", BoundaryViolation),
        ("def f(x): return [0] * 10**10", BadController),
        ("def f(x):\n    kept = []\n    while True: kept.append('x' * 10**6)", BadController),
        ("import os\ndef f(x): return os.getpid()", BadController),
        ("class E(BaseException):\n    def __str__(self): raise E\nraise E\ndef f(x): pass\nX = 1 / 0", BadController),
    ],
)
def test_code_that_misbehaves_is_killed_or_refused(block: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        run(block, spawner())
    assert run("def f(x): return x", spawner()) == ["=1", "=2"]  # others are not affected


@pytest.mark.process
@pytest.mark.parametrize(
    "attack",
    [
        "os.system('true')",
        "open('/etc/passwd').read()",
        "__import__('socket').socket()",
        "os.fork()",
        "os.write(3, b'x' * 64) and 7",  # forges a frame
        "os._exit(0)",
    ],
)
def test_code_that_gets_hold_of_modules_reaches_nothing(attack: str) -> None:
    """It may raise, be killed or lie about its own result, but never get a result from outside."""
    lines = [
        "def f(x):",
        "    classes = ().__class__.__base__.__subclasses__()",
        "    names = [c for c in classes if c.__name__ == '_wrap_close'][0].__init__.__globals__",
        "    os, found = names['sys'].modules['os'], names['__builtins__']",
        "    open, __import__ = found['open'], found['__import__']",
        f"    return {attack}",
    ]
    try:
        outcomes = run("\n".join(lines), spawner())
    except (BadController, BoundaryViolation):
        return
    assert all(outcome.startswith("!") for outcome in outcomes)


def test_what_a_process_answers_is_checked() -> None:
    assert decode_outcomes([1, 0, *encode_texts(["=1", "=\x1b\ud800"])], 2, 2 * MAX_TEXT) == (
        "",
        ["=1", "=\ufffd\ufffd"],
    )
    forged: tuple[list[int], ...] = (
        [0, *encode_texts(["=1"])],
        [0, *encode_texts(["=1"] * 3)],
        [0, *encode_texts(["x" * 999] * 2)],
        [9],
        [],
    )
    for reply in forged:
        with pytest.raises(BadFrame):
            decode_outcomes([1, *reply], 2, 2 * MAX_TEXT)
