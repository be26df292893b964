"""Labels: number the answers of an episode so that equal answers get equal numbers."""

from __future__ import annotations

import cmath
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Final, Protocol

from discovery.answers.forms import LONGEST, CanonicalForm, FormType, canonical
from discovery.answers.stated_answers import without_markup

MOST_ASKED: Final = 8
"""Maximum classes that the judge compares a new answer with, oldest first."""

_MATHEMATICAL: Final = (FormType.NUMBER, FormType.EXPRESSION, FormType.COLLECTION)
_COMPUTED: Final = ("\\int", "\\sum", "\\prod", "\\lim", "\\lfloor", "\\lceil", "\\gcd", "\\max", "\\min", "\\det")
_STRUCTURED = re.compile(r"[<>]|\\[lgn]e(?![a-z])|\\begin\{array\}|^\([a-z](?:,[a-z])+\)=\(")
EQUATION: Final = "#=0"
"""Shape of an equation between variables."""


class EqualityOracle(Protocol):
    """Decides whether two expressions are equal where forms alone cannot; implemented by `Judge`."""

    def same(self, first: str, second: str) -> bool: ...


@dataclass(slots=True)
class _Class:
    """A class of equal answers."""

    form: CanonicalForm  # of the first answer
    written: str  # text of the first answer
    name: str
    unit: str


class Labels:
    """The answers of one episode or question, numbered from 0 in order of first appearance.

    Equal forms are one answer. An answer with a unit or variable name equals one without (5 and 5 cm), but answers with
    different units or names are different; a bare answer joins the first class it fits. Expressions that might still be
    equal are compared by the judge, if there is one.
    """

    def __init__(self, judge: EqualityOracle | None = None) -> None:
        self._judge = judge
        self._classes: list[_Class] = []
        self._numbers: dict[tuple[str, str, str], int] = {}
        self._by_text: dict[str, list[int]] = {}

    def __len__(self) -> int:
        return len(self._classes)

    def written(self, label: int) -> str:
        """Return the text of the first answer with this label."""
        return self._classes[label].written

    def recorded(self, label: int) -> str:
        """Return a text of the first answer with this label that `canonical` reads as the same form, if there is one.

        Its text as written may be read otherwise, because the method that found it knew its place: in `**18** dollars`,
        or `b` for choice B.
        """
        known = self._classes[label]
        return _readable(known.written, known.form)

    def undecided(self, form: CanonicalForm) -> list[tuple[int, str]]:
        """Return the labels that `form` might have, judged by forms alone, each with its first answer's text.

        Empty if the label is known. Compare with them in this order.
        """
        return [] if self._known(form) is not None else list(islice(self._possible(form), MOST_ASKED))

    def label_of(self, form: CanonicalForm, written: str) -> int:
        """Return the label of an answer, a new one if it equals none so far. Blocks while the judge compares."""
        judge = self._judge
        doubtful = [] if judge is None else self.undecided(form)
        equal = (label for label, other in doubtful if judge is not None and judge.same(written, other))
        return self.assign(form, written, next(equal, None))

    def assign(self, form: CanonicalForm, written: str, equal: int | None) -> int:
        """Assign the label of an answer after comparing it: `equal` is the label it equals, or None."""
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
        """Yield the classes that `form` might belong to, judged by forms alone."""
        for label, known in enumerate(self._classes):
            if self._joins(form, known) and form.text != known.form.text and _might_equal(form, known.form):
                yield label, known.written

    @staticmethod
    def _joins(form: CanonicalForm, known: _Class) -> bool:
        named_alike = not form.name or not known.name or form.name == known.name
        return named_alike and (not form.unit or not known.unit or form.unit == known.unit)


def _readable(written: str, form: CanonicalForm) -> str:
    """Return a spelling of an answer that `canonical` reads as `form`, or `written` if there is none.

    Better than none is a spelling that only lacks the name and the unit of `form`.
    """
    if len(written) > LONGEST:
        return written
    quantity = f"{form.text} {form.unit}".strip()
    spellings = (written, without_markup(written), f"{form.name} = {quantity}" if form.name else quantity, form.text)
    for spelling in spellings:
        if canonical(spelling) == form:
            return spelling
    plain = canonical(form.text)
    return form.text if plain is not None and (plain.text, plain.type) == (form.text, form.type) else written


def _might_equal(left: CanonicalForm, right: CanonicalForm) -> bool:
    """Return whether two different forms might be equal, so that math-verify should decide."""
    if left.exact and right.exact:
        return False
    if FormType.OTHER in (left.type, right.type):
        return _might_be(left, right) and _might_be(right, left)
    if left.type not in _MATHEMATICAL or right.type not in _MATHEMATICAL:
        return False
    if EQUATION in (left.shape, right.shape):
        return left.shape == right.shape or _states(left, right) or _states(right, left)
    if left.shape != right.shape:
        return False
    return len(left.values) == len(right.values) and all(
        a is b is None or (a is not None and b is not None and cmath.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12))
        for a, b in zip(left.values, right.values, strict=True)
    )


def _might_be(form: CanonicalForm, other: CanonicalForm) -> bool:
    """Return whether a `form` of type OTHER might equal `other`; other types need only be mathematical."""
    if form.type is not FormType.OTHER:
        return form.type in _MATHEMATICAL
    if "..." in form.text:
        return False
    if form.text.startswith(_COMPUTED):
        return True
    return other.type in (FormType.COLLECTION, FormType.OTHER) and _STRUCTURED.search(form.text) is not None


def _states(equation: CanonicalForm, value: CanonicalForm) -> bool:
    """Return whether an equation contains the variable of `value`, as `2x + 4y = 3` does for `y = …`."""
    return equation.shape == EQUATION and value.shape == "#" and bool(value.name) and value.name in equation.text
