"""The loop that improves the loop: an explorer proposes, replay judges, and is shown what came of it.

All that happens is in the history. A run is what its history says: killed at any point and resumed, it goes on as if
nothing had been.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from inspect import getsource
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
"""Built-in controllers every run begins with."""
FINALISTS: Final = 5
"""The best on the search split that are tried again in fresh orders, of which one is chosen."""
FINAL_SHUFFLES: Final = 10
FIRST_FINAL_SHUFFLE: Final = 1000
"""Where the orders begin in which finalists are tried; no search gets so far."""
FINAL_BETAS: Final = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
"""β at which finalists are tried."""

Digester = Callable[[Candidate], str]
"""A digest of a candidate's traces, for its author."""


@dataclass(frozen=True)
class SearchLimits:
    """When a run ends; None sets no bound."""

    rounds: int | None = None  # proposals
    usd: float | None = None  # that proposals may cost
    minutes: float | None = None  # of this process


@dataclass(frozen=True)
class Finalist:
    """What a run has found."""

    candidate: Candidate
    curves: Sequence[Curve]  # in fresh orders, sealed
    lineage: Sequence[str]  # digests, the oldest first

    @property
    def afs(self) -> float:
        """Its score in fresh orders, without what latency costs."""
        return mean_afs(self.curves)


class SearchLoop:
    """One search. `digester` is asked for the best candidates' traces where the explorer reads them."""

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
        """Proposals that have been judged."""
        return len(self.history.bodies("judged"))

    @property
    def verdicts(self) -> list[CandidateVerdict]:
        """Every verdict, in order."""
        return [verdict for _, verdict in read_pairs(self.history)]

    @property
    def candidates(self) -> list[Candidate]:
        """Every candidate that has been judged, in order."""
        return [candidate for candidate, _ in read_pairs(self.history)]

    @property
    def spent(self) -> float:
        """Dollars that proposals have cost."""
        bodies = self.history.bodies("proposed")
        return float(sum(_candidate(one).cost.usd for body in bodies for one in body["candidates"]))

    def go(self, limits: SearchLimits, on_step: Callable[[SearchLoop], None] = lambda run: None) -> None:
        """Propose and judge until a limit is met or the explorer has no more. Raises ExplorerError, EngineError."""
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
            found = self._asked()
            if not found:
                return
            self._propose(found)

    def context(self) -> ExplorerContext:
        """What the explorer is shown now."""
        standings = [_standing(*pair) for pair in read_pairs(self.history)]
        context = ExplorerContext(self._seed, self.steps, standings)
        if self._digester is None:
            return context
        best = [one.candidate for one in context.leaders[:2]]
        for one in best:
            if one.digest not in self._digests:
                self._digests[one.digest] = self._digester(one)
        # of these alone: a resumed run knows of no earlier leaders
        return ExplorerContext(
            self._seed, self.steps, standings, {one.digest: self._digests[one.digest] for one in best}
        )

    def finish(self, shuffles: int = FINAL_SHUFFLES) -> Finalist:
        """The best of those found, tried again in fresh orders; the one that is chosen is measured sealed.

        Raises ExplorerError if none was found.
        """
        leaders = [one for one in self.context().leaders if one.candidate.explorer != BASELINE][:FINALISTS]
        if not leaders:
            raise ExplorerError("no candidate got through; `autotts history show` tells why")
        fresh = range(FIRST_FINAL_SHUFFLE, FIRST_FINAL_SHUFFLE + shuffles)
        tried = {
            one.candidate.digest: mean_afs(self._cascade.measure(one.candidate, TrialSettings(FINAL_BETAS, fresh)))
            for one in leaders
        }
        best = max((one.candidate for one in leaders), key=lambda one: tried[one.digest])
        curves = self._cascade.measure(best, TrialSettings(FINAL_BETAS, fresh), sealed=True)
        if self.history.events[-1].kind != "chosen":  # else a run that had ended was resumed, and ends as it did
            self.history.append(
                "chosen",
                {
                    "digest": best.digest,
                    "afs": round(mean_afs(curves), 6),
                    "tried": {digest: round(found, 6) for digest, found in tried.items()},
                    "curve": mean_curve(curves),
                },
            )
        return Finalist(best, curves, self._lineage(best))

    def _asked(self) -> list[Candidate]:
        """What the explorer proposes now; nothing once the money is gone. Raises ExplorerError."""
        try:
            return self._explorer.propose(self.context())
        except BudgetExhausted:
            if self.steps > 1:
                return []
            raise  # it bought nothing

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
    """The built-in controllers a run begins with, their sources for explorers to read."""
    return [Candidate(name, getsource(modules[BUILT_IN[name].__module__]), BASELINE) for name in BASELINES]


def card(run: SearchLoop, finalist: Finalist, data: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of a controller that was found: what goes with its file wherever it goes."""
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
    """Every candidate that has been judged, with its verdict, in order."""
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
    """Rounded: the last digits would be learnt by heart."""
    score = None if verdict.score is None else round(verdict.score, 2)
    curve = [(beta, rounded_tokens(tokens), round(accuracy, 1)) for beta, tokens, accuracy in verdict.curve]
    return ScoredCandidate(candidate, score, curve, verdict.failure)


def rounded_tokens(tokens: float) -> int:
    """Tokens to the nearest hundred, below a thousand to two digits: short chains cost tens."""
    return int(round(tokens, -2) if tokens >= 1000 else float(f"{tokens:.1e}"))
