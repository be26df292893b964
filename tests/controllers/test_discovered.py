"""Shipped discovered controllers: each can be read, passes the static check and has a card with its digest."""

from __future__ import annotations

import json

import pytest

from controllers import UnknownController
from controllers.advice import advise
from controllers.loading import DISCOVERED, discovered, parse_spec

NAMES = discovered()


def test_discovered_controllers_are_shipped_and_listed_for_an_unknown_name() -> None:
    assert NAMES
    with pytest.raises(UnknownController, match=NAMES[0]):
        parse_spec("nobody")


@pytest.mark.parametrize("name", NAMES)
def test_each_discovered_controller_passes_the_check_and_matches_its_card(name: str) -> None:
    spec = parse_spec(name)
    assert spec.is_foreign
    assert spec.source is not None
    assert advise(spec.source) == []
    card = json.loads((DISCOVERED / f"{name}.json").read_text())
    assert card["digest"] == spec.digest
    assert {"explorer", "lineage", "run", "data", "settings", "search"} <= set(card)
    assert all(cell["points"] for cell in card["search"]["cells"])
