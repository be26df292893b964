"""Recursive-descent parser of LaTeX and plain expressions."""

from __future__ import annotations

import cmath
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from types import MappingProxyType
from typing import Final

from discovery.answers.algebra.arithmetic import CONSTANTS, add, constant, exact_sine, number_of, scale
from discovery.answers.algebra.operations import ExpressionBuilder
from discovery.answers.algebra.terms import (
    MOST_DEPTH,
    MOST_TOKENS,
    ONE,
    Expression,
    NotAnExpression,
    Sum,
    TooHard,
)

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
        *("alpha", "beta", "gamma", "delta", "epsilon", "varepsilon", "zeta", "eta", "theta"),
        *("vartheta", "iota", "kappa", "lambda", "mu", "nu", "xi", "rho", "sigma"),
        *("tau", "upsilon", "phi", "varphi", "chi", "psi", "omega", "Gamma", "Delta"),
        *("Theta", "Lambda", "Xi", "Sigma", "Upsilon", "Phi", "Psi", "Omega", "ell"),
        *("hbar"),
    ]
)
_TIMES: Final = frozenset(("*", "\\cdot", "\\times", "\\ast"))
_OVER: Final = frozenset(("/", "\\div"))
_OPEN: Final = MappingProxyType({"(": ")", "[": "]", "{": "}", "\\{": "\\}"})


@lru_cache(maxsize=8192)
def normalize_expression(text: str) -> Expression:
    """Normalize an expression in LaTeX or plain text. Raises NotAnExpression or TooHard."""
    parser = ExpressionParser(text)
    try:
        return parser.to_expression(parser.parse())
    except (OverflowError, RecursionError):
        raise TooHard(text) from None


@dataclass(slots=True)
class _Token:
    """One token of the text."""

    kind: str
    text: str
    tight: bool  # no space before the token


class ExpressionParser(ExpressionBuilder):
    """Parses one text by recursive descent directly into a `Sum`."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tokens: list[_Token] = []
        for match in _TOKEN.finditer(text.strip()):
            kind = match.lastgroup
            if kind is not None:
                self.tokens.append(_Token(kind, match[kind], match.start() == match.start(kind)))
        if len(self.tokens) > MOST_TOKENS:
            raise TooHard(text)
        self.at = 0
        self.depth = 0
        self.inside = 0  # number of function arguments being parsed

    def parse(self) -> Sum:
        total = self.sum()
        if self.at < len(self.tokens):
            raise NotAnExpression(self.tokens[self.at].text)
        return total

    def peek(self, ahead: int = 0) -> str:
        at = self.at + ahead
        return self.tokens[at].text if at < len(self.tokens) else ""

    def take(self, wanted: str = "") -> _Token:
        if self.at >= len(self.tokens):
            raise NotAnExpression("unexpected end")
        token = self.tokens[self.at]
        if wanted and token.text != wanted:
            raise NotAnExpression(f"{token.text} instead of {wanted}")
        self.at += 1
        return token

    def sum(self) -> Sum:
        self.depth += 1
        if self.depth > MOST_DEPTH:
            raise TooHard("nested too deeply")
        total: Sum | None = None
        while True:
            sign = 1
            while self.peek() in ("+", "-"):
                sign = -sign if self.take().text == "-" else sign
            term = self.product()
            if sign < 0:
                term = scale(term, -1)
            total = term if total is None else add(total, term)
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
        """Return whether the next token can follow a factor without an operator: `2x`, but not `2 3`."""
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
            return term if sign == "+" else scale(term, -1)
        return self.power()

    def power(self) -> Sum:
        token = self.tokens[self.at] if self.at < len(self.tokens) else None
        base = self.base()
        if token is not None and token.kind == "number" and self.is_mixed(token):
            self.depth += 1
            base = add(base, self.base())
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
        r"""Return whether a number begins a mixed fraction, as in `3\frac{1}{2}` and `3 1/2`.

        `3\frac{x}{2}` and `3\frac{5}{2}` are products.
        """
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
        """Convert degrees to radians in the argument of a function; elsewhere the degree sign is only a unit."""
        self.take()
        return self.times(angle, {(("pi", 1),): Fraction(1, 180)}) if self.inside else angle

    def exponent(self) -> Sum:
        if self.peek() in ("+", "-"):
            sign = self.take().text
            return scale(self.exponent(), -1 if sign == "-" else 1)
        token = self.take()
        if token.kind == "number" and token.tight and len(token.text) > 1 and self.tokens[self.at - 2].text == "^":
            return {ONE: number_of(token.text)}  # 2^10 without braces, as typed in plain text
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
            return constant(number_of(text))
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
        r"""Parse an argument of `\frac` and similar commands: a group, or one digit, letter or command."""
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
        if base is None and (known := exact_sine(name, inner)) is not None:
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
        result = self.atom(spelled, value)
        return result if exponent is None else self.raised(result, exponent)

    def run(self) -> Sum:
        r"""Parse the argument of a function without brackets: `\sin 2x`."""
        total = self.power()
        while self.at < len(self.tokens) and self.starts_factor() and self.peek().removeprefix("\\") not in _FUNCTIONS:
            total = self.times(total, self.power())
        return total

    def letters(self, token: _Token) -> Sum:
        """Parse adjacent letters as a product of variables, each with an optional index; long runs are words."""
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
                    token = self.take()
                    if not token.tight and index[-1:].isdigit() and token.text[0].isdigit():
                        raise NotAnExpression(f"{index} {token.text}")
                    index += token.text
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
        return {((name if name in CONSTANTS or len(name.partition("_")[0]) == 1 else f"\\{name}", 1),): 1}
