"""Gate: compare a finalist with the champion on the sealed split.

Only this module opens the sealed split, in a process that no explorer shares (`python -m discovery.promotion.gate`).
The outcome is written to the ledger before anyone sees it, because every judgement spends part of the split's error
rate, even if its result is never read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, TypeAdapter, ValidationError

from controllers.dial import parse_beta
from controllers.errors import ControllersError
from controllers.loading import parse_spec
from discovery.data.atomic_files import check_output
from discovery.data.recordings import Cell, Split
from discovery.errors import DiscoveryError, GateError, problem_text
from discovery.evaluation.engines import EngineName, make_engine
from discovery.evaluation.evaluate import AnswerComparison
from discovery.evaluation.replay_jobs import ReplayRules
from discovery.evaluation.sources import RecordingSource, open_source, select_cells
from discovery.promotion.comparison import Comparison
from discovery.promotion.conditions import GateTerms, check_held_out
from discovery.promotion.ledger import Ledger, check_ledger, fingerprint
from discovery.promotion.power_plan import PlannedOrders, PowerPlan, make_plan
from discovery.promotion.searched_questions import check_not_card, searched_questions
from discovery.promotion.sequential_gate import run_sequential_gate
from discovery.promotion.verdict import REPORT_FILE, GateReport, JudgementContext, judge, report_of
from discovery.store import StorePlace, parse_place

BAD_INPUT = 2
"""Exit status if nothing could be judged."""


def run_gate(source: RecordingSource, cells: Sequence[Cell], comparison: Comparison, place: StorePlace) -> GateReport:
    """Judge a finalist. A judgement on the same split against the same champion is returned from the ledger.

    If the finalist is for one model only, `cells` are that model's. A report of the ledger is returned for the model
    that is asked for now.
    Raises GateError if the finalist cannot be judged, and the errors of `Evaluation.run`. Nothing has been spent then,
    except that a disturbed judgement counts once more than `FREE_DISTURBANCES` occurred on these questions.
    """
    comparison.check()
    ledger = Ledger(place)
    questions = sorted({one.question for cell in cells for one in source.load(cell)})
    split = fingerprint(questions, (cell.model for cell in cells))
    searched = comparison.count_searched(questions)
    unseen = check_held_out(cells, searched)
    if recorded := _recorded(ledger, split, comparison):
        return comparison.describe(recorded, source, cells).narrowed(unseen)
    measured = comparison.judged_replay(source, cells, ledger, questions)
    context = (comparison.advice, split, comparison.now, comparison.who, comparison.model, searched)
    with ledger.locked():
        if recorded := _recorded(ledger, split, comparison):  # another process has judged it meanwhile
            return comparison.describe(recorded, source, cells).narrowed(unseen)
        judged = judge(measured, comparison.terms, JudgementContext(ledger.next_k(questions), *context))
        report = replace(judged, probe_tokens=comparison.rules.probe_tokens)
        report = comparison.describe(report, source, cells)
        comparison.record(ledger, report, questions)
    return report


def _recorded(ledger: Ledger, split: str, comparison: Comparison) -> GateReport | None:
    finalist = comparison.finalist
    judgement = ledger.find(split, finalist.digest, comparison.champion.digest)
    try:
        return None if judgement is None else report_of(judgement.report)
    except ValueError as error:
        raise GateError(f"the ledger's report on {finalist.name} is not valid: {error}") from None


@dataclass(frozen=True)
class GateJob:
    """Input of `python -m discovery.promotion.gate`; each field is a command-line option."""

    finalist: str  # NAME, NAME@N or FILE.py
    champion: str
    recordings: Annotated[StorePlace, BeforeValidator(parse_place)]
    ledger: Annotated[StorePlace, BeforeValidator(parse_place)]
    report: Path  # file to write the report to
    created: str  # ISO 8601 time
    who: str  # user name for the ledger
    split: Split = Split.HELD_OUT
    model: str = ""  # the one model that the finalist is for; empty means all of `models`
    models: str = ""  # comma-separated; empty means all
    benchmarks: str = ""
    betas: str = "0,0.25,0.5,0.75,1"
    shuffles: int = 100
    answers: AnswerComparison = AnswerComparison.AUTO
    probe_tokens: int | None = None  # tokens charged per probe; None: as recorded
    max_branches: int = 64
    engine: EngineName = EngineName.PROCESS
    workers: int = 0  # 0 means one per core
    address: str = ""  # of a Ray cluster, for `engine` ray; empty means a local one
    alpha: float = GateTerms.alpha
    beta: float = GateTerms.beta
    margin: float = GateTerms.margin
    slowdown: float = GateTerms.slowdown
    sequential: bool = False  # a look of a sequential judgement, which goes on as questions are added
    gain: float = GateTerms.gain
    power: float = GateTerms.power
    bound: float = GateTerms.bound

    @property
    def options(self) -> list[str]:
        """The job as command-line options."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        return [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]

    def run(self) -> GateReport:
        """Judge the finalist and write the report. Raises DiscoveryError or ControllersError."""
        check_not_card(self.report, (self.finalist, self.champion))
        check_output(self.report, "--report", REPORT_FILE)
        check_ledger(self.ledger)
        source = open_source(self.recordings)
        run = run_sequential_gate if self.sequential else run_gate
        report = run(source, self._select(source, self.split), self._comparison, self.ledger)
        report.write(self.report)
        return report

    def plan(self, ledger: Ledger | None, orders: PlannedOrders) -> PowerPlan:
        """Plan a judgement from the other splits; held-out questions are not read. Raises the errors of `run`."""
        source = open_source(self.recordings)
        return make_plan(self._comparison, source, self._select(source, None), ledger, orders)

    @property
    def _comparison(self) -> Comparison:
        return Comparison(
            parse_spec(self.finalist),
            parse_spec(self.champion),
            make_engine(self.engine, self.workers or None, self.address or None),
            ReplayRules(self.max_branches, self.probe_tokens),
            [parse_beta(text, "--betas") for text in _parts(self.betas)],
            self.shuffles,
            self.created,
            self.who,
            self._terms,
            self.answers,
            self.model,
            searched_questions(self.finalist),
        )

    @property
    def _terms(self) -> GateTerms:
        return GateTerms(
            self.alpha,
            self.beta,
            self.margin,
            slowdown=self.slowdown,
            power=self.power,
            gain=self.gain,
            bound=self.bound,
        )

    def _select(self, source: RecordingSource, split: Split | None) -> list[Cell]:
        """Return the cells of the chosen models and benchmarks."""
        models = [self.model] if self.model else _parts(self.models)
        return select_cells(source.cells(), models, _parts(self.benchmarks), split)


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _parse_job(given: Mapping[str, str]) -> GateJob:
    """Validate the options and return the job. Raises GateError."""
    try:
        return TypeAdapter(GateJob).validate_python(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        raise GateError(f"--{first['loc'][0]}: {problem_text(first)}") from None


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
