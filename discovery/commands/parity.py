"""`autotts parity`: whether replay tells the truth about live."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from controllers.dial import parse_beta
from controllers.loading import parse_spec
from controllers.sandbox.frames import printable
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
from discovery.commands.console import names, wide_console
from discovery.commands.store import DEFAULT, Place
from discovery.data.atomic_files import atomic_write, check_writable_path
from discovery.errors import RecordingsNotFound
from discovery.evaluation.plot import PlotInterval, PlotRows, check_plot, draw_intervals
from discovery.store import Store

SHOWN: Final = 10
"""Disagreements that are shown of many."""
LONGEST: Final = 60
"""Characters of a round that are shown."""
FALSE: Final = 1
"""Exit status where replay does not tell the truth."""
UNCHECKED: Final = 3
"""Exit status where nobody can tell: there was nothing to check."""
COLOUR: Final = {ParityVerdict.AGREE: "green", ParityVerdict.DISAGREE: "red", ParityVerdict.TOO_LITTLE: "yellow"}


def comparing(
    place: Place = DEFAULT,
    controllers: Annotated[str, typer.Option(help="files of controllers that served: mine.py,other.py")] = "",
    controller: Annotated[str | None, typer.Option(help="only episodes of this one")] = None,
    beta: Annotated[str | None, typer.Option(help="only episodes at this β")] = None,
    shuffles: Annotated[int, typer.Option(min=1, max=1000, help="branch orders a recording is replayed in")] = 20,
    json_to: Annotated[str | None, typer.Option("--json", metavar="FILE|-", help="where figures go as JSON")] = None,
    plot: Annotated[Path | None, typer.Option(help="where the picture of means goes (.png or .svg)")] = None,
) -> None:
    """Hold served episodes against replay; exit status 1 if it does not tell the truth about them, 3 if none can be."""
    given = [parse_spec(text) for text in names(controllers)]
    dial = None if beta is None else parse_beta(beta, "--beta")
    if plot is not None:
        check_plot(plot)
    if json_to not in (None, "-"):
        check_writable_path(Path(json_to), "--json")
    found = _of(place, asyncio.run(_records(place)), controller, dial)
    with Console(stderr=True).status("asking again, and replaying…"):
        held = check_parity(found, given, shuffles)
    figures = json.dumps(held.as_json(), indent=2) + "\n"
    if json_to == "-":
        sys.stdout.write(figures)
    else:
        _show(held)
    if json_to not in (None, "-"):
        with atomic_write(Path(json_to), private=True) as file:  # it holds answers
            file.write(figures.encode())
    if plot is not None and held.groups:
        draw_intervals(_panels(held.groups), plot)
    if not held.holds:
        raise typer.Exit(FALSE if held.checked else UNCHECKED)


async def _records(place: Path) -> ServedRecords:
    async with Store.open(place) as store:
        return await load_records(store)


def _of(place: Path, found: ServedRecords, controller: str | None, beta: float | None) -> ServedRecords:
    """Those of one controller at one β, if they are given. Raises RecordingsNotFound if there are none."""
    if not found.episodes:
        raise RecordingsNotFound(
            f"{place}: no served request is recorded there; `autotts serve --store {place}` records them"
        )
    chosen = [
        one
        for one in found.episodes
        if (controller is None or one.controller == controller) and (beta is None or one.beta == beta)
    ]
    if not chosen:
        there = sorted({f"{one.controller} at {one.beta:g}" for one in found.episodes})
        raise RecordingsNotFound(f"{place}: no episodes of that controller and β; there are {', '.join(there)}")
    return replace(found, episodes=chosen)


# For people


def _show(held: ParityReport) -> None:
    console = wide_console()
    _show_decisions(console, held.decisions)
    _show_reproduced(console, held.reproduced)
    if not held.groups:
        words = "means: nothing to compare; no branches of served requests were run to their ends"
        _say(console, f"{words} (AUTOTTS_RECORD_FRACTION says of how many they are)", "yellow")
        return
    console.print(_means(held.groups))
    for group in held.groups:
        for words in _beside(group):
            _say(console, f"{group.controller}, β = {group.beta:g}, {group.model}: {words}")


def _say(console: Console, words: str, style: str = "") -> None:
    console.print(Text(printable(words)), style=style, soft_wrap=True)


def _show_decisions(console: Console, found: DecisionReport) -> None:
    words = f"decisions: {found.agreed:,} of {found.rounds:,} rounds of {found.episodes:,} episodes are decided alike"
    if found.unreached:
        words += f"; {found.unreached:,} more follow one that is not"
    _say(console, words, _colour(found.agreed == found.rounds and found.rounds > 0))
    for one in found.unchecked:
        where = f"not asked again: {one.controller} ({one.digest[:12]}), {one.episodes:,} episodes"
        _say(console, f"{where}: {one.why}", "yellow")
    if found.disagreements:
        table = _table("decided otherwise", found.disagreements, ("request", "round", "asked for now", "played then"))
        for request, number, asked, played in found.disagreements[:SHOWN]:
            _row(table, request, str(number), _clipped(asked), _clipped(played))
        console.print(table)


def _show_reproduced(console: Console, found: ReproductionReport) -> None:
    alike = found.episodes - len(found.differing)
    words = f"reproduced: {alike:,} of {found.episodes:,} recorded episodes, in their own order, to token and answer"
    _say(console, words, _colour(not found.differing) if found.episodes else "yellow")
    if found.differing:
        headings = ("request", "tokens live", "replayed", "answer live", "replayed")
        table = _table("not reproduced", found.differing, headings)
        for request, spent, replayed, *answers in found.differing[:SHOWN]:
            tokens = "?" if spent is None else f"{spent:,}", f"{replayed:,}"
            _row(table, request, *tokens, *("none" if one is None else _clipped(one) for one in answers))
        console.print(table)


def _means(groups: Sequence[ParityGroup]) -> Table:
    table = Table(title="means, 95 % intervals over questions, each of which counts once", title_justify="left")
    words = ("controller", "model", "", "verdict")
    for heading in (words[0], "β", *words[1:3], "live", "replayed", "live - replayed", "questions", words[3]):
        table.add_column(heading, justify="left" if heading in words else "right")
    for group in groups:
        figures: list[tuple[str, LiveReplayComparison | None, str]] = [
            ("tokens", group.tokens, ",.0f"),
            ("accuracy %", group.accuracy, ".1f"),
        ]
        for name, figure, form in figures:
            about = group.controller, f"{group.beta:g}", group.model, name
            if figure is None:
                _row(table, *about, "", "", "", "", "no right answers known")
                continue
            live, replayed, paired, verdict = figure.live, figure.replayed, figure.paired, figure.verdict
            spans = _span(live, form), _span(replayed, form), _span(paired, f"+{form}")
            _row(table, *about, *spans, f"{live.questions} / {paired.questions}", str(verdict), style=COLOUR[verdict])
    return table


def _beside(group: ParityGroup) -> list[str]:
    """What a reader of its means should know besides."""
    words = [
        f"{group.episodes:,} episodes, {group.recorded:,} recorded, ended {_counts(group.stops)}; replay does not see "
        f"{group.finalise:,.0f} tokens an episode for closing replies, and {group.aborted:,.0f} aborted"
    ]
    if group.labels:
        words.append(f"right answers known by {_counts(group.labels)}")
    if group.left_out:
        words.append(f"left out as no measure of it: {_counts(group.left_out)}")
    if group.exhausted:
        words.append(
            f"{100 * group.exhausted:.0f} % of replays opened all that was recorded where live would have allowed "
            "more: they may spend less than live; AUTOTTS_RECORD_BRANCHES has more recorded"
        )
    if ParityVerdict.TOO_LITTLE in (group.tokens.verdict, group.accuracy and group.accuracy.verdict):
        words.append("too few recorded questions to say anything of means")
    return words


def _counts(counted: Mapping[str, int]) -> str:
    return ", ".join(f"{what} {count:,}" for what, count in counted.items())


def _span(mean: MeanInterval, form: str) -> str:
    interval = "" if mean.low is None or mean.high is None else f" [{mean.low:{form}}, {mean.high:{form}}]"
    return f"{mean.mean:{form}}{interval}"


def _colour(is_well: bool) -> str:
    return "green" if is_well else "red"


def _clipped(words: str) -> str:
    return words if len(words) <= LONGEST else f"{words[: LONGEST - 1]}…"


def _table(title: str, rows: Sequence[object], headings: Sequence[str]) -> Table:
    more = "" if len(rows) <= SHOWN else f", the first {SHOWN} of {len(rows):,}"
    table = Table(title=title + more, title_justify="left")
    for heading in headings:
        table.add_column(heading)
    return table


def _row(table: Table, *cells: str, style: str = "") -> None:
    table.add_row(*(Text(printable(cell)) for cell in cells), style=style)


def _panels(groups: Sequence[ParityGroup]) -> dict[str, PlotRows]:
    """Tokens in one panel, accuracy in another; a row a group."""
    panels: dict[str, dict[str, dict[str, PlotInterval]]] = {}
    for group in groups:
        for title, figure in (("tokens a question", group.tokens), ("accuracy, %", group.accuracy)):
            if figure is not None:
                row = {
                    name: PlotInterval(*mean[:3])
                    for name, mean in (("live", figure.live), ("replayed", figure.replayed))
                }
                panels.setdefault(title, {})[f"{group.controller}, β = {group.beta:g}\n{group.model}"] = row
    return {title: dict(rows) for title, rows in panels.items()}
