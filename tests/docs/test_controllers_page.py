"""The page on writing controllers describes the API of controllers, and each rule in the prompt of explorers."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

import controllers
from controllers import Limits, State
from controllers.advice import IMPORTS
from discovery.search import prompt

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "controllers.md").read_text()
STATE = re.compile(r"`state\.(\w+)")
CALL = re.compile(r"^(?:- |\| )`(\w+)\(", re.MULTILINE)


def test_the_page_names_every_action_and_part_of_the_state_that_explorers_are_told() -> None:
    assert set(STATE.findall(PAGE)) >= set(STATE.findall(prompt._API))
    actions = {"branch", "advance", "probe", "prune", "answer"}
    assert set(CALL.findall(PAGE)) == actions <= set(controllers.__all__)


@pytest.mark.parametrize("name", sorted(set(STATE.findall(PAGE))))
def test_each_part_of_the_state_on_the_page_exists(name: str) -> None:
    assert hasattr(State(Limits(1)), name)


def test_the_page_names_every_module_that_a_controller_may_import() -> None:
    rules = PAGE.split("- Imports:")[1].split("- No files")[0]
    assert set(re.findall(r"`([a-z]+)`", rules)) == set(IMPORTS) - {"__future__"}


def test_the_page_lists_the_helpers_that_explorers_are_told() -> None:
    module, listed = "", {}
    for line in PAGE.partition("## Helpers")[2].partition("\n## ")[0].splitlines():
        named = re.match(r"\| (?:`(controllers\.\w+)`)? ?\| (`.*?\)`)", line)
        if named:
            module = named[1] or module
            for function in re.findall(r"`(\w+)\(", named[2] + line):
                assert callable(getattr(importlib.import_module(module), function))
                listed[function] = module
    told = prompt._API.partition("Helpers:")[2]
    assert set(listed) == set(re.findall(r"`(\w+)\(", told))
