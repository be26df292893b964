"""`autotts label`: right answers of a store's questions, and how far their sources agree."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from discovery.commands.console import wide_console
from discovery.commands.store import DEFAULT, Place
from discovery.data.atomic_files import atomic_write, check_writable_path
from discovery.data.questions import Question, read_questions
from discovery.data.recordings import LabelSource
from discovery.evaluation.answer_votes import MIN_BRANCHES, MIN_CALIBRATION_ANSWERS, MIN_MARGIN, Agreement
from discovery.evaluation.reference_answers import LabelReport, update_labels
from discovery.store import Store


def label(
    place: Place = DEFAULT,
    references: Annotated[
        Path | None, typer.Option(help="file of one JSON object a line: a question and its reference")
    ] = None,
    min_margin: Annotated[
        float, typer.Option(min=0, max=1, help="share of its branches by which a vote's leader must be ahead")
    ] = MIN_MARGIN,
    min_branches: Annotated[int, typer.Option(min=1, help="branches of a model that make a vote")] = MIN_BRANCHES,
    json_to: Annotated[str | None, typer.Option("--json", metavar="FILE|-", help="where figures go as JSON")] = None,
) -> None:
    """Label questions by references, by feedback and by votes, and say how far these agree."""
    if json_to not in (None, "-"):
        check_writable_path(Path(json_to), "--json")
    given = [] if references is None else read_questions(references)
    found = asyncio.run(_fill(place, given, min_margin, min_branches))
    figures = json.dumps(found.as_json(), indent=2) + "\n"
    if json_to == "-":
        sys.stdout.write(figures)
    else:
        _show(place, found)
    if json_to not in (None, "-"):
        with atomic_write(Path(json_to)) as file:
            file.write(figures.encode())


async def _fill(place: Path, references: Sequence[Question], min_margin: float, min_branches: int) -> LabelReport:
    async with Store.open(place) as store:
        return await update_labels(store, references, min_margin, min_branches)


def _show(place: Path, found: LabelReport) -> None:
    console = wide_console()
    console.print(_sources(place, found))
    if any(agreement.of for _, _, agreement in found.by_margin):
        console.print(_margins(found))
    for words in _beside(found):
        console.print(words, markup=False, highlight=False, soft_wrap=True)


def _sources(place: Path, found: LabelReport) -> Table:
    table = Table(title=f"{place}: questions by how their right answers are known", title_justify="left")
    for heading in ("source", "questions", "labels written", "removed", "right by reference", "95 % interval"):
        table.add_column(heading, justify="left" if heading == "source" else "right")
    agreements = {LabelSource.FEEDBACK: found.feedback, LabelSource.CONSENSUS: found.consensus}
    for source in LabelSource:
        written, removed = found.written[source], found.removed[source]
        agreement = _agreement(agreements[source]) if source in agreements else ("", "")
        table.add_row(str(source), f"{found.effective[source]:,}", f"{written:,}", f"{removed:,}", *agreement)
    table.add_row("not known", f"{found.effective[None]:,}", "", "", "", "")
    return table


def _margins(found: LabelReport) -> Table:
    table = Table(title="votes by their margin", title_justify="left")
    for heading in ("margin", "right by reference", "95 % interval"):
        table.add_column(heading, justify="right")
    for low, high, agreement in found.by_margin:
        table.add_row(f"{low:.1f} to {high:.1f}", *_agreement(agreement))
    return table


def _agreement(found: Agreement) -> tuple[str, str]:
    """How often, and its interval."""
    if found.interval is None:
        return "none to compare", ""
    low, high = found.interval
    return f"{found.right:,} of {found.of:,}", f"{low:.0f} to {high:.0f} %"


def _beside(found: LabelReport) -> list[str]:
    """What else there is to tell."""
    told = []
    if found.votes:
        way = f"read off {found.calibrated:,} votes with a reference" if found.calibrated else "reckoned from counts"
        told.append(
            f"consensus: of {found.votes:,} votes {found.close:,} are too close and {found.refuted:,} refuted by "
            f"clients; confidence is {way}"
        )
    if found.unknown:
        told.append(f"references: {found.unknown:,} are of questions that are not in the store")
    if found.contradicted:
        told.append(f"references: {found.contradicted:,} are not what their questions came with, which stays")
    if found.feedback.of >= MIN_CALIBRATION_ANSWERS:
        told.append(f"feedback: confidence is read off {found.feedback.of:,} questions with a reference")
    if found.unheard:
        told.append(f"feedback: of {found.unheard:,} requests it bears on no answer that is known")
    return told
