"""How a candidate is judged on the search split, the cheapest question first; a failure is a result with its message.

    static check → fingerprint (does it behave as one before it?) → few questions → all of them

A grammar's files are written by this program and are tried in the workers themselves; everything else is sealed, and a
winner is, whoever wrote it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from controllers.advice import advise
from controllers.loading import LARGEST, Spec
from discovery.data.recordings import Cell, RecordedBranch, RecordedQuestion, Recording, Split, intern_answers
from discovery.evaluation.afs import Curve, CurvePoint, mean_afs
from discovery.evaluation.replay_jobs import ReplayRules, Sealing
from discovery.search.explorers import Candidate
from discovery.search.trial_pool import TrialPool, TrialSettings, failures

PROBES: Final = Cell("fingerprint", "fixed", Split.SEARCH)
"""The cell of made-up recordings on which behaviour is compared."""
BASELINE: Final = "baseline"
"""In place of an explorer: the candidate came with this program, and is known by its name."""
TRUSTED: Final = frozenset({"grammar", BASELINE})
"""Whose files this program writes itself."""


@dataclass(frozen=True)
class CandidateVerdict:
    """What came of a candidate."""

    digest: str
    score: float | None = None  # AFS less what latency costs; None if it failed
    afs: float | None = None
    slowdown: float | None = None  # doublings of the critical path over a chain's
    few: float | None = None  # its score on the few questions
    curve: Sequence[tuple[float, float, float]] = ()  # over all cells: β, mean tokens, percent right
    cells: Mapping[str, float] = field(default_factory=dict)  # AFS by cell
    fingerprint: str = ""
    failure: str = ""


class CascadePlan(NamedTuple):
    """How much a candidate is tried."""

    betas: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0)
    shuffles: int = 4
    few: int = 3  # one of so many questions in the first trial; 1 leaves that out
    behind: float = 1.0  # points behind the best of the few at which a candidate is not tried on all
    latency: float = 0.0  # points a doubling of the critical path costs

    @property
    def all(self) -> TrialSettings:
        """Every question."""
        return TrialSettings(self.betas, range(self.shuffles))

    @property
    def some(self) -> TrialSettings:
        """The few questions."""
        return replace(self.all, every=self.few)


class Cascade:
    """Judges candidates in an arena over the search split and the fixed episodes."""

    def __init__(self, arena: TrialPool, probes: TrialPool, plan: CascadePlan) -> None:
        self._arena = arena
        self._probes = probes
        self._plan = plan

    def judge(self, candidates: Sequence[Candidate], known: Sequence[CandidateVerdict]) -> list[CandidateVerdict]:
        """A verdict for each candidate, `known` being those before them: the same as if each were judged by itself.

        Raises EngineError, SandboxUnavailable.
        """
        verdicts: dict[int, CandidateVerdict] = {}
        seen = {one.fingerprint: one.digest for one in reversed(known) if one.fingerprint}  # the first of each
        going: dict[int, CandidateVerdict] = {}
        for at, candidate in enumerate(candidates):
            verdict = self._look(candidate, seen)
            (verdicts if verdict.failure else going)[at] = verdict
            seen.setdefault(verdict.fingerprint, candidate.digest)
        best = max((one.few for one in known if one.few is not None), default=None)
        if self._plan.few > 1:
            for at, found in self._try(candidates, going, self._plan.some):
                if isinstance(found, str):
                    verdicts[at] = replace(going.pop(at), failure=found)
                    continue
                few = self._score(found)
                best = few if best is None else max(best, few)
                if few < best - self._plan.behind and candidates[at].explorer != BASELINE:
                    words = f"{few:.2f} on the few questions, where the best has {best:.2f}: not tried on all"
                    verdicts[at] = replace(going.pop(at), few=few, failure=words)
                else:
                    going[at] = replace(going[at], few=few)
        for at, found in self._try(candidates, going, self._plan.all):
            verdicts[at] = (
                replace(going[at], failure=found) if isinstance(found, str) else self._final(going[at], found)
            )
        return [verdicts[at] for at in range(len(candidates))]

    def measure(
        self, candidate: Candidate, trial: TrialSettings, sealed: bool = False, traces: Path | None = None
    ) -> list[Curve]:
        """Return a candidate's curves under a trial; write its traces if a folder is given.

        Raises EngineError and SandboxUnavailable.
        """
        rules = replace(self._arena.rules, sealing=Sealing.ALL) if sealed else self._rules(candidate)
        rules = replace(rules, traces=traces)
        return self._arena.measure(_spec(candidate), trial, rules)

    def _look(self, candidate: Candidate, seen: Mapping[str, str]) -> CandidateVerdict:
        """What can be told without recordings."""
        verdict = CandidateVerdict(candidate.digest)
        if len(candidate.source.encode()) > LARGEST:
            return replace(verdict, failure=f"more than {LARGEST} bytes")
        if candidate.explorer != BASELINE and (wrong := advise(candidate.source)):
            return replace(verdict, failure="; ".join(wrong))
        found = self._probes.enter(
            _spec(candidate), TrialSettings((0.0, 0.5, 1.0), range(2)), self._rules(candidate)
        ).scores
        if words := failures(found):
            return replace(verdict, failure=words)
        print_ = sha256(b"".join(np.ascontiguousarray(score.outcomes).tobytes() for score in found)).hexdigest()[:16]
        verdict = replace(verdict, fingerprint=print_)
        if print_ in seen and seen[print_] != candidate.digest:
            return replace(verdict, failure=f"behaves exactly as {seen[print_][:12]}, which was tried before")
        return verdict

    def _try(
        self, candidates: Sequence[Candidate], going: Mapping[int, CandidateVerdict], trial: TrialSettings
    ) -> Iterator[tuple[int, list[Curve] | str]]:
        """The curves of each that is still in, or why it has failed; all are tried at once."""
        entries = [(at, self._arena.enter(_spec(candidates[at]), trial, self._rules(candidates[at]))) for at in going]
        for at, entry in entries:
            if words := failures(entry.scores):
                yield at, words
                continue
            found = entry.curves()
            falls = next((number for number, curve in enumerate(found) if not curve.rises), None)
            # by its number: explorers read this, and names are others' words
            yield (
                at,
                found if falls is None else f"a larger β spends less on cell {falls + 1}: {_spends(found[falls])}",
            )

    def _rules(self, candidate: Candidate) -> ReplayRules:
        sealing = Sealing.NONE if candidate.explorer in TRUSTED else Sealing.ALL
        return replace(self._arena.rules, sealing=sealing)

    def _score(self, found: Sequence[Curve]) -> float:
        slowdown = float(np.mean([curve.slowdown for curve in found]))
        return round(mean_afs(found) - self._plan.latency * slowdown, 6)

    def _final(self, verdict: CandidateVerdict, found: Sequence[Curve]) -> CandidateVerdict:
        return replace(
            verdict,
            score=self._score(found),
            afs=round(mean_afs(found), 6),
            slowdown=round(float(np.mean([curve.slowdown for curve in found])), 6),
            curve=mean_curve(found),
            cells={" ".join(curve.cell): round(curve.afs, 6) for curve in found},
        )


def mean_curve(found: Sequence[Curve]) -> list[tuple[float, float, float]]:
    """β, mean tokens and percent right over all cells."""
    points: Sequence[Sequence[CurvePoint]] = list(zip(*(curve.points for curve in found), strict=True))
    return [
        (row[0].beta, float(np.mean([one.tokens for one in row])), float(np.mean([one.accuracy for one in row])))
        for row in points
    ]


def _spends(curve: Curve) -> str:
    return ", ".join(f"{one.tokens:,.0f} at {one.beta:g}" for one in curve.points)


def _spec(candidate: Candidate) -> Spec:
    return Spec(candidate.name, None if candidate.explorer == BASELINE else candidate.source)


def fixed_recordings() -> dict[Cell, list[Recording]]:
    """Made-up recordings, always the same, on which controllers that differ at all are likely to behave differently."""
    return {PROBES: [intern_answers(_question(number)) for number in range(8)]}


def _question(number: int) -> RecordedQuestion:
    rng = np.random.default_rng(number)
    branches = []
    for _ in range(64):
        length = int(rng.gamma(4, 2000)) + 300
        final = "7" if rng.random() < 0.2 + 0.08 * number else str(rng.integers(0, 5))
        probes = [final if rng.random() < at / 12 else str(rng.integers(0, 9)) for at in range(length // 500)]
        branches.append(RecordedBranch(probes, length, final, [20] * len(probes)))
    return RecordedQuestion(f"{number:064d}", *PROBES[:2], 500, branches, "7")
