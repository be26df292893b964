r"""Algebra: bring expressions to one normalized text, as sums of rational multiples of products of powers.

`14+4\sqrt{37}`, `4\sqrt{37}+14` and `\sqrt{592}+14` all become `14+4*sqrt(37)`. Numbers, surds, π, e, i, variables,
and powers and products of these are *exact*: different exact texts are different values. Functions, powers of
sums and the like are kept as they are; whether two of those are equal is decided elsewhere.

All work is bounded: what would take long or grow large raises TooHard, and what is not an expression NotAnExpression.
Imported by the other modules of `discovery.answers` only.
"""

from discovery.answers.algebra.parser import ExpressionParser, normalize_expression
from discovery.answers.algebra.terms import Expression, NotAnExpression, Number, Sum, TooHard

__all__ = [
    "Expression",
    "ExpressionParser",
    "NotAnExpression",
    "Number",
    "Sum",
    "TooHard",
    "normalize_expression",
]
