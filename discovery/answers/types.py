"""The types of canonical forms: sort, text, and the parts that may be left out."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class FormType(StrEnum):
    """Kind of an answer."""

    NUMBER = "number"  # a rational number
    EXPRESSION = "expression"
    COLLECTION = "collection"  # a tuple, set, interval, matrix
    CHOICE = "choice"  # one capital letter
    WORDS = "words"
    OTHER = "other"  # not understood: the same only as what is written the same


@dataclass(frozen=True, slots=True)
class CanonicalForm:
    """The canonical form of an answer."""

    text: str
    type: FormType
    name: str = ""  # the variable it was given as the value of
    unit: str = ""
    exact: bool = True  # two exact forms that differ are not equal
    shape: str = ""  # forms of different shape are not equal
    values: tuple[complex | None, ...] = ()  # of its expressions, at fixed values of their variables

    @property
    def is_interval(self) -> bool:
        """Whether it is an interval, as `x > 2` is."""
        return (
            self.type is FormType.COLLECTION and self.text[:1] in "([" and self.text[-1:] in ")]" and "oo" in self.text
        )
