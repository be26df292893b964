"""Answers by number: which of those seen so far are the same."""

from __future__ import annotations

import cmath
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Final, Protocol

from discovery.answers.forms import CanonicalForm, FormType

MOST_ASKED: Final = 8
"""Classes a new answer is held against by the judge; the first come first."""

_MATHEMATICAL: Final = (FormType.NUMBER, FormType.EXPRESSION, FormType.COLLECTION)
_COMPUTED: Final = ("\\int", "\\sum", "\\prod", "\\lim", "\\lfloor", "\\lceil", "\\gcd", "\\max", "\\min", "\\det")
_STRUCTURED = re.compile(r"[<>]|\\[lgn]e(?![a-z])|\\begin\{array\}|^\([a-z](?:,[a-z])+\)=\(")
EQUATION: Final = "#=0"
"""Shape of an equation of variables."""


class EqualityOracle(Protocol):
    """Who is asked about expressions whose forms do not settle it: a `Judge`."""

    def same(self, one: str, other: str) -> bool: ...


@dataclass(slots=True)
class _Class:
    """Answers that are the same."""

    form: CanonicalForm  # of the first
    written: str  # the first, as it was written
    name: str
    unit: str


class Labels:
    """The answers of one episode, or one question, numbered from 0 in the order they are first seen.

    Forms that are the same are one answer. So are an answer with a unit, or named as a variable's value, and one
    without (5 and 5 cm), but not two with different ones: who comes first decides which of those a bare answer joins.
    Expressions that might still be equal are put to the judge, if there is one.
    """

    def __init__(self, judge: EqualityOracle | None = None) -> None:
        self._judge = judge
        self._classes: list[_Class] = []
        self._numbers: dict[tuple[str, str, str], int] = {}
        self._by_text: dict[str, list[int]] = {}

    def __len__(self) -> int:
        return len(self._classes)

    def written(self, label: int) -> str:
        """The answer of `label`, as it was written first."""
        return self._classes[label].written

    def undecided(self, form: CanonicalForm) -> list[tuple[int, str]]:
        """Labels that `form` might have and forms alone cannot rule out, each with its answer as first written.

        Empty if the label is known. Ask about them in this order.
        """
        return [] if self._known(form) is not None else list(islice(self._possible(form), MOST_ASKED))

    def label_of(self, form: CanonicalForm, written: str) -> int:
        """The label of an answer, a new one if it is none of those seen. Blocks while the judge is asked."""
        judge = self._judge
        doubtful = [] if judge is None else self.undecided(form)
        equal = (label for label, other in doubtful if judge is not None and judge.same(written, other))
        return self.assign(form, written, next(equal, None))

    def assign(self, form: CanonicalForm, written: str, equal: int | None) -> int:
        """The label of an answer that was found to be `equal` to one of those it might be, or to none of them."""
        label = self._known(form)
        label = equal if label is None else label
        if label is None:
            label = len(self._classes)
            self._classes.append(_Class(form, written, form.name, form.unit))
            self._by_text.setdefault(form.text, []).append(label)
        known = self._classes[label]
        known.name, known.unit = known.name or form.name, known.unit or form.unit
        self._numbers[form.text, form.name, form.unit] = label
        return label

    def _known(self, form: CanonicalForm) -> int | None:
        label = self._numbers.get((form.text, form.name, form.unit))
        if label is None:
            for candidate in self._by_text.get(form.text, ()):
                if self._joins(form, self._classes[candidate]):
                    return candidate
        return label

    def _possible(self, form: CanonicalForm) -> Iterator[tuple[int, str]]:
        """The classes `form` might belong to for all that forms can tell."""
        for label, known in enumerate(self._classes):
            if self._joins(form, known) and form.text != known.form.text and _might_equal(form, known.form):
                yield label, known.written

    @staticmethod
    def _joins(form: CanonicalForm, known: _Class) -> bool:
        named_alike = not form.name or not known.name or form.name == known.name
        return named_alike and (not form.unit or not known.unit or form.unit == known.unit)


def _might_equal(one: CanonicalForm, other: CanonicalForm) -> bool:
    """Whether math-verify can settle what forms cannot."""
    if one.exact and other.exact:
        return False
    if FormType.OTHER in (one.type, other.type):
        return _might_be(one, other) and _might_be(other, one)
    if one.type not in _MATHEMATICAL or other.type not in _MATHEMATICAL:
        return False
    if EQUATION in (one.shape, other.shape):
        return one.shape == other.shape or _states(one, other) or _states(other, one)
    if one.shape != other.shape:
        return False
    return len(one.values) == len(other.values) and all(
        a is b is None or (a is not None and b is not None and cmath.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12))
        for a, b in zip(one.values, other.values, strict=True)
    )


def _might_be(form: CanonicalForm, other: CanonicalForm) -> bool:
    """Whether `form`, if it is one that was not understood, is of a kind that might be `other`."""
    if form.type is not FormType.OTHER:
        return form.type in _MATHEMATICAL
    if "..." in form.text:
        return False
    if form.text.startswith(_COMPUTED):
        return True
    return other.type in (FormType.COLLECTION, FormType.OTHER) and _STRUCTURED.search(form.text) is not None


def _states(equation: CanonicalForm, value: CanonicalForm) -> bool:
    """Whether an equation has the variable that `value` was given for: `2x + 4y = 3` and `y = …`."""
    return equation.shape == EQUATION and value.shape == "#" and bool(value.name) and value.name in equation.text
