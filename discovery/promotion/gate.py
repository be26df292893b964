"""The gate: a finalist judged against the champion on the sealed split.

Only this module opens that split, in a process that no explorer shares (`python -m discovery.promotion.gate`). The
outcome is in the ledger before anyone sees it: a judgement costs the split something even if nobody reads it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from controllers.advice import advise
from controllers.dial import parse_beta
from controllers.errors import ControllersError, MachineDisturbed
from controllers.loading import Spec, parse_spec
from discovery.data.atomic_files import check_writable_path
from discovery.data.recordings import Cell, Split
from discovery.errors import DiscoveryError, GateError
from discovery.evaluation.engines import Engine, EngineName, make_engine
from discovery.evaluation.evaluate import DEFAULT_WEIGHTS, AnswerComparison, Evaluation
from discovery.evaluation.replay_jobs import ReplayRules
from discovery.evaluation.score_set import score_controllers
from discovery.evaluation.sources import RecordingSource, open_source, select_cells
from discovery.promotion.ledger import DISTURBED, FREE_DISTURBANCES, Ledger, fingerprint, shorten_ids
from discovery.promotion.verdict import (
    DEFAULT_TERMS,
    GateReport,
    GateTerms,
    JudgementContext,
    card_of,
    judge,
    report_of,
)

__all__ = ["GateJob", "GateReport", "GateTerms", "card_of", "run_gate"]

BAD_INPUT = 2
"""Exit status when nothing could be judged."""


def run_gate(
    source: RecordingSource,
    cells: Sequence[Cell],
    finalist: Spec,
    champion: Spec,
    ledger_path: Path,
    engine: Engine,
    rules: ReplayRules,
    betas: Sequence[float],
    shuffles: int,
    now: str,
    who: str,
    terms: GateTerms = DEFAULT_TERMS,
    answers: AnswerComparison = AnswerComparison.AUTO,
) -> GateReport:
    """Judge a finalist; what was judged before on the same split against the same champion is told again.

    Raises GateError if it cannot be judged so, and what `Evaluation.run` raises; then nothing has been spent. Nor has
    it where the machine disturbed the judgement, unless that has happened too often on these questions.
    """
    _check(finalist, champion, rules, betas, terms)
    betas = sorted(set(betas))
    ledger = Ledger(ledger_path)
    questions = sorted({one.question for cell in cells for one in source.load(cell)})
    split = fingerprint(questions, (cell.model for cell in cells))
    if told := _recorded(ledger, split, finalist, champion):
        return told
    evaluation = Evaluation(
        source, cells, [finalist, champion], betas, shuffles, answers, rules, weights=DEFAULT_WEIGHTS
    )
    try:
        measured = score_controllers(evaluation, engine)  # nobody is judged by a vote
    except MachineDisturbed as error:
        with ledger.locked():
            k, before = ledger.next_k(questions), ledger.disturbances(questions)
            ledger.append(
                split=split,
                questions=shorten_ids(questions),
                digest=finalist.digest,
                champion=champion.digest,
                k=k,
                p=1.0,
                verdict=DISTURBED,
                created=now,
                who=who,
                report={DISTURBED: str(error)},
            )
        spent = f"no look is spent, this was disturbance {before + 1} of the {FREE_DISTURBANCES} that are free"
        if before >= FREE_DISTURBANCES:
            spent = f"a look is spent, for {before} judgements on these questions were disturbed before"
        raise GateError(f"{finalist.name} could not be judged: {error}; {spent}; judge it again") from None
    if failed := [failure for score in measured.sides[1].scores for failure in score.failures]:
        raise GateError(f"the champion {champion.name} fails itself ({failed[0].message}); nothing is judged by it")
    advice = advise(finalist.source) if finalist.source is not None else []
    with ledger.locked():
        if told := _recorded(ledger, split, finalist, champion):  # another process was faster
            return told
        report = judge(measured, terms, JudgementContext(ledger.next_k(questions), advice, split, now, who))
        ledger.append(
            split=split,
            questions=shorten_ids(questions),
            digest=finalist.digest,
            champion=champion.digest,
            k=report.k,
            p=report.p,
            verdict=str(report.verdict),
            created=now,
            who=who,
            report=report.as_json(),
        )
    return report


def _check(finalist: Spec, champion: Spec, rules: ReplayRules, betas: Sequence[float], terms: GateTerms) -> None:
    if finalist.digest == champion.digest:
        raise GateError(f"{finalist.name} is the champion itself")
    if finalist.is_foreign and not rules.seal(finalist):
        raise GateError(f"{finalist.name}: a controller from a file is judged sealed or not at all")
    if not 0 < terms.alpha < 1:
        raise GateError(f"α is {terms.alpha:g}; what may be spent lies between 0 and 1")
    if terms.beta not in betas:
        raise GateError(f"the deployed β {terms.beta:g} is not among those scored: {', '.join(map(str, betas))}")


def _recorded(ledger: Ledger, split: str, finalist: Spec, champion: Spec) -> GateReport | None:
    found = ledger.find(split, finalist.digest, champion.digest)
    try:
        return None if found is None else report_of(found.report)
    except ValueError as error:
        raise GateError(f"the ledger's report on {finalist.name} is none: {error}") from None


@dataclass(frozen=True)
class GateJob:
    """What `python -m discovery.promotion.gate` is to do: an option a field, as text."""

    finalist: str  # NAME, NAME@N or FILE.py
    champion: str
    recordings: Path
    ledger: Path
    report: Path  # where the report goes
    created: str  # the time
    who: str  # asks for it
    split: Split = Split.HELD_OUT
    models: str = ""  # none means all
    benchmarks: str = ""
    betas: str = "0,0.25,0.5,0.75,1"
    shuffles: int = 100
    answers: AnswerComparison = AnswerComparison.AUTO
    max_branches: int = 64
    engine: EngineName = EngineName.PROCESS
    workers: int = 0  # 0 means as many as cores
    alpha: float = GateTerms.alpha
    beta: float = GateTerms.beta
    margin: float = GateTerms.margin
    slowdown: float = GateTerms.slowdown

    @property
    def options(self) -> list[str]:
        """It as command-line options."""
        return [f"--{name.replace('_', '-')}={value}" for name, value in asdict(self).items()]

    def run(self) -> GateReport:
        """Judge, and write the report. Raises DiscoveryError or ControllersError."""
        check_writable_path(self.report, "--report")
        check_writable_path(self.ledger, "--ledger")
        source = open_source(self.recordings)
        report = run_gate(
            source,
            select_cells(source.cells(), _parts(self.models), _parts(self.benchmarks), self.split),
            parse_spec(self.finalist),
            parse_spec(self.champion),
            self.ledger,
            make_engine(self.engine, self.workers or None),
            ReplayRules(self.max_branches),
            [parse_beta(text, "--betas") for text in _parts(self.betas)],
            self.shuffles,
            self.created,
            self.who,
            GateTerms(self.alpha, self.beta, self.margin, slowdown=self.slowdown),
            self.answers,
        )
        report.write(self.report)
        return report


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _ordered(given: Mapping[str, str]) -> GateJob:
    """The order as its options say. Raises GateError."""
    try:
        return TypeAdapter(GateJob).validate_python(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        raise GateError(f"--{first['loc'][0]}: {first['msg']}") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line orders. What went wrong is a line on standard error."""
    parser = argparse.ArgumentParser(prog="python -m discovery.promotion.gate", description=__doc__)
    for field in fields(GateJob):
        parser.add_argument(f"--{field.name.replace('_', '-')}", default=argparse.SUPPRESS)
    given = vars(parser.parse_args(arguments))
    try:
        _ordered(given).run()
    except (DiscoveryError, ControllersError) as error:
        sys.stderr.write(" ".join(str(error).split()) + "\n")
        return BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
