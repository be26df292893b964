r"""Parser of normalized answers into canonical forms: lists, sets, intervals, matrices, equations, units and words.

Longer than 400 lines: these are the rules of one grammar, and they call each other.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from types import MappingProxyType
from typing import Final

from discovery.answers.algebra import NotAnExpression, TooHard, normalize_expression
from discovery.answers.latex import balanced, split_top_level
from discovery.answers.linear import half_line, segment
from discovery.answers.types import CanonicalForm, FormType
from discovery.answers.units import split_unit

MOST_PARTS: Final = 256
"""Maximum distinct parts of one answer."""
SCORES: Final = 100
"""From this number on, `a - b` is a difference and not a score."""
DEEPEST: Final = 24
"""Maximum nesting of the parts of an answer."""

SET: Final = ("\\{", "\\}")
ROW: Final = ("[", "]")
EMPTY: Final = CanonicalForm("\\{\\}", FormType.COLLECTION, shape="\\{\\}")

_PREFIX = re.compile(
    r"""(?P<name>
        (?:\\?[a-zA-Z]+|\\angle\s*[A-Z]{1,3}|m\\angle\s*[A-Z]{1,3}|\\triangle\s*[A-Z]{3}|\\overline\{[A-Z]{2}\}|\|[A-Z]{2}\|)
        (?:_(?:\w|\{\w+\}))?'*(?:\([a-zA-Z0-9,\s]+\))?
    )\s*(?P<relation>:=|=|\\approx|\\equiv|\\in(?![a-z]))\s*(?P<rest>.*\S)""",
    re.VERBOSE | re.DOTALL,
)
_EQUALS = re.compile(r"=")
_APPROXIMATELY = re.compile(r"\\approx")
_COMPARED = re.compile(r"\\le(?![a-z])|\\ge(?![a-z])|<=|>=|<|>")
_EITHER = re.compile(r"\\pm(?![a-z])")
_UNION = re.compile(r"\\cup(?![a-z])")
_LISTED = re.compile(r"\s*[,;]\s*(?:and|or)(?![a-zA-Z])|\s+(?:and|or)\s+|\s*;\s*|\s*,(?!\d{3}(?!\d))\s*|(?<!\d),")
_INTEGERS = re.compile(r"(?!-?\d{1,3}(?:,\d{3})+$)-?(?:0|[1-9]\d*)(?:,-?(?:0|[1-9]\d*))+")
"""Integers without spaces, `2,5,100`, but neither one number, `50,100,200`, nor several that end in `,000`."""
_OR = re.compile(r"\s*,?\s*(?<![a-zA-Z])or(?![a-zA-Z])\s*")
_OPEN_ENDED = re.compile(
    r"(?<![a-zA-Z])or\s+(?:more|less|fewer|greater|higher|lower|larger|smaller|above|below|over|under|later|earlier|so)\b"
)
"""Words that make the number before them a bound or an estimate."""
_WITHOUT = re.compile(
    r"(?:\\mathbb\s*(?:\{\s*R\s*\}|R)|\(\s*-\s*\\infty\s*,\s*\\infty\s*\))\s*"
    r"(?:\\setminus(?![a-z])|\\backslash(?![a-z])|-)\s*\\\{(?P<points>.*)\\\}",
    re.DOTALL,
)
"""The real numbers without some points."""
_AND = re.compile(r"(?<![a-zA-Z])and(?![a-zA-Z])")
_COMMA = re.compile(r"[,;]")
_ROW = re.compile(r"\\\\")
_COLUMN = re.compile(r"&")
_MATRIX = re.compile(r"\\begin\{([pbvV]?matrix|array)\}(?:\{[lcr|]*\})?(?P<body>.*)\\end\{\1\}", re.DOTALL)
_CHOICE = re.compile(
    r"(?:(?:[Oo]ption|[Cc]hoice|[Aa]nswer)\s*:?\s*)?(?:\(?([A-J])[).:]?|\(?([A-J])[).:]\s+(?!and\b|or\b)[^\s,&](?!.*\b[A-J][).:]).*)",
    re.DOTALL,
)
_REALS = re.compile(
    r"\\mathbb\s*(?:\{\s*R\s*\}|R)|(?:the set of )?(?:all )?(?:the )?real numbers|all reals", re.IGNORECASE
)
_BUILDER = re.compile(
    r"\s*(?P<name>[a-zA-Z])\s*(?:\\in\s*\\mathbb\s*(?:\{\s*R\s*\}|R)\s*)?[|:](?P<condition>.*)", re.DOTALL
)
_DATE = re.compile(r"\d{4}([-/.])\d{1,2}\1\d{1,2}|\d{1,2}([-/.])\d{1,2}\2\d{4}|\d{1,2}/\d{1,2}/\d{2}")
_PLAIN = r"\\?[$€£¥]?\d[\d,]*(?:\.\d+)?%?"
_RANGE = re.compile(rf"{_PLAIN}(?:\s*-\s*{_PLAIN})+|{_PLAIN}\s+(?:to|through)\s+{_PLAIN}")
_BASES: Final = MappingProxyType(
    {
        **{"two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9"},
        **{"ten": "10", "eleven": "11", "twelve": "12", "sixteen": "16"},
    }
)
_BASED = re.compile(
    r"(?P<open>\()?(?P<digits>[0-9][0-9A-F]*|[A-F][0-9A-F]+(?=[^0-9A-F].*16|.*sixteen))(?(open)\))"
    rf"(?:_\s*\{{?\s*\(?|\s*\(?\s*base\s*)(?P<base>[0-9]+|{'|'.join(_BASES)})\s*\)?\s*\}}?"
)
_PROSE = re.compile(r"[a-zA-Z]{4,}|[a-zA-Z]{2,}\s+[a-zA-Z]|[a-zA-Z]\s+[a-zA-Z]{2,}")
_MATHEMATICAL = re.compile(
    r"\\[a-zA-Z]+|(?<![a-zA-Z])(?:sqrt|arc(?:sin|cos|tan)|sin|cos|tan|cot|sec|csc|log|ln|exp|pi|infty|oo)(?![a-zA-Z])"
)
_NO_WORDS = re.compile(r"[<>=^|]")
_MARKS = re.compile(r"[^\w\s+\-/%&@#.']")
_NEEDLESS_SPACE = re.compile(r"(?<![0-9]) | (?!\.?[0-9])")
"""A space that does not separate two numbers."""
_BRACKETS: Final = MappingProxyType({"(": ")", "[": "]", "\\{": "\\}", "\\langle": "\\rangle"})
_KNOWN_WORDS: Final = MappingProxyType(
    {
        "dne": "does not exist",
        "no solutions": "no solution",
        "no real solutions": "no real solution",
        "none of these": "none of the above",
        "not possible": "impossible",
    }
)


def lettered(text: str) -> CanonicalForm | None:
    """Return the form of a choice letter: `B`, `(B)`, `B) 17`; None if `text` is not one."""
    match = _CHOICE.fullmatch(text)
    return None if match is None else choice(match[1] or match[2])


def choice(letter: str) -> CanonicalForm:
    """Return the form of a choice letter."""
    return CanonicalForm(letter, FormType.CHOICE, shape=letter)


class FormParser:
    """Parser of one answer. Raises TooHard if an answer takes too many steps."""

    def __init__(self) -> None:
        self._known: dict[str, CanonicalForm] = {}  # forms of parts that have been parsed
        self._depth = 0

    def form(self, text: str) -> CanonicalForm:
        """Return the form of normalized `text`. Raises TooHard if that takes too long."""
        known = self._known.get(text)
        if known is None:
            if len(self._known) >= MOST_PARTS:
                raise TooHard("too many parts")
            self._depth += 1
            if self._depth > DEEPEST:
                raise TooHard("nested too deeply")
            known = self._known[text] = self._read(text)
            self._depth -= 1
        return known

    def _read(self, text: str) -> CanonicalForm:
        if (letter := lettered(text)) is not None:
            return letter
        if (literal := _literal(text)) is not None:
            return literal
        if _REALS.fullmatch(text) is not None:
            return self.form("(-\\infty,\\infty)")
        if (form := self.named(text)) is not None:
            return form
        if (matrix := _MATRIX.fullmatch(text)) is not None:
            return self.matrix(matrix["body"], ("|", "|") if matrix[1] in ("vmatrix", "Vmatrix") else ROW)
        for make in (self.without, self.union, self.listed, self.bracketed, self.compared, self.either_sign):
            if (collection := make(text)) is not None:
                return collection
        return self.single(text)

    def named(self, text: str) -> CanonicalForm | None:
        """Parse `x = …`, `f(x) = …` or `x \\in …` into a value with a name."""
        match = _PREFIX.fullmatch(text)
        if match is None or len(split_top_level(text, _LISTED)) > 1:
            return None
        name, rest = _squeezed(match["name"]).lstrip("\\"), match["rest"]
        if name in ("pi", "e", "i", "infty") or not balanced(rest):
            return None
        steps = split_top_level(rest, _EQUALS)
        if len(steps) > 1:  # x = 2 + 3 = 5 is one value if all sides are equal
            forms = {self.value(step.strip()).text for step in steps}
            if len(forms) > 1:
                return None
            rest = steps[-1].strip()
        form = self.value(rest)
        return None if form.type is FormType.OTHER else replace(form, name=form.name or name)

    def value(self, text: str) -> CanonicalForm:
        """Parse the right side of an equation, where `5-3` is a difference and not a range."""
        form = self.expression(text) if _is_range(text) else None
        return self.form(text) if form is None else form

    def without(self, text: str) -> CanonicalForm | None:
        r"""Parse `\mathbb{R}\setminus\{2\}` as a union of intervals."""
        match = _WITHOUT.fullmatch(text)
        points = [] if match is None else [part.strip() for part in split_top_level(match["points"], _COMMA)]
        if not points or not all(points):
            return None
        known = {form.text: form for form in map(self.form, points)}
        places = {text: form.values[0] for text, form in known.items() if form.exact and form.values}
        if len(places) < len(known) or any(place is None or place.imag for place in places.values()):
            return None
        bounds = ["-\\infty", *sorted(known, key=lambda text: getattr(places[text], "real", 0.0)), "\\infty"]
        return self.form("\\cup".join(f"({low},{high})" for low, high in pairwise(bounds)))

    def union(self, text: str) -> CanonicalForm | None:
        parts = split_top_level(text, _UNION)
        return _unordered([self.form(part.strip()) for part in parts], "\\cup ") if len(parts) > 1 else None

    def listed(self, text: str) -> CanonicalForm | None:
        """Parse several answers in any order; `x=1, y=2` are sorted by name."""
        separator = _LISTED if _INTEGERS.fullmatch(text) is None else _COMMA
        parts = [part.strip() for part in split_top_level(text, separator)]
        if len(parts) < 2 or not all(parts) or _OPEN_ENDED.search(text):
            return None
        forms = [self.form(part) for part in parts]
        if any(
            form.type in (FormType.WORDS, FormType.OTHER) and " " in part
            for form, part in zip(forms, parts, strict=True)
        ):
            return None  # a sentence
        names = [form.name for form in forms]
        if (
            len(set(names)) == 1
            and all(form.is_interval for form in forms)
            and len(split_top_level(text, _OR)) == len(parts)
        ):
            return replace(_unordered(forms, "\\cup "), name=names[0])  # x < 1 or x > 2
        units = {form.unit for form in forms}
        if len(units) > 1 and "" not in units and _AND.search(text):
            return None  # 1 hour and 30 minutes is one answer in parts
        if all(names) and len(set(names)) == len(names):
            return _collect(sorted(forms, key=lambda form: form.name), ",", ("", ""), named=True)
        return _unordered(forms, ",", SET)

    def bracketed(self, text: str) -> CanonicalForm | None:
        opening = next((bracket for bracket in _BRACKETS if text.startswith(bracket)), None)
        if opening is None:
            return None
        closing = next((bracket for bracket in _BRACKETS.values() if text.endswith(bracket)), None)
        if closing is None:
            return None
        inner = text[len(opening) : -len(closing)].strip()
        if len(text) < len(opening) + len(closing) or not balanced(inner):
            return None
        parts = [part.strip() for part in split_top_level(inner, _COMMA)]
        is_set = opening == "\\{" and closing == "\\}"
        if len(parts) == 1:
            if opening in ("[", "\\langle") or (opening == "\\{") != (closing == "\\}"):
                return None
            if not inner:
                return EMPTY
            if is_set and re.search(r"[|:]", inner):
                return self.described(inner)
            return self.form(inner)
        if not all(parts):
            return None
        forms = [self.form(part) for part in parts]
        if is_set:
            return _unordered(forms, ",", SET)
        ends = "(" if opening == "\\langle" else opening, ")" if closing == "\\rangle" else closing
        return _collect(forms, ",", ends)

    def described(self, text: str) -> CanonicalForm | None:
        """Parse the content of the braces of `{x | x > 2}`."""
        match = _BUILDER.fullmatch(text)
        if match is None:
            return None
        form = self.form(match["condition"].strip())
        return replace(form, name="") if form.is_interval and form.name == match["name"] else None

    def compared(self, text: str) -> CanonicalForm | None:
        r"""Parse `1 \le x < 2` as the interval [1, 2)."""
        parts = [part.strip() for part in split_top_level(text, _COMPARED)]
        if len(parts) not in (2, 3) or not all(parts):
            return None
        signs = [match[0] for match in _COMPARED.finditer(text)]
        if len(signs) != len(parts) - 1:
            return None
        up = [sign in ("<", "<=", "\\le") for sign in signs]
        loose = ["e" in sign or "=" in sign for sign in signs]
        bounded = None
        if len(parts) == 2:
            bounded = half_line(parts[0], parts[1], up[0], loose[0])
        elif up[0] == up[1]:
            bounded = segment(parts, up[0], loose)
        if bounded is None:
            return None
        forms = [self.form(bound) for bound in bounded.bounds]
        if any(form.type not in (FormType.NUMBER, FormType.EXPRESSION, FormType.CHOICE) for form in forms):
            return None
        ends = "[" if bounded.closed[0] else "(", "]" if bounded.closed[1] else ")"
        return replace(_collect(forms, ",", ends), name=bounded.variable.lstrip("\\"))

    def either_sign(self, text: str) -> CanonicalForm | None:
        if len(_EITHER.findall(text)) != 1 or "\\mp" in text:
            return None
        return _unordered([self.single(_EITHER.sub(sign, text)) for sign in "+-"], ",", SET)

    def matrix(self, body: str, ends: tuple[str, str]) -> CanonicalForm:
        rows = [
            [cell.strip() for cell in split_top_level(row, _COLUMN)]
            for row in split_top_level(body.strip(), _ROW)
            if row.strip()
        ]
        return _collect([_collect([self.form(cell) for cell in row], ",", ROW) for row in rows], ",", ends)

    def single(self, text: str) -> CanonicalForm:
        """Parse one expression with or without a unit, an equation, or words."""
        exactly = split_top_level(text, _APPROXIMATELY)
        if len(exactly) > 1 and exactly[0].strip():
            return self.form(exactly[0].strip())
        body, unit = split_unit(text)
        if _is_range(body.strip()):
            return replace(_range(body.strip()), unit=unit)
        if unit or body != text:
            form = self.expression(body.strip())
            if form is not None:
                return replace(form, unit=unit)
        form = self.expression(text)
        if form is not None:
            return form
        return self.equation(text) or _words(text)

    def expression(self, text: str) -> CanonicalForm | None:
        if _is_prose(text) or _is_word(text):
            return None
        try:
            spelled = normalize_expression(text)
        except (NotAnExpression, TooHard):
            return None
        number = spelled.exact and spelled.text.replace("/", "").lstrip("-").isdigit()
        sort = (
            FormType.NUMBER if number else FormType.CHOICE if _CHOICE.fullmatch(spelled.text) else FormType.EXPRESSION
        )
        shape = spelled.text if sort is FormType.CHOICE else "#"
        return CanonicalForm(
            spelled.text,
            sort,
            exact=spelled.exact,
            shape=shape,
            values=() if sort is FormType.CHOICE else (spelled.value,),
        )

    def equation(self, text: str) -> CanonicalForm | None:
        """Parse an equation of variables, with all terms on one side. A true equation of numbers is its last side.

        Of the two signs of an equation, the one whose text sorts first is used. `12 + 15 = 27` is 27.
        """
        sides = [side.strip() for side in split_top_level(text, _EQUALS)]
        if len(sides) < 2 or not all(sides) or _is_prose(text):
            return None
        try:
            values = [normalize_expression(side) for side in sides]
            if all(value.text == values[0].text for value in values):
                return self.expression(sides[-1])
            if len(sides) > 2:
                return None
            left, right = (normalize_expression(f"({a})-({b})") for a, b in (sides, sides[::-1]))
        except (NotAnExpression, TooHard):
            return None
        spelled = min(left, right)
        if spelled.exact and not any(char.isalpha() for char in spelled.text):
            return None  # 2 = 3
        return CanonicalForm(
            f"{spelled.text}=0", FormType.EXPRESSION, exact=False, shape="#=0", values=(spelled.value,)
        )


def _literal(text: str) -> CanonicalForm | None:
    """Parse a literal that looks like an expression: a date or a numeral in another base."""
    if _DATE.fullmatch(text):
        date = re.sub(r"(?<!\d)0+(?=\d)", "", text)
        return CanonicalForm(date, FormType.WORDS, shape=date)
    if (match := _BASED.fullmatch(text)) is not None:
        base = int(_BASES.get(match["base"], match["base"])) if len(match["base"]) < 8 else 0
        if 2 <= base <= 16 and all(int(digit, 16) < base for digit in match["digits"]):
            numeral = f"{match['digits'].lstrip('0') or '0'}_{base}"
            return CanonicalForm(numeral, FormType.EXPRESSION, shape="base")
    return None


def _is_range(text: str) -> bool:
    """Return whether text like `5-10` is a range or a score.

    `1911 - 648`, with spaces and decreasing from a large number, is a difference that was not computed.
    """
    if _RANGE.fullmatch(text) is None:
        return False
    terms = text.split(" - ") if "-" not in text.replace(" - ", "") and " to " not in text else []
    parts = [float(re.sub(r"[^\d.]", "", term)) for term in terms]
    return len(parts) < 2 or parts[0] < SCORES or parts[0] <= parts[1]


def _range(text: str) -> CanonicalForm:
    """Return the form of a range, score or record such as `5-10`, which is not a difference."""
    plain = "-".join(part.strip() for part in re.split(r"\s*-\s*|\s+(?:to|through)\s+", text))
    plain = plain.replace("\\", "").replace(",", "")
    return CanonicalForm(plain, FormType.WORDS, shape=plain)


def _unordered(forms: Sequence[CanonicalForm], separator: str, ends: tuple[str, str] = ("", "")) -> CanonicalForm:
    """Combine the distinct forms into one that does not depend on their order."""
    distinct = sorted({form.text: form for form in forms}.values(), key=lambda form: (form.shape, form.text))
    if len(distinct) == 1:
        return distinct[0]
    form = _collect(distinct, separator, ends)
    in_order = sorted(form.values, key=lambda value: (0.0, 0.0) if value is None else (value.real, value.imag))
    return replace(form, values=tuple(in_order))


def _collect(
    forms: Sequence[CanonicalForm], separator: str, ends: tuple[str, str], *, named: bool = False
) -> CanonicalForm:
    """Combine several forms into one; their units become its unit."""
    units = {form.unit for form in forms}
    texts = [f"{form.name}={form.text}" if named else form.text for form in forms]
    return CanonicalForm(
        separator.join(texts).join(ends),
        FormType.COLLECTION,
        unit=units.pop() if len(units) == 1 else ",".join(form.unit for form in forms),
        exact=all(form.exact for form in forms),
        shape=separator.join(f"{form.name}={form.shape}" if named else form.shape for form in forms).join(ends),
        values=tuple(value for form in forms for value in form.values),
    )


def _is_prose(text: str) -> bool:
    return _PROSE.search(_MATHEMATICAL.sub(" 0 ", text)) is not None


def _is_word(text: str) -> bool:
    return len(text) > 1 and text.isalpha() and text not in ("pi", "oo")


def _words(text: str) -> CanonicalForm:
    if "\\" not in text and not _NO_WORDS.search(text) and any(char.isalpha() for char in text):
        letters = (
            text if text.isupper() and len(text) <= 4 and text.casefold() not in ("yes", "no") else text.casefold()
        )
        plain = " ".join(_MARKS.sub(" ", letters).split()).strip(".- ")
        plain = re.sub(r"^(?:the|an?) (?=\S)", "", plain)
        if plain:
            plain = _KNOWN_WORDS.get(plain, plain)
            return CanonicalForm(plain, FormType.WORDS, shape=plain)
    squeezed = _squeezed(text)
    return EMPTY if squeezed == "\\emptyset" else CanonicalForm(squeezed, FormType.OTHER, exact=False)


def _squeezed(text: str) -> str:
    """Remove white space, but keep a space between two numbers: `2 3` is not 23."""
    return _NEEDLESS_SPACE.sub("", " ".join(text.split()))
