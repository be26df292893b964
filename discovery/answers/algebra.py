r"""Expressions brought to one spelling: sums of rational multiples of products of powers.

`14+4\sqrt{37}`, `4\sqrt{37}+14` and `\sqrt{592}+14` are all `14+4*sqrt(37)`. What is a number, a surd, π, e, i, a
variable or a power or product of these comes out *exact*: two exact spellings that differ are two values. Functions,
powers of sums and the like are carried along as they stand, and whether two of those are equal is another's business.

Everything is bounded: what would take long or grow large raises TooHard, and what is no expression NoExpression.
"""

from __future__ import annotations

import cmath
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from types import MappingProxyType
from typing import Final, NamedTuple
from zlib import crc32

MOST_BITS: Final = 4096
"""Numbers of more bits are not multiplied out."""
MOST_TERMS: Final = 64
MOST_DEPTH: Final = 24
MOST_TOKENS: Final = 400
MOST_DIVIDED: Final = 10_000
"""Larger factors of a number are not looked for."""

Number = int | Fraction
Monomial = tuple[tuple[str, Number], ...]  # atoms by name with their exponents, sorted; () is the constant
Sum = Mapping[Monomial, Number]  # coefficient of each monomial, none of them 0

ONE: Final[Monomial] = ()


class NotAnExpression(Exception):
    """The text is not an expression."""


class TooHard(Exception):
    """The text is an expression that would take too long, or grow too large, to bring to one spelling."""


class Expression(NamedTuple):
    """An expression's one spelling."""

    text: str
    exact: bool  # no other spelling has the same value
    value: complex | None  # at fixed values of its variables; None where it cannot be said


_TOKEN = re.compile(
    r"""\s*(?:
      (?P<number>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+\.?\d*(?:[eE][-+]?\d+(?![a-zA-Z]))?|\.\d+)
    | (?P<command>\\[a-zA-Z]+|\\.)
    | (?P<name>[a-zA-Z]+)
    | (?P<sign>.)
    )""",
    re.VERBOSE,
)
_FUNCTIONS: Final[Mapping[str, Callable[[complex], complex]]] = MappingProxyType(
    {
        "sin": cmath.sin,
        "cos": cmath.cos,
        "tan": cmath.tan,
        "cot": lambda x: 1 / cmath.tan(x),
        "sec": lambda x: 1 / cmath.cos(x),
        "csc": lambda x: 1 / cmath.sin(x),
        "arcsin": cmath.asin,
        "arccos": cmath.acos,
        "arctan": cmath.atan,
        "sinh": cmath.sinh,
        "cosh": cmath.cosh,
        "tanh": cmath.tanh,
        "ln": cmath.log,
        "log": cmath.log,
        "lg": cmath.log10,
        "exp": cmath.exp,
    }
)
_GREEK: Final = frozenset(
    [
        "alpha",
        "beta",
        "gamma",
        "delta",
        "epsilon",
        "varepsilon",
        "zeta",
        "eta",
        "theta",
        "vartheta",
        "iota",
        "kappa",
        "lambda",
        "mu",
        "nu",
        "xi",
        "rho",
        "sigma",
        "tau",
        "upsilon",
        "phi",
        "varphi",
        "chi",
        "psi",
        "omega",
        "Gamma",
        "Delta",
        "Theta",
        "Lambda",
        "Xi",
        "Sigma",
        "Upsilon",
        "Phi",
        "Psi",
        "Omega",
        "ell",
        "hbar",
    ]
)
_CONSTANTS: Final[Mapping[str, complex]] = MappingProxyType({"pi": math.pi, "e": math.e, "i": 1j})
_TIMES: Final = frozenset(("*", "\\cdot", "\\times", "\\ast"))
_OVER: Final = frozenset(("/", "\\div"))
_OPEN: Final = MappingProxyType({"(": ")", "[": "]", "{": "}", "\\{": "\\}"})


@lru_cache(maxsize=8192)
def normalize_expression(text: str) -> Expression:
    """The one spelling of `text`, LaTeX or plain. Raises NoExpression or TooHard."""
    parser = ExpressionParser(text)
    try:
        return parser.to_expression(parser.whole())
    except (OverflowError, RecursionError):
        raise TooHard(text) from None


@dataclass(slots=True)
class _Token:
    kind: str
    text: str
    tight: bool  # no space before it


class ExpressionParser:
    """One text, read by recursive descent straight into a Sum."""

    def __init__(self, text: str) -> None:
        self.tokens: list[_Token] = []
        for match in _TOKEN.finditer(text.strip()):
            kind = match.lastgroup
            if kind is not None:
                self.tokens.append(_Token(kind, match[kind], match.start() == match.start(kind)))
        if len(self.tokens) > MOST_TOKENS:
            raise TooHard(text)
        self.at = 0
        self.depth = 0
        self.inside = 0  # function arguments open
        self.values: dict[str, complex | None] = {}  # of atoms that are no name, surd or constant

    # Reading

    def whole(self) -> Sum:
        found = self.sum()
        if self.at < len(self.tokens):
            raise NotAnExpression(self.tokens[self.at].text)
        return found

    def peek(self, ahead: int = 0) -> str:
        at = self.at + ahead
        return self.tokens[at].text if at < len(self.tokens) else ""

    def take(self, wanted: str = "") -> _Token:
        if self.at >= len(self.tokens):
            raise NotAnExpression("it ends too early")
        token = self.tokens[self.at]
        if wanted and token.text != wanted:
            raise NotAnExpression(f"{token.text} where {wanted} should be")
        self.at += 1
        return token

    def sum(self) -> Sum:
        self.depth += 1
        if self.depth > MOST_DEPTH:
            raise TooHard("nested too deep")
        total: Sum | None = None
        while True:
            sign = 1
            while self.peek() in ("+", "-"):
                sign = -sign if self.take().text == "-" else sign
            term = self.product()
            if sign < 0:
                term = {monomial: -factor for monomial, factor in term.items()}
            total = term if total is None else _add(total, term)
            if self.peek() not in ("+", "-"):
                self.depth -= 1
                return total

    def product(self) -> Sum:
        total = self.power()
        while self.at < len(self.tokens):
            text = self.tokens[self.at].text
            if text in _TIMES:
                self.at += 1
                total = self.times(total, self.signed())
            elif text in _OVER:
                self.at += 1
                total = self.times(total, self.raised(self.signed(), {ONE: -1}))
            elif self.starts_factor():
                total = self.times(total, self.power())
            else:
                return total
        return total

    def starts_factor(self) -> bool:
        """Whether what follows can stand beside a factor without a sign between: `2x`, but not `2 3`."""
        token = self.tokens[self.at]
        if token.kind == "number":
            return self.tokens[self.at - 1].text in (")", "}", "]")
        if token.kind == "sign":
            return token.text in ("(", "[", "{")
        return token.text not in ("\\}", "\\pm", "\\mp", "\\to", "\\rvert", "\\vert") and token.text not in (",", "\\%")

    def signed(self) -> Sum:
        if self.peek() in ("+", "-"):
            sign = self.take().text
            term = self.signed()
            return term if sign == "+" else _scale(term, -1)
        return self.power()

    def power(self) -> Sum:
        token = self.tokens[self.at] if self.at < len(self.tokens) else None
        base = self.base()
        if token is not None and token.kind == "number" and self.is_mixed(token):
            self.depth += 1
            base = _add(base, self.base())
            self.depth -= 1
        while self.at < len(self.tokens):
            text = self.tokens[self.at].text
            if text == "^":
                self.at += 1
                if self.peek() in ("\\circ", "\\degree"):
                    base = self.degrees(base)
                elif self.peek() == "{" and self.peek(1) == "\\circ" and self.peek(2) == "}":
                    self.at += 2
                    base = self.degrees(base)
                else:
                    base = self.raised(base, self.exponent())
            elif text == "!":
                self.at += 1
                base = self.factorial(base)
            elif text in ("°", "\\degree"):
                base = self.degrees(base)
            else:
                return base
        return base

    def is_mixed(self, token: _Token) -> bool:
        r"""`3\frac{1}{2}` is three and a half, as is `3 1/2`; `3\frac{x}{2}` and `3\frac{5}{2}` are products."""
        if not token.text.isdigit() or (self.at < 2 and self.at != 1):
            return False
        rest = self.tokens[self.at : self.at + 7]
        texts = [one.text for one in rest]
        if len(texts) >= 2 and texts[0] == "\\frac" and rest[1].kind == "number":  # \frac34
            over, under = texts[1][:1], texts[1][1:]
        elif len(texts) >= 7 and texts[0] == "\\frac" and texts[1] == texts[4] == "{" and texts[3] == texts[6] == "}":
            over, under = texts[2], texts[5]
        elif len(texts) >= 3 and rest[0].kind == "number" and not rest[0].tight and texts[1] == "/":
            over, under = texts[0], texts[2]
            if over.isdigit() and under.isdigit() and int(over) < int(under):
                self.tokens[self.at : self.at + 3] = [
                    _Token("command", "\\frac", False),
                    *(
                        _Token("sign" if one in "{}" else "number", one, True)
                        for one in ("{", over, "}", "{", under, "}")
                    ),
                ]
                return True
            return False
        else:
            return False
        return over.isdigit() and under.isdigit() and int(over) < int(under)

    def degrees(self, angle: Sum) -> Sum:
        """In a function's argument an angle in degrees is meant as one; elsewhere the sign is only a unit."""
        self.take()
        return self.times(angle, {(("pi", 1),): Fraction(1, 180)}) if self.inside else angle

    def exponent(self) -> Sum:
        if self.peek() in ("+", "-"):
            sign = self.take().text
            return _scale(self.exponent(), -1 if sign == "-" else 1)
        token = self.take()
        if token.kind == "number" and token.tight and len(token.text) > 1 and self.tokens[self.at - 2].text == "^":
            return {ONE: _number(token.text)}  # 2^10, as people type it
        self.at -= 1
        base = self.base()
        if self.peek() == "^":
            self.at += 1
            base = self.raised(base, self.exponent())
        return base

    def base(self) -> Sum:
        token = self.take()
        kind, text = token.kind, token.text
        if kind == "number":
            return _constant(_number(text))
        if kind == "sign":
            return self.bracketed(text)
        name = text.removeprefix("\\")
        if name in ("frac", "dfrac", "tfrac", "cfrac"):
            over = self.argument()
            return self.times(over, self.raised(self.argument(), {ONE: -1}))
        if name == "sqrt":
            return self.root()
        if name in ("binom", "dbinom", "tbinom"):
            return self.choose(self.argument(), self.argument())
        if name in _FUNCTIONS:
            return self.function(name)
        if text in ("\\lvert", "\\vert"):
            return self.bracketed("|", "\\rvert" if text == "\\lvert" else None)
        if name in ("pi", "infty", "oo") or (kind == "command" and name in _GREEK):
            return self.symbol(name)
        if kind == "name":
            return self.letters(token)
        raise NotAnExpression(text)

    def bracketed(self, text: str, close: str | None = None) -> Sum:
        if text == "√":
            return self.raised(self.base(), {ONE: Fraction(1, 2)})
        if text == "|":
            inner = self.sum()
            self.take(close or ("\\vert" if self.peek() == "\\vert" else "|"))
            return self.absolute(inner)
        if text not in _OPEN:
            raise NotAnExpression(text)
        inner = self.sum()
        self.take(_OPEN[text])
        return inner

    def argument(self) -> Sum:
        r"""What `\frac` and its like take: a group, or one digit, letter or command."""
        if self.peek() == "{":
            return self.base()
        token = self.take()
        if token.kind == "number" and token.text.isdigit():
            if len(token.text) > 1:  # \frac12
                self.at -= 1
                self.tokens[self.at] = _Token("number", token.text[1:], True)
            return {ONE: int(token.text[0])} if token.text[0] != "0" else {}
        self.at -= 1
        return self.base()

    def root(self) -> Sum:
        degree: Sum = {ONE: 2}
        if self.peek() == "[":
            self.take()
            degree = self.sum()
            self.take("]")
        inner = self.base() if self.peek() in ("(", "{") else self.argument()
        return self.raised(inner, self.raised(degree, {ONE: -1}))

    def function(self, name: str) -> Sum:
        exponent: Sum | None = None
        base: Sum | None = None
        while self.peek() in ("^", "_"):
            if self.take().text == "^":
                exponent = self.exponent()
            else:
                base = self.argument()
        self.inside += 1
        inner = self.base() if self.peek() in ("(", "{", "[") else self.run()
        self.inside -= 1
        if exponent == {ONE: -1}:
            name, exponent = f"arc{name}", None
            if name not in _FUNCTIONS:
                raise NotAnExpression(name)
        if name == "exp":
            return self.raised({(("e", 1),): 1}, inner)
        if base is None and (known := _at_nice_angle(name, inner)) is not None:
            return known if exponent is None else self.raised(known, exponent)
        argument = self.to_expression(inner)
        of = None if base is None else self.to_expression(base)
        value = self.apply(_FUNCTIONS[name], argument.value)
        if of is not None:
            below = self.apply(cmath.log, of.value)
            value = None if value is None or not below else value / below
        called = "ln" if name == "log" and of is not None and of.text == "e" else name
        spelled = (
            f"{called}({argument.text})" if of is None or called == "ln" else f"{name}_{{{of.text}}}({argument.text})"
        )
        found = self.atom(spelled, value)
        return found if exponent is None else self.raised(found, exponent)

    def run(self) -> Sum:
        r"""The argument of a function without brackets: `\sin 2x`."""
        total = self.power()
        while self.at < len(self.tokens) and self.starts_factor() and self.peek().removeprefix("\\") not in _FUNCTIONS:
            total = self.times(total, self.power())
        return total

    def apply(self, function: Callable[[complex], complex], value: complex | None) -> complex | None:
        try:
            return None if value is None else function(value)
        except (ValueError, ZeroDivisionError, OverflowError):
            return None

    def letters(self, token: _Token) -> Sum:
        """Letters side by side are a product of variables, each of which may have an index; long runs are words."""
        if len(token.text) > 3:
            raise NotAnExpression(token.text)
        name, rest = token.text[0], token.text[1:]
        if rest:
            self.tokens.insert(self.at, _Token("name", rest, True))
            return self.symbol(name)
        if self.peek() == "_":
            self.take()
            if self.peek() == "{":
                self.take()
                index = ""
                while self.peek() != "}":
                    index += self.take().text
                self.take()
            else:
                index = self.take().text
            if not index.isalnum():
                raise NotAnExpression(index)
            name = f"{name}_{index}" if len(index) == 1 else f"{name}_{{{index}}}"
        if self.peek() == "'":
            raise NotAnExpression("a prime")
        return self.symbol(name)

    def symbol(self, name: str) -> Sum:
        if name in ("infty", "oo"):
            self.values["oo"] = None
            return {(("oo", 1),): 1}
        return {((name if name in _CONSTANTS or len(name.partition("_")[0]) == 1 else f"\\{name}", 1),): 1}

    # Reckoning

    def times(self, one: Sum, other: Sum) -> Sum:
        if len(one) * len(other) > MOST_TERMS * 4:
            raise TooHard("too many terms")
        total: dict[Monomial, Number] = {}
        for left, a in one.items():
            for right, b in other.items():
                monomial, factor = (left or right, 1) if not left or not right else _join(left, right)
                total[monomial] = total.get(monomial, 0) + _small(a * b * factor)
        return _tidy(total)

    def raised(self, base: Sum, exponent: Sum) -> Sum:
        if not exponent:
            return {ONE: 1}
        if set(exponent) != {ONE}:
            return self.symbolic_power(base, exponent)
        power = exponent[ONE]
        if not base:
            if power < 0:
                raise NotAnExpression("a division by zero")
            return {}
        if power == 1:
            return base
        if len(base) == 1:
            ((monomial, factor),) = base.items()
            return self.monomial_power(monomial, factor, power)
        if isinstance(power, int) and power > 0 and len(base) ** power <= MOST_TERMS:
            total = base
            for _ in range(power - 1):
                total = self.times(total, base)
            return total
        if power == -1 and len(base) == 2 and (conjugated := self.by_conjugate(base)) is not None:
            return conjugated
        return self.opaque_power(base, power)

    def monomial_power(self, monomial: Monomial, factor: Number, power: Number) -> Sum:
        if isinstance(power, int):
            bits = max(factor.numerator.bit_length(), factor.denominator.bit_length())
            if bits * abs(power) > MOST_BITS and abs(factor) != 1:
                return self.opaque_power({monomial: factor}, power)
            raised, extra = _raise(monomial, power)
            return {raised: _ratio(_power(factor, power) * extra)}
        if abs(power) > MOST_BITS or power.denominator > 64:
            raise TooHard("an exponent")
        if factor < 0 and power.denominator != 2:
            return self.opaque_power({monomial: factor}, power)
        if any(not _positive(name) for name, _ in monomial):
            return self.opaque_power({monomial: factor}, power)
        total: Sum = {ONE: 1}
        if factor < 0:
            turned, sign = _raise((("i", 1),), power.numerator)
            total = {turned: sign}
        total = self.times(total, self.surd(factor if factor > 0 else -factor, Fraction(power)))
        raised, extra = _raise(monomial, power)
        return self.times(total, {raised: extra})

    def surd(self, number: Number, power: Fraction) -> Sum:
        """A positive rational to a fractional power, its squares taken out."""
        whole: Number = 1
        parts: dict[str, Number] = {}
        for integer, sign in ((number.numerator, 1), (number.denominator, -1)):
            for prime, count in _factor(integer):
                exponent = power * count * sign
                outside = math.floor(exponent)
                if abs(outside) * prime.bit_length() > MOST_BITS:
                    raise TooHard("a power")
                whole = _ratio(whole * _power(prime, outside))
                if exponent != outside:
                    parts[str(prime)] = exponent - outside
        return {tuple(sorted(parts.items())): whole}

    def by_conjugate(self, base: Sum) -> Sum | None:
        """1 / (a + b) = (a - b) / (a² - b²), if the squares are rational."""
        (first, a), (second, b) = base.items()
        squares = [self.times({m: f}, {m: f}) for m, f in ((first, a), (second, b))]
        if any(set(square) != {ONE} for square in squares):
            return None
        norm = squares[0][ONE] - squares[1][ONE]
        return None if norm == 0 else {first: _ratio(Fraction(a) / norm), second: _ratio(Fraction(-b) / norm)}

    def opaque_power(self, base: Sum, power: Number) -> Sum:
        """A power that stays as it is, but for a rational factor that comes out."""
        content: Number = 1
        if len(base) > 1:
            content = _content(base)
            if type(power) is int and base[min(base)] < 0:
                content = -content
            base = {monomial: _ratio(Fraction(factor) / content) for monomial, factor in base.items()}
        inner = self.to_expression(base)
        value = None
        if inner.value is not None and (inner.value or power > 0):
            value = self.apply(lambda x: x ** float(power), inner.value)
        found = self.atom(f"({inner.text})", inner.value, power, value)
        return found if content == 1 else self.times(self.monomial_power(ONE, content, power), found)

    def symbolic_power(self, base: Sum, exponent: Sum) -> Sum:
        rest = dict(exponent)
        whole = rest.pop(ONE, 0)
        if type(whole) is not int or len(base) != 1 or set(base) != {ONE}:
            rest, whole = dict(exponent), 0
        below, above = self.to_expression(base), self.to_expression(rest)
        value = None
        if below.value is not None and above.value is not None:
            value = self.apply(lambda x: x**above.value if above.value is not None else x, below.value)
        left = below.text if below.text.isalnum() else f"({below.text})"
        found = self.atom(f"{left}^({above.text})", value)
        return self.times(self.raised(base, {ONE: whole}), found) if whole else found

    def factorial(self, of: Sum) -> Sum:
        number = of.get(ONE, 0)
        if (not of or set(of) == {ONE}) and type(number) is int and 0 <= number <= 300:
            return {ONE: math.factorial(number)}
        inner = self.to_expression(of)
        return self.atom(f"({inner.text})!", None)

    def choose(self, of: Sum, chosen: Sum) -> Sum:
        numbers = [one.get(ONE, 0) for one in (of, chosen) if not one or set(one) == {ONE}]
        if len(numbers) == 2 and all(type(n) is int and 0 <= n <= 1000 for n in numbers):
            return _constant(_small(math.comb(int(numbers[0]), int(numbers[1]))))
        return self.atom(f"\\binom{{{self.to_expression(of).text}}}{{{self.to_expression(chosen).text}}}", None)

    def absolute(self, inner: Sum) -> Sum:
        found = self.to_expression(inner)
        if found.value is not None and found.value.imag == 0 and not _variables(inner) and not self.values:
            return inner if found.value.real >= 0 else _scale(inner, -1)
        return self.atom(f"|{found.text}|", None if found.value is None else abs(found.value))

    def atom(self, text: str, value: complex | None, power: Number = 1, raised: complex | None = None) -> Sum:
        """What cannot be taken apart further."""
        self.values[text] = value
        return {((text, power),): 1}

    # Spelling

    def to_expression(self, found: Sum) -> Expression:
        if not found:
            return Expression("0", True, 0j)
        if len(found) > MOST_TERMS:
            raise TooHard("too many terms")
        parts: list[str] = []
        for monomial in sorted(found):
            part = _spell(monomial, found[monomial])
            parts.append(part if not parts or part.startswith("-") else f"+{part}")
        exact = not any(name in self.values for monomial in found for name, _ in monomial)
        return Expression("".join(parts), exact, self.evaluate(found))

    def evaluate(self, found: Sum) -> complex | None:
        total = 0j
        try:
            for monomial, factor in found.items():
                term = complex(float(factor))
                for name, power in monomial:
                    value = self.values[name] if name in self.values else _value(name)
                    if value is None:
                        return None
                    term *= value ** (power if type(power) is int else float(power))
                total += term
        except (OverflowError, ZeroDivisionError):
            return None
        return total if cmath.isfinite(total) else None


@lru_cache(maxsize=1)
def _sines() -> tuple[Sum, ...]:
    """The sines of the multiples of 15 degrees up to 90."""
    root2, root3 = ("2", Fraction(1, 2)), ("3", Fraction(1, 2))
    quarter, half = Fraction(1, 4), Fraction(1, 2)
    return (
        {},
        {(root2, root3): quarter, (root2,): -quarter},
        {ONE: half},
        {(root2,): half},
        {(root3,): half},
        {(root2, root3): quarter, (root2,): quarter},
        {ONE: 1},
    )


def _at_nice_angle(name: str, angle: Sum) -> Sum | None:
    """Sine or cosine of a multiple of π/12."""
    steps = angle.get((("pi", 1),), 0) * 12 if angle else 0
    if name not in ("sin", "cos") or type(_ratio(steps)) is not int or len(angle) > (steps != 0):
        return None
    at = (int(steps) + (6 if name == "cos" else 0)) % 24
    sine = _sines()[min(at % 12, 12 - at % 12)]
    return sine if at <= 12 else _scale(sine, -1)


def _number(text: str) -> Number:
    plain = text.replace(",", "")
    if plain.isdigit():
        return int(plain)
    mantissa, _, exponent = plain.lower().partition("e")
    if exponent and abs(int(exponent)) > 1000:
        raise TooHard(text)
    return _small(_ratio(Fraction(plain if mantissa else "0")))


def _constant(number: Number) -> Sum:
    return {ONE: number} if number else {}


def _ratio(number: Number) -> Number:
    return number.numerator if number.denominator == 1 else number


def _small(number: Number) -> Number:
    if number.numerator.bit_length() > MOST_BITS or number.denominator.bit_length() > MOST_BITS:
        raise TooHard("a number")
    return _ratio(number)


def _power(base: Number, power: int) -> Number:
    return base**power if power >= 0 else _ratio(Fraction(1) / base**-power)


def _tidy(total: Mapping[Monomial, Number]) -> Sum:
    return {monomial: _ratio(factor) for monomial, factor in total.items() if factor}


def _add(one: Sum, other: Sum) -> Sum:
    if len(one) + len(other) > MOST_TERMS * 2:
        raise TooHard("too many terms")
    total = dict(one)
    for monomial, factor in other.items():
        total[monomial] = total.get(monomial, 0) + factor
    return _tidy(total)


def _scale(of: Sum, by: int) -> Sum:
    return {monomial: factor * by for monomial, factor in of.items()}


def _join(left: Monomial, right: Monomial) -> tuple[Monomial, Number]:
    """The product of two monomials, and the rational factor that comes out of it."""
    powers = dict(left)
    for name, power in right:
        powers[name] = powers.get(name, 0) + power
    return _settle(powers)


def _raise(monomial: Monomial, power: Number) -> tuple[Monomial, Number]:
    return _settle({name: of * power for name, of in monomial})


def _settle(powers: Mapping[str, Number]) -> tuple[Monomial, Number]:
    factor: Number = 1
    settled: list[tuple[str, Number]] = []
    for name, given in powers.items():
        power = _ratio(given)
        if name == "i" and type(power) is int:
            factor *= -1 if power % 4 >= 2 else 1
            power %= 2
        elif name[0].isdigit() and name.isdigit():
            outside = math.floor(power)
            if abs(outside) * int(name).bit_length() > MOST_BITS:
                raise TooHard("a power")
            if outside:
                factor = _small(_ratio(factor * _power(int(name), outside)))
                power = _ratio(power - outside)
        if power:
            settled.append((name, power))
    return tuple(sorted(settled)), factor


def _positive(name: str) -> bool:
    return name.isdigit() or name in ("pi", "e")


def _variables(found: Sum) -> bool:
    return any(not _positive(name) for monomial in found for name, _ in monomial)


def _content(found: Sum) -> Number:
    """The positive rational that, taken out, leaves whole coefficients without a common factor."""
    over = math.gcd(*(factor.numerator for factor in found.values()))
    under = math.lcm(*(factor.denominator for factor in found.values()))
    return _ratio(Fraction(over, under))


@lru_cache(maxsize=4096)
def _factor(integer: int) -> tuple[tuple[int, int], ...]:
    """Prime factors with their counts. Raises TooHard where trial division does not find them soon."""
    found: list[tuple[int, int]] = []
    divisor = 2
    while divisor * divisor <= integer and divisor < MOST_DIVIDED:
        count = 0
        while integer % divisor == 0:
            integer //= divisor
            count += 1
        if count:
            found.append((divisor, count))
        divisor += 1 if divisor == 2 else 2
    if integer > 1:
        if divisor * divisor <= integer:
            root = math.isqrt(integer)
            if root * root != integer or root >= MOST_DIVIDED**2:
                raise TooHard("a root of a large number")
            found.append((root, 2))  # and without a factor below its own root: a prime
        else:
            found.append((integer, 1))
    return tuple(found)


@lru_cache(maxsize=1024)
def _value(name: str) -> complex:
    """A constant's value, or one picked for a variable by its name."""
    if name.isdigit():
        return complex(int(name))
    if name in _CONSTANTS:
        return _CONSTANTS[name]
    return complex((crc32(name.encode()) % 10_007 - 5_000) / 3_000 + 0.0137)


def _spell(monomial: Monomial, factor: Number) -> str:
    roots = [name for name, power in monomial if name.isdigit() and power == Fraction(1, 2)]
    parts = [_spell_power(name, power) for name, power in monomial if name not in roots]
    parts[:0] = [f"sqrt({inner})" for inner in _under_roots(sorted(map(int, roots)))]
    if not parts:
        return str(factor)
    body = "*".join(parts)
    return body if factor == 1 else f"-{body}" if factor == -1 else f"{factor}*{body}"


def _under_roots(primes: list[int]) -> list[int]:
    """What stands under one root together: all, unless whoever reads the product could not take it apart again."""
    large = [prime for prime in primes if prime > MOST_DIVIDED]
    if len(large) < 2:
        return [math.prod(primes)] if primes else []
    small = [prime for prime in primes if prime <= MOST_DIVIDED]
    return ([math.prod(small)] if small else []) + large


def _spell_power(name: str, power: Number) -> str:
    if power == 1:
        return name
    base = f"({name})" if "^" in name and not name.startswith("(") else name
    return f"{base}^{power}" if type(power) is int and power > 0 else f"{base}^({power})"
