"""Any explorer with its numbers tuned: between its proposals, constants of the best file are refined by CMA-ES.

The constants are those in the constructor of the file's controller; each is multiplied by a factor near 1, so a file
stays as it was written but for its numbers. Zeros and ones are left alone: they are structure more often than numbers.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from discovery.search.explorers import Candidate, Explorer, ExplorerContext, ScoredCandidate
from discovery.search.explorers.evolution import Vector, failure_score, next_generation

BY_TURNS: Final = 2
"""Of so many steps one is the explorer's own."""
SIGMA: Final = 0.15
"""Spread of the factors' logarithms in the first generation."""


LARGEST_NUMBER: Final = 2**53
"""Constants from there on are left alone: they are no quantities."""


class Spot(NamedTuple):
    """Where a constant stands in a file, in bytes of its line."""

    line: int
    start: int
    end: int
    value: float
    whole: bool


class Tuned:
    """`explorer`, and tunings of the best candidate it or an earlier tuning has brought."""

    def __init__(self, explorer: Explorer, batch: int = 6) -> None:
        self.name = explorer.name
        self._explorer = explorer
        self._batch = batch

    def propose(self, context: ExplorerContext) -> list[Candidate]:
        """The explorer's own candidates, and tunings by turns; those alone when it has none. Raises ExplorerError."""
        leader = next((one for one in context.leaders if one.candidate.explorer == self.name), None)
        if leader is None or context.step % BY_TURNS:
            found = self._explorer.propose(context)
            if found or leader is None:
                return found
        return self._tune(context, leader) or self._explorer.propose(context)

    def _tune(self, context: ExplorerContext, leader: ScoredCandidate) -> list[Candidate]:
        """A generation of the leader's line; none if its file has too few numbers."""
        origin = leader.candidate.genome.get("root", leader.candidate.digest)
        root = next(one.candidate for one in context.standings if one.candidate.digest == origin)
        spots = spots_of(root.source)
        if len(spots) < 2:
            return []
        worst = failure_score(context.standings)
        line = [one for one in context.standings if one.candidate.genome.get("root") == origin]
        told = [(np.array(one.candidate.genome["factors"]), worst if one.score is None else one.score) for one in line]
        seed = context.rng.getrandbits(31)
        children = next_generation([0.0] * len(spots), told, seed, self._batch, SIGMA)
        return [
            Candidate(
                f"{root.name[:48]}-t{context.step}-{at}",
                varied(root.source, spots, child),
                self.name,
                leader.candidate.digest,
                f"numbers of {root.name} tuned",
                genome={"root": origin, "factors": [float(one) for one in child]},
            )
            for at, child in enumerate(children)
        ]


def spots_of(source: str) -> list[Spot]:
    """The constants of a controller's constructor; none if the file cannot be read."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError, SystemError):
        return []
    constructors = [
        one
        for node in tree.body
        if isinstance(node, ast.ClassDef)
        for one in node.body
        if isinstance(one, ast.FunctionDef) and one.name == "__init__"
    ]
    return [spot for one in constructors for node in ast.walk(one) for spot in _spot(node)]


def _spot(node: ast.AST) -> Sequence[Spot]:
    if not isinstance(node, ast.Constant) or not isinstance(node.value, int | float) or isinstance(node.value, bool):
        return ()
    if node.value in (0, 1) or not abs(node.value) < LARGEST_NUMBER or node.end_col_offset is None:
        return ()
    return (Spot(node.lineno, node.col_offset, node.end_col_offset, float(node.value), isinstance(node.value, int)),)


def varied(source: str, spots: Sequence[Spot], factors: Vector) -> str:
    """The file with each constant multiplied by e to the power of its factor."""
    lines = source.encode().split(b"\n")
    for spot, factor in sorted(zip(spots, factors, strict=True), key=lambda pair: pair[0], reverse=True):
        value = spot.value * math.exp(min(3.0, max(-3.0, float(factor))))
        text = str(max(1, round(value))) if spot.whole else _plain(value)
        line = lines[spot.line - 1]
        lines[spot.line - 1] = line[: spot.start] + text.encode() + line[spot.end :]
    return b"\n".join(lines).decode()


def _plain(value: float) -> str:
    """Four digits, and a point or an exponent, so that it stays what it was."""
    text = f"{value:.4g}"
    return text if set(text) & set(".e") else f"{text}.0"
