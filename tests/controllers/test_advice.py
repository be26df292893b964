"""The static check of controller files: its messages for each violation, and that it accepts valid files."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from controllers.advice import LONGEST, MOST, advise
from controllers.loading import LARGEST

GOOD = """
from controllers import State, answer, branch

class Mine:
    def __init__(self, beta):
        self.beta = beta

    def decide(self, state: State):
        return [answer(state.leader())] if state.width else [branch()]
"""
BODY = "        return [answer(state.leader())]"


def test_a_valid_file_and_built_in_controllers_give_no_advice() -> None:
    assert advise(GOOD) == []
    baselines = Path(__file__).parents[2] / "controllers" / "baselines"
    for name in ("cmc", "single", "answer_consistency"):
        assert advise((baselines / f"{name}.py").read_text()) == []


def test_a_dataclass_may_have_beta_as_its_only_constructor_field() -> None:
    header = "from dataclasses import dataclass, field\nfrom typing import ClassVar\n@dataclass\nclass Mine:\n"
    decide = "    def decide(self, state): return []\n"
    others = "    seen: int = field(default=0, init=False)\n    MOST: ClassVar[int] = 3\n"
    assert advise(f"{header}    beta: float\n{others}{decide}") == []
    assert advise(f"{header}    beta: float\n    more: int = 3\n{decide}") == [
        "line 4: Mine must take β only: __init__(self, beta)"
    ]


def test_a_constructor_inherited_in_the_same_file_is_accepted() -> None:
    assert (
        advise(
            "class Base:\n    def __init__(self, beta): ...\n" + "class Mine(Base):\n    def decide(self, state): ..."
        )
        == []
    )
    loop = "class A(B):\n    def decide(self, state): ...\n    def __init__(self, beta): ...\nclass B(A): pass\n"
    assert any("not A, B" in line for line in advise(loop))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("import os", "import os: a controller may import controllers, math"),
        ("import os.path as p", "import os.path: a controller may import"),
        ("from . import x", "import .: a controller may import"),
        ("import random", "import random: no randomness"),
        ("import numpy as np", "import numpy: a controller may import controllers, math"),
        ("import time", "import time: no clock"),
        ("from datetime import datetime", "import datetime: no clock"),
        ("x = (1).__class__", ".__class__: a controller must not use Python internals"),
        ("x = getattr(1, '__class__')", "'__class__': a controller must not use"),
        ("x = __builtins__", "__builtins__: a controller must not use"),
        ("x = eval('1')", "eval(): a controller must be complete in its file"),
        ("x = open('f')", "open(): a controller must not read or write anything"),
        ("x = id(1)", "id(): it differs between runs"),
        ("x = 0\ndef f():\n    global x\n    x = 1", "global x: one object serves one episode"),
        ("async def f(): ...", "async: a decision must not wait"),
        ("class Other:\n    def decide(self, state): ...", "one class with a decide method, not Mine, Other"),
    ],
)
def test_each_forbidden_statement_is_reported_with_its_line_and_reason(change: str, expected: str) -> None:
    (message,) = advise(GOOD + change)
    assert expected in message
    assert message.startswith("line 1")


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("(self, beta)", "(self, beta, n=3)", "line 5: Mine must take β only"),
        ("(self, beta)", "(self, *beta)", "line 5: Mine must take β only"),
        ("    def __init__(self, beta):\n        self.beta = beta\n", "", "line 4: Mine must take β only"),
        ("(self, state: State)", "(self, state, more)", "decide must take self and the state"),
        ("class Mine", "class Mine(", "line 4: SyntaxError: invalid syntax"),
        ("decide", "decides", "one class with a decide method, not none"),
    ],
)
def test_a_wrong_signature_or_a_missing_class_is_reported(old: str, new: str, expected: str) -> None:
    (message,) = advise(GOOD.replace(old, new))
    assert expected in message


def test_unparsable_source_gives_one_message_instead_of_an_exception() -> None:
    assert advise("\0") == ["SyntaxError: source code string cannot contain null bytes"]
    assert len(advise("(" * 5000)) == 1
    assert len(advise("-" * 60_000 + "1")) == 1


# Files crafted to make the check slow or deep


def calls(source: str) -> int:
    """Return how many functions are called to check a file."""
    count = 0

    def note(*_: object) -> None:
        nonlocal count
        count += 1

    sys.setprofile(note)
    try:
        advise(source)
    finally:
        sys.setprofile(None)
    return count


def ladder(classes: int) -> str:
    """Return source of empty classes, each derived from all later ones."""
    names = [f"C{number}" for number in range(classes)]
    return "".join(f"class {name}({', '.join(names[at + 1 :])}): pass\n" for at, name in enumerate(names))


def test_the_check_visits_each_base_class_only_once() -> None:
    assert calls(ladder(20)) < 8 * calls(ladder(10))  # twice the classes have four times as many bases
    assert advise(ladder(150)) == [
        "line 1: a controller file must have exactly one class with a decide method, not none"
    ]
    decide = "\n    def decide(self, state): ...\n"
    assert advise(ladder(40).replace("class C39(): pass\n", f"class C39:{decide}"))[0].startswith("line 2: ")


def test_an_inheritance_chain_of_1500_classes_is_followed_to_its_end() -> None:
    line = "".join(f"class C{number}(C{number + 1}): pass\n" for number in range(1500))
    last = "class C1500:\n    def __init__(self, beta): ...\n    def decide(self, state): ...\n"
    (only,) = advise(line + last)
    assert only.startswith("line 2: a controller file must have exactly one class with a decide method, not C0, C1")
    assert len(only) <= LONGEST + 2


@pytest.mark.parametrize("deep", ["-" * 400 + "1", "-" * 60_000 + "1", "(" * 180 + ")" * 180, "not " * 2_000 + "1"])
@pytest.mark.parametrize(
    "file",
    [
        "@dataclass({})\nclass A:\n    def decide(self, state): ...\n",
        "@dataclass\nclass A:\n    beta: {}\n    def decide(self, state): ...\n",
        "@dataclass\nclass A:\n    beta: float = {}\n    def decide(self, state): ...\n",
        "x = {}",
    ],
)
def test_deeply_nested_expressions_never_raise(file: str, deep: str) -> None:
    assert isinstance(advise(file.format(deep)), list)


def test_the_number_and_length_of_messages_are_bounded() -> None:
    names = "".join(f"import m{number}\n" for number in range(5_000))
    messages = advise(names[:LARGEST])
    assert len(messages) == MOST + 1
    assert messages[-1].startswith("and ")
    assert len(advise("import " + "m" * 60_000)[1]) <= LONGEST + 2
