"""The task of the embedded model: a numbered chain of small operations, worked modulo 13.

A problem is one line of text. It has a start from 0 to 12 and operations that are numbered from 1:

    Start with 7. 1) Add 5. 2) Multiply by 3. 3) Halve. 4) Square. 5) Negate. What is the result mod 13?

The operations are `Add k`, `Subtract k`, `Multiply by k` (k from 2 to 9), `Halve` (divide by 2 modulo 13, so half of
11 is 12), `Square` and `Negate`. The answer is a number from 0 to 12. The example has the intermediate values 12, 10, 5
and 12, and the answer 1. The model knows chains of 4 to 16 operations, and only this wording.

`think` writes the thought of a fallible solver, which the model learns to imitate. A thought names one of four methods
and computes the chain in numbered passes. The solver compares the results of the passes, and stops when a result occurs
often enough or after the last pass that the method allows. The last result is the answer. Most thoughts end with a
glance at the first steps, which changes nothing:

    Carefully: 7
    1) + 5 = 12
    2) * 3 = 10
    ...
    So 1.
    Pass 2: 7
    1) + 5 = 12
    ...
    So 1.
    Glance: 7
    1) + 5 = 12
    Fine.

The solver errs in two ways. Slips: any step may give any wrong value. Slips are independent, so they scatter votes, and
greedy decoding makes none. They are improbable, so they lower the mean log-probability of a thought. Flaws: each method
except one always gets one kind of operation wrong, in its own way.

The most likely method, `Quickly`, has a flaw and makes only one pass. Greedy decoding always picks it, so it is wrong
on every problem that the flaw affects, while a majority of samples is right. Its thoughts are shorter than the others
and wrong more often, so a vote of the shortest thoughts is misled.

This module uses only the standard library, so the proxy can make problems without the training dependencies.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from typing import Final, Literal

MODULUS = 13
LENGTHS = (4, 16)
OPERANDS = (2, 9)
SLIP_RATE = 0.05

Split = Literal["train", "held_back"]


class OperationKind(Enum):
    """Kind of operation: its wording in a question, its sign in a thought, and its weight in random draws."""

    ADD = ("Add {}", "+ {}", 30)
    SUBTRACT = ("Subtract {}", "- {}", 30)
    MULTIPLY = ("Multiply by {}", "* {}", 30)
    HALVE = ("Halve", "/ 2", 10)
    SQUARE = ("Square", "^ 2", 7)
    NEGATE = ("Negate", "* -1", 7)

    def __init__(self, wording: str, sign: str, weight: int) -> None:
        self.wording = wording
        self.sign = sign
        self.weight = weight


@dataclass(frozen=True, slots=True)
class ArithmeticOperation:
    """One operation of a chain; `operand` is 0 for kinds without an operand."""

    kind: OperationKind
    operand: int = 0

    def __call__(self, value: int) -> int:
        """Return the true result, from 0 to 12."""
        match self.kind:
            case OperationKind.ADD:
                result = value + self.operand
            case OperationKind.SUBTRACT:
                result = value - self.operand
            case OperationKind.MULTIPLY:
                result = value * self.operand
            case OperationKind.HALVE:
                result = value * (MODULUS + 1) // 2
            case OperationKind.SQUARE:
                result = value * value
            case OperationKind.NEGATE:
                result = -value
        return result % MODULUS


@dataclass(frozen=True, slots=True)
class Method:
    """Method to compute a chain: its name in a thought, its probability, its flaw, and how much it checks."""

    name: str
    share: float
    flaw: OperationKind | None  # kind of operation that the method gets wrong
    agreeing: int  # passes with equal results that end the thought
    passes: int  # most passes of a thought
    glances: float  # probability of a glance at the end

    def __call__(self, operation: ArithmeticOperation, value: int) -> int:
        """Return the result by this method; it is right unless the operation is of the kind in `flaw`."""
        if operation.kind is not self.flaw:
            return operation(value)
        match self.flaw:
            case OperationKind.HALVE:  # rounds down, as if there were no modulus
                return value // 2
            case OperationKind.SQUARE:  # doubles
                return value * 2 % MODULUS
            case _:  # negates by counting down from 12 rather than 13
                return MODULUS - 1 - value


# The first method must be the most likely one and have a flaw, or greedy decoding would beat voting. It must also make
# the fewest passes, or short thoughts would not mislead.
METHODS = (
    Method("Quickly", 0.40, OperationKind.HALVE, agreeing=1, passes=1, glances=1.0),
    Method("Carefully", 0.21, OperationKind.SQUARE, agreeing=2, passes=4, glances=0.6),
    Method("Patiently", 0.21, OperationKind.NEGATE, agreeing=2, passes=5, glances=0.6),
    Method("Thoroughly", 0.18, None, agreeing=3, passes=5, glances=0.3),
)


@dataclass(frozen=True, slots=True)
class Problem:
    """A question, its true answer, and the number of operations in it."""

    question: str
    answer: str
    length: int


@dataclass(frozen=True, slots=True)
class Chain:
    """A start value and the operations to apply to it."""

    start: int
    operations: tuple[ArithmeticOperation, ...]

    def question(self) -> str:
        steps = (f"{n}) {step.kind.wording.format(step.operand)}." for n, step in enumerate(self.operations, 1))
        return f"Start with {self.start}. {' '.join(steps)} What is the result mod {MODULUS}?"

    def answer(self) -> int:
        value = self.start
        for operation in self.operations:
            value = operation(value)
        return value

    def problem(self) -> Problem:
        return Problem(self.question(), str(self.answer()), len(self.operations))


EXAMPLE: Final = Chain(
    7,
    (
        ArithmeticOperation(OperationKind.ADD, 5),
        ArithmeticOperation(OperationKind.MULTIPLY, 3),
        ArithmeticOperation(OperationKind.HALVE),
        ArithmeticOperation(OperationKind.SQUARE),
        ArithmeticOperation(OperationKind.NEGATE),
    ),
).problem()
"""Problem that people are shown first: short, and one that voting usually solves."""


def chains(split: Split, seed: int = 0, lengths: tuple[int, int] = LENGTHS) -> Iterator[Chain]:
    """Yield an endless seeded sequence of chains of a split, with lengths uniform over `lengths`, both ends included.

    The hash of a question determines its split, so every question is in one split only, whatever the seed.
    """
    rng = random.Random(f"{split}/{seed}")
    while True:
        chain = _draw(rng, rng.randint(*lengths))
        if _split(chain.question()) == split:
            yield chain


def problems(split: Split, seed: int = 0, lengths: tuple[int, int] = LENGTHS) -> Iterator[Problem]:
    """Yield an endless seeded sequence of problems of a split; see `chains`."""
    return (chain.problem() for chain in chains(split, seed, lengths))


def held_back(n: int, seed: int = 0, lengths: tuple[int, int] = LENGTHS) -> list[Problem]:
    """Return the first `n` problems of the split that is excluded from training."""
    return list(islice(problems("held_back", seed, lengths), n))


@dataclass(frozen=True, slots=True)
class Thought:
    """Text of one thought, ending in a line break, its method, and the result of each pass. The last is the answer."""

    text: str
    method: Method
    results: tuple[int, ...]

    @property
    def answer(self) -> int:
        return self.results[-1]


def think(chain: Chain, rng: random.Random, slip_rate: float = SLIP_RATE) -> Thought:
    """Return one thought of the solver, which slips in a step with probability `slip_rate`."""
    method = rng.choices(METHODS, [method.share for method in METHODS])[0]
    text = ""
    results: list[int] = []
    while len(results) < method.passes and (not results or results.count(results[-1]) < method.agreeing):
        name = f"Pass {len(results) + 1}" if results else method.name
        lines, result = _steps(chain, chain.operations, method, rng, slip_rate)
        text += f"{name}: {lines}So {result}.\n"
        results.append(result)
    if rng.random() < method.glances:
        some = chain.operations[: rng.randint(1, len(chain.operations))]
        text += f"Glance: {_steps(chain, some, method, rng, slip_rate)[0]}Fine.\n"
    return Thought(text, method, tuple(results))


def _steps(
    chain: Chain, operations: Sequence[ArithmeticOperation], method: Method, rng: random.Random, slip_rate: float
) -> tuple[str, int]:
    """Apply operations to the start of a chain. Return the start and one line per step, and the result.

    A slip replaces a value by any other one. The later steps continue from the wrong value.
    """
    value = chain.start
    text = f"{value}\n"
    for n, step in enumerate(operations, 1):
        slip = rng.randrange(1, MODULUS) if rng.random() < slip_rate else 0
        value = (method(step, value) + slip) % MODULUS
        text += f"{n}) {step.kind.sign.format(step.operand)} = {value}\n"
    return text, value


def _draw(rng: random.Random, length: int) -> Chain:
    kinds = rng.choices(list(OperationKind), [kind.weight for kind in OperationKind], k=length)
    operations = (ArithmeticOperation(kind, rng.randint(*OPERANDS) if "{}" in kind.wording else 0) for kind in kinds)
    return Chain(rng.randrange(MODULUS), tuple(operations))


def _split(question: str) -> Split:
    """Return the split of a question: one in eight is held back."""
    return "held_back" if hashlib.sha256(question.encode()).digest()[0] % 8 == 0 else "train"
