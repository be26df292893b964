"""Gate: compare a finalist with the champion on the sealed split.

Only this module opens the sealed split, in a process that no explorer shares (`python -m discovery.promotion.gate`).
The outcome is written to the ledger before anyone sees it, because every judgement spends part of the split's error
rate, even if its result is never read.
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
    judge,
    report_of,
)

BAD_INPUT = 2
"""Exit status if nothing could be judged."""


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
    """Judge a finalist. A judgement on the same split against the same champion is returned from the ledger.

    Raises GateError if the finalist cannot be judged, and the errors of `Evaluation.run`. Nothing has been spent then,
    except that a disturbed judgement counts once more than `FREE_DISTURBANCES` occurred on these questions.
    """
    _check(finalist, champion, rules, betas, terms)
    betas = sorted(set(betas))
    ledger = Ledger(ledger_path)
    questions = sorted({one.question for cell in cells for one in source.load(cell)})
    split = fingerprint(questions, (cell.model for cell in cells))
    if recorded := _recorded(ledger, split, finalist, champion):
        return recorded
    evaluation = Evaluation(
        source, cells, [finalist, champion], betas, shuffles, answers, rules, weights=DEFAULT_WEIGHTS
    )
    try:
        measured = score_controllers(evaluation, engine)  # votes never decide a judgement
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
        spent = f"no judgement is spent, this was disturbance {before + 1} of {FREE_DISTURBANCES} free ones"
        if before >= FREE_DISTURBANCES:
            spent = f"one judgement is spent, because {before} on these questions were disturbed before"
        raise GateError(f"{finalist.name} could not be judged: {error}; {spent}; retry") from None
    if failed := [failure for score in measured.sides[1].scores for failure in score.failures]:
        failures = f"{len(failed)} episodes ({failed[0].message})"
        raise GateError(f"champion {champion.name} failed {failures}; cannot compare against it")
    advice = advise(finalist.source) if finalist.source is not None else []
    with ledger.locked():
        if recorded := _recorded(ledger, split, finalist, champion):  # another process has judged it meanwhile
            return recorded
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
        raise GateError(f"finalist {finalist.name} is identical to the champion; nothing to compare")
    if finalist.is_foreign and not rules.seal(finalist):
        raise GateError(f"{finalist.name}: a controller from a file can only be judged in the sandbox")
    if not 0 < terms.alpha < 1:
        raise GateError(f"α is {terms.alpha:g}; it must be above 0 and below 1")
    if terms.beta not in betas:
        raise GateError(f"the deployed β {terms.beta:g} is not among the scored values {', '.join(map(str, betas))}")


def _recorded(ledger: Ledger, split: str, finalist: Spec, champion: Spec) -> GateReport | None:
    judgement = ledger.find(split, finalist.digest, champion.digest)
    try:
        return None if judgement is None else report_of(judgement.report)
    except ValueError as error:
        raise GateError(f"the ledger's report on {finalist.name} is not valid: {error}") from None


@dataclass(frozen=True)
class GateJob:
    """Input of `python -m discovery.promotion.gate`; each field is a command-line option."""

    finalist: str  # NAME, NAME@N or FILE.py
    champion: str
    recordings: Path
    ledger: Path
    report: Path  # file to write the report to
    created: str  # ISO 8601 time
    who: str  # user name for the ledger
    split: Split = Split.HELD_OUT
    models: str = ""  # comma-separated; empty means all
    benchmarks: str = ""
    betas: str = "0,0.25,0.5,0.75,1"
    shuffles: int = 100
    answers: AnswerComparison = AnswerComparison.AUTO
    max_branches: int = 64
    engine: EngineName = EngineName.PROCESS
    workers: int = 0  # 0 means one per core
    alpha: float = GateTerms.alpha
    beta: float = GateTerms.beta
    margin: float = GateTerms.margin
    slowdown: float = GateTerms.slowdown

    @property
    def options(self) -> list[str]:
        """The job as command-line options."""
        return [f"--{name.replace('_', '-')}={value}" for name, value in asdict(self).items()]

    def run(self) -> GateReport:
        """Judge the finalist and write the report. Raises DiscoveryError or ControllersError."""
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


def _parse_job(given: Mapping[str, str]) -> GateJob:
    """Validate the options and return the job. Raises GateError."""
    try:
        return TypeAdapter(GateJob).validate_python(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        raise GateError(f"--{first['loc'][0]}: {first['msg']}") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job given on the command line. Errors are printed as one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m discovery.promotion.gate", description=__doc__)
    for field in fields(GateJob):
        parser.add_argument(f"--{field.name.replace('_', '-')}", default=argparse.SUPPRESS)
    given = vars(parser.parse_args(arguments))
    try:
        _parse_job(given).run()
    except (DiscoveryError, ControllersError) as error:
        sys.stderr.write(" ".join(str(error).split()) + "\n")
        return BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
