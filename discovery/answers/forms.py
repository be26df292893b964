r"""Canonical forms: bring a written answer to a form that is equal for equal answers.

A form has a normalized text (number, expression, tuple, set, interval or words). Optional parts are kept apart from it:
the variable the answer is the value of (`x=5`) and its unit (`5 cm`, `5°`, `5%`). `5 cm` and `5` may be one answer, and
`5` and `5 m` too, but `5 cm` and `5 m` never are. No single text can express that, so it is decided where labels are
assigned (`labels.py`).
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final

from discovery.answers.algebra import TooHard
from discovery.answers.form_parser import FormParser, choice, lettered
from discovery.answers.latex import balanced, normalize_latex
from discovery.answers.types import CanonicalForm, FormType

__all__ = ["LONGEST", "CanonicalForm", "FormType", "canonical", "choice"]

LONGEST: Final = 1000
"""Maximum characters of an answer; longer texts are not votes."""

_INTEGER = re.compile(r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)")
_PLACEHOLDER = re.compile(
    r"\[?(?:err(?:or)?|nan|null|n/a|unknown|tbd|todo|(?:(?:the|your|final|boxed|correct|insert)\s+)*answer(?:\s+here)?|"
    r"box|boxed|result|placeholder|blank|(?:[^\w{}]|_)*)\]?",
    re.IGNORECASE,
)


@lru_cache(maxsize=16_384)
def canonical(written: str) -> CanonicalForm | None:
    r"""Return the form of the content of a `\boxed{}` or of a stated answer; None if it cannot be read as an answer.

    Takes milliseconds at most, because length, nesting and number of parts are bounded.
    """
    text = written.strip()
    if _INTEGER.fullmatch(text):
        return _integer(text)
    if not text or len(text) > LONGEST:
        return None
    if (letter := lettered(text)) is not None:
        return letter
    text = normalize_latex(text)
    if not text or len(text) > 4 * LONGEST or not balanced(text) or _PLACEHOLDER.fullmatch(text):
        return None
    try:
        return FormParser().form(text)
    except (TooHard, RecursionError):
        return None


def _integer(text: str) -> CanonicalForm:
    digits = text.lstrip("+-").replace(",", "").lstrip("0") or "0"
    plain = f"-{digits}" if text[0] == "-" and digits != "0" else digits
    return CanonicalForm(
        plain, FormType.NUMBER, shape="#", values=(complex(float(plain)) if len(plain) < 300 else None,)
    )
