r"""Text → canonical answer: two texts that give the same string here have given the same answer.

Reads the forms models are asked for: `\boxed{…}`, a choice of A to J, a number. What cannot be read is None, which
never votes. Replay regrades recordings with this, the proxy reads probes and replies with it, so neither can drift.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from enum import StrEnum


class Kind(StrEnum):
    """How an answer is found in a text."""

    AUTO = "auto"  # boxed, else a stated choice, else a stated number
    BOXED = "boxed"
    CHOICE = "choice"
    NUMBER = "number"


_LEAD = r"(?:final\s+)?answer\s*(?:is|:|=)\s*"
_CHOICE = re.compile(rf"(?i:{_LEAD})(?:\\boxed\{{)?\**\(?([A-J])\)?(?![A-Za-z0-9']|\s+[a-z])")
_LONE_CHOICE = re.compile(r"^\W*\(?([A-J])\)?\W*$")
_DIGITS = r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?"
_STATED_NUMBER = re.compile(rf"(?i:{_LEAD})\**\$?\s*({_DIGITS})")
_NUMBER = re.compile(rf"(?<![\w.]){_DIGITS}(?![\w])")
_BRACE = re.compile(r"\\boxed\{|\\[{}]|[{}]")
_NOISE = re.compile(r"\\left|\\right|\\[,;!: ]|\\q?quad|\s|(?<=\d),(?=\d{3}(?:\D|$))")
_WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\{([^{}]*)\}")


def read(text: str, kind: Kind = Kind.AUTO) -> str | None:
    """The canonical form of the answer `text` ends up giving, or None."""
    if kind is Kind.BOXED:
        return canonical(boxed(text))
    if kind is Kind.CHOICE:
        return _choice(boxed(text) or "") or _choice(text)
    if kind is Kind.NUMBER:
        return _number(boxed(text) or "") or _number(text)
    inner = boxed(text)
    if inner is not None:
        return canonical(inner)
    return _last(_CHOICE, text) or _plain_number(_last(_STATED_NUMBER, text))


def boxed(text: str) -> str | None:
    r"""What the last complete `\boxed{…}` of `text` holds, braces balanced; None if there is none."""
    opened: list[int] = []  # where the content of each open brace starts; negative if the brace is no box's
    last: tuple[int, int] | None = None
    for token in _BRACE.finditer(text):
        if token[0] == "}":
            begin = opened.pop() if opened else -1
            if begin >= 0 and (last is None or begin > last[0]):
                last = begin, token.start()
        elif not token[0].startswith("\\") or token[0] == "\\boxed{":
            opened.append(token.end() if token[0] == "\\boxed{" else -1)
    return None if last is None else text[slice(*last)]


def canonical(inner: str | None) -> str | None:
    """One spelling for an expression: LaTeX's spacing and wrappers gone, numbers in plain digits."""
    if inner is None:
        return None
    inner = _WRAPPED.sub(r"\1", inner.strip().strip("$"))
    inner = inner.replace("dfrac", "frac").replace("tfrac", "frac")
    inner = _NOISE.sub("", inner).rstrip(".")
    return _plain_number(inner) or inner or None


def _plain_number(text: str | None) -> str | None:
    """`007`, `7.0`, `+7` and `7` are all `7`; None if `text` is no decimal number."""
    if text is None or not re.fullmatch(_DIGITS, text):
        return None
    try:
        number = Decimal(text.replace(",", ""))
    except InvalidOperation:  # pragma: no cover - the pattern admits only decimals
        return None
    plain = f"{number:f}"
    if "." in plain:
        plain = plain.rstrip("0").rstrip(".")
    return "0" if plain in ("-0", "") else plain


def _choice(text: str) -> str | None:
    lone = _LONE_CHOICE.match(text)
    return lone[1] if lone else _last(_CHOICE, text)


def _number(text: str) -> str | None:
    return _plain_number(_last(_STATED_NUMBER, text)) or _plain_number(_last(_NUMBER, text))


def _last(pattern: re.Pattern[str], text: str) -> str | None:
    """What the last match of `pattern` captures, or matches if it captures nothing."""
    match = None
    for match in pattern.finditer(text):  # noqa: B007 - only the last one is wanted
        pass
    return None if match is None else match[match.lastindex or 0]
