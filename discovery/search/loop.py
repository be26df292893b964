"""Search loop: an explorer proposes candidates, replay judges them, and the explorer sees the results.

The history is the only state of a run. A run that is killed at any point and resumed continues as if it had not been
interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from inspect import getsource
from shlex import quote
from sys import modules
from typing import Any, Final

from controllers.builtin import BUILT_IN
from discovery.errors import BudgetExhausted, ExplorerError
from discovery.evaluation.afs import Curve, mean_afs
from discovery.search.cascade import BASELINE, CandidateVerdict, Cascade, mean_curve
from discovery.search.explorers import Candidate, Cost, Explorer, ExplorerContext, ScoredCandidate
from discovery.search.history import History
from discovery.search.trial_pool import TrialSettings

BASELINES: Final = ("cmc", "short_m_at_k", "self_consistency", "asc")
"""Built-in controllers that every run begins with."""
FINALISTS: Final = 5
"""Number of best candidates that are tried again in new branch orders, of which one is chosen."""
FINAL_SHUFFLES: Final = 10
FIRST_FINAL_SHUFFLE: Final = 1000
"""First branch order in which finalists are tried; no search uses orders this high."""
FINAL_BETAS: Final = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
"""Values of β at which finalists are tried."""

Digester = Callable[[Candidate], str]
"""Returns a digest of a candidate's traces for explorers to read."""


@dataclass(frozen=True)
class SearchLimits:
    """Stopping conditions of a run; None means no limit."""

    rounds: int | None = None  # proposals
    usd: float | None = None  # cost of proposals
    minutes: float | None = None  # in this process


@dataclass(frozen=True)
class Finalist:
    """The best controller of a run."""

    candidate: Candidate
    curves: Sequence[Curve]  # in new branch orders, sandboxed
    lineage: Sequence[str]  # digests, oldest first

    @property
    def afs(self) -> float:
        """AFS in new branch orders, without the latency charge."""
        return mean_afs(self.curves)


class SearchLoop:
    """One search run. `digester` summarizes the best candidates' traces for explorers that read them."""

    def __init__(
        self, explorer: Explorer, cascade: Cascade, history: History, seed: int, digester: Digester | None = None
    ) -> None:
        self.history = history
        self._explorer = explorer
        self._cascade = cascade
        self._seed = seed
        self._digester = digester
        self._digests: dict[str, str] = {}

    @property
    def steps(self) -> int:
        """Number of proposals that have been judged."""
        return len(self.history.bodies("judged"))

    @property
    def verdicts(self) -> list[CandidateVerdict]:
        """All verdicts, in order."""
        return [verdict for _, verdict in read_pairs(self.history)]

    @property
    def candidates(self) -> list[Candidate]:
        """All judged candidates, in order."""
        return [candidate for candidate, _ in read_pairs(self.history)]

    @property
    def spent(self) -> float:
        """Cost of all proposals, in USD."""
        bodies = self.history.bodies("proposed")
        return float(sum(_candidate(one).cost.usd for body in bodies for one in body["candidates"]))

    def search(self, limits: SearchLimits, on_step: Callable[[SearchLoop], None] = lambda run: None) -> None:
        """Propose and judge until a limit is reached or the explorer has no more candidates.

        Raises ExplorerError, EngineError.
        """
        until = None if limits.minutes is None else time.monotonic() + 60 * limits.minutes
        if not self.history.bodies("proposed"):
            self._propose(baselines())
        while True:
            if len(self.history.bodies("proposed")) > self.steps:
                self._judge()
                on_step(self)
            if (
                (limits.rounds is not None and self.steps > limits.rounds)
                or (limits.usd is not None and self.spent >= limits.usd)
                or (until is not None and time.monotonic() >= until)
            ):
                return
            candidates = self._ask_explorer()
            if not candidates:
                return
            self._propose(candidates)

    def context(self) -> ExplorerContext:
        """Return what the explorer is shown now."""
        standings = [_standing(*pair) for pair in read_pairs(self.history)]
        context = ExplorerContext(self._seed, self.steps, standings)
        if self._digester is None:
            return context
        best = [leader.candidate for leader in context.leaders[:2]]
        for candidate in best:
            if candidate.digest not in self._digests:
                self._digests[candidate.digest] = self._digester(candidate)
        # only the current leaders, because a resumed run has no digests of earlier ones
        return ExplorerContext(
            self._seed, self.steps, standings, {candidate.digest: self._digests[candidate.digest] for candidate in best}
        )

    def choose_finalist(self, shuffles: int = FINAL_SHUFFLES) -> Finalist:
        """Try the best candidates again in new branch orders, choose one, and measure it in the sandbox.

        Raises ExplorerError if no candidate was scored.
        """
        leaders = [leader for leader in self.context().leaders if leader.candidate.explorer != BASELINE][:FINALISTS]
        if not leaders:
            raise ExplorerError(self._no_finalist())
        fresh = range(FIRST_FINAL_SHUFFLE, FIRST_FINAL_SHUFFLE + shuffles)
        tried = {
            leader.candidate.digest: mean_afs(
                self._cascade.measure(leader.candidate, TrialSettings(FINAL_BETAS, fresh))
            )
            for leader in leaders
        }
        best = max((leader.candidate for leader in leaders), key=lambda candidate: tried[candidate.digest])
        curves = self._cascade.measure(best, TrialSettings(FINAL_BETAS, fresh), sealed=True)
        if self.history.events[-1].kind != "chosen":  # otherwise a finished run was resumed, which ends as before
            self.history.append(
                "chosen",
                {
                    "digest": best.digest,
                    "afs": round(mean_afs(curves), 6),
                    "tried": {digest: round(afs, 6) for digest, afs in tried.items()},
                    "curve": mean_curve(curves),
                },
            )
        return Finalist(best, curves, self._lineage(best))

    def _no_finalist(self) -> str:
        """Return why there is no candidate to choose, and what to do."""
        verdicts = [verdict for one, verdict in read_pairs(self.history) if one.explorer != BASELINE]
        if not verdicts:
            return "no candidate was tried; search longer"
        reasons = f"see the reasons with `autotts history show {quote(str(self.history.path.parent))}`"
        dropped = sum(verdict.few is not None for verdict in verdicts)
        if not dropped:
            return f"all {len(verdicts)} candidates failed; {reasons}"
        return (
            f"no candidate was scored on all questions: {dropped} of {len(verdicts)} were dropped after a few "
            f"questions, the others failed before; {reasons}, then search longer or record more questions"
        )

    def _ask_explorer(self) -> list[Candidate]:
        """Return the explorer's next candidates; none if the budget is exhausted. Raises ExplorerError."""
        try:
            return self._explorer.propose(self.context())
        except BudgetExhausted:
            if self.steps > 1:
                return []
            raise  # the budget paid for no candidate at all

    def _propose(self, candidates: Sequence[Candidate]) -> None:
        self.history.append("proposed", {"step": self.steps, "candidates": [asdict(one) for one in candidates]})

    def _judge(self) -> None:
        body = self.history.bodies("proposed")[self.steps]
        candidates = [_candidate(one) for one in body["candidates"]]
        verdicts = self._cascade.judge(candidates, self.verdicts)
        self.history.append("judged", {"step": self.steps, "verdicts": [asdict(one) for one in verdicts]})

    def _lineage(self, candidate: Candidate) -> list[str]:
        known = {one.digest: one for one in self.candidates}
        line = [candidate.digest]
        while (parent := known[line[-1]].parent if line[-1] in known else None) and parent not in line:
            line.append(parent)
        return line[::-1]


def baselines() -> list[Candidate]:
    """Return the built-in controllers that a run begins with, with their sources."""
    return [Candidate(name, getsource(modules[BUILT_IN[name].__module__]), BASELINE) for name in BASELINES]


def card(run: SearchLoop, finalist: Finalist, data: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the card of a discovered controller, which accompanies its file."""
    return {
        "name": finalist.candidate.name,
        "digest": finalist.candidate.digest,
        "explorer": finalist.candidate.explorer,
        "note": finalist.candidate.note,
        "lineage": list(finalist.lineage),
        "run": run.history.head,
        "data": dict(data),
        "settings": dict(settings),
        "search": {
            "afs": round(finalist.afs, 3),
            "cells": [
                {
                    "cell": list(curve.cell),
                    "afs": round(curve.afs, 3),
                    "chain": curve.anchor._asdict(),
                    "points": [one._asdict() for one in curve.points],
                }
                for curve in finalist.curves
            ],
        },
        "cost": {"usd": run.spent, "candidates": len(run.candidates), "steps": run.steps},
    }


def read_pairs(history: History) -> list[tuple[Candidate, CandidateVerdict]]:
    """Return all judged candidates with their verdicts, in order."""
    return [
        (_candidate(candidate), _verdict(verdict))
        for proposed, judged in zip(history.bodies("proposed"), history.bodies("judged"), strict=False)
        for candidate, verdict in zip(proposed["candidates"], judged["verdicts"], strict=True)
    ]


def _candidate(body: Mapping[str, Any]) -> Candidate:
    return Candidate(**{**body, "cost": Cost(*body["cost"])})


def _verdict(body: Mapping[str, Any]) -> CandidateVerdict:
    return CandidateVerdict(**{**body, "curve": [tuple(point) for point in body["curve"]]})


def _standing(candidate: Candidate, verdict: CandidateVerdict) -> ScoredCandidate:
    """Return a candidate with its rounded result; explorers would overfit to more digits."""
    score = None if verdict.score is None else round(verdict.score, 2)
    curve = [(beta, rounded_tokens(tokens), round(accuracy, 1)) for beta, tokens, accuracy in verdict.curve]
    return ScoredCandidate(candidate, score, curve, verdict.failure)


def rounded_tokens(tokens: float) -> int:
    """Round tokens to hundreds, and below 1000 to two significant digits."""
    return int(round(tokens, -2) if tokens >= 1000 else float(f"{tokens:.1e}"))
