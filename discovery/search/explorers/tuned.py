"""Explorer that wraps another one and tunes constants of the best file with CMA-ES between its proposals.

Only constants in the constructor of the controller are tuned. Each is multiplied by a factor near 1, so that nothing
else in the file changes. Zeros and ones are not tuned, because they are usually structure rather than parameters.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from discovery.search.explorers import Candidate, Explorer, ExplorerContext, ScoredCandidate
from discovery.search.explorers.evolution import Vector, failure_score, next_generation

TUNE_EVERY: Final = 2
"""Every n-th step is a tuning; the others are the wrapped explorer's."""
SIGMA: Final = 0.15
"""Standard deviation of the logarithms of the factors in the first generation."""
LARGEST_NUMBER: Final = 2**53
"""Constants of this size and above are not tuned; they are not quantities."""


class Spot(NamedTuple):
    """A constant and its position in a file, in bytes of its line."""

    line: int
    start: int
    end: int
    value: float
    is_integer: bool


class Tuned:
    """Proposes the candidates of `explorer`, alternating with tuned versions of the best one; implements `Explorer`."""

    def __init__(self, explorer: Explorer, batch: int = 6) -> None:
        self.name = explorer.name
        self._explorer = explorer
        self._batch = batch

    def propose(self, context: ExplorerContext) -> list[Candidate]:
        """Return the explorer's candidates and tuned versions in turn. Raises ExplorerError.

        If the explorer has no more candidates, only tuned versions are returned.
        """
        leader = next((one for one in context.leaders if one.candidate.explorer == self.name), None)
        if leader is None or context.step % TUNE_EVERY:
            candidates = self._explorer.propose(context)
            if candidates or leader is None:
                return candidates
        return self._tune(context, leader) or self._explorer.propose(context)

    def _tune(self, context: ExplorerContext, leader: ScoredCandidate) -> list[Candidate]:
        """Return the next generation of the leader's lineage; none if the file has fewer than two constants."""
        origin = leader.candidate.genome.get("root", leader.candidate.digest)
        root = next(one.candidate for one in context.standings if one.candidate.digest == origin)
        spots = spots_of(root.source)
        if len(spots) < 2:
            return []
        worst = failure_score(context.standings)
        lineage = [one for one in context.standings if one.candidate.genome.get("root") == origin]
        earlier = [
            (np.array(one.candidate.genome["factors"]), worst if one.score is None else one.score) for one in lineage
        ]
        seed = context.rng.getrandbits(31)
        children = next_generation([0.0] * len(spots), earlier, seed, self._batch, SIGMA)
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
    """Return the constants in the constructors of a file; none if it cannot be parsed.

    There are none either if a line ends with a lone carriage return, because `varied` counts line feeds.
    """
    if "\r" in source.replace("\r\n", ""):
        return []
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError, SystemError):
        return []
    constructors = [
        statement
        for node in tree.body
        if isinstance(node, ast.ClassDef)
        for statement in node.body
        if isinstance(statement, ast.FunctionDef) and statement.name == "__init__"
    ]
    return [spot for statement in constructors for node in ast.walk(statement) for spot in _spot(node)]


def _spot(node: ast.AST) -> Sequence[Spot]:
    if not isinstance(node, ast.Constant) or not isinstance(node.value, int | float) or isinstance(node.value, bool):
        return ()
    if node.value in (0, 1) or not abs(node.value) < LARGEST_NUMBER or node.end_col_offset is None:
        return ()
    return (Spot(node.lineno, node.col_offset, node.end_col_offset, float(node.value), isinstance(node.value, int)),)


def varied(source: str, spots: Sequence[Spot], factors: Vector) -> str:
    """Return the file with each constant multiplied by e to the power of its factor."""
    lines = source.encode().split(b"\n")
    for spot, factor in sorted(zip(spots, factors, strict=True), key=lambda pair: pair[0], reverse=True):
        value = spot.value * math.exp(min(3.0, max(-3.0, float(factor))))
        text = str(max(1, round(value))) if spot.is_integer else _plain(value)
        line = lines[spot.line - 1]
        lines[spot.line - 1] = line[: spot.start] + text.encode() + line[spot.end :]
    return b"\n".join(lines).decode()


def _plain(value: float) -> str:
    """Format a float with four digits, and a point or exponent so that it stays a float."""
    text = f"{value:.4g}"
    return text if set(text) & set(".e") else f"{text}.0"
