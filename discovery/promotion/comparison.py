"""Comparison of a finalist with a champion: their replay, and what the ledger keeps of a judgement on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from controllers.advice import advise
from controllers.errors import MachineDisturbed
from controllers.loading import Spec
from discovery.data.recordings import Cell
from discovery.errors import GateError
from discovery.evaluation.engines import Engine
from discovery.evaluation.evaluate import DEFAULT_WEIGHTS, AnswerComparison, Evaluation
from discovery.evaluation.replay_jobs import ReplayRules
from discovery.evaluation.score_set import ScoreSet, score_controllers
from discovery.evaluation.sources import RecordingSource
from discovery.promotion.conditions import DEFAULT_TERMS, GateTerms
from discovery.promotion.ledger import DISTURBED, FREE_DISTURBANCES, Ledger, fingerprint, shorten_ids
from discovery.promotion.searched_questions import SearchedQuestions
from discovery.promotion.selected_source import SelectedSource
from discovery.promotion.verdict import GateReport


@dataclass(frozen=True)
class Comparison:
    """A finalist and a champion, and how they are replayed and judged."""

    finalist: Spec
    champion: Spec
    engine: Engine
    rules: ReplayRules
    betas: Sequence[float]
    shuffles: int
    now: str
    who: str
    terms: GateTerms = DEFAULT_TERMS
    answers: AnswerComparison = AnswerComparison.AUTO
    model: str = ""  # the one model that the finalist is for; empty: all models
    searched: SearchedQuestions | None = None  # by the search for the finalist; None: unknown

    def check(self) -> None:
        """Raise GateError if the finalist cannot be judged."""
        if self.finalist.digest == self.champion.digest:
            raise GateError(f"finalist {self.finalist.name} is identical to the champion; nothing to compare")
        if self.finalist.is_foreign and not self.rules.seal(self.finalist):
            raise GateError(f"{self.finalist.name}: a controller from a file can only be judged in the sandbox")
        if not 0 < self.terms.alpha < 1:
            raise GateError(f"α is {self.terms.alpha:g}; it must be above 0 and below 1")
        if self.terms.beta not in self.betas:
            scored = ", ".join(map(str, self.betas))
            raise GateError(f"the deployed β {self.terms.beta:g} is not among the scored values {scored}")

    @property
    def advice(self) -> list[str]:
        """The findings of the static check on the finalist's source."""
        return advise(self.finalist.source) if self.finalist.source is not None else []

    def count_searched(self, questions: Sequence[str]) -> int | None:
        """Return how many of the questions the search for the finalist has seen; None if that is unknown."""
        return None if self.searched is None else self.searched.count(questions)

    def replay(self, source: RecordingSource, cells: Sequence[Cell], is_warning: bool = True) -> ScoreSet:
        """Return the scores of both. Raises GateError if the champion fails, and the errors of `Evaluation.run`.

        `is_warning`: whether problems with the recordings are logged.
        """
        measured = score_controllers(
            Evaluation(
                source,
                cells,
                [self.finalist, self.champion],
                sorted(set(self.betas)),
                self.shuffles,
                self.answers,
                self.rules,
                weights=DEFAULT_WEIGHTS,  # votes never decide a judgement
                is_warning=is_warning,
                is_read=isinstance(source, SelectedSource),
            ),
            self.engine,
        )
        if failed := [failure for score in measured.sides[1].scores for failure in score.failures]:
            failures = f"{len(failed)} episodes ({failed[0].message})"
            raise GateError(f"champion {self.champion.name} failed {failures}; cannot compare against it")
        return measured

    def judged_replay(
        self, source: RecordingSource, cells: Sequence[Cell], ledger: Ledger, questions: Sequence[str]
    ) -> ScoreSet:
        """Return the scores of both on questions of the sealed split. A disturbance is recorded in the ledger.

        Raises the errors of `replay`, and GateError if the machine disturbed it.
        """
        try:
            return self.replay(source, cells)
        except MachineDisturbed as error:
            with ledger.locked():
                before = ledger.disturbances(questions)
                ledger.append(
                    split=fingerprint(questions, (cell.model for cell in cells)),
                    questions=shorten_ids(questions),
                    digest=self.finalist.digest,
                    champion=self.champion.digest,
                    k=ledger.next_k(questions),
                    p=1.0,
                    verdict=DISTURBED,
                    created=self.now,
                    who=self.who,
                    report={DISTURBED: str(error)},
                    model=self.model,
                )
            spent = f"no judgement is spent, this was disturbance {before + 1} of {FREE_DISTURBANCES} free ones"
            if before >= FREE_DISTURBANCES:
                spent = f"one judgement is spent, because {before} on these questions were disturbed before"
            raise GateError(f"{self.finalist.name} could not be judged: {error}; {spent}; retry") from None

    def describe(self, report: GateReport, source: RecordingSource, cells: Sequence[Cell]) -> GateReport:
        """Return the report with the model that it was asked for, and what the choice of `cells` leaves out.

        A report of the ledger on the same questions and models may have been asked for in other words.
        """
        splits, models = {cell.split for cell in cells}, {cell.model for cell in cells}
        recorded = [cell for cell in source.cells() if cell.split in splits]
        benchmarks = {cell.benchmark for cell in recorded if cell.model in models}
        return replace(
            report,
            model=self.model,
            models_left_out=sorted({cell.model for cell in recorded} - models),
            benchmarks_left_out=sorted(benchmarks - {cell.benchmark for cell in cells}),
        )

    def record(self, ledger: Ledger, report: GateReport, questions: Sequence[str], sequence: str = "") -> None:
        """Append a judgement to the ledger, which must be locked."""
        ledger.append(
            split=report.split,
            questions=shorten_ids(questions),
            digest=self.finalist.digest,
            champion=self.champion.digest,
            k=report.k,
            p=report.p,
            verdict=str(report.verdict),
            created=self.now,
            who=self.who,
            report=report.as_json(),
            model=self.model,
            sequence=sequence,
        )
