"""Explorers: programs that propose new controllers. All implement one interface and see only what a context holds."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, NamedTuple, Protocol


class Cost(NamedTuple):
    """Cost of producing a candidate."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    usd: float = 0.0
    seconds: float = 0.0


FREE = Cost()


@dataclass(frozen=True)
class Candidate:
    """A proposed controller file."""

    name: str  # letters, digits, _ and -; the stem of the file
    source: str
    explorer: str  # name of the explorer
    parent: str | None = None  # digest of the candidate it was derived from
    note: str = ""  # the author's description
    cost: Cost = FREE
    genome: Mapping[str, Any] = field(default_factory=dict)  # data the explorer keeps for itself

    @property
    def digest(self) -> str:
        """Hash of the source, the same as `Spec.digest`."""
        return sha256(self.source.encode()).hexdigest()

    @property
    def is_tuned(self) -> bool:
        """Whether the file is another one with tuned numbers; the genome is then of `Tuned`, not of the explorer."""
        return "root" in self.genome


class ScoredCandidate(NamedTuple):
    """A candidate with its rounded result on the search split, the only facts that explorers may know about it."""

    candidate: Candidate
    score: float | None  # AFS minus latency charge and penalty for harm, in points, two decimals; None if it failed
    curve: Sequence[tuple[float, int, float]] = ()  # means over all search cells: β, tokens, percent correct
    failure: str = ""  # what went wrong, for the author to read
    estimate: float | None = None  # score on the questions of the trials before the last, two decimals


@dataclass(frozen=True)
class ExplorerContext:
    """Everything an explorer is shown: results on the search split, without questions, answer texts or references."""

    seed: int
    step: int  # number of earlier proposals
    standings: Sequence[ScoredCandidate]  # all candidates in order, baselines first
    digests: Mapping[str, str] = field(
        default_factory=dict
    )  # trace digests of the best candidates, by candidate digest
    has_probes: bool = True  # whether the branches of the search split can be probed

    @property
    def rng(self) -> random.Random:
        """Random generator for this step, determined by seed and step alone."""
        return random.Random(f"{self.seed} {self.step}")

    @property
    def leaders(self) -> list[ScoredCandidate]:
        """Candidates that did not fail, best first; ties are broken by age, oldest first."""
        scored = [candidate for candidate in self.standings if candidate.score is not None]
        return sorted(scored, key=lambda candidate: -(candidate.score or 0.0))


class Explorer(Protocol):
    """Proposes candidates. It keeps no state between calls beyond what a context shows, so that runs can be resumed."""

    name: str

    def propose(self, context: ExplorerContext) -> list[Candidate]:
        """Return the next candidates; none if there are no more. Raises ExplorerError, BudgetExhausted."""
        ...
