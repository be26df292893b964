"""Arithmetic on sums, monomials and rational numbers. Everything is bounded and raises TooHard beyond its limits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache
from types import MappingProxyType
from typing import Final
from zlib import crc32

from discovery.answers.algebra.terms import MOST_BITS, MOST_DIVIDED, MOST_TERMS, ONE, Monomial, Number, Sum, TooHard

CONSTANTS: Final[Mapping[str, complex]] = MappingProxyType({"pi": math.pi, "e": math.e, "i": 1j})


@lru_cache(maxsize=1)
def _sines() -> tuple[Sum, ...]:
    """Return the sines of the multiples of 15 degrees up to 90."""
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


def exact_sine(name: str, angle: Sum) -> Sum | None:
    """Return the exact sine or cosine of a multiple of π/12; None for other functions and angles."""
    steps = angle.get((("pi", 1),), 0) * 12 if angle else 0
    if name not in ("sin", "cos") or type(reduced(steps)) is not int or len(angle) > (steps != 0):
        return None
    at = (int(steps) + (6 if name == "cos" else 0)) % 24
    sine = _sines()[min(at % 12, 12 - at % 12)]
    return sine if at <= 12 else scale(sine, -1)


def number_of(text: str) -> Number:
    plain = text.replace(",", "")
    if plain.isdigit():
        return int(plain)
    mantissa, _, exponent = plain.lower().partition("e")
    if exponent and abs(int(exponent)) > 1000:
        raise TooHard(text)
    return bounded(reduced(Fraction(plain if mantissa else "0")))


def constant(number: Number) -> Sum:
    return {ONE: number} if number else {}


def reduced(number: Number) -> Number:
    return number.numerator if number.denominator == 1 else number


def bounded(number: Number) -> Number:
    if number.numerator.bit_length() > MOST_BITS or number.denominator.bit_length() > MOST_BITS:
        raise TooHard("a number")
    return reduced(number)


def number_power(base: Number, power: int) -> Number:
    return base**power if power >= 0 else reduced(Fraction(1) / base**-power)


def without_zeros(total: Mapping[Monomial, Number]) -> Sum:
    return {monomial: reduced(factor) for monomial, factor in total.items() if factor}


def add(left: Sum, right: Sum) -> Sum:
    if len(left) + len(right) > MOST_TERMS * 2:
        raise TooHard("too many terms")
    total = dict(left)
    for monomial, factor in right.items():
        total[monomial] = total.get(monomial, 0) + factor
    return without_zeros(total)


def scale(of: Sum, by: int) -> Sum:
    return {monomial: factor * by for monomial, factor in of.items()}


def multiply_monomials(left: Monomial, right: Monomial) -> tuple[Monomial, Number]:
    """Return the product of two monomials, and the rational factor that comes out of it."""
    powers = dict(left)
    for name, power in right:
        powers[name] = powers.get(name, 0) + power
    return normalize_powers(powers)


def raise_monomial(monomial: Monomial, power: Number) -> tuple[Monomial, Number]:
    return normalize_powers({name: of * power for name, of in monomial})


def normalize_powers(powers: Mapping[str, Number]) -> tuple[Monomial, Number]:
    factor: Number = 1
    settled: list[tuple[str, Number]] = []
    for name, given in powers.items():
        power = reduced(given)
        if name == "i" and type(power) is int:
            factor *= -1 if power % 4 >= 2 else 1
            power %= 2
        elif name[0].isdigit() and name.isdigit():
            outside = math.floor(power)
            if abs(outside) * int(name).bit_length() > MOST_BITS:
                raise TooHard("a power")
            if outside:
                factor = bounded(reduced(factor * number_power(int(name), outside)))
                power = reduced(power - outside)
        if power:
            settled.append((name, power))
    return tuple(sorted(settled)), factor


def is_positive(name: str) -> bool:
    return name.isdigit() or name in ("pi", "e")


def has_variables(total: Sum) -> bool:
    return any(not is_positive(name) for monomial in total for name, _ in monomial)


def common_factor(total: Sum) -> Number:
    """Return the positive rational that, taken out, leaves integer coefficients without a common factor."""
    over = math.gcd(*(factor.numerator for factor in total.values()))
    under = math.lcm(*(factor.denominator for factor in total.values()))
    return reduced(Fraction(over, under))


@lru_cache(maxsize=4096)
def prime_factors(integer: int) -> tuple[tuple[int, int], ...]:
    """Return the prime factors with their exponents. Raises TooHard if trial division takes too long."""
    factors: list[tuple[int, int]] = []
    divisor = 2
    while divisor * divisor <= integer and divisor < MOST_DIVIDED:
        count = 0
        while integer % divisor == 0:
            integer //= divisor
            count += 1
        if count:
            factors.append((divisor, count))
        divisor += 1 if divisor == 2 else 2
    if integer > 1:
        if divisor * divisor <= integer:
            root = math.isqrt(integer)
            if root * root != integer or root >= MOST_DIVIDED**2:
                raise TooHard("a root of a large number")
            factors.append((root, 2))  # has no factor up to its own root, so it is prime
        else:
            factors.append((integer, 1))
    return tuple(factors)


@lru_cache(maxsize=1024)
def atom_value(name: str) -> complex:
    """Return the value of a constant, or a fixed pseudo-random value for a variable."""
    if name.isdigit():
        return complex(int(name))
    if name in CONSTANTS:
        return CONSTANTS[name]
    return complex((crc32(name.encode()) % 10_007 - 5_000) / 3_000 + 0.0137)


def format_term(monomial: Monomial, factor: Number) -> str:
    roots = [name for name, power in monomial if name.isdigit() and power == Fraction(1, 2)]
    parts = [_spell_power(name, power) for name, power in monomial if name not in roots]
    parts[:0] = [f"sqrt({inner})" for inner in _under_roots(sorted(map(int, roots)))]
    if not parts:
        return str(factor)
    body = "*".join(parts)
    return body if factor == 1 else f"-{body}" if factor == -1 else f"{factor}*{body}"


def _under_roots(primes: list[int]) -> list[int]:
    """Group primes under common roots, so that parsing the text again can factor each product."""
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
