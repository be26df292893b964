r"""What was written as an answer → its canonical form: two that have the same form are the same answer.

A form has a text (numbers, expressions, tuples, sets, intervals, words, each in one spelling) and, apart from it,
what an answer may be given with or without: the variable it is the value of (`x=5`) and its unit (`5 cm`, `5°`,
`5%`). `5 cm` and `5` may be one answer, `5` and `5 m` too, but `5 cm` and `5 m` never are: no one spelling can tell
that, so it is settled where labels are given out (`labels.py`).
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
"""Characters of an answer; nobody votes on what is longer."""

_INTEGER = re.compile(r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)")
_PLACEHOLDER = re.compile(
    r"\[?(?:err(?:or)?|nan|null|n/a|unknown|tbd|todo|(?:(?:the|your|final|boxed|correct|insert)\s+)*answer(?:\s+here)?|"
    r"box|boxed|result|placeholder|blank|(?:[^\w{}]|_)*)\]?",
    re.IGNORECASE,
)


@lru_cache(maxsize=16_384)
def canonical(written: str) -> CanonicalForm | None:
    r"""The form of what stands in a `\boxed{}` or was stated as the answer; None if it cannot be read as one.

    Takes milliseconds at most: the text's length, the depth of its brackets and the number of its parts are bounded.
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
