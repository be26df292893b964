"""Search loop: an explorer proposes candidates, replay judges them, and the explorer sees the results.

The history is the only state of a run. A run that is killed at any point and resumed continues as if it had not been
interrupted.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from inspect import getsource
from shlex import quote
from sys import modules
from typing import Any, Final

from controllers.builtin import BUILT_IN
from controllers.loading import Spec
from discovery.errors import BudgetExhausted, ExplorerError
from discovery.evaluation.afs import Curve, mean_afs, mean_curve
from discovery.search.cascade import BASELINE, REFERENCE, CandidateVerdict, Cascade
from discovery.search.explorers import Candidate, Cost, Explorer, ExplorerContext, ScoredCandidate
from discovery.search.history import History
from discovery.search.trial_pool import TrialSettings

BASELINES: Final = (REFERENCE, "cmc", "short_m_at_k", "self_consistency", "asc")
"""Built-in controllers that every run begins with."""
FINALISTS: Final = 5
"""Number of best candidates that are tried again in new branch orders, of which one is chosen."""
FINAL_SHUFFLES: Final = 10
MOST_FINAL_SHUFFLES: Final = 50
"""Bounds of the branch orders in which the chosen candidate is measured."""
FINAL_EPISODES: Final = 2_000
"""Episodes at one β that these orders should make together."""
FIRST_FINAL_SHUFFLE: Final = 1000
"""First branch order in which finalists are tried; no search uses orders this high."""
FINAL_BETAS: Final = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
"""Values of β at which finalists are tried."""

log = logging.getLogger(__name__)

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
    shuffles: int  # branch orders it was measured under

    @property
    def afs(self) -> float:
        """AFS in new branch orders, without the latency charge."""
        return mean_afs(self.curves)


def final_shuffles(questions: int) -> int:
    """Return the branch orders in which the chosen candidate is measured: more if there are few questions."""
    return min(MOST_FINAL_SHUFFLES, max(FINAL_SHUFFLES, FINAL_EPISODES // max(1, questions)))


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
        self._pairs: list[tuple[Candidate, CandidateVerdict]] = []
        self._paired_steps = 0

    @property
    def steps(self) -> int:
        """Number of proposals that have been judged."""
        return len(self.history.bodies("judged"))

    @property
    def verdicts(self) -> list[CandidateVerdict]:
        """All verdicts, in order."""
        return [verdict for _, verdict in self.pairs]

    @property
    def candidates(self) -> list[Candidate]:
        """All judged candidates, in order."""
        return [candidate for candidate, _ in self.pairs]

    @property
    def pairs(self) -> list[tuple[Candidate, CandidateVerdict]]:
        """All judged candidates with their verdicts, in order; only new steps of the history are read."""
        self._pairs += read_pairs(self.history, self._paired_steps)
        self._paired_steps = self.steps
        return list(self._pairs)

    @property
    def spent(self) -> float:
        """Cost of all proposals, in USD."""
        bodies = self.history.bodies("proposed")
        return float(sum(Cost(*one["cost"]).usd for body in bodies for one in body["candidates"]))

    def search(self, limits: SearchLimits, on_step: Callable[[SearchLoop], None] = lambda run: None) -> None:
        """Propose and judge until a limit is reached or the explorer has no more candidates.

        Raises ExplorerError, EngineError.
        """
        until = None if limits.minutes is None else time.monotonic() + 60 * limits.minutes
        if not self.history.bodies("proposed"):
            self._propose(baselines(self._cascade.has_probes))
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
        standings = [_standing(*pair) for pair in self.pairs]
        context = ExplorerContext(self._seed, self.steps, standings, has_probes=self._cascade.has_probes)
        if self._digester is None:
            return context
        best = [leader.candidate for leader in context.leaders[:2]]
        for candidate in best:
            if candidate.digest not in self._digests:
                self._digests[candidate.digest] = self._digester(candidate)
        # only the current leaders, because a resumed run has no digests of earlier ones
        digests = {candidate.digest: self._digests[candidate.digest] for candidate in best}
        return replace(context, digests=digests)

    def choose_finalist(self, shuffles: int = FINAL_SHUFFLES, choosing: int | None = None) -> Finalist:
        """Try the best candidates again in new branch orders, choose one, and measure it in the sandbox.

        It is chosen under `choosing` orders, by default the `shuffles` it is measured under. If the kernel has chosen
        it, the measurement must agree with the kernel; otherwise the next best is chosen.

        Raises ExplorerError if no candidate was scored, or none agrees.
        """
        leaders = [leader for leader in self.context().leaders if leader.candidate.explorer != BASELINE][:FINALISTS]
        if not leaders:
            raise ExplorerError(self._no_finalist())
        trial = TrialSettings(FINAL_BETAS, range(FIRST_FINAL_SHUFFLE, FIRST_FINAL_SHUFFLE + shuffles))
        choice = replace(trial, shuffles=range(FIRST_FINAL_SHUFFLE, FIRST_FINAL_SHUFFLE + (choosing or shuffles)))
        tried = {
            leader.candidate.digest: self._cascade.score(self._cascade.measure(leader.candidate, choice), choice)
            for leader in leaders
        }
        ranked = sorted((leader.candidate for leader in leaders), key=lambda candidate: -tried[candidate.digest])
        best, curves, disagreeing = self._measure_first(ranked, trial)
        if self.history.events[-1].kind != "chosen":  # otherwise a finished run was resumed, which ends as before
            self.history.append(
                "chosen",
                {
                    "digest": best.digest,
                    "afs": round(mean_afs(curves), 6),
                    "tried": tried,  # scores by digest
                    "curve": mean_curve(curves),
                    **({"disagreeing": disagreeing} if disagreeing else {}),  # with the kernel; digests
                },
            )
        return Finalist(best, curves, self._lineage(best), shuffles)

    def _measure_first(
        self, ranked: Sequence[Candidate], trial: TrialSettings
    ) -> tuple[Candidate, list[Curve], list[str]]:
        """Measure candidates in the sandbox until one agrees with the kernel, if there is one.

        Returns it, its curves, and the digests of those before it. Raises ExplorerError if none agrees.
        """
        disagreeing: list[str] = []
        for candidate in ranked:
            curves = self._cascade.measure(candidate, trial, sealed=True)
            if not self._cascade.has_kernel or curves == self._cascade.measure(candidate, trial):
                return candidate, curves, disagreeing
            log.error("%s: the kernel and the sandboxed controller file disagree; please report it", candidate.name)
            disagreeing.append(candidate.digest)
        raise ExplorerError("the compiled kernel and the controller files disagree; search without it (--no-kernel)")

    def _no_finalist(self) -> str:
        """Return why there is no candidate to choose, and what to do."""
        verdicts = [verdict for one, verdict in self.pairs if one.explorer != BASELINE]
        if not verdicts:
            return "no candidate was tried; search longer"
        reasons = f"see the reasons with `autotts history show {quote(str(self.history.path.parent))}`"
        dropped = sum(verdict.few is not None or bool(verdict.rungs) for verdict in verdicts)
        if not dropped:
            return f"all {len(verdicts)} candidates failed; {reasons}"
        others = "" if dropped == len(verdicts) else ", the others failed before"
        return (
            f"no candidate was scored on all questions: {dropped} of {len(verdicts)} were dropped after a few "
            f"questions{others}; {reasons}, then search longer or record more questions"
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
        known = {one.digest: one for one in reversed(self.candidates)}  # of equal ones the first
        line = [candidate.digest]
        while (parent := known[line[-1]].parent if line[-1] in known else None) and parent not in line:
            line.append(parent)
        return line[::-1]


def baselines(has_probes: bool = True) -> list[Candidate]:
    """Return the built-in controllers that a run begins with, with their sources. Without probes, none probes."""
    names = [name for name in BASELINES if has_probes or not Spec(name).needs_probes]
    return [Candidate(name, getsource(modules[BUILT_IN[name].__module__]), BASELINE) for name in names]


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


def better_baseline(run: SearchLoop, finalist: Finalist) -> str:
    """Return which built-in controller scores at least as high as the winner, with the scores; empty if none does."""
    scores = {one.name: verdict.score for one, verdict in run.pairs if one.explorer == BASELINE}
    own = next(verdict.score for one, verdict in run.pairs if one.digest == finalist.candidate.digest)
    known = {name: score for name, score in scores.items() if score is not None}
    best = max(known, key=known.__getitem__, default=None)
    if best is None or own is None or known[best] < own:
        return ""
    return f"{best} scores {known[best]:.2f} in the table, {finalist.candidate.name} {own:.2f}"


def read_pairs(history: History, start: int = 0) -> list[tuple[Candidate, CandidateVerdict]]:
    """Return all judged candidates with their verdicts, in order, from the step `start` on."""
    return [
        (_candidate(candidate), _verdict(verdict))
        for proposed, judged in zip(history.bodies("proposed")[start:], history.bodies("judged")[start:], strict=False)
        for candidate, verdict in zip(proposed["candidates"], judged["verdicts"], strict=True)
    ]


def _candidate(body: Mapping[str, Any]) -> Candidate:
    return Candidate(**{**body, "cost": Cost(*body["cost"])})


def _verdict(body: Mapping[str, Any]) -> CandidateVerdict:
    pairs = [tuple(point) for point in body["curve"]]
    return CandidateVerdict(**{**body, "curve": pairs, "rungs": tuple(body.get("rungs", ()))})


def _standing(candidate: Candidate, verdict: CandidateVerdict) -> ScoredCandidate:
    """Return a candidate with its rounded result; explorers would overfit to more digits."""
    score = None if verdict.score is None else round(verdict.score, 2)
    curve = [(beta, rounded_tokens(tokens), round(accuracy, 1)) for beta, tokens, accuracy in verdict.curve]
    estimate = verdict.screened if verdict.few is None else verdict.few
    if verdict.rungs:  # the largest, so that those who went further are not below those who were dropped before
        estimate = max(verdict.rungs)
    return ScoredCandidate(candidate, score, curve, verdict.failure, None if estimate is None else round(estimate, 2))


def rounded_tokens(tokens: float) -> int:
    """Round tokens to hundreds, and below 1000 to two significant digits."""
    return int(round(tokens, -2) if tokens >= 1000 else float(f"{tokens:.1e}"))
