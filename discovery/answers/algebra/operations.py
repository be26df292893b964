"""Operations on expressions: products, powers, roots, factorials and binomials, and their normalized text."""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable
from fractions import Fraction

from discovery.answers.algebra.arithmetic import (
    atom_value,
    bounded,
    common_factor,
    constant,
    format_term,
    has_variables,
    is_positive,
    multiply_monomials,
    number_power,
    prime_factors,
    raise_monomial,
    reduced,
    scale,
    without_zeros,
)
from discovery.answers.algebra.terms import (
    MOST_BITS,
    MOST_TERMS,
    ONE,
    Expression,
    Monomial,
    NotAnExpression,
    Number,
    Sum,
    TooHard,
)


class ExpressionBuilder:
    """Computes sums. It keeps the values of atoms, the parts of a sum that cannot be taken apart further."""

    def __init__(self) -> None:
        self.values: dict[str, complex | None] = {}  # of atoms other than names, surds and constants

    def apply(self, function: Callable[[complex], complex], value: complex | None) -> complex | None:
        try:
            return None if value is None else function(value)
        except (ValueError, ZeroDivisionError, OverflowError):
            return None

    def times(self, left_sum: Sum, right_sum: Sum) -> Sum:
        if len(left_sum) * len(right_sum) > MOST_TERMS * 4:
            raise TooHard("too many terms")
        total: dict[Monomial, Number] = {}
        for left, a in left_sum.items():
            for right, b in right_sum.items():
                monomial, factor = (left or right, 1) if not left or not right else multiply_monomials(left, right)
                total[monomial] = total.get(monomial, 0) + bounded(a * b * factor)
        return without_zeros(total)

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
            raised, extra = raise_monomial(monomial, power)
            return {raised: reduced(number_power(factor, power) * extra)}
        if abs(power) > MOST_BITS or power.denominator > 64:
            raise TooHard("an exponent")
        if factor < 0 and power.denominator != 2:
            return self.opaque_power({monomial: factor}, power)
        if any(not is_positive(name) for name, _ in monomial):
            return self.opaque_power({monomial: factor}, power)
        total: Sum = {ONE: 1}
        if factor < 0:
            turned, sign = raise_monomial((("i", 1),), power.numerator)
            total = {turned: sign}
        total = self.times(total, self.surd(factor if factor > 0 else -factor, Fraction(power)))
        raised, extra = raise_monomial(monomial, power)
        return self.times(total, {raised: extra})

    def surd(self, number: Number, power: Fraction) -> Sum:
        """Raise a positive rational to a fractional power, with perfect powers taken out of the root."""
        outside_root: Number = 1
        parts: dict[str, Number] = {}
        for integer, sign in ((number.numerator, 1), (number.denominator, -1)):
            for prime, count in prime_factors(integer):
                exponent = power * count * sign
                outside = math.floor(exponent)
                if abs(outside) * prime.bit_length() > MOST_BITS:
                    raise TooHard("a power")
                outside_root = reduced(outside_root * number_power(prime, outside))
                if exponent != outside:
                    parts[str(prime)] = exponent - outside
        return {tuple(sorted(parts.items())): outside_root}

    def by_conjugate(self, base: Sum) -> Sum | None:
        """Invert a sum of two terms with 1 / (a + b) = (a - b) / (a² - b²); None unless the squares are rational."""
        (first, a), (second, b) = base.items()
        squares = [self.times({m: f}, {m: f}) for m, f in ((first, a), (second, b))]
        if any(set(square) != {ONE} for square in squares):
            return None
        norm = squares[0][ONE] - squares[1][ONE]
        return None if norm == 0 else {first: reduced(Fraction(a) / norm), second: reduced(Fraction(-b) / norm)}

    def opaque_power(self, base: Sum, power: Number) -> Sum:
        """Return a power as an atom, with a rational factor taken out."""
        content: Number = 1
        if len(base) > 1:
            content = common_factor(base)
            if type(power) is int and base[min(base)] < 0:
                content = -content
            base = {monomial: reduced(Fraction(factor) / content) for monomial, factor in base.items()}
        inner = self.to_expression(base)
        value = None
        if inner.value is not None and (inner.value or power > 0):
            value = self.apply(lambda x: x ** float(power), inner.value)
        power_atom = self.atom(f"({inner.text})", inner.value, power, value)
        return power_atom if content == 1 else self.times(self.monomial_power(ONE, content, power), power_atom)

    def symbolic_power(self, base: Sum, exponent: Sum) -> Sum:
        rest = dict(exponent)
        integer_part = rest.pop(ONE, 0)
        if type(integer_part) is not int or len(base) != 1 or set(base) != {ONE}:
            rest, integer_part = dict(exponent), 0
        below, above = self.to_expression(base), self.to_expression(rest)
        value = None
        if below.value is not None and above.value is not None:
            value = self.apply(lambda x: x**above.value if above.value is not None else x, below.value)
        left = below.text if below.text.isalnum() else f"({below.text})"
        power_atom = self.atom(f"{left}^({above.text})", value)
        return self.times(self.raised(base, {ONE: integer_part}), power_atom) if integer_part else power_atom

    def factorial(self, of: Sum) -> Sum:
        number = of.get(ONE, 0)
        if (not of or set(of) == {ONE}) and type(number) is int and 0 <= number <= 300:
            return {ONE: math.factorial(number)}
        inner = self.to_expression(of)
        return self.atom(f"({inner.text})!", None)

    def choose(self, of: Sum, chosen: Sum) -> Sum:
        numbers = [one.get(ONE, 0) for one in (of, chosen) if not one or set(one) == {ONE}]
        if len(numbers) == 2 and all(type(n) is int and 0 <= n <= 1000 for n in numbers):
            return constant(bounded(math.comb(int(numbers[0]), int(numbers[1]))))
        return self.atom(f"\\binom{{{self.to_expression(of).text}}}{{{self.to_expression(chosen).text}}}", None)

    def absolute(self, inner: Sum) -> Sum:
        expression = self.to_expression(inner)
        if expression.value is not None and expression.value.imag == 0 and not has_variables(inner) and not self.values:
            return inner if expression.value.real >= 0 else scale(inner, -1)
        return self.atom(f"|{expression.text}|", None if expression.value is None else abs(expression.value))

    def atom(self, text: str, value: complex | None, power: Number = 1, raised: complex | None = None) -> Sum:
        """Return an atom, a part that is not simplified further."""
        self.values[text] = value
        return {((text, power),): 1}

    def to_expression(self, total: Sum) -> Expression:
        if not total:
            return Expression("0", True, 0j)
        if len(total) > MOST_TERMS:
            raise TooHard("too many terms")
        parts: list[str] = []
        for monomial in sorted(total):
            part = format_term(monomial, total[monomial])
            parts.append(part if not parts or part.startswith("-") else f"+{part}")
        exact = not any(name in self.values for monomial in total for name, _ in monomial)
        return Expression("".join(parts), exact, self.evaluate(total))

    def evaluate(self, terms: Sum) -> complex | None:
        total = 0j
        try:
            for monomial, factor in terms.items():
                term = complex(float(factor))
                for name, power in monomial:
                    value = self.values[name] if name in self.values else atom_value(name)
                    if value is None:
                        return None
                    term *= value ** (power if type(power) is int else float(power))
                total += term
        except (OverflowError, ZeroDivisionError):
            return None
        return total if cmath.isfinite(total) else None
