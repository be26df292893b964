"""Answers by number: which of those seen so far are the same."""

from __future__ import annotations

import cmath
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Protocol

from discovery.answers.forms import Form, Sort

MOST_ASKED: Final = 8
"""Classes a new answer is held against by the judge; the first come first."""

_MATHEMATICAL: Final = (Sort.NUMBER, Sort.EXPRESSION, Sort.COLLECTION)
_COMPUTED: Final = ("\\int", "\\sum", "\\prod", "\\lim", "\\lfloor", "\\lceil", "\\gcd", "\\max", "\\min", "\\det")


class Decides(Protocol):
    """Who is asked about expressions whose forms do not settle it: a `Judge`."""

    def same(self, one: str, other: str) -> bool: ...


@dataclass(slots=True)
class _Class:
    """Answers that are the same."""

    form: Form  # of the first
    written: str  # the first, as it was written
    name: str
    unit: str


class Labels:
    """The answers of one episode, or one question, numbered from 0 in the order they are first seen.

    Forms that are the same are one answer. So are an answer with a unit, or named as a variable's value, and one
    without (5 and 5 cm), but not two with different ones: who comes first decides which of those a bare answer joins.
    Expressions that might still be equal are put to the judge, if there is one.
    """

    def __init__(self, judge: Decides | None = None) -> None:
        self._judge = judge
        self._classes: list[_Class] = []
        self._numbers: dict[tuple[str, str, str], int] = {}
        self._by_text: dict[str, list[int]] = {}

    def __len__(self) -> int:
        return len(self._classes)

    def written(self, label: int) -> str:
        """The answer of `label`, as it was written first."""
        return self._classes[label].written

    def doubtful(self, form: Form) -> bool:
        """Whether `number` would ask the judge about `form`, and so may take its time."""
        return self._judge is not None and self._known(form) is None and next(self._possible(form), None) is not None

    def number(self, form: Form, written: str) -> int:
        """The label of an answer, a new one if it is none of those seen."""
        label = self._known(form)
        if label is None and self._judge is not None:
            for asked, possible in enumerate(self._possible(form)):
                if asked == MOST_ASKED:
                    break
                if self._judge.same(written, self._classes[possible].written):
                    label = possible
                    break
        if label is None:
            label = len(self._classes)
            self._classes.append(_Class(form, written, form.name, form.unit))
            self._by_text.setdefault(form.text, []).append(label)
        known = self._classes[label]
        known.name, known.unit = known.name or form.name, known.unit or form.unit
        self._numbers[form.text, form.name, form.unit] = label
        return label

    def _known(self, form: Form) -> int | None:
        label = self._numbers.get((form.text, form.name, form.unit))
        if label is None:
            for candidate in self._by_text.get(form.text, ()):
                if self._joins(form, self._classes[candidate]):
                    return candidate
        return label

    def _possible(self, form: Form) -> Iterator[int]:
        """The classes `form` might belong to for all that forms can tell."""
        for label, known in enumerate(self._classes):
            if self._joins(form, known) and form.text != known.form.text and _might_equal(form, known.form):
                yield label

    @staticmethod
    def _joins(form: Form, known: _Class) -> bool:
        named_alike = not form.name or not known.name or form.name == known.name
        return named_alike and (not form.unit or not known.unit or form.unit == known.unit)


def _might_equal(one: Form, other: Form) -> bool:
    if one.exact and other.exact:
        return False
    if Sort.OTHER in (one.sort, other.sort):  # an integral, say: its value is not known here
        forms = (one, other)
        return all(form.sort in _MATHEMATICAL or form.text.startswith(_COMPUTED) for form in forms)
    if one.sort not in _MATHEMATICAL or other.sort not in _MATHEMATICAL or one.shape != other.shape:
        return False
    return len(one.values) == len(other.values) and all(
        a is b is None or (a is not None and b is not None and cmath.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12))
        for a, b in zip(one.values, other.values, strict=True)
    )
