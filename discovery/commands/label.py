"""`autotts label`: set the correct answers of a store's questions, and report how far their sources agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from discovery.commands.console import wide_console
from discovery.commands.options import DEFAULT_STORE, JsonTarget, Place, check_json_target, output_figures
from discovery.commands.store import with_store
from discovery.data.atomic_files import json_object
from discovery.data.questions import read_questions
from discovery.data.recordings import LabelSource
from discovery.evaluation.answer_votes import MIN_BRANCHES, MIN_CALIBRATION_ANSWERS, MIN_MARGIN, Agreement
from discovery.evaluation.reference_answers import LabelReport, update_labels
from discovery.store import StorePlace


def label(
    place: Place = DEFAULT_STORE,
    references: Annotated[
        Path | None, typer.Option(help="file of JSON lines: a question and its reference answer")
    ] = None,
    min_margin: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="margin by which the leading answer must win a vote, as a share of the branches"
        ),
    ] = MIN_MARGIN,
    min_branches: Annotated[
        int, typer.Option(min=1, help="branches of one model that are needed for a vote")
    ] = MIN_BRANCHES,
    json_to: JsonTarget = None,
) -> None:
    """Label questions from references, feedback and votes, and report how far these agree."""
    check_json_target(json_to, json_object("JSON of `autotts label`", "written", "removed", "consensus"))
    questions = [] if references is None else read_questions(references)
    report = with_store(place, lambda store: update_labels(store, questions, min_margin, min_branches))
    figures = json.dumps(report.as_json(), indent=2) + "\n"
    output_figures(figures, json_to, lambda: _show(place, report))


def _show(place: StorePlace, report: LabelReport) -> None:
    console = wide_console()
    console.print(_sources(place, report))
    if any(agreement.of for _, _, agreement in report.by_margin):
        console.print(_margins(report))
    for remark in _remarks(report):
        console.print(remark, markup=False, highlight=False, soft_wrap=True)


def _sources(place: StorePlace, report: LabelReport) -> Table:
    table = Table(title=f"{place}: questions by source of their correct answers", title_justify="left")
    for heading in ("source", "questions", "labels written", "removed", "agrees with reference", "95 % interval"):
        table.add_column(heading, justify="left" if heading == "source" else "right")
    agreements = {LabelSource.FEEDBACK: report.feedback, LabelSource.CONSENSUS: report.consensus}
    for source in LabelSource:
        written, removed = report.written[source], report.removed[source]
        agreement = _agreement(agreements[source]) if source in agreements else ("", "")
        table.add_row(str(source), f"{report.effective[source]:,}", f"{written:,}", f"{removed:,}", *agreement)
    table.add_row("unknown", f"{report.effective[None]:,}", "", "", "", "")
    return table


def _margins(report: LabelReport) -> Table:
    table = Table(title="votes by margin", title_justify="left")
    for heading in ("margin", "agrees with reference", "95 % interval"):
        table.add_column(heading, justify="right")
    for low, high, agreement in report.by_margin:
        table.add_row(f"{low:.1f} to {high:.1f}", *_agreement(agreement))
    return table


def _agreement(agreement: Agreement) -> tuple[str, str]:
    """Return the count of agreements and its interval, as two table cells."""
    if agreement.interval is None:
        return "no references", ""
    low, high = agreement.interval
    return f"{agreement.right:,} of {agreement.of:,}", f"{low:.0f} to {high:.0f} %"


def _remarks(report: LabelReport) -> list[str]:
    """Return further remarks on the labels, one line each."""
    remarks = []
    if report.votes:
        basis = f"{report.calibrated:,} votes with a reference" if report.calibrated else "vote counts alone"
        remarks.append(
            f"consensus: of {report.votes:,} votes {report.close:,} are too close and {report.refuted:,} contradict "
            f"feedback; confidence is estimated from {basis}"
        )
    if report.unknown:
        remarks.append(f"references: {report.unknown:,} belong to questions that are not in the store")
    if report.contradicted:
        remarks.append(
            f"references: {report.contradicted:,} differ from the reference a question came with, which is kept"
        )
    if report.feedback.of >= MIN_CALIBRATION_ANSWERS:
        remarks.append(f"feedback: confidence is estimated from {report.feedback.of:,} questions with a reference")
    if report.unheard:
        remarks.append(f"feedback: for {report.unheard:,} requests it concerns no known answer")
    return remarks
