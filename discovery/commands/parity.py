"""`autotts parity`: check that replay reproduces served episodes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.table import Table

from controllers.dial import parse_beta
from controllers.loading import parse_spec
from discovery.audit.decision_replay import DecisionReport
from discovery.audit.parity import ServedRecords, check_parity, load_records
from discovery.audit.parity_report import (
    LiveReplayComparison,
    MeanInterval,
    ParityGroup,
    ParityReport,
    ParityVerdict,
    ReproductionReport,
)
from discovery.commands.console import add_plain_row, print_plain, split_names, wide_console
from discovery.commands.options import DEFAULT_STORE, JsonTarget, Place, check_json_target, output_figures
from discovery.commands.store import with_store
from discovery.data.atomic_files import json_object
from discovery.data.recordings import LabelSource
from discovery.errors import RecordingsNotFound
from discovery.evaluation.evaluate import SELECTED_BY_OUTCOME, UNEVEN_FEEDBACK
from discovery.evaluation.plot import PlotInterval, PlotRows, check_plot, draw_intervals
from discovery.store import StorePlace

SHOWN: Final = 10
"""Maximum disagreements shown."""
LONGEST: Final = 60
"""Maximum characters shown of a round."""
DISAGREES: Final = 1
"""Exit status if replay disagrees with served episodes."""
UNCHECKED: Final = 3
"""Exit status if there was nothing to check."""
COLOUR: Final = {ParityVerdict.AGREE: "green", ParityVerdict.DISAGREE: "red", ParityVerdict.TOO_LITTLE: "yellow"}


def parity_command(
    place: Place = DEFAULT_STORE,
    controllers: Annotated[
        str, typer.Option(help="files of controllers that served requests, separated by commas: mine.py,other.py")
    ] = "",
    controller: Annotated[str | None, typer.Option(help="check only episodes of this controller")] = None,
    beta: Annotated[str | None, typer.Option(help="check only episodes at this β")] = None,
    shuffles: Annotated[int, typer.Option(min=1, max=1000, help="branch orders per recording")] = 20,
    json_to: JsonTarget = None,
    plot: Annotated[Path | None, typer.Option(help="file to write the plot of means to (.png or .svg)")] = None,
) -> None:
    """Compare served episodes with replay. Exit status 1 if they disagree, 3 if there is nothing to check."""
    specs = [parse_spec(text) for text in split_names(controllers)]
    beta_value = None if beta is None else parse_beta(beta, "--beta")
    if plot is not None:
        check_plot(plot)
    check_json_target(json_to, json_object("JSON of `autotts parity`", "decisions", "reproduced", "means"))
    served = _select(place, with_store(place, load_records), controller, beta_value)
    with Console(stderr=True).status("replaying decisions and episodes…"):
        report = check_parity(served, specs, shuffles)
    figures = json.dumps(report.as_json(), indent=2) + "\n"
    output_figures(figures, json_to, lambda: _show(report), private=True)  # the file contains answers
    if plot is not None and report.groups:
        draw_intervals(_panels(report.groups), plot)
    if not report.holds:
        raise typer.Exit(DISAGREES if report.checked else UNCHECKED)


def _select(place: StorePlace, served: ServedRecords, controller: str | None, beta: float | None) -> ServedRecords:
    """Select the episodes of one controller and one β, where given. Raises RecordingsNotFound if there are none."""
    if not served.episodes:
        raise RecordingsNotFound(
            f"{place}: the store holds no served requests; record them with `autotts serve --store {place}`"
        )
    chosen = [
        episode
        for episode in served.episodes
        if (controller is None or episode.controller == controller) and (beta is None or episode.beta == beta)
    ]
    if not chosen:
        available = sorted({f"{episode.controller} at {episode.beta:g}" for episode in served.episodes})
        raise RecordingsNotFound(f"{place}: no episodes of that controller and β; the store has {', '.join(available)}")
    return replace(served, episodes=chosen)


# Output


def _show(report: ParityReport) -> None:
    console = wide_console()
    _show_decisions(console, report.decisions)
    _show_reproduced(console, report.reproduced)
    if report.unrecorded:
        text = f"{report.unrecorded:,} sampled episodes are not recorded, or not yet; those recorded first need not be"
        print_plain(console, f"{text} typical, so check again later", "yellow")
    if not report.groups:
        text = "means: nothing to compare, because no branches of served requests were completed"
        print_plain(console, f"{text} (set AUTOTTS_RECORD_FRACTION to have some completed)", "yellow")
        return
    console.print(_means(report.groups))
    for group in report.groups:
        for text in _remarks(group):
            print_plain(console, f"{group.controller}, β = {group.beta:g}, {group.model}: {text}")


def _show_decisions(console: Console, report: DecisionReport) -> None:
    text = (
        f"decisions: {report.agreed:,} of {report.rounds:,} rounds of {report.episodes:,} episodes are decided the same"
    )
    if report.unreached:
        text += f"; {report.unreached:,} more follow a differing round"
    print_plain(console, text, _colour(report.agreed == report.rounds and report.rounds > 0))
    for controller in report.unchecked:
        label = f"not replayed: {controller.controller} ({controller.digest[:12]}), {controller.episodes:,} episodes"
        print_plain(console, f"{label}: {controller.why}", "yellow")
    if report.disagreements:
        table = _table("decisions that differ", report.disagreements, ("request", "round", "replayed", "served"))
        for request, number, replayed, served_actions in report.disagreements[:SHOWN]:
            add_plain_row(table, request, str(number), _clipped(replayed), _clipped(served_actions))
        console.print(table)


def _show_reproduced(console: Console, report: ReproductionReport) -> None:
    same = report.episodes - len(report.differing)
    text = (
        f"reproduced: {same:,} of {report.episodes:,} recorded episodes match in tokens and answer when replayed in "
        "their own branch order"
    )
    print_plain(console, text, _colour(not report.differing) if report.episodes else "yellow")
    if report.differing:
        headings = ("request", "live tokens", "replayed", "live answer", "replayed")
        table = _table("episodes that differ", report.differing, headings)
        for request, spent, replayed, *answers in report.differing[:SHOWN]:
            tokens = "?" if spent is None else f"{spent:,}", f"{replayed:,}"
            add_plain_row(
                table, request, *tokens, *("none" if answer is None else _clipped(answer) for answer in answers)
            )
        console.print(table)


def _means(groups: Sequence[ParityGroup]) -> Table:
    table = Table(title="means with 95 % intervals over questions, each counted once", title_justify="left")
    left_aligned = ("controller", "model", "", "verdict")
    for heading in ("controller", "β", "model", "", "live", "replayed", "live - replayed", "questions", "verdict"):
        table.add_column(heading, justify="left" if heading in left_aligned else "right")
    for group in groups:
        figures: list[tuple[str, LiveReplayComparison | None, str]] = [
            ("tokens", group.tokens, ",.0f"),
            ("accuracy %", group.accuracy, ".1f"),
        ]
        for name, figure, format_spec in figures:
            about = group.controller, f"{group.beta:g}", group.model, name
            if figure is None:
                add_plain_row(table, *about, "", "", "", "", _why_no_accuracy(group))
                continue
            live, replayed, paired, verdict = figure.live, figure.replayed, figure.paired, figure.verdict
            spans = _span(live, format_spec), _span(replayed, format_spec), _span(paired, f"+{format_spec}")
            add_plain_row(
                table, *about, *spans, f"{live.questions} / {paired.questions}", str(verdict), style=COLOUR[verdict]
            )
    return table


def _why_no_accuracy(group: ParityGroup) -> str:
    if group.judged_wrong:
        return f"{group.judged_wrong:,} episodes judged wrong have no right answer"
    return "no correct answers known"


def _remarks(group: ParityGroup) -> list[str]:
    """Return remarks on a group's means, one line each."""
    remarks = [
        f"{group.episodes:,} episodes, {group.recorded:,} recorded, ended by {_counts(group.stops)}; replay leaves out "
        f"{group.finalise:,.0f} tokens per episode for closing replies and {group.aborted:,.0f} aborted tokens"
    ]
    if group.labels:
        remarks.append(f"correct answers from {_counts(group.labels)}")
    if group.judged_wrong:
        remarks.append(f"{group.judged_wrong:,} episodes judged wrong have no right answer; {SELECTED_BY_OUTCOME}")
    elif LabelSource.FEEDBACK in group.labels:
        remarks.append(UNEVEN_FEEDBACK)
    elif group.accuracy is None:
        remarks.append("`autotts label` sets correct answers from references, feedback and votes; run it first")
    if group.left_out:
        remarks.append(f"episodes left out: {_counts(group.left_out)}")
    if group.exhausted:
        remarks.append(
            f"{100 * group.exhausted:.0f} % of replays opened every recorded branch where live would have allowed "
            "more, so they may spend less than live; record more with AUTOTTS_RECORD_BRANCHES"
        )
    if ParityVerdict.TOO_LITTLE in (group.tokens.verdict, group.accuracy and group.accuracy.verdict):
        remarks.append("too few recorded questions to compare means")
    return remarks


def _counts(counted: Mapping[str, int]) -> str:
    return ", ".join(f"{what} {count:,}" for what, count in counted.items())


def _span(mean: MeanInterval, format_spec: str) -> str:
    interval = (
        "" if mean.low is None or mean.high is None else f" [{mean.low:{format_spec}}, {mean.high:{format_spec}}]"
    )
    return f"{mean.mean:{format_spec}}{interval}"


def _colour(is_well: bool) -> str:
    return "green" if is_well else "red"


def _clipped(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _table(title: str, rows: Sequence[object], headings: Sequence[str]) -> Table:
    more = "" if len(rows) <= SHOWN else f", the first {SHOWN} of {len(rows):,}"
    table = Table(title=title + more, title_justify="left")
    for heading in headings:
        table.add_column(heading)
    return table


def _panels(groups: Sequence[ParityGroup]) -> dict[str, PlotRows]:
    """Return the plot's panels for tokens and accuracy, with one row per group."""
    panels: dict[str, dict[str, dict[str, PlotInterval]]] = {}
    for group in groups:
        for title, figure in (("tokens per question", group.tokens), ("accuracy, %", group.accuracy)):
            if figure is not None:
                row = {
                    name: PlotInterval(*mean[:3])
                    for name, mean in (("live", figure.live), ("replayed", figure.replayed))
                }
                panels.setdefault(title, {})[f"{group.controller}, β = {group.beta:g}\n{group.model}"] = row
    return {title: dict(rows) for title, rows in panels.items()}
