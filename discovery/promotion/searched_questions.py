"""Facts about the search for a controller, from the card beside its file: the questions it has seen, and its rules.

The card has salted hashes, because cards are published and recordings may be private.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, NamedTuple

from discovery.data.safe_json import parse_json
from discovery.errors import GateError
from discovery.evaluation.search_split import salted_id
from discovery.promotion.ledger import ID_DIGITS, shorten_ids

SEARCHED: Final = "searched"
"""Entry of a card's `data` that lists the hashes. Their salt is the card's `run`."""


class SearchedQuestions(NamedTuple):
    """Questions that a search has seen."""

    salt: str
    hashes: frozenset[str]

    def count(self, questions: Iterable[str]) -> int:
        """Return how many of these questions the search has seen. Their ids may be shortened."""
        return len(self.hashes.intersection(_hashes(questions, self.salt)))


def with_searched(card: dict[str, Any], questions: Iterable[str]) -> dict[str, Any]:
    """Return the card with the questions that its search has seen."""
    return {**card, "data": {**card["data"], SEARCHED: _hashes(questions, card["run"])}}


def searched_questions(controller: str) -> SearchedQuestions | None:
    """Return the questions that the search for FILE.py has seen; None if they are unknown.

    The card beside the file counts for edited files too: they come from the same search.
    """
    card = _card(controller)
    try:
        return SearchedQuestions(str(card["run"]), frozenset(map(str, card["data"][SEARCHED])))
    except (KeyError, TypeError):
        return None  # no card of a search, or one of an earlier version


def check_not_card(report: Path, controllers: Iterable[str]) -> None:
    """Raise GateError if a report would replace the card beside FILE.py: without it, nobody knows what was searched."""
    for controller in controllers:
        card = _card_file(controller)
        if card is not None and card.resolve() == report.resolve():
            raise GateError(
                f"--report {report}: the card of the search for {controller} is kept there; name another file, such as "
                f"{card.with_suffix('.report.json')}"
            )


def charged_probe_tokens(controller: str) -> int | None:
    """Return what the search for FILE.py charged per probe; None if it counted recorded tokens, or is unknown."""
    settings = _card(controller).get("settings")
    charged = settings.get("probe_tokens") if isinstance(settings, dict) else None
    return charged if isinstance(charged, int) else None


def _card(controller: str) -> dict[str, Any]:
    """Return the card beside FILE.py; empty if there is none."""
    file = _card_file(controller)
    try:
        card = {} if file is None else parse_json(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return card if isinstance(card, dict) else {}


def _card_file(controller: str) -> Path | None:
    """Return where the card of FILE.py is; None for a controller that is no file."""
    return Path(controller).with_suffix(".json") if controller.endswith(".py") else None


def _hashes(questions: Iterable[str], salt: str) -> list[str]:
    return sorted(salted_id(question, salt)[:ID_DIGITS] for question in shorten_ids(questions))
