"""Explorers: whoever writes new controllers. One interface; what they are shown is all they know."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, NamedTuple, Protocol


class Cost(NamedTuple):
    """What making a candidate cost."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    usd: float = 0.0
    seconds: float = 0.0


FREE = Cost()


@dataclass(frozen=True)
class Candidate:
    """A controller file somebody proposes."""

    name: str  # letters, digits, _ and -; the file's stem
    source: str
    explorer: str  # who wrote it
    parent: str | None = None  # digest of the candidate it was made from
    note: str = ""  # what its author says it tries
    cost: Cost = FREE
    genome: Mapping[str, Any] = field(default_factory=dict)  # what the explorer itself wants to remember of it

    @property
    def digest(self) -> str:
        """What it is known by: the hash of its text, as `Spec.digest`."""
        return sha256(self.source.encode()).hexdigest()


class ScoredCandidate(NamedTuple):
    """A candidate and how it did on the search split, rounded: all an explorer may know of it."""

    candidate: Candidate
    score: float | None  # AFS less what latency costs, in points, two digits; None if it failed
    curve: Sequence[tuple[float, int, float]] = ()  # over all search cells: β, mean tokens, percent right
    failure: str = ""  # what went wrong, in words for its author


@dataclass(frozen=True)
class ExplorerContext:
    """What an explorer is shown: of the search split alone, no question, no answer's text, no reference."""

    seed: int
    step: int  # how many proposals there were before
    standings: Sequence[ScoredCandidate]  # every candidate so far, in the order they came; baselines first
    digests: Mapping[str, str] = field(default_factory=dict)  # trace digests by a candidate's digest, for the best ones

    @property
    def rng(self) -> random.Random:
        """Chance for this step: the same for the same seed and step, whatever happened before."""
        return random.Random(f"{self.seed} {self.step}")

    @property
    def leaders(self) -> list[ScoredCandidate]:
        """Those that did not fail, best first; of equals the earlier."""
        scored = [one for one in self.standings if one.score is not None]
        return sorted(scored, key=lambda one: -(one.score or 0.0))


class Explorer(Protocol):
    """Writes candidates. It keeps nothing between calls that `context` does not tell, so a resumed run goes on."""

    name: str

    def propose(self, context: ExplorerContext) -> list[Candidate]:
        """The next candidates, at least one unless there are no more. Raises ExplorerError, BudgetExhausted."""
        ...
