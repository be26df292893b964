"""Types of canonical forms."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class FormType(StrEnum):
    """Type of an answer."""

    NUMBER = "number"  # a rational number
    EXPRESSION = "expression"
    COLLECTION = "collection"  # a tuple, set, interval, matrix
    CHOICE = "choice"  # one capital letter
    WORDS = "words"
    OTHER = "other"  # not understood; equal only to identical text


@dataclass(frozen=True, slots=True)
class CanonicalForm:
    """Canonical form of an answer: answers with equal forms are equal."""

    text: str
    type: FormType
    name: str = ""  # variable the answer is the value of, as in `x = 5`
    unit: str = ""
    exact: bool = True  # two different exact forms are never equal
    shape: str = ""  # forms of different shapes are never equal
    values: tuple[complex | None, ...] = ()  # numerical values of its expressions, with fixed values for variables

    @property
    def is_interval(self) -> bool:
        """Whether the form is an interval, as `x > 2` is."""
        return (
            self.type is FormType.COLLECTION and self.text[:1] in "([" and self.text[-1:] in ")]" and "oo" in self.text
        )
